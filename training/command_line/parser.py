"""A parser that reports a mistake in one line and suggests the nearest option or value."""

import argparse
import difflib
import re
import sys
from collections.abc import Collection, Iterable, Sequence
from typing import Any, NoReturn

from training.command_line.types import shown
from training.errors import Refusal

DASHES = "-–—−"  # word processors replace the first by one of the others
NUMBER = re.compile(r"-(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$|-inf$|-nan$", re.IGNORECASE)  # negative numbers


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises Refusal with one line, and suggests the nearest option or choice.

    Unlike argparse, it accepts no abbreviations, even for options with a single dash. Negative numbers in any form are
    values. An option may be given twice only with the same value.
    """

    def __init__(self, **settings: Any):
        super().__init__(allow_abbrev=False, **settings)
        # argparse's own pattern takes -1e-3 and -inf for options
        self._negative_number_matcher = NUMBER
        for name in (None, "store"):
            self.register("action", name, _Store)
        self.register("action", "switch", _Switch)
        self.given: dict[str, Any] = {}  # the values on this command line

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> argparse.Namespace:
        words = sys.argv[1:] if args is None else list(args)
        before = words[: words.index("--")] if "--" in words else words
        if not {"-h", "--help"} & set(before):
            for word in before:
                self._check_option(word)
        self.given = {}
        parsed, surplus = self.parse_known_args(words, namespace)
        if surplus:
            options = [action for action in self._actions if action.option_strings and action.choices]
            meant = [f"{action.option_strings[0]} {surplus[0]}" for action in options if surplus[0] in action.choices]
            self.error(f"unrecognized arguments: {' '.join(surplus)}{_did_you_mean(meant)}")
        return parsed

    def _check_option(self, word: str) -> None:
        """Refuses an unknown option. Argparse would read -seed 3 as -s eed."""
        name, known = word.partition("=")[0], self._option_string_actions
        if len(word) < 2 or word[0] not in DASHES or " " in word or NUMBER.match(word) or name in known:
            return
        near = nearest(name, known)
        if word[0] != "-" and not near:
            return
        attached, same = known.get(word[:2]), bare(name) in map(bare, near)
        if attached and attached.nargs != 0 and not same and _accepts(attached, word[2:]):
            return
        meant = dict.fromkeys("/".join(known[option].option_strings) for option in near)
        self.error(f"unrecognized option {name}{_did_you_mean(meant)}")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            choices = [str(choice) for choice in action.choices]
            meant = _did_you_mean(nearest(str(value), choices))
            raise argparse.ArgumentError(action, f"must be {either(choices)}, not {shown(str(value))}{meant}")

    def error(self, message: str) -> NoReturn:  # one line instead of the usage and a line
        raise Refusal(f"{message.replace('expected one argument', 'needs a value')} (see --help)")


class _Store(argparse.Action):
    """Stores a value, as argparse does; refuses another value for the same option."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        if option_string is not None:
            _check_once(parser, self, values)
        setattr(namespace, self.dest, values)


class _Switch(argparse.BooleanOptionalAction):
    """An option that --no-... turns off; refuses both forms on one command line."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        super().__call__(parser, namespace, values, option_string)
        _check_once(parser, self, option_string)


def _check_once(parser: Parser, action: argparse.Action, value: Any) -> None:
    first = parser.given.setdefault(action.dest, value)
    if first != value:
        raise argparse.ArgumentError(action, f"given twice, as {first} and as {value}")


def _accepts(action: argparse.Action, text: str) -> bool:
    """Whether the text attached to an option can be its value. A number always can, even if it is out of range."""
    if re.match(r"[-+.]?\d", text):
        return True
    try:
        value = (action.type or str)(text)
    except (argparse.ArgumentTypeError, TypeError, ValueError):
        return False
    return action.choices is None or value in action.choices


def bare(word: str) -> str:
    """Normalises a word for comparison: no leading dashes, lower case, - for _."""
    return word.lstrip(DASHES).lower().replace("_", "-")


def nearest(word: str, words: Iterable[str]) -> list[str]:
    """Finds the ``words`` that a mistyped one may mean.

    They are equal but for dashes and case, or else begin with it, or else are the most similar. Equally near words are
    all returned; the list is empty if none is near.
    """
    words, typed = list(words), bare(word)
    same = [right for right in words if bare(right) == typed]
    longer = [right for right in words if typed and bare(right).startswith(typed)]
    if same or 0 < len(longer) <= 3:
        return same or longer
    alike = {right: difflib.SequenceMatcher(None, typed, bare(right)).ratio() for right in words}
    best = max(0.7, *alike.values()) if alike else 1.0
    return [right for right in words if alike[right] == best]


def either(words: Iterable[str]) -> str:
    """Joins words as in "a, b or c"."""
    *others, last = words
    return f"{', '.join(others)} or {last}" if others else last


def _did_you_mean(words: Collection[str]) -> str:
    return f"; did you mean {either(words)}?" if words else ""
