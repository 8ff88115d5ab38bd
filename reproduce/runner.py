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
from enum import Enum, auto
from pathlib import Path
from typing import Any

import torch

from reproduce import records
from reproduce.grid import Row
from training import checkpoint, device
from training.errors import Refusal
from training.interrupt import known
from training.options import REPOSITORY

STOPPING = known(("SIGTERM", "SIGINT"))
# On Linux a row becomes its script after this. It is sent SIGTERM when the runner ends, even by SIGKILL, and takes no
# notice of SIGUSR1 before it trains.
FOLLOW = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
signal.signal(signal.SIGUSR1, signal.SIG_IGN)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""
PYTHON = [sys.executable, *(["-I", "-c", FOLLOW] if sys.platform == "linux" else [])]


def log_of(dump: Path, row: Row) -> Path:
    """Where the output of a row's commands is kept."""
    return dump / "rows" / f"{row.key}.log"


class End(Enum):
    """How it ended to run a row."""

    FINISHED = auto()
    FAILED = auto()
    TAKEN = auto()  # another process runs it
    STOPPED = auto()  # as the runner was


class Runner:
    """Runs rows, ``jobs`` at a time, each in a process of its own with its share of the cores, or a GPU in turn.

    With ``ranks``, so many processes train each row together, started by torchrun; on GPUs, each has its own. Every
    command gets the dump folder and ``places`` beside its row's arguments. ``stopped`` is the signal that stopped the
    runner; None while there is none.

    Raises:
        Refusal: there are GPUs, but fewer than ranks.
    """

    def __init__(self, dump: Path, places: Sequence[str], jobs: int, ranks: int = 1):
        self.dump, self.jobs, self.ranks = dump, jobs, ranks
        self.places = [*places, "--dump-dir", str(dump)]
        self.gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if 0 < self.gpus < ranks:
            raise Refusal(f"argument --ranks: {ranks} ranks need as many GPUs; this machine has {self.gpus}")
        self.threads = max(1, device.cores() // (jobs * ranks))
        self.stopped: int | None = None
        self._processes: set[subprocess.Popen] = set()
        self._starting = threading.RLock()  # so that a signal misses no process; one may come during another

    def run(self, rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
        """Runs the rows that are not finished; returns those that failed, and those that another process has.

        A signal is handed on to the rows that run, but SIGUSR1 not to torchrun, which would end. After SIGTERM or
        SIGINT no other row starts.
        """
        (self.dump / "rows").mkdir(parents=True, exist_ok=True)
        waiting = [row for row in rows if records.finished(self.dump, row) is None]
        running: dict[int, tuple[Row, Future[tuple[End, str]]]] = {}  # at most one row of a run
        ends: dict[Row, End] = {}
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
                        ends[row], text = future.result()
                        if ends[row] != End.STOPPED:
                            progress = records.progress(self.dump, rows).line(self.jobs)
                            print(f"{row.key} {text}\n{progress}", flush=True)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        failed, taken = ([row for row in rows if ends.get(row) == end] for end in (End.FAILED, End.TAKEN))
        return failed, taken

    def _hand_on(self, number: int, frame: Any) -> None:
        with self._starting:
            if number in STOPPING:
                self.stopped = number
            elif self.ranks > 1:
                return
            for process in self._processes:
                with contextlib.suppress(ValueError):  # Windows cannot pass on a Ctrl-C, but sends it to all itself
                    process.send_signal(number)

    def _finish(self, row: Row, slot: int) -> tuple[End, str]:
        """Trains and tests a row, and writes its record; returns how it ended, also in words."""
        gpus = [(slot * self.ranks + rank) % self.gpus for rank in range(self.ranks)] if self.gpus else []
        argv, gpu = [*row.argv, *self.places], ["-gpu", str(gpus[0])] if gpus else []
        try:
            if records.finished(self.dump, row) is not None:  # by another runner, since this one began
                return End.FINISHED, "was finished by another runner"
            if records.state(self.dump, row).last.get("epoch", 0) <= row.epochs:  # else its run was extended before
                print(f"{row.command}\n", end="", flush=True)  # in one piece: other rows start at the same time
                for more in ([], ["-test"]):
                    if self.ranks > 1 and not more:  # a test is one process
                        status = self._call(row, argv, gpus)
                    else:
                        status = self._call(row, [*argv, *gpu, *more])
                    if status:
                        last_line = _last_line(log_of(self.dump, row), self.ranks > 1)
                        if checkpoint.TAKEN in last_line:
                            return End.TAKEN, "skipped: another process runs it"
                        end = End.FAILED if self.stopped is None else End.STOPPED
                        return end, f"failed with status {status}: {last_line}"
            result = records.write(self.dump, row)["result"]
        except (OSError, ValueError) as error:
            return End.FAILED, f"failed: {error}"
        numbers = result["test_accuracy"], result["connectivity"]
        return End.FINISHED, "finished: test accuracy {:.2%}, connectivity {:.2%}".format(*numbers).replace("%", " %")

    def _call(self, row: Row, argv: Sequence[str], gpus: Sequence[int] | None = None) -> int:
        """Runs the row's script to its end; returns its exit status.

        Args:
            gpus: of several ranks, none on a CPU; None for one process.
        """
        script, launcher = f"{row.experiment}/{row.experiment}.py", []
        share = dict.fromkeys(("OMP_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS"), str(self.threads))
        environment = {**share, **os.environ}
        if gpus is not None:
            launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(self.ranks)]
            visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
            names = visible if len(visible) >= self.gpus > 0 and visible[0] else [*map(str, range(self.gpus))]
            environment |= {"CUDA_VISIBLE_DEVICES": ",".join(names[gpu] for gpu in gpus)} if gpus else {}
        with open(log_of(self.dump, row), "ab") as log, self._starting:
            if self.stopped is not None:
                return 128 + self.stopped
            log.write(f"$ {shlex.join(['python', *launcher, script, *argv])}\n".encode())
            log.flush()
            process = subprocess.Popen(
                [*PYTHON, *launcher, str(REPOSITORY / script), *argv],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # a terminal's Ctrl-C comes through the runner, once
            )
            self._processes.add(process)
        status = process.wait()
        with self._starting:
            self._processes.remove(process)
        return status


def _last_line(path: Path, of_ranks: bool = False) -> str:
    """The last line of a log; of several ranks that of the script, as torchrun's report comes after it."""
    try:
        lines = path.read_text("utf-8", "replace").strip().splitlines()
    except OSError as error:
        return f"its log cannot be read: {error}"
    if of_ranks:
        begin = max((number for number, line in enumerate(lines) if line.startswith("$ ")), default=0)
        lines = [line for line in lines[begin:] if ": error: " in line] or lines
    return lines[-1] if lines else ""
