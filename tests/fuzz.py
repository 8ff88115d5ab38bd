"""Damages exports and checkpoints in every way it knows, and sees what the readers make of them: ``make fuzz``.

Every mutation has to be refused in one line that names the file, or be loaded as the very same network, in less than
2 s of processor time and 1 GB of memory above the start. Half of the mutations are blind: bytes changed, lost and put
in. Half know the format, and are *signed anew*: digests, CRCs and lengths fit, so that they reach the checks behind.
Such a file may hold another network rightly, as anyone can export one; then it has to be a sound one.

The mutation with a number is always the same: ``python tests/fuzz.py nir --first 17 --mutations 1 --keep FOLDER``.
"""

import argparse
import contextlib
import faulthandler
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from mutations import contents, mutation

import measuring
from analysis.export import load_pruned
from analysis.snapshot import Unreadable
from spiking import SpikingNetwork
from training.files import storage

SECONDS, MEMORY, HANG = 2.0, 1 << 30, 300  # of the processor; bytes; seconds on the clock, then the fuzzer ends itself
FORMS = ("npz", "safetensors", "gaps", "csr", "nir", "checkpoint")  # gaps: safetensors as version 2 wrote it


# -- what the readers make of them -------------------------------------------------------------------


@dataclass
class Outcome:
    """Of all mutations of a format: how many were refused and so on, the worst of all, and a line for every failure."""

    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("refused", "same", "anew"), 0))
    seconds: float = 0.0
    memory: int = 0
    failures: list[str] = field(default_factory=list)


def peak() -> int:
    """The most memory that was resident since the last :func:`reset_peak`; 0 where the system does not tell."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return 1024 * int(line.split()[1])
    return 0


def reset_peak() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def same(network: SpikingNetwork, other: SpikingNetwork) -> bool:
    """Whether two networks are of one kind, with the same weights to the bit, but for BatchNorm's, which csr folds."""
    if type(network) is not type(other) or network.T != other.T:
        return False
    weights, others = (
        [weight.numpy(force=True).tobytes() for weight in measuring.prunable(n).values()] for n in (network, other)
    )
    if weights != others:
        return False
    norms, others = (
        [m for m in n.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)] for n in (network, other)
    )
    x = torch.linspace(-2, 2, 64).view(1, 1, 8, 8)
    with torch.no_grad():
        return all(
            torch.equal(*(torch.nn.BatchNorm2d.forward(m, x.repeat(2, m.num_features, 1, 1)) for m in pair))
            for pair in zip(norms, others, strict=True)
        )


def sound(network: SpikingNetwork) -> bool:
    """Whether nothing in a network is odd."""
    tensors = list(network.state_dict().values())
    plain = all(type(t) is torch.Tensor and t.layout is torch.strided and t.is_contiguous() for t in tensors)
    finite = plain and all(bool(t.isfinite().all()) for t in tensors)
    return finite and type(network.T) is int and 0 < network.T < 10_000


def verdict(network: SpikingNetwork, path: Path, change: str, load: Callable[[Path], SpikingNetwork]) -> str:
    """What a reader makes of a file: refused, same, anew, or a line that says what is wrong with it."""
    try:
        loaded = load(path)
    except Unreadable as error:
        text = str(error)
        if len(text.splitlines()) == 1 and str(path) in text and len(text) < 1000:
            return "refused"
        return f"is refused in other than one line with its name: {text[:300]!r}"
    except BaseException as error:
        return f"ends in {type(error).__name__}: {str(error)[:300]}"
    if same(network, loaded):
        return "same"
    if change != "signed anew":
        return "is loaded as another network"
    return "anew" if sound(loaded) else "is loaded as a network that is not sound"


def quick_look(path: Path) -> None:
    """As the report looks at the checkpoints of many runs."""
    with contextlib.suppress(storage.DamagedError):
        storage.read(path, verify=False)


def fuzz(
    form: str,
    mutations: int,
    first: int = 0,
    keep: Path | None = None,
    load: Callable[[Path], SpikingNetwork] = load_pruned,
) -> Outcome:
    """Loads that many damaged files of a format, and says what came of it.

    Args:
        form: one of :data:`FORMS`.
        mutations: how many.
        first: the number of the first.
        keep: a folder in which files that fail are left.
        load: the reader.
    """
    outcome, whole = Outcome(), contents(form)
    with tempfile.TemporaryDirectory() as folder:
        for number in range(first, first + mutations):
            network, content = whole[number // 2 % len(whole)]
            content, change = mutation(form, number, content)
            path = Path(folder) / "file"
            path.write_bytes(content)
            failure = _one(outcome, network, path, change, load)
            if failure:
                outcome.failures.append(f"{form} {number} ({change}) {failure}")
                if keep:
                    keep.mkdir(parents=True, exist_ok=True)
                    (keep / f"{form}-{number}").write_bytes(content)
    return outcome


def _one(outcome: Outcome, network: SpikingNetwork, path: Path, change: str, load: Callable) -> str | None:
    faulthandler.dump_traceback_later(HANG, exit=True, file=sys.__stderr__)
    reset_peak()
    resident, start = peak(), sum(os.times()[:4])
    with warnings.catch_warnings(action="ignore"):
        found = verdict(network, path, change, load)
        if found in ("refused", "same", "anew") and change != "flip" and path.read_bytes()[:2] == b"PK":
            quick_look(path)
    seconds, memory = sum(os.times()[:4]) - start, peak() - resident
    faulthandler.cancel_dump_traceback_later()
    outcome.seconds, outcome.memory = max(outcome.seconds, seconds), max(outcome.memory, memory)
    if found not in outcome.counts:
        return found
    outcome.counts[found] += 1
    if seconds > SECONDS or memory > MEMORY:
        return f"takes {seconds:.1f} s and {memory / 2**20:.0f} MB"
    return None


def _form(text: str) -> str:
    if text not in FORMS:
        raise argparse.ArgumentTypeError(f"must be one of {', '.join(FORMS)}, not {text!r}")
    return text


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python tests/fuzz.py", description=__doc__.splitlines()[0])
    # no choices: in Python 3.11, argparse holds the absence of words against them
    parser.add_argument("forms", nargs="*", type=_form, metavar="FORMAT", help=f"{', '.join(FORMS)} (default: all)")
    parser.add_argument("--mutations", type=int, default=2000, help="of each format (default: %(default)s)")
    parser.add_argument("--first", type=int, default=0, help="number of the first (default: %(default)s)")
    parser.add_argument("--keep", type=Path, help="a folder for the files that fail")
    options = parser.parse_args(argv)
    print("format       mutations  refused  the same  another, signed anew  worst CPU s  worst MB  failures  seconds")
    failures = []
    for form in options.forms or FORMS:
        start = time.monotonic()
        outcome = fuzz(form, options.mutations, options.first, options.keep)
        failures += outcome.failures
        refused, unchanged, anew = outcome.counts.values()
        print(
            f"{form:12} {options.mutations:9} {refused:8} {unchanged:9} {anew:21} {outcome.seconds:12.2f} "
            f"{outcome.memory / 2**20:9.0f} {len(outcome.failures):9} {time.monotonic() - start:8.0f}",
            flush=True,
        )
    for failure in failures:
        print(failure)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
