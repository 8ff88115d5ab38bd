"""What a run records: TensorBoard, its results, and the files of a test.

The tags are those of the published implementation. Steps count the updates, epochs the finished
epochs, at the time of measuring: train/loss at step 0 is the loss before the first update.
"""

import contextlib
import errno
import io
import json
import os
import platform
import shlex
import subprocess
import sys
import threading
from argparse import Namespace
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from training import device, files
from training.measure import Connections, prunable, total
from training.options import REPOSITORY, arguments

RESULTS = "results.jsonl"
BINS = 64  # of the distributions in the results


def folder_of(options: Namespace) -> Path:
    """Where the logs of a run are."""
    return options.dump_dir / "logs" / options.name


def is_log(name: str) -> bool:
    """Whether a file of this name grows while a run goes on: the results and TensorBoard's events."""
    return name == RESULTS or "tfevents" in name


def log_files(folder: Path) -> list[Path]:
    """The files of a log folder that grow while a run goes on."""
    return sorted(path for path in folder.glob("*") if is_log(path.name) and path.is_file())


def _rewind(folder: Path, lengths: dict[str, int]) -> None:
    """Takes back what was logged after a checkpoint that knows these lengths."""
    for path in log_files(folder):
        if path.name not in lengths:
            path.unlink()
        elif path.stat().st_size > lengths[path.name]:
            os.truncate(path, lengths[path.name])
    for name, length in lengths.items():
        path = folder / name
        there = path.stat().st_size if path.exists() else 0
        if there < length:
            print(f"{path} has lost its end ({there} bytes of {length}); going on behind it.", flush=True)


@contextlib.contextmanager
def _quiet_writer() -> Iterator[None]:
    """Keeps Python from printing what TensorBoard's thread fails with: it is raised where the next thing is logged."""
    before = threading.excepthook

    def hook(failure: threading.ExceptHookArgs) -> None:
        if not type(failure.thread).__module__.startswith("tensorboard."):
            before(failure)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = before


class Recorder:
    """Writes a run's TensorBoard log, and its results: a line of JSON for each epoch.

    Args:
        folder: the log folder.
        lengths: of the log files at the checkpoint from which the run goes on, as :meth:`lengths` gave
            them; what an interrupted run logged after it is taken back, to be logged again.

    Raises:
        OSError: as every method, where the folder cannot be written (any more); it names the folder or a file in it.
            TensorBoard writes in a thread: its failure is raised by a later call.
    """

    def __init__(self, folder: Path, lengths: dict[str, int]):
        self.folder = folder
        _rewind(folder, lengths)
        with contextlib.ExitStack() as stack:
            stack.enter_context(_quiet_writer())
            with self._naming():
                self.writer = SummaryWriter(str(folder))
            self._quiet = stack.pop_all()

    @contextlib.contextmanager
    def _naming(self) -> Iterator[None]:
        with files.naming(self.folder):
            try:
                yield
            except OSError:
                self._check_folder()
                raise

    def _check_folder(self) -> None:
        if not self.folder.is_dir():
            raise FileNotFoundError(errno.ENOENT, "the folder was removed while the run went on", str(self.folder))

    def lengths(self) -> dict[str, int]:
        """Flushes all that was logged, and gives the length of every log file."""
        with self._naming():
            self.writer.flush()
            self._check_folder()
            return {path.name: path.stat().st_size for path in log_files(self.folder)}

    def results(self, line: dict[str, Any]) -> None:
        """Appends the results of an epoch, in one write: who reads meanwhile sees whole lines, but perhaps the last."""
        rest = (json.dumps(line, allow_nan=False) + "\n").encode()
        with files.naming(self.folder / RESULTS), open(self.folder / RESULTS, "ab", buffering=0) as file:
            while rest:  # a disk that becomes full takes a part, and refuses the rest
                rest = rest[file.write(rest) :]

    def _scalars(self, values: dict[str, float], step: int) -> None:
        with self._naming():
            for tag, value in values.items():
                self.writer.add_scalar(tag, value, step)

    def training(self, step: int, loss: float, accuracy: float) -> None:
        self._scalars({"train/loss": loss, "train/acc": accuracy}, step)

    def accuracy(self, epoch: int, accuracy: float) -> None:
        self._scalars({"test_acc": accuracy}, epoch)

    def connections(
        self,
        epoch: int,
        layers: dict[str, Connections],
        rewired: dict[str, tuple[int, int]],
        others: int,
    ) -> None:
        """Records sparsity and rewiring; ``others`` is the number of parameters that are never pruned."""
        values: dict[str, float] = {}
        for name, layer in layers.items():
            pruned, regrown = rewired[name]
            values[f"layer sparsity/{name}"] = layer.sparsity
            values[f"prune_cnt/{name}"] = pruned
            values[f"regrow_cnt/{name}"] = regrown
            values[f"prune-regrow/{name}"] = pruned - regrown
        if others:
            values["sparsity/with bn"] = total(layers, others).sparsity
            values["sparsity/without bn"] = total(layers).sparsity
        else:
            values["sparsity"] = total(layers).sparsity
        values["connectivity"] = total(layers).connectivity
        self._scalars(values, epoch)

    def describe(self, command: str, arguments: dict[str, Any]) -> None:
        """Records the command line (the text tab) and the arguments (the hparams tab, beside the last recordings)."""
        known = {key: value for key, value in arguments.items() if value is not None}
        summaries = hparams(known, dict.fromkeys(("test_acc", "connectivity"), 0.0))
        with self._naming():
            self.writer.add_text("command", command)
            for summary in summaries[:2]:  # the third says that the run has ended
                self.writer.file_writer.add_summary(summary)

    def neurons(self, epoch: int, rates: dict[str, Tensor]) -> None:
        """Records, per LIF layer, the mean firing rate and the share of neurons silent on the whole test set."""
        for name, layer in neuron_results(rates).items():
            self._scalars(
                {f"avg_firing_rate/{name}": layer["firing_rate"], f"nonfire_prop/{name}": layer["silent"]}, epoch
            )

    def weights(
        self, epoch: int, network: nn.Module, optimizers: list[Optimizer], names: tuple[str, ...] | None
    ) -> None:
        """Records the distributions of weights and, where the algorithm has it, of theta; all layers, or ``names``."""
        for name, tensors in weights_and_theta(network, optimizers, names):
            for kind, values in tensors.items():
                with self._naming():
                    self.writer.add_histogram(f"{name}-{kind}", values, epoch)

    def close(self) -> None:
        with self._quiet, self._naming():
            self.writer.close()

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: Any) -> None:
        try:
            self.close()
        except OSError:
            if error is None:
                raise  # else the first failure is the one to tell


def epoch_results(
    *,
    epoch: int,
    step: int,
    train_loss: float,
    train_accuracy: float,
    test_accuracy: float,
    best_accuracy: float,
    learning_rate: float,
    penalty: float | None,
    layers: dict[str, Connections],
    rewired: dict[str, tuple[int, int]],
    others: int,
    seconds: dict[str, float],
) -> dict[str, Any]:
    """What a line of the results says of an epoch; accuracies, sparsities and connectivities are fractions.

    Args:
        epoch: finished epochs.
        step: updates in all.
        train_loss: mean over the epoch's batches.
        train_accuracy: share of the epoch's images that were right, each when its batch was trained on.
        test_accuracy: after the epoch.
        best_accuracy: the highest test accuracy so far.
        learning_rate: of the epoch's last step.
        penalty: Grad R's alpha or Deep R's l1 in the epoch's last step; None without pruning.
        layers: connections by the weights' names.
        rewired: connections pruned and regrown since the epoch before, by the weights' names.
        others: the number of parameters that are never pruned.
        seconds: spent on train, test and checkpoint since the line before.
    """
    everything, with_bn = total(layers), total(layers, others)
    return {
        "epoch": epoch,
        "step": step,
        "train_loss": train_loss,
        "train_accuracy": train_accuracy,
        "test_accuracy": test_accuracy,
        "best_accuracy": best_accuracy,
        "sparsity": everything.sparsity,
        "connectivity": everything.connectivity,
        "sparsity_with_bn": with_bn.sparsity,
        "connectivity_with_bn": with_bn.connectivity,
        "pruned": sum(pruned for pruned, _ in rewired.values()),
        "regrown": sum(regrown for _, regrown in rewired.values()),
        "layers": {
            name: {
                "connected": layer.connected,
                "weights": layer.weights,
                "sparsity": layer.sparsity,
                "connectivity": layer.connectivity,
                "pruned": rewired[name][0],
                "regrown": rewired[name][1],
            }
            for name, layer in layers.items()
        },
        "learning_rate": learning_rate,
        "penalty": penalty,
        **{f"{what}_seconds": seconds[what] for what in ("train", "test", "checkpoint")},
    }


def neuron_results(rates: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    """Mean firing rate and share of silent neurons of each LIF layer, from the rates of its neurons."""
    return {
        name: {"firing_rate": float(rate.mean()), "silent": float((rate == 0).float().mean())}
        for name, rate in rates.items()
    }


def distribution(values: Tensor) -> dict[str, list]:
    """A histogram from the least to the greatest value: ``edges`` (one more than bins) and ``counts``."""
    values = values.detach().flatten()
    low, high = (float(end) for end in values.aminmax())
    if low == high:
        return {"edges": [low, high], "counts": [values.numel()]}
    bins = ((values - low) * (BINS / (high - low))).long().clamp_(0, BINS - 1)
    edges = [low + (high - low) * i / BINS for i in range(BINS)]
    return {"edges": [*edges, high], "counts": torch.bincount(bins, minlength=BINS).tolist()}


def distributions(
    network: nn.Module, optimizers: list[Optimizer], names: tuple[str, ...] | None
) -> dict[str, dict[str, Any]]:
    """The distributions of weights and, where the algorithm has it, of theta; of all layers, or of ``names``."""
    return {
        name: {kind: distribution(values) for kind, values in tensors.items()}
        for name, tensors in weights_and_theta(network, optimizers, names)
    }


def weights_and_theta(
    network: nn.Module, optimizers: list[Optimizer], names: tuple[str, ...] | None
) -> Iterable[tuple[str, dict[str, Tensor]]]:
    """Yields, for all layers or those of ``names``, the weights as w and, where the algorithm has it, theta."""
    for name, weight in prunable(network).items():
        if names is not None and name not in names:
            continue
        tensors = {"w": weight.detach()}
        for optimizer in optimizers:
            if "theta" in optimizer.state.get(weight, {}):
                tensors["theta"] = optimizer.state[weight]["theta"]
        yield name, tensors


def describe(options: Namespace, network: nn.Module, versions: dict[str, str]) -> dict[str, Any]:
    """What ``run.json`` says of a run: its arguments, versions, device, processor, commit and parameters."""
    weights = prunable(network)
    prunable_weights = sum(weight.numel() for weight in weights.values())
    return {
        "format": 1,
        "experiment": options.experiment,
        "name": options.name,
        "command": shlex.join(["python", *sys.argv]),
        "arguments": arguments(options),
        "versions": {"python": ".".join(map(str, sys.version_info[:3])), **versions},
        "device": device.name(options.device),
        "cpu": processor(),
        "git_commit": _git_commit(),
        "parameters": {
            "prunable": prunable_weights,
            "others": sum(parameter.numel() for parameter in network.parameters()) - prunable_weights,
            "layers": {name: list(weight.shape) for name, weight in weights.items()},
        },
    }


def processor() -> str:
    """The machine's CPU, with the number of its cores."""
    try:
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        return f"{len(names)} cores of {names[0].split(':')[1].strip()}"
    except (OSError, IndexError):
        return platform.processor()


def _git_commit() -> str | None:
    """The commit that runs, with "+" behind it if files differ from it; None where that cannot be told."""
    try:
        commit, changes = (
            subprocess.run(["git", "-C", REPOSITORY, *command], capture_output=True, text=True, check=True, timeout=10)
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return commit.stdout.strip() + ("+" if changes.stdout.strip() else "")


def write_json(path: Path, content: Any) -> None:
    files.write_whole(path, json.dumps(content, indent=2) + "\n")


def percent(fraction: float) -> str:
    return f"{100 * fraction:.2f} %"


def store_test(folder: Path, epoch: int, lines: list[str], numbers: dict[str, Any], rates: dict[str, Tensor]) -> None:
    """Prints a test's results and stores them: ``test.json``, and ``rate-<LIF>-epoch-<epoch>.npy`` per LIF layer."""
    folder.mkdir(parents=True, exist_ok=True)
    print("\n".join(lines))
    for name, rate in rates.items():
        array = io.BytesIO()
        np.save(array, rate.cpu().numpy())
        files.write_whole(folder / f"rate-{name}-epoch-{epoch}.npy", array.getvalue())
    write_json(folder / "test.json", numbers)
    print(f"\nfiring rates of every neuron and test.json are in {folder}")
