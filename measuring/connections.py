"""Connections: which weights are prunable, which are connected, and how many.

A weight is connected if it is not 0; otherwise it is pruned. Sparsity is the share of pruned weights, and
connectivity = 1 - sparsity the share of connected weights.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn


def prunable(network: nn.Module) -> dict[str, nn.Parameter]:
    """The prunable weights by name: those of linear and convolutional layers."""
    return {
        f"{name}.weight": module.weight
        for name, module in network.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d))
    }


def connected(weight: Tensor) -> Tensor:
    """Which weights are connected: bool, of the weight's shape. The one definition: w != 0."""
    return weight.detach() != 0


def masks(network: nn.Module) -> dict[str, Tensor]:
    """Which prunable weights of a network are connected, by name."""
    return {name: connected(weight) for name, weight in prunable(network).items()}


def pack(mask: Tensor) -> Tensor:
    """Packs n bools into bits: uint8 [(n + 7) // 8], on the CPU."""
    return torch.from_numpy(np.packbits(mask.flatten().cpu().numpy()))


def unpack(bits: Tensor, like: Tensor) -> Tensor:
    """Unpacks bits to bools, with the shape and on the device of ``like``."""
    mask = np.unpackbits(bits.numpy(), count=like.numel()).astype(bool)
    return torch.from_numpy(mask).view(like.shape).to(like.device)


@dataclass(frozen=True)
class Connections:
    """The number of connected weights and of all weights, of one layer or several."""

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
    """Counts the connections of each layer from its mask of connected weights."""
    return {name: Connections(_number(mask), mask.numel()) for name, mask in masks.items()}


def _number(mask: Tensor) -> int:
    """The number of True; in parts, because a sum takes 8 bytes of a GPU's memory for each bool."""
    return int(sum(part.sum() for part in mask.flatten().split(2**22)))


def total(layers: dict[str, Connections], others: int = 0) -> Connections:
    """The sum over all layers, and over ``others`` more parameters that are never pruned, such as BatchNorm's."""
    return Connections(
        sum(layer.connected for layer in layers.values()) + others,
        sum(layer.weights for layer in layers.values()) + others,
    )


def rewired(before: dict[str, Tensor], after: dict[str, Tensor]) -> dict[str, tuple[int, int]]:
    """Counts, for each layer, the connections that were pruned and regrown between two sets of masks."""
    return {name: (_number(before[name] & ~mask), _number(~before[name] & mask)) for name, mask in after.items()}


def record_connections(record: Callable[..., None], layers: dict[str, Connections], others: int | None = None) -> None:
    """Records the connections of the network by ``record(key, number)``, and those of each layer with ``layer=name``.

    With ``others``, the number of parameters that are never pruned, it also records the shares of all parameters.
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
    """Records the numbers of :func:`rewired`, for the network and for each layer."""
    record("pruned", sum(pruned for pruned, _ in layers.values()))
    record("regrown", sum(regrown for _, regrown in layers.values()))
    for name, (pruned, regrown) in layers.items():
        record("pruned", pruned, layer=name)
        record("regrown", regrown, layer=name)
        record("net_pruned", pruned - regrown, layer=name)
