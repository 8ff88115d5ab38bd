"""Connections: which weights can be pruned, which are connected, and how many.

A connection is connected when its weight is not 0. Sparsity is the share of pruned (not connected)
weights, connectivity = 1 - sparsity the share of connected ones.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn


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


def pack(mask: Tensor) -> Tensor:
    """A bool tensor as bits, uint8 [(n + 7) // 8], on the CPU."""
    return torch.from_numpy(np.packbits(mask.flatten().cpu().numpy()))


def unpack(bits: Tensor, like: Tensor) -> Tensor:
    """The bool tensor of the shape and on the device of ``like`` that was packed."""
    mask = np.unpackbits(bits.numpy(), count=like.numel()).astype(bool)
    return torch.from_numpy(mask).view(like.shape).to(like.device)


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


def record_connections(record: Callable[..., None], layers: dict[str, Connections], others: int | None = None) -> None:
    """Records the connections of all layers, by ``record(key, number)``, and of each, by ``layer=name`` as well.

    With ``others``, the number of parameters that are never pruned, also what the network's shares are with these.
    """
    record("sparsity", total(layers).sparsity)
    record("connectivity", total(layers).connectivity)
    if others is not None:
        record("sparsity_with_bn", total(layers, others).sparsity)
        record("connectivity_with_bn", total(layers, others).connectivity)
    for name, layer in layers.items():
        record("connected", layer.connected, layer=name)
        record("weights", layer.weights, layer=name)
        record("sparsity", layer.sparsity, layer=name)
        record("connectivity", layer.connectivity, layer=name)


def record_rewired(record: Callable[..., None], layers: dict[str, tuple[int, int]]) -> None:
    """Records what :func:`rewired` counted, of all layers together and of each."""
    record("pruned", sum(pruned for pruned, _ in layers.values()))
    record("regrown", sum(regrown for _, regrown in layers.values()))
    for name, (pruned, regrown) in layers.items():
        record("pruned", pruned, layer=name)
        record("regrown", regrown, layer=name)
        record("net_pruned", pruned - regrown, layer=name)
