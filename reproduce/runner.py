"""Runs the rows of a grid, some at a time, each by its own command: skips what is finished, goes on with what is not.

A row is finished when its record ``<dump-dir>/rows/<key>.json`` is there: it is written after the row's epochs and
its ``-test``. Rows may run on several machines that share the dump folder: a run's lock keeps the others away from it.
"""

import contextlib
import math
import os
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from analysis import runs
from reproduce.grid import Row
from training.console import duration
from training.files import json_files
from training.interrupt import known
from training.options import REPOSITORY
from training.record import write_json

TAKEN = "another process is training in"  # in the line of a script that finds its run locked


def record_of(dump: Path, row: Row) -> Path:
    """Where a finished row's record is."""
    return dump / "rows" / f"{row.key}.json"


def log_of(dump: Path, row: Row) -> Path:
    """Where what a row's commands print is kept."""
    return dump / "rows" / f"{row.key}.log"


def finished(dump: Path, row: Row) -> dict[str, Any] | None:
    """The row's record; None if the row is not finished or its record is damaged (see :func:`damaged`)."""
    try:
        return _read_record(dump, row)
    except ValueError:
        return None


def damaged(dump: Path, rows: Sequence[Row]) -> list[str]:
    """A line, with the reason, for every record that exists but is not a record of its row."""
    lines = []
    for row in rows:
        try:
            _read_record(dump, row)
        except ValueError as error:
            lines.append(
                f"{record_of(dump, row)} is damaged ({error}): the row counts as not done until it is run again"
            )
    return lines


def _read_record(dump: Path, row: Row) -> dict[str, Any] | None:
    """The row's record, None if there is none; raises ValueError if it is not a record of this row."""
    record = json_files.read_object(record_of(dump, row))
    if record is not None:
        _check_record(record, row)
    return record


def _check_record(record: dict[str, Any], row: Row) -> None:
    """Raises ValueError unless a record has what an outcome is made of."""
    if (record.get("row"), record.get("epochs")) != (row.key, row.epochs):
        raise ValueError("it is not of this row")
    for key in ("test_accuracy", "connectivity"):
        if not 0 <= json_files.number(record, "result", key) <= 1:
            raise ValueError(f"it has no {key} from 0 to 1")
    parts = {"run": ("run",), "layers": ("result", "layers"), "test": ("test",), "operations": ("test", "operations")}
    for name, (*path, key) in parts.items():
        value = (json_files.nested(record, *path) or {}).get(key)
        if not isinstance(value, dict) and (value is not None or name == "run"):
            raise ValueError(f"its {name} is not a JSON object")


def state(dump: Path, row: Row) -> runs.Run:
    """What the row's run has logged so far."""
    return runs.read(row.name, dump / "logs" / row.name, dump / "models" / row.name)


@dataclass(frozen=True)
class Progress:
    """How far the rows of a grid are.

    Attributes:
        done: the finished rows.
        rows: how many there are.
        epochs_left: to be trained until all are finished.
        seconds_per_epoch: median over the runs that have any epoch; NaN when there is none.
    """

    done: list[Row]
    rows: int
    epochs_left: int
    seconds_per_epoch: float

    def line(self, jobs: int) -> str:
        """For the console, with the time that is left where ``jobs`` rows run at a time."""
        seconds = self.epochs_left * self.seconds_per_epoch / jobs
        time_left = "" if math.isnan(seconds) else f", about {duration(seconds)}"
        return f"{len(self.done)} of {self.rows} rows done, {self.epochs_left:,} epochs left{time_left}"


def progress(dump: Path, rows: Sequence[Row]) -> Progress:
    """Looks up how far the rows are, whoever runs them."""
    done = [row for row in rows if finished(dump, row) is not None]
    left, seconds = 0, []
    for name in dict.fromkeys(row.name for row in rows):
        mine = [row for row in rows if row.name == name]
        run = state(dump, mine[0])
        left += max([row.epochs - run.last.get("epoch", 0) for row in mine if row not in done] + [0])
        if run.seconds_per_epoch == run.seconds_per_epoch:
            seconds.append(run.seconds_per_epoch)
    return Progress(done, len(rows), left, statistics.median(seconds) if seconds else float("nan"))


class Runner:
    """Runs rows, ``jobs`` at a time, each in a process of its own with its share of the cores, or a GPU in turn.

    Args:
        dump: the dump folder.
        places: what every command gets beside its row's: --dataset-dir.
        jobs: how many rows at a time, >= 1.
    """

    def __init__(self, dump: Path, places: Sequence[str], jobs: int):
        self.dump, self.jobs = dump, jobs
        self.places = [*places, "--dump-dir", str(dump)]
        self.gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        self.threads = max(1, (os.cpu_count() or 1) // jobs)
        self.stopped: int | None = None  # by which signal

    def run(self, rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
        """Runs the rows that are not finished; returns those that failed, and those that another process has.

        A signal is handed on to the rows that run; after SIGTERM or SIGINT no other is started.
        """
        (self.dump / "rows").mkdir(parents=True, exist_ok=True)
        waiting = [row for row in rows if finished(self.dump, row) is None]
        running: dict[int, tuple[Row, Iterator[subprocess.Popen]]] = {}  # by slot
        processes: dict[int, subprocess.Popen] = {}
        failed, taken = [], []
        for row in [row for row in waiting if state(self.dump, row).last.get("epoch", 0) > row.epochs]:
            waiting.remove(row)  # its run was prolonged before
            try:
                self._record(row)
            except (OSError, ValueError) as error:
                failed.append(row)
                self._say(row, f"failed: {error}", rows)
        before = {number: signal.signal(number, self._hand_on(processes)) for number in _SIGNALS}
        try:
            while running or (waiting and self.stopped is None):
                busy = {row.name for row, _ in running.values()}
                for slot in range(self.jobs):
                    row = next((row for row in waiting if row.name not in busy), None)
                    if slot in running or row is None or self.stopped is not None:
                        continue
                    waiting.remove(row)
                    busy.add(row.name)
                    running[slot] = row, self._steps(row, slot)
                for slot, (row, steps) in list(running.items()):
                    process, fault = processes.get(slot), None
                    if process is not None and process.poll() is None:
                        continue
                    processes.pop(slot, None)
                    if process is not None and process.returncode != 0:
                        fault = f" with status {process.returncode}: {_last_line(log_of(self.dump, row))}"
                    else:
                        try:
                            processes[slot] = next(steps)
                            continue
                        except StopIteration:
                            pass
                        except (OSError, ValueError) as error:  # its start fails, or the recording of its results
                            fault = f": {error}"
                    del running[slot]
                    if fault is None:
                        self._say(row, f"finished: {_outcome(finished(self.dump, row))}", rows)
                    elif TAKEN in fault:
                        taken.append(row)
                        self._say(row, "left to the process that runs it", rows)
                    elif self.stopped is None:
                        failed.append(row)
                        self._say(row, f"failed{fault}", rows)
                time.sleep(0.1)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        return failed, taken

    def _hand_on(self, processes: dict[int, subprocess.Popen]):
        def handler(number: int, frame: Any) -> None:
            if number in _STOPPING:
                self.stopped = number
            for process in list(processes.values()):
                with contextlib.suppress(ValueError):  # Windows cannot pass on a Ctrl-C, but sends it to all itself
                    process.send_signal(number)

        return handler

    def _steps(self, row: Row, slot: int) -> Iterator[subprocess.Popen]:
        """The row's processes, one after the other: training, then the test; then the record is written."""
        argv = [*row.argv, *self.places, *(["-gpu", str(slot % self.gpus)] if self.gpus else [])]
        print(row.command, flush=True)
        yield self._start(row, argv)
        if self.stopped is not None:
            return
        yield self._start(row, [*argv, "-test"])
        self._record(row)

    def _start(self, row: Row, argv: Sequence[str]) -> subprocess.Popen:
        script = f"{row.experiment}/{row.experiment}.py"
        environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(self.threads))}
        with open(log_of(self.dump, row), "ab") as log:
            log.write(f"$ {shlex.join(['python', script, *argv])}\n".encode())
            log.flush()
            return subprocess.Popen(
                [sys.executable, str(REPOSITORY / script), *argv],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # a terminal's Ctrl-C comes through the runner, once
            )

    def _record(self, row: Row) -> None:
        """Writes the row's record; ValueError where its run has not left what belongs in one."""
        run = state(self.dump, row)
        try:
            test = json_files.read_object(run.logs / "test.json")
        except ValueError as error:
            raise ValueError(f"{run.logs / 'test.json'}: {error}") from None
        if test is not None and test.get("epoch") != row.epochs:  # of a run that was prolonged since
            test = None
        result = next((line for line in run.epochs if line["epoch"] == row.epochs), None)
        if result is None:
            raise ValueError("; ".join([f"{run.logs / runs.RESULTS} has no epoch {row.epochs}", *run.problems]))
        keys = ("versions", "device", "cpu", "git_commit")
        record = {
            "row": row.key,
            "title": row.title,
            "command": row.command,
            "seed": row.seed,
            "epochs": row.epochs,
            "result": {key: value for key, value in result.items() if key not in ("neurons", "distributions")},
            "test": test,
            "run": {key: run.info.get(key) for key in keys},
        }
        _check_record(record, row)
        write_json(record_of(self.dump, row), record)

    def _say(self, row: Row, what: str, rows: Sequence[Row]) -> None:
        print(f"{row.key} {what}\n{progress(self.dump, rows).line(self.jobs)}", flush=True)


_STOPPING = known(("SIGTERM", "SIGINT"))
_SIGNALS = [*_STOPPING, *known(["SIGUSR1"])]


def _outcome(record: dict[str, Any] | None) -> str:
    if record is None:
        return "no record"
    result = record["result"]
    return f"test accuracy {100 * result['test_accuracy']:.2f} %, connectivity {100 * result['connectivity']:.2f} %"


def _last_line(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 10_000))
            lines = file.read().decode(errors="replace").strip().splitlines()
    except OSError as error:
        return f"its log cannot be read: {error}"
    return lines[-1] if lines else ""
