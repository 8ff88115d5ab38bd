"""The progress of a grid: which rows are finished, and how far the others are, from the logs of their runs.

A row is finished when its record ``<dump-dir>/rows/<key>.json`` is there. The runner writes it after the row's epochs
and its ``-test``.
"""

import contextlib
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from analysis import runs
from reproduce.grid import Row
from training.console import duration
from training.files import json_files
from training.logs import RESULTS
from training.metrics import FILES, TEST
from training.run_info import everywhere

MADE = ("cpu", "device", "precision", "versions", "git_commit")  # what a record says of how its row was made


def path_of(dump: Path, row: Row) -> Path:
    """Where a finished row's record is."""
    return dump / "rows" / f"{row.key}.json"


def read(dump: Path, row: Row) -> dict[str, Any] | None:
    """The row's record; None if there is none. A damaged one raises ValueError with the reason."""
    record = json_files.read_object(path_of(dump, row))
    if record is not None:
        _check(record, row)
    return record


def finished(dump: Path, row: Row) -> dict[str, Any] | None:
    """The row's record; None if the row is not finished or its record is damaged (see :func:`damaged`)."""
    with contextlib.suppress(ValueError):
        return read(dump, row)
    return None


def damaged(dump: Path, rows: Sequence[Row]) -> list[str]:
    """A line, with the reason, for every damaged record."""
    lines = []
    for row in rows:
        try:
            read(dump, row)
        except ValueError as error:
            lines.append(f"{path_of(dump, row)} is damaged ({error}): the row counts as not done until it is run again")
    return lines


def write(dump: Path, row: Row) -> dict[str, Any]:
    """Writes and returns the record of a row that was trained and tested; ValueError if results are missing."""
    run = state(dump, row)
    path = run.logs / FILES[TEST]
    try:
        test = json_files.read_object(path)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if test is not None and (test.get("epoch"), test.get("position", 0)) != (row.epochs, 0):
        test = None  # the run was extended since
    result = next((line for line in run.epochs if line["epoch"] == row.epochs), None)
    if result is None:
        raise ValueError("; ".join([f"{run.logs / RESULTS} has no epoch {row.epochs}", *run.problems]))
    record = {
        "row": row.key,
        "title": row.title,
        "command": row.command,
        "seed": row.seed,
        "epochs": row.epochs,
        "result": {key: value for key, value in result.items() if key not in ("neurons", "distributions")},
        "test": test,
        "run": {key: everywhere(run.info, key) for key in MADE},
    }
    _check(record, row)
    if test is None and (earlier := finished(dump, row)) is not None:  # another runner's, perhaps with its test
        return earlier
    json_files.write(path_of(dump, row), record)
    return record


def _check(record: dict[str, Any], row: Row) -> None:
    """Raises ValueError if a record lacks something that an outcome needs."""
    if (record.get("row"), record.get("epochs")) != (row.key, row.epochs):
        raise ValueError("it is not of this row")
    for key in ("test_accuracy", "connectivity"):
        if not 0 <= json_files.number(record, "result", key) <= 1:
            raise ValueError(f"it has no {key} from 0 to 1")
    for *path, key in (("run",), ("result", "layers"), ("test",), ("test", "operations"), ("test", "neurons")):
        value = (json_files.nested(record, *path) or {}).get(key)
        if not isinstance(value, dict) and (value is not None or key == "run"):
            raise ValueError(f"its {key} is not a JSON object")


def state(dump: Path, row: Row) -> runs.SavedRun:
    """What the row's run has logged so far."""
    return runs.read(row.name, dump / "logs" / row.name, dump / "models" / row.name)


@dataclass(frozen=True)
class Progress:
    """How far the rows of a grid are."""

    done: list[Row]  # the finished ones
    rows: int
    epochs_left: int  # until all are finished
    seconds_per_epoch: float  # median over the runs that have any epoch; NaN when there is none

    def line(self, jobs: int) -> str:
        """For the console, with the time that is left where ``jobs`` rows run at a time."""
        seconds = self.epochs_left * self.seconds_per_epoch / jobs
        time_left = "" if math.isnan(seconds) else f", about {duration(seconds)}"
        return f"{len(self.done)} of {self.rows} rows done, {self.epochs_left:,} epochs left{time_left}"


def progress(dump: Path, rows: Sequence[Row]) -> Progress:
    """Looks up how far the rows are, whoever runs them."""
    done = [row for row in rows if finished(dump, row) is not None]
    saved = {name: state(dump, row) for name, row in {row.name: row for row in rows}.items()}
    ends = {row.name: row.epochs for row in rows if row not in done}  # the longest row of a run is its last
    left = sum(max(0, epochs - saved[name].last.get("epoch", 0)) for name, epochs in ends.items())
    seconds = [run.seconds_per_epoch for run in saved.values() if not math.isnan(run.seconds_per_epoch)]
    return Progress(done, len(rows), left, statistics.median(seconds) if seconds else math.nan)
