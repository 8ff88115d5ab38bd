"""Finds runs and reads their results, arguments and weights. Safe while a run still writes.

A run NAME under a dump folder D has its logs in ``D/logs/NAME`` (``results.jsonl``, one line per finished epoch, and
``run.json``) and its checkpoint in ``D/models/NAME``. Any of them may be missing. What is damaged is left out and
named in :attr:`SavedRun.problems`, so that one bad line never hides the other runs.
"""

import contextlib
import math
import os
import re
from argparse import Namespace
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import measuring
from analysis.experiments import EXPERIMENTS
from measuring.report import beyond
from training.errors import Refusal
from training.files import checks, storage
from training.files.json_files import LARGEST, nested, number, parse_object, read_file, read_object, reason, shown
from training.files.storage import CHECKPOINT
from training.logs import INFO, RESULTS
from training.methods import METHODS

LARGEST_RESULTS, MOST_EPOCHS = 1 << 27, 1 << 17  # bytes and lines of results.jsonl
MOST_NAMES = 256  # of layers, those of LIF neurons among them
MOST_PROBLEMS = 20  # named of one file
RECORDINGS = 7  # of the distributions, that are kept
PARTS = ("logs", "models")  # the folders of a dump folder


@dataclass
class SavedRun:
    """One run as it is on disk."""

    name: str  # of its folders; with the dump folder before it where two runs share a name
    logs: Path  # its folders, which need not exist
    models: Path
    info: dict[str, Any] = field(default_factory=dict)  # run.json; empty when there is none
    # the lines of results.jsonl, one per finished epoch, in order; RECORDINGS of them have distributions, which are
    # nearly all of the file
    epochs: list[dict[str, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)  # a line for everything that was damaged and left out

    @property
    def arguments(self) -> dict[str, Any]:
        return nested(self.info, "arguments") or {}

    @property
    def experiment(self) -> tuple[str, str]:
        """Experiment and data set: only runs that share both can be compared. Unknown ones are empty texts."""
        experiment = self.info.get("experiment") or self.arguments.get("experiment")
        return shown(experiment), shown(self.arguments.get("dataset"))

    @property
    def width(self) -> Any:
        """Of the network; older runs have their experiment's. None when not known."""
        experiment = EXPERIMENTS.get(self.experiment[0])
        return self.arguments.get("width", experiment and experiment.width)

    @property
    def method(self) -> str:
        """What trains it, in the words of its method; the bare name of a method that the table does not know."""
        mode = shown(self.arguments.get("mode"))
        if mode not in METHODS:
            return mode
        given = {option.name: self.arguments.get(option.name) for option in METHODS[mode].options}
        with contextlib.suppress(TypeError, ValueError):  # of values that its options do not take
            return METHODS[mode].title(Namespace(**given))
        return METHODS[mode].label

    @property
    def last(self) -> dict[str, Any]:
        """The last finished epoch; empty before the first."""
        return self.epochs[-1] if self.epochs else {}

    def series(self, *keys: str) -> np.ndarray:
        """A number of every epoch, float64 [epochs]; NaN where it is absent. ``keys`` lead into nested dictionaries."""
        return np.array([number(epoch, *keys) for epoch in self.epochs], dtype=np.float64)

    def names_in(self, key: str) -> list[str]:
        """The names (of layers, of LIF neurons) that any epoch has under ``key``, in their first order."""
        return list(dict.fromkeys(name for epoch in self.epochs for name in nested(epoch, key) or {}))

    @property
    def seconds_per_epoch(self) -> float:
        """Median over the epochs of training, test and checkpoint together; NaN when not known."""
        seconds = sum(self.series(f"{part}_seconds") for part in ("train", "test", "checkpoint"))
        seconds = seconds[np.isfinite(seconds)]
        return float(np.median(seconds)) if len(seconds) else math.nan

    @property
    def connections(self) -> measuring.Connections | None:
        """Connected weights, and all that can be pruned, after the last epoch; None when not known."""
        layers = nested(self.last, "layers") or {}
        sums = [sum(number(self.last, "layers", name, key) for name in layers) for key in ("connected", "weights")]
        return measuring.Connections(*map(int, sums)) if layers and np.isfinite(sums).all() else None


def find(paths: Iterable[str | Path]) -> list[SavedRun]:
    """Finds and reads the runs of dump folders and run folders, each once, sorted by name within a dump folder.

    A path is a dump folder (with ``logs`` or ``models`` in it), a folder of dump folders (as the default ``runs`` is),
    one of the two folders in a dump folder, or the folder of one run in either of them.

    Raises:
        Refusal: a path does not exist, or holds no run.
    """
    places: dict[tuple[Path, Path], str] = {}  # (logs, models) of a run, to its name
    for text in paths:
        path = Path(os.path.abspath(os.path.expanduser(text)))  # a "." has no name
        if not path.is_dir():
            wanted = "a dump folder, which holds logs and models, or folders of runs"
            raise Refusal(f"{text} is not a folder; give {wanted}")
        found = _places(path)
        for folder in sorted({folder.parent for part in PARTS for folder in path.glob(f"*/{part}/")}):
            found |= _places(folder)
        if not found:
            looked_for = f"folders logs/<name> and models/<name> in it, and for {RESULTS}, {INFO} or {CHECKPOINT}"
            raise Refusal(f"there is no run in {text}: looked for {looked_for}")
        places.update(found)
    names = Counter(places.values())
    return [
        read(name if names[name] == 1 else f"{logs.parent.parent}/{name}", logs, models)
        for (logs, models), name in places.items()
    ]


def _places(path: Path) -> dict[tuple[Path, Path], str]:
    if path.parent.name in PARTS and not any((path / part).is_dir() for part in PARTS):
        dump, names = path.parent.parent, [path.name]
    else:
        dump = path.parent if path.name in PARTS else path
        names = sorted({folder.name for part in PARTS for folder in (dump / part).glob("*/")})
    if not names and any((path / file).is_file() for file in (RESULTS, INFO, CHECKPOINT)):
        return {(path, path): path.name}  # a run's files, taken elsewhere
    return {(dump / "logs" / name, dump / "models" / name): name for name in names}


def read(name: str, logs: Path, models: Path) -> SavedRun:
    """Reads a run's ``run.json`` and ``results.jsonl``, whichever are there."""
    run = SavedRun(name, logs, models)
    try:
        run.info = read_object(logs / INFO) or {}
    except ValueError as error:
        run.problems.append(f"{logs / INFO}: {error}; its arguments are not shown")
    try:
        content = read_file(logs / RESULTS, LARGEST_RESULTS)
        if (count := content.count(b"\n")) > MOST_EPOCHS:
            raise ValueError(f"{count:,} lines, more than {MOST_EPOCHS:,}")
    except FileNotFoundError:
        return run
    except (OSError, ValueError) as error:
        run.problems.append(f"{logs / RESULTS}: {reason(error)}")
        return run
    epochs: dict[int, dict[str, Any]] = {}
    recorded: dict[int, bytes] = {}  # the lines with distributions
    names: set[str] = set()
    problems = []
    for line_number, line in enumerate(content.split(b"\n")[:-1], 1):  # what follows the last is still being written
        if not line.strip():
            continue
        try:
            if len(line) > LARGEST:
                raise ValueError(f"{len(line):,} bytes, more than {LARGEST:,}")
            entry = parse_object(line)
            epoch = entry.get("epoch")
            if type(epoch) is not int or not 1 <= epoch < 2**63:
                raise ValueError("no epoch, a whole number >= 1")
            if epoch in epochs:
                raise ValueError(f"epoch {epoch} was there before")
            more = names.union(*(nested(entry, key) or {} for key in ("layers", "neurons", "distributions")))
            if len(more) > MOST_NAMES:
                raise ValueError(f"more than {MOST_NAMES} names of layers")
        except ValueError as error:
            problems.append(f"{logs / RESULTS}, line {line_number}: {reason(error)}; the line is left out")
            continue
        names, epochs[epoch] = more, _numbers(entry)
        if nested(entry, "distributions"):
            recorded[epoch] = line
    run.epochs = [epochs[epoch] for epoch in sorted(epochs)]
    places = np.linspace(0, len(recorded) - 1, min(RECORDINGS, len(recorded))).round().astype(int)
    for epoch in np.array(sorted(recorded))[places].tolist():
        epochs[epoch]["distributions"] = parse_object(recorded[epoch])["distributions"]
    run.problems += problems[:MOST_PROBLEMS]
    if len(problems) > MOST_PROBLEMS:
        run.problems.append(f"{logs / RESULTS}: {len(problems) - MOST_PROBLEMS:,} more lines are left out")
    return run


def _numbers(entry: dict[str, Any]) -> dict[str, Any]:
    """What a line says of an epoch, of its layers and of their neurons; nothing that is nested deeper or is a list."""

    def flat(entry: Any) -> dict[str, Any]:
        return {key: value for key, value in (nested(entry) or {}).items() if not isinstance(value, (dict, list))}

    parts = {part: nested(entry, part) for part in ("layers", "neurons")}
    return flat(entry) | {
        part: {name: flat(layer) for name, layer in layers.items()} for part, layers in parts.items() if layers
    }


def is_there(path: Path) -> bool:
    """Whether a file can be seen: not in a folder that is another user's alone."""
    try:
        return path.is_file()
    except OSError:
        return False


def weights_of(run: SavedRun) -> tuple[str, dict[str, Tensor]]:
    """The checkpoint's epoch, in words, and its weights that can be pruned, by name; empty when there is none.

    The words are such as "3", or "3 and 20 steps of the next". A damaged checkpoint is one more of
    :attr:`SavedRun.problems`.
    """
    path = run.models / CHECKPOINT
    if not is_there(path):
        return "", {}
    try:
        state = storage.read(path, verify=False)  # only the weights are read from the disk
        with torch.device("meta"):  # for the names alone: no memory, no random numbers
            network = EXPERIMENTS[state["arguments"]["experiment"]].network()
        weights = {name: state["network"][name] for name in measuring.prunable(network)}
        for name, weight in weights.items():  # that they are dense and of the file's size, storage.read has checked
            if not weight.is_floating_point() or weight.dim() < 2 or not weight.numel():
                raise ValueError(f"{name} is not of a layer")
        epoch, position = (checks.whole_number(key, state.get(key, 0)) for key in ("epoch", "position"))
        return f"{epoch}{beyond(position)}", weights
    except Exception as error:  # what a damaged file raises is up to zipfile, pickle and torch
        what = "damaged or not a checkpoint of this program" if checks.is_about_content(error) else "cannot be read"
        run.problems.append(f"{path}: {what} ({reason(error)})")
        return "", {}


_PART = re.compile(r"[A-Za-z_]+-\d+(?:\.\d+)?(?:e-?\d+)?(?=-|$)|[^-]+")


def short_names(names: Sequence[str]) -> list[str]:
    """What tells runs apart: of ``lr-1e-4-s-0.9-grad`` and ``lr-1e-4-s-0.8-grad``, ``s-0.9`` and ``s-0.8``.

    The parts of a name are options with their values. Those that all names share are left out; a name with nothing of
    its own keeps its last part. Whole names where that does not tell them apart.
    """
    parts = [[part for folder in name.split("/") for part in _PART.findall(folder)] or [name] for name in names]
    shared = set.intersection(*map(set, parts)) if parts else set()
    short = [" ".join(part for part in of_name if part not in shared) or of_name[-1] for of_name in parts]
    return short if len(names) > 1 and len(set(short)) == len(names) else list(names)
