"""A grid: a TOML table of rows. Each row is a command line of an experiment's script."""

import shlex
import tomllib
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

from analysis.experiments import EXPERIMENTS
from training.command_line import either, format_number
from training.errors import Refusal
from training.methods import METHODS, Method
from training.methods.method import PENALTY
from training.naming import run_name
from training.options import REPOSITORY, read

FOLDER = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Row:
    """One run of the grid, up to a number of epochs."""

    experiment: str  # the name of the one whose script runs it
    heading: str  # of the grid's figures
    title: str  # of its group
    ablation: bool  # whether the group is one, not a method to compare
    argv: tuple[str, ...]  # what the script is given, but for the places (--dataset-dir, --dump-dir, -gpu)
    options: Namespace = field(compare=False, repr=False)  # what argv says

    @cached_property
    def name(self) -> str:
        """The run's name. Rows that differ only in the number of epochs share it."""
        return run_name(self.options)

    @property
    def epochs(self) -> int:
        return self.options.epoch

    @property
    def seed(self) -> int:
        return self.options.seed

    @property
    def method(self) -> Method:
        return METHODS[self.options.mode]

    @property
    def variant(self) -> str:
        """The options of its method that have a value, and the learning rate."""
        texts = []
        for option in sorted(self.method.options, key=lambda option: (option.place == "last", option is PENALTY)):
            if option.type is not None and (parts := option.parts(self.options)):
                texts += [option.spellings.split("/")[0], parts[1].removesuffix(".0")]
        return " ".join([*texts, "-lr", format_number(self.options.learning_rate)])

    @property
    def key(self) -> str:
        """The row's own name: that of its run, with the number of epochs."""
        return f"{self.name}-N-{self.epochs}"

    @property
    def command(self) -> str:
        """The command line for a person to type, in the repository."""
        return shlex.join(["python", f"{self.experiment}/{self.experiment}.py", *self.argv])


def dump_dir(name: str) -> Path:
    """The default folder for logs and models of a grid."""
    return REPOSITORY / "runs" / f"{name}-grid"


def names(folder: Path = FOLDER) -> list[str]:
    """The names of the grids in a folder."""
    return sorted(path.stem for path in folder.glob("*.toml"))


def load(name: str, folder: Path = FOLDER) -> list[Row]:
    """Reads ``<name>.toml``: the rows, the first seed first, methods before ablations, in the table's order.

    The head of the table may name the ``experiment``, which else is the grid's name, and a ``title`` for the figures,
    in which ``{T}``, say, is the first row's option. With ``ablations_last = false`` ablations keep their place.
    ``options``, ``epochs`` and ``seeds`` hold for all groups but those that have their own. A group has a ``title``,
    what its rows share in ``method``, and its ``variants``; ``ablation = true`` keeps it out of comparisons.

    Raises:
        Refusal: the table, or a command line that it gives, is not accepted; the message names it.
    """
    path = folder / f"{name}.toml"
    table = _table(path)
    for key in ("networks", "data"):
        table.pop(key, None)
    experiment, heading = table.pop("experiment", name), table.pop("title", name)
    in_place = not table.pop("ablations_last", True)
    if experiment not in EXPERIMENTS:
        raise Refusal(f"{path}: experiment must be {either(EXPERIMENTS)}, not {experiment!r}")
    rows: list[tuple[tuple[int, bool], Row]] = []
    for group in table.get("group", []):
        settings = {**table, **group}
        for key in ("title", "variants", "epochs", "seeds"):
            if key not in settings:
                raise Refusal(f"{path}: a group has no {key}")
        title, ablation = settings["title"], settings.get("ablation", False)
        for variant, (place, seed) in product(settings["variants"], enumerate(settings["seeds"])):
            texts = [settings.get("options", ""), settings.get("method", ""), variant]
            argv = [*_words(path, " ".join(texts)), "-N", str(settings["epochs"]), "--seed", str(seed)]
            try:
                options = read(EXPERIMENTS[experiment], argv)
            except Refusal as refusal:
                raise Refusal(f"{path}: {title}: {shlex.join(argv)}: {refusal}") from None
            try:
                shown = heading.format_map(vars(options))
            except (LookupError, ValueError, AttributeError, TypeError):
                raise Refusal(f"{path}: title: names in braces must be those of options: {heading!r}") from None
            row = Row(experiment, shown, title, ablation, tuple(argv), options)
            rows.append(((place, ablation and not in_place), row))
    found: dict[str, Row] = {}
    longest: dict[str, int] = {}
    for _, row in sorted(rows, key=lambda row: row[0]):
        if row.key in found:
            raise Refusal(f"{path}: {row.command} is there twice, in {found[row.key].title} and {row.title}")
        if row.epochs < longest.get(row.name, 0):
            raise Refusal(f"{path}: {row.command} has to come before that of {longest[row.name]} epochs")
        found[row.key], longest[row.name] = row, row.epochs
    return list(found.values())


def _is(kind: type, of: type | None = None) -> Callable[[Any], bool]:
    """Whether a value is of a type and, if it is a list, its items are."""
    return lambda value: type(value) is kind and (of is None or all(type(item) is of for item in value))


TEXT, SWITCH = (_is(str), "a text"), (_is(bool), "true or false")
GROUP = {  # what a group may have, of its own or from the head of the table
    **dict(title=TEXT, options=TEXT, method=TEXT, ablation=SWITCH),
    "epochs": (_is(int), "a whole number"),
    "seeds": (_is(list, int), "a list of whole numbers"),
    "variants": (_is(list, str), "a list of texts"),
}
HEAD = {
    **GROUP,
    **dict(experiment=TEXT, ablations_last=SWITCH),
    "group": (_is(list, dict), "a list of tables"),
    **dict.fromkeys(("networks", "data"), (_is(dict), "a table")),
}


def _table(path: Path) -> dict[str, Any]:
    """The table in a file; raises Refusal if it or a group has what is not known, or of another type."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Refusal(f"{path}: {error}") from None
    _check(path, table, HEAD)
    for group in table.get("group", []):
        _check(path, group, GROUP)
    return table


def _check(path: Path, part: dict[str, Any], known: dict[str, tuple[Callable[[Any], bool], str]]) -> None:
    for key, value in part.items():
        if key not in known:
            raise Refusal(f"{path}: {key} is not known here; there are {', '.join(known)}")
        accepted, text = known[key]
        if not accepted(value):
            raise Refusal(f"{path}: {key} must be {text}, not {value!r:.100}")


def _words(path: Path, text: Any) -> list[str]:
    """The words of a command line; raises Refusal if it has none."""
    try:
        return shlex.split(text)
    except (TypeError, ValueError, AttributeError) as error:
        raise Refusal(f"{path}: {text!r:.100} is no command line: {error}") from None


def data_note(name: str, fingerprint: str, folder: Path = FOLDER) -> str:
    """What ``<name>.toml`` says in ``[data]`` of a data set, by its fingerprint; empty without a word on it."""
    return _table(folder / f"{name}.toml").get("data", {}).get(fingerprint, "")


def networks(name: str, folder: Path = FOLDER) -> dict[str, Row]:
    """The rows whose networks are kept, by the names of these: those of ``<name>.toml`` in ``[networks]``.

    A network is given by its method and variant, as a group has them: the first row that has them is meant.

    Raises:
        Refusal: the table is not accepted, or has no such row.
    """
    path = folder / f"{name}.toml"
    rows = load(name, folder)
    found = {}
    for network, text in _table(path).get("networks", {}).items():
        words = _words(path, text)
        some = [row for row in rows if list(row.argv[: row.argv.index("-N")])[-len(words) :] == words]
        if not some:
            raise Refusal(f"{path}: networks: no row of {network} is: {text}")
        found[network] = some[0]
    return found


def shard(rows: Sequence[Row], part: int, parts: int) -> list[Row]:
    """The rows of part ``part`` of ``parts``, from 1. All rows of a run are in the same part."""
    names = list(dict.fromkeys(row.name for row in rows))
    mine = set(names[part - 1 :: parts])
    return [row for row in rows if row.name in mine]
