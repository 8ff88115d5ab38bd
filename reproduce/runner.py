"""Runs the rows of a grid, several at a time: skips finished ones, continues interrupted ones.

Several machines that share the dump folder may run the same grid: a run's lock keeps the others away from it.
"""

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch

from reproduce import records
from reproduce.grid import Row
from training.interrupt import known
from training.options import REPOSITORY

TAKEN = "another process is training in"  # in the line of a script that finds its run locked
STOPPING = known(("SIGTERM", "SIGINT"))
# On Linux a row becomes its script after this, and is sent SIGTERM when the runner ends, even by SIGKILL.
FOLLOW = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""
PYTHON = [sys.executable, *(["-I", "-c", FOLLOW] if sys.platform == "linux" else [])]


def log_of(dump: Path, row: Row) -> Path:
    """Where the output of a row's commands is kept."""
    return dump / "rows" / f"{row.key}.log"


class Runner:
    """Runs rows, ``jobs`` at a time, each in a process of its own with its share of the cores, or a GPU in turn.

    Every command gets the dump folder and ``places`` beside its row's arguments. ``stopped`` is the signal that stopped
    the runner; None while there is none.
    """

    def __init__(self, dump: Path, places: Sequence[str], jobs: int):
        self.dump, self.jobs = dump, jobs
        self.places = [*places, "--dump-dir", str(dump)]
        self.gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        self.threads = max(1, (os.cpu_count() or 1) // jobs)
        self.stopped: int | None = None
        self._processes: set[subprocess.Popen] = set()
        self._starting = threading.RLock()  # so that a signal misses no process; one may come during another

    def run(self, rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
        """Runs the rows that are not finished; returns those that failed, and those that another process has.

        A signal is handed on to the rows that run. After SIGTERM or SIGINT no other row starts.
        """
        (self.dump / "rows").mkdir(parents=True, exist_ok=True)
        waiting = [row for row in rows if records.finished(self.dump, row) is None]
        running: dict[int, tuple[Row, Future[str]]] = {}  # at most one row of a run
        ends: dict[Row, str] = {}
        before = {number: signal.signal(number, self._hand_on) for number in (*STOPPING, *known(["SIGUSR1"]))}
        try:
            with ThreadPoolExecutor(self.jobs) as pool:
                while True:
                    for slot in sorted(set(range(self.jobs)) - running.keys()):
                        busy = {row.name for row, _ in running.values()}
                        row = next((row for row in waiting if row.name not in busy), None)
                        if row is not None and self.stopped is None:
                            waiting.remove(row)
                            running[slot] = row, pool.submit(self._finish, row, slot)
                    if not running:
                        break
                    # on Windows a signal does not end a wait
                    wait([future for _, future in running.values()], timeout=0.2, return_when=FIRST_COMPLETED)
                    for slot in [slot for slot, (_, future) in running.items() if future.done()]:
                        row, future = running.pop(slot)
                        ends[row] = future.result()
                        if ends[row]:
                            progress = records.progress(self.dump, rows).line(self.jobs)
                            print(f"{row.key} {ends[row]}\n{progress}", flush=True)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        failed, taken = ([row for row in rows if ends.get(row, "").startswith(word)] for word in ("failed", "skipped"))
        return failed, taken

    def _hand_on(self, number: int, frame: Any) -> None:
        with self._starting:
            if number in STOPPING:
                self.stopped = number
            for process in self._processes:
                with contextlib.suppress(ValueError):  # Windows cannot pass on a Ctrl-C, but sends it to all itself
                    process.send_signal(number)

    def _finish(self, row: Row, slot: int) -> str:
        """Trains and tests a row, and writes its record; returns how it ended, nothing where it was stopped."""
        argv = [*row.argv, *self.places, *(["-gpu", str(slot % self.gpus)] if self.gpus else [])]
        try:
            if records.state(self.dump, row).last.get("epoch", 0) <= row.epochs:  # else its run was extended before
                print(f"{row.command}\n", end="", flush=True)  # in one piece: other rows start at the same time
                for more in ([], ["-test"]):
                    if status := self._call(row, [*argv, *more]):
                        last_line = _last_line(log_of(self.dump, row))
                        if TAKEN in last_line:
                            return "skipped: another process runs it"
                        return "" if self.stopped is not None else f"failed with status {status}: {last_line}"
            result = records.write(self.dump, row)["result"]
        except (OSError, ValueError) as error:
            return f"failed: {error}"
        numbers = result["test_accuracy"], result["connectivity"]
        return "finished: test accuracy {:.2%}, connectivity {:.2%}".format(*numbers).replace("%", " %")

    def _call(self, row: Row, argv: Sequence[str]) -> int:
        """Runs the row's script to its end; returns its exit status."""
        script = f"{row.experiment}/{row.experiment}.py"
        share = dict.fromkeys(("OMP_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS"), str(self.threads))
        with open(log_of(self.dump, row), "ab") as log, self._starting:
            if self.stopped is not None:
                return 128 + self.stopped
            log.write(f"$ {shlex.join(['python', script, *argv])}\n".encode())
            log.flush()
            process = subprocess.Popen(
                [*PYTHON, str(REPOSITORY / script), *argv],
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**share, **os.environ},
                start_new_session=True,  # a terminal's Ctrl-C comes through the runner, once
            )
            self._processes.add(process)
        status = process.wait()
        with self._starting:
            self._processes.remove(process)
        return status


def _last_line(path: Path) -> str:
    try:
        lines = path.read_text("utf-8", "replace").strip().splitlines()
    except OSError as error:
        return f"its log cannot be read: {error}"
    return lines[-1] if lines else ""
