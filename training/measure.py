"""What is measured, each thing in one place: connections, spikes, accuracy.

A connection is connected when its weight is not 0. Sparsity is the share of pruned (not connected)
weights, connectivity = 1 - sparsity the share of connected ones.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from spikingjelly.activation_based import neuron
from torch import Tensor, nn
from torch.nn import functional as F


def prunable(network: nn.Module) -> dict[str, nn.Parameter]:
    """The weights that pruning is about, by name: those of linear and convolutional layers, so all but BatchNorm's."""
    return {
        f"{name}.weight": module.weight
        for name, module in network.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d))
    }


def connected(weight: Tensor) -> Tensor:
    """Which connections are connected: bool, of the weight's shape. The one definition: w != 0."""
    return weight.detach() != 0


@dataclass(frozen=True)
class Connections:
    """How many connections there are, of how many weights; per layer or in all."""

    connected: int
    weights: int

    @property
    def pruned(self) -> int:
        return self.weights - self.connected

    @property
    def connectivity(self) -> float:
        """Share of connected weights."""
        return self.connected / self.weights

    @property
    def sparsity(self) -> float:
        """Share of pruned weights."""
        return self.pruned / self.weights


def count(masks: dict[str, Tensor]) -> dict[str, Connections]:
    """Counts the connections of every layer from its mask of connected weights."""
    return {name: Connections(int(mask.sum()), mask.numel()) for name, mask in masks.items()}


def total(layers: dict[str, Connections], others: int = 0) -> Connections:
    """All layers together; ``others`` further parameters, such as BatchNorm's, count as connected."""
    return Connections(
        sum(layer.connected for layer in layers.values()) + others,
        sum(layer.weights for layer in layers.values()) + others,
    )


def rewired(before: dict[str, Tensor], after: dict[str, Tensor]) -> dict[str, tuple[int, int]]:
    """Counts, per layer, the connections pruned and those regrown between two sets of masks."""
    return {
        name: (int((before[name] & ~mask).sum()), int((~before[name] & mask).sum())) for name, mask in after.items()
    }


def loss_function(counts: Tensor, labels: Tensor, T: int) -> Tensor:
    """Mean squared error between firing rates, counts / T with counts [N, 10], and the one-hot labels."""
    return F.mse_loss(counts / T, F.one_hot(labels, counts.shape[1]).to(counts.dtype))


def correct(counts: Tensor, labels: Tensor) -> Tensor:
    """How many predictions, the class with the most spikes, are right: 0-dimensional."""
    return (counts.argmax(1) == labels).sum()


class SpikeCounter:
    """Counts the spikes of every LIF neuron of a network while it is open (a context manager).

    ``rates()`` gives, by the LIF layer's name, the firing rate of each of its neurons: spikes per image
    and time step, float32 of the layer's shape [C, H, W] or [C].
    """

    def __init__(self, network: nn.Module):
        self._layers = {name: m for name, m in network.named_modules() if isinstance(m, neuron.LIFNode)}
        self._counts: dict[str, Tensor] = {}
        self._outputs: dict[str, int] = {}

    def __enter__(self) -> "SpikeCounter":
        self._hooks = [module.register_forward_hook(self._hook(name)) for name, module in self._layers.items()]
        return self

    def __exit__(self, *exception: Any) -> None:
        for hook in self._hooks:
            hook.remove()

    def _hook(self, name: str):
        def count_spikes(module: neuron.LIFNode, inputs: Any, spikes: Tensor) -> None:
            if module.step_mode == "m":
                spikes = spikes.flatten(0, 1)  # [T, N, ...] -> [T N, ...]
            # sums of up to 2^24 spikes are exact in float32
            self._counts[name] = self._counts.get(name, 0) + spikes.detach().sum(0, dtype=torch.float32)
            self._outputs[name] = self._outputs.get(name, 0) + len(spikes)

        return count_spikes

    def rates(self) -> dict[str, Tensor]:
        return {name: counts / self._outputs[name] for name, counts in self._counts.items()}


@torch.no_grad()
def accuracy(network: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """The share of images that the network, in eval mode, classifies correctly."""
    network.eval()
    right, images = torch.zeros((), dtype=torch.int64), 0
    for inputs, labels in batches:
        right = right.to(labels.device) + correct(network(inputs), labels)
        images += len(labels)
    return int(right) / images
