"""What is recorded of a run: what a line of its results says, what ran, and the files of a test."""

import io
import json
import platform
import shlex
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from measuring import Connections, prunable, total
from training import device, files
from training.options import REPOSITORY, arguments

BINS = 64  # of the distributions in the results


def folder_of(options: Namespace) -> Path:
    """Where the logs of a run are."""
    return options.dump_dir / "logs" / options.name


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
