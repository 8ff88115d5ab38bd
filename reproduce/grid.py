"""An experiment's grid: a small TOML table, to rows, each of them a command line of the experiment's script."""

import shlex
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from analysis.experiments import EXPERIMENTS
from training.errors import Refusal
from training.naming import run_name
from training.options import read

FOLDER = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Row:
    """One run of the grid, up to a number of epochs.

    Attributes:
        experiment: whose script runs it, ``mnist`` or ``c10``.
        title: of its group: the method.
        ablation: whether the group is one, not a method to compare.
        argv: what the script is given, but for the places (--dataset-dir, --dump-dir, -gpu).
        name: of the run's folders; rows that differ in the number of epochs only share it.
        epochs: after which the row is finished.
        seed: of the run.
    """

    experiment: str
    title: str
    ablation: bool
    argv: tuple[str, ...]
    name: str
    epochs: int
    seed: int

    @property
    def key(self) -> str:
        """The row's name, unlike that of any other row: the run and its number of epochs."""
        return f"{self.name}-N-{self.epochs}"

    @property
    def command(self) -> str:
        """The command line for a person to type, in the repository."""
        return shlex.join(["python", f"{self.experiment}/{self.experiment}.py", *self.argv])


def load(experiment: str, folder: Path = FOLDER) -> list[Row]:
    """Reads ``<experiment>.toml``: the rows, the first seed first, methods before ablations, in the table's order.

    ``options``, ``epochs`` and ``seeds`` of the table hold for all groups but those that have their own. A group has a
    ``title``, what its rows share in ``method``, and its ``variants``; ``ablation = true`` keeps it out of comparisons.

    Raises:
        Refusal: the table, or a command line that it gives, is not accepted; the message names it.
    """
    path = folder / f"{experiment}.toml"
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Refusal(f"{path}: {error}") from None
    rows = []
    for group in table.get("group", []):
        for key in ("title", "variants"):
            if key not in group:
                raise Refusal(f"{path}: a group has no {key}")
        settings = {**table, **group}
        for variant in group["variants"]:
            for place, seed in enumerate(settings["seeds"]):
                texts = [settings.get("options", ""), settings.get("method", ""), variant]
                argv = [word for text in texts for word in shlex.split(text)]
                argv += ["-N", str(settings["epochs"]), "--seed", str(seed)]
                row = _row(path, experiment, group, argv)
                rows.append(((place, row.ablation), row))
    rows.sort(key=lambda row: row[0])
    found: list[Row] = []
    for _, row in rows:
        for other in found:
            if other.key == row.key:
                raise Refusal(f"{path}: {row.command} is there twice, in {other.title} and {row.title}")
            if other.name == row.name and other.epochs > row.epochs:
                raise Refusal(f"{path}: {row.command} has to come before that of {other.epochs} epochs")
        found.append(row)
    return found


def _row(path: Path, experiment: str, group: dict[str, Any], argv: Sequence[str]) -> Row:
    title = group["title"]
    try:
        options = read(EXPERIMENTS[experiment], argv)
    except Refusal as refusal:
        raise Refusal(f"{path}: {title}: {shlex.join(argv)}: {refusal}") from None
    ablation, name = group.get("ablation", False), run_name(options, EXPERIMENTS[experiment])
    return Row(experiment, title, ablation, tuple(argv), name, options.epoch, options.seed)


def shard(rows: Sequence[Row], part: int, parts: int) -> list[Row]:
    """The rows of part ``part`` of ``parts`` (from 1): every run belongs to one part, whatever its epochs."""
    names = list(dict.fromkeys(row.name for row in rows))
    mine = set(names[part - 1 :: parts])
    return [row for row in rows if row.name in mine]
