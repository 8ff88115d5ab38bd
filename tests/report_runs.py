"""Made-up runs for the report's tests: as many and as long as wanted, in the files that real runs write.

python -m tests.report_runs FOLDER --runs 20 --epochs 512     # to measure how long a report takes
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch

from training.files import storage

SHAPES = {
    "mnist": {"static_fc.1.weight": (800, 784), "fc.1.weight": (10, 800)},
    "c10": {
        "static_conv.0.weight": (256, 3, 3, 3),
        **{f"conv.{i}.weight": (256, 256, 3, 3) for i in (1, 4, 8, 11, 14)},
        "fc.2.weight": (2048, 16384),
        "fc.4.weight": (100, 2048),
    },
}
LIFS = {"mnist": ("fc.0", "fc.2"), "c10": (*(f"conv.{i}" for i in (0, 3, 6, 10, 13, 16)), "fc.3", "fc.5")}


def result(epoch, experiment="mnist", connectivity=0.1, accuracy=0.9, full=False, rng=None):
    """A line of results.jsonl."""
    rng = rng or np.random.default_rng(epoch)
    shapes = {name: math.prod(shape) for name, shape in SHAPES[experiment].items()}
    layers = {}
    for i, (name, weights) in enumerate(shapes.items()):
        share = min(1.0, connectivity * (1 + 0.5 * i))
        connected = round(share * weights)
        moved = [int(weights * share * rng.uniform(0.002, 0.004) / epoch**0.5) for _ in range(2)]
        layers[name] = {
            "connected": connected,
            "weights": weights,
            "sparsity": 1 - connected / weights,
            "connectivity": connected / weights,
            "pruned": moved[0] if connectivity < 1 else 0,
            "regrown": moved[1] if connectivity < 1 else 0,
        }
    total = sum(layer["connected"] for layer in layers.values()) / sum(shapes.values())
    line = {
        "epoch": epoch,
        "step": epoch * 468,
        "train_loss": 0.05 / epoch,
        "train_accuracy": accuracy,
        "test_accuracy": accuracy,
        "best_accuracy": accuracy + 0.001,
        "sparsity": 1 - total,
        "connectivity": total,
        "sparsity_with_bn": 1 - total,
        "connectivity_with_bn": total,
        "pruned": sum(layer["pruned"] for layer in layers.values()),
        "regrown": sum(layer["regrown"] for layer in layers.values()),
        "layers": layers,
        "learning_rate": 1e-4,
        "train_seconds": 1.5,
        "test_seconds": 0.25,
        "checkpoint_seconds": 0.05,
    }
    if full:
        line["neurons"] = {
            name: {"firing_rate": float(rng.uniform(0.02, 0.2)), "silent": float(rng.uniform(0, 0.4))}
            for name in LIFS[experiment]
        }
        line["distributions"] = {}
        for name in list(shapes)[:3]:
            theta = rng.normal(0.01 - 0.005 * math.log(epoch), 0.02, 4000)
            line["distributions"][name] = {
                what: dict(zip(("counts", "edges"), (a.tolist() for a in np.histogram(values, 64)), strict=True))
                for what, values in (("w", theta.clip(0) * rng.choice([-1, 1], 4000)), ("theta", theta))
            }
    return line


def write_run(dump, name, lines=(), experiment="mnist", dataset=None, arguments=None):
    """Writes run.json and results.jsonl of a run; returns its log folder."""
    logs = Path(dump) / "logs" / name
    logs.mkdir(parents=True)
    dataset = dataset or {"mnist": "mnist", "c10": "cifar10"}[experiment]
    settings = dict(experiment=experiment, dataset=dataset, mode="grad", soft=False, epoch=512, seed=2020)
    info = {
        "format": 1,
        "experiment": experiment,
        "name": name,
        "command": f"python {experiment}/{experiment}.py",
        "arguments": settings | (arguments or {}),
        "versions": {"torch": "2.15.0", "spikingjelly": "2.0.0"},
        "device": "cpu: 2 cores",
        "git_commit": "0123456789abcdef0123",
        "parameters": {"prunable": 635200, "others": 0, "layers": SHAPES[experiment]},
    }
    (logs / "run.json").write_text(json.dumps(info))
    (logs / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return logs


def write_checkpoint(dump, name, weights, epoch=1, experiment="mnist"):
    """Writes a checkpoint with these weights; returns its path."""
    models = Path(dump) / "models" / name
    models.mkdir(parents=True)
    state = {"format": 1, "arguments": {"experiment": experiment}, "epoch": epoch, "step": 1, "network": weights}
    storage.write(models / "checkpoint.pt", state)
    return models / "checkpoint.pt"


def write_runs(dump, runs, epochs, experiment="mnist", interval=32):
    """Writes runs of Grad R with several settings, the last one dense, every one with its checkpoint."""
    for i in range(runs):
        dense = i == runs - 1
        rng = np.random.default_rng(i)
        left = 1.0 if dense else 0.3 * 0.75**i
        lines = []
        for epoch in range(1, epochs + 1):
            progress = 1 - math.exp(-6 * epoch / epochs)
            accuracy = 0.98 - 0.004 * i * (not dense) - 0.3 * math.exp(-40 * epoch / epochs) + rng.normal(0, 0.001)
            full = epoch == 1 or epoch % interval == 0
            lines.append(result(epoch, experiment, 1 - (1 - left) * progress, accuracy, full, rng))
        penalty, s = ("1e-3", "5e-3")[i % 2], round(0.5 + 0.9 * (i // 2) / runs, 3)
        name = "lr-1e-4-b-128-T-8-" + ("no_prune" if dense else f"penalty-{penalty}-s-{s}-grad")
        write_run(dump, name, lines, experiment, arguments={"epoch": epochs, "mode": "no_prune" if dense else "grad"})
        generator = torch.Generator().manual_seed(i)
        weights = {}
        for layer, shape in SHAPES[experiment].items():
            weight = torch.randn(shape, generator=generator) / shape[1] ** 0.5
            weights[layer] = weight * (torch.rand(shape, generator=generator) < left)
        write_checkpoint(dump, name, weights, epochs, experiment)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Writes made-up runs.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=512)
    parser.add_argument("--experiment", choices=SHAPES, default="mnist")
    options = parser.parse_args()
    write_runs(options.folder, options.runs, options.epochs, options.experiment)
