"""Small pruned networks to export, their runs, and what has to be the same."""

from pathlib import Path
from typing import Any

import pytest
import torch

import measuring
from analysis.experiments import EXPERIMENTS
from analysis.snapshot import Snapshot
from c10.model import Cifar10Net
from mnist.model import MnistNet
from spiking import SpikingNetwork
from training.files import storage

forms = pytest.mark.parametrize("form", ["npz", "safetensors", "csr", "nir"], indirect=True)
packed_forms = pytest.mark.parametrize("form", ["npz", "safetensors", "csr"], indirect=True)

OLD = Path(__file__).parent / "exports"
OLD_EXPORTS = {"safetensors": OLD / "version-2.safetensors", "csr": OLD / "version-2.npz"}  # of :func:`old_network`
OLD_EXPORTS["npz"] = OLD / "version-3.npz"


@torch.no_grad()
def pruned(network: SpikingNetwork, sparsities, gain: float) -> SpikingNetwork:
    """Prunes a network at random, layer by layer to a sparsity, with weights that make it spike."""
    generator = torch.Generator().manual_seed(0)
    for weight, sparsity in zip(measuring.prunable(network).values(), sparsities, strict=True):
        kept = torch.rand(weight.shape, generator=generator) >= sparsity
        weight.mul_(kept * gain / max(1 - sparsity, 0.01) ** 0.5)
    return network.eval()


def mnist(first=0.9, second=0.5, T=8, width=800) -> MnistNet:
    torch.manual_seed(1)
    return pruned(MnistNet(T, width=width), (first, second), gain=4)


@torch.no_grad()
def cifar10(sparsities=(0.0, 0.3, 0.5, 0.7, 0.9, 0.8, 0.95, 0.5), T=4, width=8) -> Cifar10Net:
    """With running statistics, weights and biases of BatchNorm that all matter."""
    torch.manual_seed(1)
    network = pruned(Cifar10Net(T, width=width), sparsities, gain=3)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.05, 3)
            module.weight.normal_(1, 0.5)
            module.bias.normal_(0.6, 0.4)
            module.num_batches_tracked.fill_(77)
    network.fc[2].weight.mul_(8)
    network.fc[4].weight.mul_(8)
    return network


@torch.no_grad()
def old_network() -> MnistNet:
    """The network in :data:`OLD_EXPORTS`: its first layer has the layout gaps there, its second one a bitmap."""
    network = MnistNet(T=8)
    for weight, modulus, below in ((network.static_fc[1].weight, 1511, 3), (network.fc[1].weight, 7, 1)):
        number = torch.arange(weight.numel())
        kept = number * number % modulus < below
        weight.copy_(((number % 97 - 48.5) / 8).where(kept, 0.0).view_as(weight))
    return network.eval()


def about(network: SpikingNetwork) -> dict[str, Any]:
    """What a checkpoint's arguments and an export's description say of a network."""
    experiment = EXPERIMENTS["mnist" if isinstance(network, MnistNet) else "c10"]
    width = len(next(iter(measuring.prunable(network).values())))  # the first layer's units
    return {"experiment": experiment.name, "dataset": experiment.datasets[0].name, "T": network.T, "width": width}


def snapshot_of(network: SpikingNetwork) -> Snapshot:
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    return Snapshot(**about(network), run="a-run", epoch=3, state=state)


def images_for(network: SpikingNetwork, n: int = 16) -> torch.Tensor:
    shape = (1, 28, 28) if isinstance(network, MnistNet) else (3, 32, 32)
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def assert_same_counts(one, other, n: int = 16) -> None:
    counts = one(images_for(one, n))
    assert counts.sum() > 0
    assert len(counts.unique()) > 2
    assert torch.equal(other(images_for(one, n)), counts)


def write_run(folder: Path, network: SpikingNetwork, name: str = "a-run", **more: Any) -> Path:
    """The checkpoint of a run, as training leaves it, with what is given besides."""
    path = folder / "models" / name / "checkpoint.pt"
    path.parent.mkdir(parents=True)
    (folder / "logs" / name).mkdir(parents=True)
    state = {"format": 1, "arguments": about(network), "epoch": 3, "network": network.state_dict(), "optimizers": []}
    storage.write(path, state | more)
    return path.parent
