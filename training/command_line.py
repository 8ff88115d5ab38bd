"""What all command lines share: a failure is one line, and a mistyped option or value names the nearest right one."""

import argparse
import contextlib
import difflib
import functools
import io
import math
import os
import re
import shlex
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from training import files
from training.defaults import torch_defaults
from training.divergence import DivergedError
from training.interrupt import Interrupted

LARGEST = 2**63 - 1  # of whole numbers: what a tensor can hold
DASHES = "-–—−"  # what a word processor makes of the first of them
NUMBER = re.compile(r"-(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$|-inf$|-nan$", re.IGNORECASE)  # a negative one


class Refusal(Exception):
    """Something the user asked for that is not accepted; its text is the one line to print."""


# -- failures --------------------------------------------------------------------------------------------


def command(main: Callable[..., int]) -> Callable[..., int]:
    """Decorates a script's main: a failure becomes one line, with status 2 when the user can fix it.

    A :class:`Refusal` gives status 2; a run that diverges, too little memory or an error of the operating
    system 1; a signal that stops a run 128 and its number. A UserWarning becomes one line too.
    """

    @functools.wraps(main)
    def wrapped(*args: Any) -> int:
        if isinstance(sys.stdout, io.TextIOWrapper):  # a console without µ or – shows ?
            sys.stdout.reconfigure(errors="replace")
        try:
            with torch_defaults(), _warnings_in_one_line():
                return main(*args)
        except Refusal as refusal:
            return _fail(str(refusal), 2)
        except DivergedError as error:
            return _fail(str(error), 1)
        except FileNotFoundError as error:  # perhaps what was saved before is what was not found
            return _fail(str(error), 1)
        except OSError as error:
            return _fail(f"{error}; what was saved before is unchanged", 1)
        except Interrupted as stop:
            name = signal.Signals(stop.number).name
            print(f"Stopped by {name} {stop}, and saved. To go on: {shlex.join(['python', *sys.argv])}", flush=True)
            return 128 + stop.number
        except KeyboardInterrupt:
            return _fail("interrupted; what was saved before is unchanged", 130)
        except (MemoryError, RuntimeError) as error:
            line = _explained(error)
            if line is None:
                raise
            return _fail(line, 2 if "--deterministic" in line else 1)

    return wrapped


def _explained(error: Exception) -> str | None:
    """The line for an error of torch that is not a fault of the program; None for all others."""
    text = str(error)
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in text:
        return f"out of memory ({text.splitlines()[0] if text else 'no more is known'}); a smaller -b or -T takes less"
    if operation := re.match(r"(\S+) does not have a deterministic implementation", text):
        return f"argument --deterministic: {operation[1]} has no deterministic implementation on this device"
    if "without overflow" in text:  # Adam's plain step; the fused one goes on with infinity, which is found
        return "a step is too large for float32: -lr is too large; what was saved before is unchanged"
    return None


@contextlib.contextmanager
def _warnings_in_one_line() -> Iterator[None]:
    """Prints a UserWarning without the line of code that gives it; other categories stay as they are."""
    usual = warnings.formatwarning

    def one_line(message: Warning | str, category: type[Warning], *place: Any) -> str:
        if category is not UserWarning:
            return usual(message, category, *place)
        return f"{Path(sys.argv[0]).name}: warning: {' '.join(str(message).split())}\n"

    warnings.formatwarning = one_line
    try:
        yield
    finally:
        warnings.formatwarning = usual


def _fail(message: str, status: int) -> int:
    script = Path(sys.argv[0])
    name = script.parent.name if script.name == "__main__.py" else script.name
    print(f"{name}: error: {' '.join(message.split())}", file=sys.stderr)
    return status


# -- the parser ------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that refuses in one line, by Refusal, and suggests the nearest right option or choice.

    Unlike argparse's own, it accepts no abbreviations, even of options with a single dash. It takes negative numbers
    in any form as values, and an option that is given twice must have the same value.
    """

    def __init__(self, **settings: Any):
        super().__init__(allow_abbrev=False, **settings)
        # argparse's own pattern takes -1e-3 and -inf for options, not for values that can be explained
        self._negative_number_matcher = NUMBER
        for name in (None, "store"):
            self.register("action", name, _Store)
        self.register("action", "switch", _Switch)
        self.given: dict[str, Any] = {}  # on this command line

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> argparse.Namespace:
        words = sys.argv[1:] if args is None else list(args)
        options = words[: words.index("--")] if "--" in words else words
        if not {"-h", "--help"} & set(options):
            for word in options:
                self._check_option(word)
        self.given = {}
        parsed, surplus = self.parse_known_args(words, namespace)
        if surplus:
            self._refuse_surplus(surplus)
        return parsed

    def _check_option(self, word: str) -> None:
        """Refuses a word that looks like an option but is not one; argparse would read -seed 3 as -s eed."""
        name, known = word.partition("=")[0], self._option_string_actions
        if len(word) < 2 or word[0] not in DASHES or " " in word or NUMBER.match(word) or name in known:
            return
        near = nearest(name, known)
        if word[0] != "-" and not near:
            return
        attached = known.get(word[:2])
        same = bare(name) in map(bare, near)
        if attached and attached.nargs != 0 and not same and _accepts(attached, word[2:]):
            return
        meant = dict.fromkeys("/".join(known[option].option_strings) for option in near)
        self.error(f"unrecognized option {name}{_did_you_mean(meant)}")

    def _refuse_surplus(self, words: Sequence[str]) -> NoReturn:
        options = [action for action in self._actions if action.option_strings and action.choices]
        meant = [f"{action.option_strings[0]} {words[0]}" for action in options if words[0] in action.choices]
        self.error(f"unrecognized arguments: {' '.join(words)}{_did_you_mean(meant)}")

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
    """An option that --no-... turns off; refuses both on one command line."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        super().__call__(parser, namespace, values, option_string)
        _check_once(parser, self, option_string)


def _check_once(parser: Parser, action: argparse.Action, value: Any) -> None:
    first = parser.given.setdefault(action.dest, value)
    if first != value:
        raise argparse.ArgumentError(action, f"given twice, as {first} and as {value}")


def _accepts(action: argparse.Action, text: str) -> bool:
    """Whether a text that is attached to an option is its value; a number is, even one that the option refuses."""
    if re.match(r"[-+.]?\d", text):
        return True
    try:
        value = (action.type or str)(text)
    except (argparse.ArgumentTypeError, TypeError, ValueError):
        return False
    return action.choices is None or value in action.choices


def bare(word: str) -> str:
    """A word without what is mistaken most easily: dashes before it, the case of its letters, _ for -."""
    return word.lstrip(DASHES).lower().replace("_", "-")


def nearest(word: str, words: Iterable[str]) -> list[str]:
    """Those of ``words`` that a mistyped one may mean: nearly the same, beginning with it, or else the most similar.

    Several if they are equally near; none if none is near.
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


def _did_you_mean(words: Iterable[str]) -> str:
    words = list(words)
    return f"; did you mean {either(words)}?" if words else ""


# -- types of options ------------------------------------------------------------------------------------


def whole_number(least: int, most: int = LARGEST) -> Callable[[str], int]:
    """The type of an option that takes a whole number in [least, most]."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:  # not a number, or one of thousands of digits
            value = None
        if value is None or not least <= value <= most:
            from_least = f">= {least}" if value is None or value < least else "below 2^63"
            accepted = from_least if most == LARGEST else f"from {least} to {most}"
            raise argparse.ArgumentTypeError(f"must be a whole number {accepted}, not {shown(text)}")
        return value

    return parse


def number(accepted: str, condition: Callable[[float], bool], share: bool = False) -> Callable[[str], float]:
    """The type of an option that takes a finite number that a condition accepts; ``accepted`` says which, in words.

    A number that was meant in percent is explained where the option takes a ``share``, and a decimal comma everywhere.
    """

    def parse(text: str) -> float:
        value = _float(text)
        if not math.isfinite(value) or not condition(value):
            percent = _float(text.strip().removesuffix("%"))
            hint = ""
            if share and 0 <= percent <= 100 and (percent > 1 or "%" in text):
                hint = f"; {percent:g} % is {percent / 100:.12g}"
            elif math.isfinite(value := _float(text.replace(",", "."))) and condition(value):
                hint = f"; did you mean {text.replace(',', '.')}?"
            raise argparse.ArgumentTypeError(f"must be a finite number {accepted}, not {shown(text)}{hint}")
        return value

    return parse


def _float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def shown(text: str) -> str:
    """What was typed, in quotes, cut short where it is long."""
    return repr(text if len(text) <= 40 else text[:40] + "…")


def _path_to(what: str) -> Callable[[str], Path]:
    def parse(text: str) -> Path:
        # bytes that are no UTF-8 are surrogates here; TensorBoard, for one, cannot write to such a path
        if not text.strip() or "\0" in text or re.search("[\ud800-\udfff]", text):
            raise argparse.ArgumentTypeError(f"must be the path of a {what}, in UTF-8, not {shown(text)}")
        try:
            return files.expanded(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parse


folder_path = _path_to("folder")  # the type of an option that takes a folder, which need not exist
file_path = _path_to("file")  # the type of an option that takes a file, which need not exist


def check_writable(option: str, folder: Path) -> None:
    """Makes the folder that an option names.

    Raises:
        Refusal: the folder cannot be made, or no file can be made in it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise Refusal(f"argument {option}: cannot write to {folder}: {reason}") from None


def check_output(option: str, path: Path, parents: bool = False) -> None:
    """Raises Refusal unless the file that an option names can be written; for use before a long computation."""
    try:
        files.check_replacing(path, parents)
    except OSError as error:
        raise Refusal(f"argument {option}: cannot write {path}: {error.strerror}") from None


@contextlib.contextmanager
def output_file(option: str, path: Path, parents: bool = False) -> Iterator[Path]:
    """:func:`training.files.replacing` for the file that an option names.

    Raises:
        Refusal: it cannot be written; nothing was computed for it yet.
    """
    with contextlib.ExitStack() as stack:
        try:
            temporary = stack.enter_context(files.replacing(path, parents=parents))
        except OSError as error:
            raise Refusal(f"argument {option}: cannot write {path}: {error.strerror}") from None
        yield temporary
