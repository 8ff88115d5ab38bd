"""What is measured, each thing in one place: connections, spikes, accuracy.

A connection is connected when its weight is not 0. Sparsity is the share of pruned (not connected)
weights, connectivity = 1 - sparsity the share of connected ones.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from spikingjelly.activation_based import neuron
from torch import Tensor, nn
from torch.nn import functional as F

from spiking import SpikingNetwork


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


def loss_function(counts: Tensor, labels: Tensor, T: int) -> Tensor:
    """Mean squared error between firing rates, counts / T with counts [N, 10], and the one-hot labels."""
    one_hot = torch.zeros_like(counts).scatter_(1, labels.unsqueeze(1), 1.0)
    return F.mse_loss(counts / T, one_hot)


def correct(counts: Tensor, labels: Tensor) -> Tensor:
    """How many predictions, the class with the most spikes, are right: 0-dimensional."""
    return (counts.argmax(1) == labels).sum()


class SpikeCounter:
    """Counts the spikes of every neuron of a network while it is open (a context manager).

    ``rates()`` gives, by the name of a layer of SpikingJelly's neurons, LIF or other, the firing rate of each
    of its neurons: spikes per image and time step, float32 of the layer's shape [C, H, W] or [C]. Counts stay
    on the device until then.
    """

    def __init__(self, network: SpikingNetwork):
        self.network = network
        self._counts: dict[str, Tensor] = {}
        self._images = 0

    def __enter__(self) -> "SpikeCounter":
        layers = [(name, m) for name, m in self.network.named_modules() if isinstance(m, neuron.BaseNode)]
        self._hooks = [module.register_forward_hook(self._count_layer(name)) for name, module in layers]
        self._hooks.append(self.network.register_forward_hook(self._count_images))
        self.network.spike_counts.append(self._counts)  # for what runs fused, without the layers' hooks
        return self

    def __exit__(self, *exception: Any) -> None:
        self.network.spike_counts = [counts for counts in self.network.spike_counts if counts is not self._counts]
        for hook in self._hooks:
            hook.remove()

    def _counted(self, hook: Callable[..., None]) -> Callable[..., None]:
        """Marks a layer's hook as one that need not be called where a fused kernel adds to the counts."""
        hook.spike_counts = self._counts
        return hook

    def _count_images(self, network: SpikingNetwork, inputs: Any, counts: Tensor) -> None:
        self._images += len(counts)

    def _count_layer(self, name: str):
        def count_spikes(module: neuron.BaseNode, inputs: Any, spikes: Tensor) -> None:
            if module.step_mode == "m":
                spikes = spikes.flatten(0, 1)  # [T, N, ...] -> [T N, ...]
            # one batch's sum is exact in float32, the sum of all in int64
            self._counts[name] = self._counts.get(name, 0) + spikes.detach().sum(0, dtype=torch.float32).long()

        return self._counted(count_spikes)

    def rates(self) -> dict[str, Tensor]:
        outputs = self._images * self.network.T
        return {name: (counts.double() / outputs).float() for name, counts in self._counts.items()}


def confusion(counts: Tensor, labels: Tensor) -> Tensor:
    """How often images of each class (rows) were taken for each class (columns): int64 [classes, classes].

    Counts are [N, classes], labels [N]; the prediction is that of :func:`correct`. Nothing leaves the device.
    """
    classes = counts.shape[1]
    cells = labels * classes + counts.argmax(1)
    matrix = torch.zeros(classes * classes, dtype=torch.int64, device=counts.device)
    return matrix.index_add_(0, cells, torch.ones_like(cells)).view(classes, classes)


def wilson_interval(right: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval of a share of which ``right`` of ``n`` were seen; 95 % with z = 1.96.

    E. B. Wilson, "Probable inference, the law of succession, and statistical inference", Journal of the
    American Statistical Association 22 (1927).

    Raises:
        ValueError: not 0 <= right <= n with n >= 1.
    """
    if not 0 <= right <= n or n < 1:
        raise ValueError(f"right={right}, n={n} is not accepted: must be 0 <= right <= n, and n >= 1")
    share, z2 = right / n, z * z
    center = (right + z2 / 2) / (n + z2)
    half = z * math.sqrt(n * share * (1 - share) + z2 / 4) / (n + z2)
    # the ends are exact, where rounding would leave them a little off
    return 0.0 if right == 0 else center - half, 1.0 if right == n else center + half


@dataclass(frozen=True)
class Evaluation:
    """What one pass over labelled images gave: their confusion matrix, int64 [classes, classes] on the CPU."""

    confusion: Tensor

    @property
    def images(self) -> int:
        return int(self.confusion.sum())

    @property
    def right(self) -> int:
        """How many images were classified correctly."""
        return int(self.confusion.diagonal().sum())

    @property
    def accuracy(self) -> float:
        """The share of images classified correctly."""
        return self.right / self.images


@torch.no_grad()
def evaluate(network: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> Evaluation:
    """Runs the network, in eval mode, once over all batches; the host waits for the device at the end only."""
    network.eval()
    matrix = torch.zeros((), dtype=torch.int64, device="cpu")
    for inputs, labels in batches:
        matrix = matrix.to(labels.device) + confusion(network(inputs), labels)
    return Evaluation(matrix.cpu())


def accuracy(network: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """The share of images that the network, in eval mode, classifies correctly."""
    return evaluate(network, batches).accuracy
