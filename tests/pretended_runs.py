"""Runs the project's commands on a pretended GPU, and reads what its driver reports.

SPIKING_PRETENDED_GPU names the folder of the pretended GPU: its program ``run [-n GPUS] [-m GB] PROGRAM ARGS…`` runs a
Python program on torch's own CUDA code, over a driver whose kernels do nothing. It shows crashes, wrong devices, calls
that a capture forbids, memory and numbers of launches, but no results and no speed.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from forked import ForkServer, Program

REPOSITORY = Path(__file__).resolve().parent.parent
PATCHES = Path(__file__).resolve().parent / "pretended_gpu"
SET = ("LD_LIBRARY_PATH", "LD_PRELOAD", "OMP_WAIT_POLICY", "TORCHINDUCTOR_COMPILE_THREADS")  # by its program
LIBRARIES = ("torch._inductor.compile_fx", "torch._inductor.codegen.triton", "torchvision", "torch.utils.tensorboard")
HEAD = re.compile(r"== (.*): (\d+) launches, (\d+) graph launches, (\d+) mallocs, (\d+) frees;(.*)")
USED = re.compile(r"device (\d+) used [\d.]+ GB, peak ([\d.]+) GB;")
BEGINS = re.compile(r"capture begins on stream \d+ of device (\d+) \(current (\d+)\)")
ENDS = re.compile(r"capture ends: (\d+) nodes")
# of the user's machine, these would change what torch does
OWN = ("CUDA", "CUBLAS", "FAKE", "NVIDIA", "PRETENDED", "PYTHON", "PYTORCH", "TORCH", "TRITON", "LD_PRELOAD")


def unavailable() -> str | None:
    """Why no command can run on a pretended GPU here, in words; None if it can."""
    if not os.environ.get("SPIKING_PRETENDED_GPU"):
        return "needs a pretended GPU: set SPIKING_PRETENDED_GPU to its folder"
    if missing := [name for name in ("gcc", "g++") if shutil.which(name) is None]:
        return f"the pretended GPU needs {missing[0]}"
    if not (torch.version.cuda or "").startswith("13."):
        return f"the pretended GPU is one for CUDA 13, and torch is built with {torch.version.cuda or 'none'}"
    return None


@dataclass
class Period:
    """What a process did between two moments: each of these counts calls to the driver.

    Attributes:
        title: "start", "step 0", "step 1", …, "evaluation" or "after evaluation".
        kernels: launches by the kernel's name, besides those into a graph; memsets are among them.
        launched: their number without memsets, and with those into a graph.
        replays: launches of graphs, by their device.
        events: copies, synchronisations and more, by the driver's names.
        captures: of each capture its device, the current device, and the number of nodes.
        errors: calls that the driver refused, or that a capture does not allow.
        used: the most bytes in use, of each device that was asked for any.
    """

    title: str
    launched: int = 0
    mallocs: int = 0
    kernels: Counter = field(default_factory=Counter)
    replays: Counter = field(default_factory=Counter)
    events: Counter = field(default_factory=Counter)
    captures: list[list[int]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    used: dict[int, float] = field(default_factory=dict)

    @property
    def launches(self) -> int:
        """What the host launches one by one, beside a graph: kernels, memsets, and copies on the device."""
        return sum(self.kernels.values()) + self.events["D2D"]

    @property
    def synchronisations(self) -> int:
        """How often the host waits for the device; copies from and to memory that is not pinned wait, too."""
        waits = ("Synchronize", "pageable")
        return sum(n for name, n in self.events.items() if any(word in name for word in waits))


@dataclass
class Process:
    """A process of a command."""

    argv: list[str]
    periods: list[Period]
    memory: dict[int, dict[str, int]]  # of torch's allocator, by device: most allocated, most reserved, failures
    compiled: int  # graphs of torch.compile

    def of(self, title: str) -> list[Period]:
        """The periods with such a title."""
        return [period for period in self.periods if period.title.startswith(title)]

    @property
    def steps(self) -> list[Period]:
        return self.of("step")

    @property
    def captures(self) -> list[list[int]]:
        return [capture for period in self.periods for capture in period.captures]

    @property
    def errors(self) -> list[str]:
        return [error for period in self.periods for error in period.errors]

    @cached_property
    def total(self) -> Period:
        """All periods together."""
        total = Period("total")
        for period in self.periods:
            total.launched += period.launched
            total.mallocs += period.mallocs
            for key in ("kernels", "replays", "events", "captures", "errors"):
                setattr(total, key, getattr(total, key) + getattr(period, key))
            for device, used in period.used.items():
                total.used[device] = max(used, total.used.get(device, 0))
        return total

    def reserved(self, device: int = 0) -> float:
        """The most memory that torch has held of a device, in units of 1e9 bytes."""
        return self.memory[device]["reserved"] / 1e9

    def devices(self) -> set[int]:
        """Where anything was done: memory, captures, replays, synchronisations."""
        waited = [int(name.split("@")[1]) for name in self.total.events if "@" in name]
        captured = [device for capture in self.captures for device in capture[:2]]
        return {*self.total.used, *self.total.replays, *waited, *captured}


@dataclass
class Run:
    """A command that has ended: its exit status, what it printed, and its processes, in the order of their ends."""

    status: int
    out: str
    err: str
    processes: list[Process]

    @property
    def only(self) -> Process:
        (process,) = self.processes
        return process

    def check(self, devices: Collection[int] = (0,), status: int = 0) -> None:
        """The command has ended as it should: in no process a call that is not allowed, or work on another device."""
        assert self.status == status, self.err
        assert "Traceback" not in self.err
        for process in self.processes:
            assert process.errors == []
            assert process.devices() <= set(devices)


def parse(lines: Iterator[str]) -> list[Period]:
    """Reads the driver's log of a process."""
    periods, captures, errors = [], [], []
    for line in map(str.rstrip, lines):
        if match := HEAD.fullmatch(line):
            title, launched, _, mallocs, _, used = match.groups()
            used = {int(device): float(most) * 1e9 for device, most in USED.findall(used)}
            periods.append(Period(title, int(launched), int(mallocs), captures=captures, errors=errors, used=used))
            captures, errors = [], []
        elif match := re.fullmatch(r" +event graph launch on device (\d+), current (\d+): (\d+)", line):
            device, current, number = map(int, match.groups())
            periods[-1].replays[device] += number
            if device != current:
                periods[-1].errors.append(line.strip())
        elif match := re.fullmatch(r" +event (.*): (\d+)", line):
            periods[-1].events[match[1]] += int(match[2])
        elif match := re.fullmatch(r" +(\d+) (.*)", line):
            periods[-1].kernels[match[2]] += int(match[1])
        elif match := BEGINS.search(line):
            captures.append([int(match[1]), int(match[2]), 0])
        elif match := ENDS.search(line):
            captures[-1][2] = int(match[1])
        elif line.startswith("[fake"):
            errors.append(line.split("] ", 1)[1])
        else:
            raise ValueError(f"a line of the driver that is not understood: {line}")
    return periods


def program(gpus: int, gigabytes: float) -> list[str]:
    """What runs Python on such a machine, followed by its arguments."""
    return [str(Path(os.environ["SPIKING_PRETENDED_GPU"]) / "run"), "-n", str(gpus), "-m", str(gigabytes), "--"]


def environment() -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(OWN)}
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHON": sys.executable}


def fork_server(errors: Path) -> ForkServer:
    """One whose programs run on the pretended GPU; it imports what asks for no device."""
    return ForkServer(errors, environment(), LIBRARIES, program(1, 80), SET)


def start(
    argv: list[str],
    folder: Path,
    gpus: int,
    gigabytes: float,
    images: int,
    more: dict[str, str],
    server: ForkServer | None,
) -> subprocess.Popen | Program:
    logs = folder / "driver"
    logs.mkdir(parents=True)
    variables = environment() | {
        "PRETENDED_IMAGES": str(images),
        "PRETENDED_LOGS": str(logs),
        "PYTHONPATH": str(PATCHES),
        **more,
    }
    if server is not None and server.serves(variables):
        variables |= {"FAKE_NDEV": str(gpus), "FAKE_MEM_GB": str(gigabytes)}
        return server.start(argv, variables, REPOSITORY, folder)
    with open(folder / "out", "wb") as out, open(folder / "err", "wb") as err:
        return subprocess.Popen(
            [*program(gpus, gigabytes), *argv], cwd=REPOSITORY, env=variables, stdout=out, stderr=err
        )


def finished(status: int, folder: Path) -> Run:
    """Reads the reports of a command that has ended."""
    found = []
    for about in sorted((folder / "driver").glob("*.json"), key=lambda path: path.stat().st_mtime):
        content = json.loads(about.read_text())
        memory = {int(device): numbers for device, numbers in content.pop("memory").items()}
        with open(about.with_suffix(".log"), encoding="utf-8") as log:
            found.append(Process(periods=parse(log), memory=memory, **content))
    return Run(status, (folder / "out").read_text(), (folder / "err").read_text(), found)


def run(
    argv: list[str],
    folder: Path,
    *,
    gpus: int = 1,
    gigabytes: float = 80,
    images: int = 64,
    seconds: float = 600,
    stop: Callable[[], bool] | None = None,
    server: ForkServer | None = None,
    **environment: str,
) -> Run:
    """Runs ``python ARGV`` in the repository, on a machine with GPUs of so many gigabytes.

    Args:
        folder: an empty one, for what is printed and reported.
        images: the number of images to train on.
        seconds: after which the command has failed.
        stop: the command is sent SIGTERM once this returns True.
        server: starts it, instead of a new Python; not with other packages or programs than the server has found.
        environment: more variables.
    """
    process = start(argv, folder, gpus, gigabytes, images, environment, server)
    try:
        if stop is not None:
            while process.poll() is None and not stop():
                time.sleep(0.05)
            process.send_signal(signal.SIGTERM)
        status = process.wait(seconds)
    finally:
        process.kill()
        process.wait(60)
    return finished(status, folder)
