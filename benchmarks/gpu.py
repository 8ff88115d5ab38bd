"""Tells in minutes what this project does on a GPU: make gpu, or python -m benchmarks.gpu.

It runs the tests that need a GPU; compares every mode with the CPU; measures speed and memory of each execution
and precision; profiles a step; measures the optimizers beside Adam; and trains on CIFAR-10's images, where
--dataset-dir has them, for the rest of the time. Each part runs in a process of its own, which is stopped when its
share of the time is over. What is found is written at once, to gpu.md and gpu.json in the folder --out; what the parts
print is in gpu.log. It needs no network.
"""

import argparse
import contextlib
import json
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from types import MappingProxyType

import torch

from benchmarks.gpu_parts import C10, FAST, PARTS, SMALL
from benchmarks.gpu_report import Report
from benchmarks.tables import table, versions
from training.command_line import Parser, check_writable, command, folder_path, number
from training.errors import Refusal
from training.run_info import git_commit, processor

REPOSITORY = Path(__file__).resolve().parent.parent
GRACE = 10.0  # seconds that a process has to stop by itself
FIRST = ("step", "models", "schedule", "batches_on_gpu", "divergence", "energy", "export", "storage")  # files of tests
TESTS, TRAINING = "Tests that need a GPU", "Training on CIFAR-10's images, fast recipe"
SHARES = {"tests": 0.12, **{name: part.share for name, part in PARTS.items()}, "training": 0.30}
RUNS = {  # the first two have as many epochs as both have time for, then the next two
    "5 %": "-m grad --connectivity 0.05",
    "dense": "-m no_prune",
    "1 %": "-m grad --connectivity 0.01",
    "30 %": "-m grad --connectivity 0.3",
}
START = 40.0  # seconds that a run needs before its first epoch, until one has told


def finish(
    argv: list[str], log: Path, seconds: float, environment: Mapping[str, str] = MappingProxyType({})
) -> str | None:
    """Runs a command for at most so many seconds; returns why it failed, in one line."""
    with open(log, "ab") as out:
        out.write(f"\n$ {shlex.join(argv)}\n".encode())
        out.flush()
        begin = out.tell()
        process = subprocess.Popen(
            argv,
            cwd=REPOSITORY,
            # columns for pytest's reasons; unbuffered, as an error would otherwise come before what was printed earlier
            env={**os.environ, "COLUMNS": "200", "PYTHONUNBUFFERED": "1", **environment},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
        try:
            status = process.wait(max(0.0, seconds - GRACE))
        except subprocess.TimeoutExpired:
            return f"stopped after {seconds - GRACE:.0f} s, its share of the time"
        finally:
            stop(process)
    if status == 0:
        return None
    if status < 0:
        return f"ended by {signal.Signals(-status).name}"
    lines = log.read_bytes()[begin:].decode(errors="replace").split("\n")
    said = [line.strip() for line in lines if line.strip()]
    return said[-1][:300] if said else f"exit status {status}"


def stop(process: subprocess.Popen) -> None:
    """Ends a process, and those that it has started, where the system has groups of processes."""
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
    if hasattr(os, "killpg"):
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
    elif process.poll() is None:
        process.kill()
    process.wait()


# -- tests -------------------------------------------------------------------------------------------


def run_tests(report: Report, log: Path, seconds: float, small: bool) -> None:
    begin = log.stat().st_size if log.exists() else 0
    which = ["tests/test_step.py"] if small else gpu_tests()
    options = ["-v", "--tb=short", "--continue-on-collection-errors", "-p", "no:cacheprovider"]
    # read at the first product of a process, and tests of deterministic runs may come after it
    workspace = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    reason = finish([sys.executable, "-m", "pytest", "-m", "gpu", *options, *which], log, seconds, workspace)
    counts, failures = outcomes(log.read_bytes()[begin:].decode(errors="replace"))
    said = ", ".join(f"{n} {outcome.lower()}" for outcome, n in counts.items()) or "none ran"
    note = said if reason is None or (failures and not reason.startswith("stopped")) else f"{said}; {reason}"
    made = table("Tests that did not pass", ("test", "reason"), failures) if failures else None
    report.add(TESTS, made, note=note)


def gpu_tests() -> list[str]:
    """The files with tests that need a GPU, in the order in which they tell most, for there may be no time for all."""
    files = [path for path in (REPOSITORY / "tests").glob("test_*.py") if "mark.gpu" in path.read_text("utf-8")]
    places = {f"test_{name}.py": place for place, name in enumerate(FIRST)}
    files.sort(key=lambda path: (places.get(path.name, len(FIRST)), path.name))
    return [f"tests/{path.name}" for path in files]


def outcomes(text: str) -> tuple[Counter, list[tuple[str, str]]]:
    """The outcomes of pytest -v, by kind, and its failures with their reasons, where it has come to the summary."""
    found = re.findall(r"^(tests/.*?) (PASSED|FAILED|ERROR|SKIPPED)\b", text, re.MULTILINE)
    reasons = dict(re.findall(r"^(?:FAILED|ERROR) (tests/.*?) - (.*)$", text, re.MULTILINE))
    bad = dict.fromkeys([name for name, outcome in found if outcome in ("FAILED", "ERROR")], "") | reasons
    return Counter(outcome for _, outcome in found), [(name, reason[:200]) for name, reason in bad.items()]


# -- training ----------------------------------------------------------------------------------------


@dataclass
class Pace:
    """Seconds: of an epoch with its test, None while unknown, and of a run beside its epochs."""

    epoch: float | None
    start: float

    def epochs(self, seconds: float, runs: int) -> int:
        """How many epochs each of some runs can have."""
        if self.epoch is None:
            return 1  # it will tell
        return min(C10.fast.epochs, int((seconds / runs - self.start) / self.epoch))


def has_images(folder: Path | None) -> bool:
    """Whether c10.py finds its images there; it would download missing ones."""
    names = ("train", "cifar-10-batches-py")
    return folder is not None and any((folder / name).is_dir() for name in names)


def train(report: Report, log: Path, end: float, options: argparse.Namespace) -> None:
    """Trains as many networks as there is time for, until ``end`` on the clock."""
    if not has_images(options.dataset_dir):
        report.add(TRAINING, note="Left out: --dataset-dir names no folder with CIFAR-10's images.")
        return
    found = [report.number(PARTS["c10-bf16"].title, FAST, column) for column in ("s/epoch", "s/test set")]
    pace, rows, together = Pace(None if None in found else sum(found), START), [], 0
    head = ("run", "epochs", "test accuracy", "best", "connectivity", "s/epoch", "s/test", "s in all", "")
    for place, (name, mode) in enumerate(RUNS.items()):
        first = place % 2 == 0  # of two that have as many epochs
        left = end - GRACE - time.monotonic()
        epochs = pace.epochs(left, 2 if first else 1) or pace.epochs(left, 1)
        epochs = epochs if first or not together else min(epochs, together)
        together = epochs = min(epochs, 1) if options.small else epochs
        if epochs < 1:
            rows.append((name, *("-",) * 7, "left out: no time for an epoch"))
        else:
            line = f"{mode} --recipe fast --precision bf16 -N {epochs} {SMALL['c10'] if options.small else ''}"
            rows.append((name, *run_row(report, log, name, line, epochs, options.dataset_dir, left, pace)))
        report.add(TRAINING, table("Grad R at a connectivity, and dense", head, rows))


def run_row(report: Report, log: Path, name: str, line: str, epochs: int, images: Path, left: float, pace: Pace):
    """Trains a network for at most ``left`` seconds; returns the cells of its row, and notes its pace."""
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        places = ["--dataset-dir", str(images.resolve()), "--dump-dir", folder, "--checkpoint-minutes", "1000"]
        reason = finish([sys.executable, "c10/c10.py", *line.split(), *places], log, left + GRACE)
        lines = results(Path(folder))
    took, cells = time.monotonic() - begin, ("-",) * 5
    report.add(TRAINING, **{f"epochs, {name}": lines})
    if lines:
        train, test = (statistics.median(line[key] for line in lines) for key in ("train_seconds", "test_seconds"))
        pace.epoch, pace.start = (
            train + test,
            took - sum(line["train_seconds"] + line["test_seconds"] for line in lines),
        )
        shares = (lines[-1][key] for key in ("test_accuracy", "best_accuracy", "connectivity"))
        cells = (*(f"{100 * share:.2f} %" for share in shares), f"{train:.2f}", f"{test:.2f}")
    return f"{len(lines)} of {epochs}", *cells, f"{took:.0f}", reason or ""


def results(folder: Path) -> list[dict]:
    """The lines of a run's results.jsonl, without those of its layers."""
    lines = [line for path in folder.glob("logs/*/results.jsonl") for line in path.read_text("utf-8").splitlines()]
    return [{key: value for key, value in json.loads(line).items() if not isinstance(value, dict)} for line in lines]


# --


def driver() -> str:
    """The driver's version, and what the card may use."""
    argv = ["nvidia-smi", "--query-gpu=driver_version,power.limit,clocks.max.sm", "--format=csv,noheader"]
    try:
        found = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return "unknown, as there is no nvidia-smi"
    return "; ".join(found.splitlines())


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    what = {"prog": "python -m benchmarks.gpu", "description": __doc__}
    parser = Parser(**what, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, positive = parser.add_argument, number("> 0", lambda x: x > 0)
    # fmt: off
    add("--minutes", type=positive, default=9.0, metavar="M", help="the time for all of it (default: 9)")
    add("--dataset-dir", type=folder_path, metavar="DIR",
        help="folder with CIFAR-10's images, as c10.py takes it (default: none, and no training)")
    add("--out", type=folder_path, default=Path("gpu-report"), metavar="DIR",
        help="folder for the report; with --only, one that is there gets more parts (default: %(default)s)")
    add("--only", nargs="+", choices=SHARES, help="the parts to measure, which share the time (default: all)")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try it out (default: %(default)s)")
    add("--small", action="store_true", help="small networks and few steps, to try it out (default: off)")
    add("--commit", metavar="HASH", help="what is measured (default: the commit that git names)")
    # fmt: on
    return parser.parse_args(argv)


@command
def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise Refusal(f"argument --device: PyTorch {torch.__version__} finds no GPU; cpu is there to try this out")
    check_writable("--out", options.out)
    out = options.out.resolve()
    log = out / "gpu.log"
    if not options.only:
        for name in ("gpu.json", "gpu.md", "gpu.log"):
            (out / name).unlink(missing_ok=True)
    report = Report(out)
    report.head = {
        "card": report.head.get("card", "unknown"),  # until a part tells
        "date": str(date.today()),
        "commit": options.commit or git_commit() or "unknown",
        "command": shlex.join(["python", "-m", "benchmarks.gpu", *(sys.argv[1:] if argv is None else argv)]),
        "versions": f"{versions(('torch', 'torchvision', 'spikingjelly'))}, CUDA {torch.version.cuda}",
        "driver": driver(),
        "processor": processor(),
    }
    stopped = signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that no process is left behind
    try:
        measure(report, log, options)
    finally:
        signal.signal(signal.SIGTERM, stopped)
    print(f"The report is {out / 'gpu.md'}, with its numbers in gpu.json.")
    return 0


def measure(report: Report, log: Path, options: argparse.Namespace) -> None:
    chosen = {name: share for name, share in SHARES.items() if name in (options.only or SHARES)}
    begin, passed = time.monotonic(), 0.0
    for name, share in chosen.items():
        passed += share
        end = begin + 60 * options.minutes * passed / sum(chosen.values())
        title = PARTS[name].title if name in PARTS else {"tests": TESTS, "training": TRAINING}[name]
        started = time.monotonic()
        print(f"{title}, at most {max(0.0, end - started):.0f} s", flush=True)
        report.parts.pop(title, None)
        report.add(title)
        if end - started < 2 * GRACE:
            report.add(title, note="Left out: no time.")
        elif name == "tests":
            run_tests(report, log, end - started, options.small)
        elif name == "training":
            train(report, log, end, options)
        else:
            small = ["--small"] if options.small else []
            argv = ["-m", "benchmarks.gpu_parts", name, "--device", options.device, "--out", str(log.parent), *small]
            reason = finish([sys.executable, *argv], log, end - started)
            report.read()
            if reason:
                report.add(title, note=f"Not complete: {reason}")
        report.add(title, seconds=time.monotonic() - started)


if __name__ == "__main__":
    sys.exit(main())
