"""Classification: the loss, the predictions and what they are worth: accuracy, its interval, the confusion matrix."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def loss_function(counts: Tensor, labels: Tensor, T: int) -> Tensor:
    """Mean squared error between firing rates, counts / T with counts [N, 10], and the one-hot labels."""
    one_hot = torch.zeros_like(counts).scatter_(1, labels.unsqueeze(1), 1.0)
    return F.mse_loss(counts / T, one_hot)


def correct(counts: Tensor, labels: Tensor) -> Tensor:
    """The number of correct predictions, a 0-dimensional tensor. The prediction is the class with the most spikes."""
    return (counts.argmax(1) == labels).sum()


def confusion(counts: Tensor, labels: Tensor) -> Tensor:
    """The confusion matrix, true classes by predicted classes: int64 [classes, classes], on the same device.

    ``counts`` are [N, classes], ``labels`` [N]. The prediction is that of :func:`correct`.
    """
    classes = counts.shape[1]
    cells = labels * classes + counts.argmax(1)
    matrix = torch.zeros(classes * classes, dtype=torch.int64, device=counts.device)
    return matrix.index_add_(0, cells, torch.ones_like(cells)).view(classes, classes)


def wilson_interval(right: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval for the probability of success, given ``right`` of ``n``; 95 % with z = 1.96.

    E. B. Wilson, "Probable inference, the law of succession, and statistical inference", Journal of the
    American Statistical Association 22 (1927).

    Raises:
        ValueError: unless 0 <= right <= n and n >= 1.
    """
    if not 0 <= right <= n or n < 1:
        raise ValueError(f"right={right}, n={n} is not accepted: must be 0 <= right <= n, and n >= 1")
    share, z2 = right / n, z * z
    center = (right + z2 / 2) / (n + z2)
    half = z * math.sqrt(n * share * (1 - share) + z2 / 4) / (n + z2)
    # without rounding errors at the ends
    return 0.0 if right == 0 else center - half, 1.0 if right == n else center + half


@dataclass(frozen=True)
class Evaluation:
    """The result of one pass over labelled images: the confusion matrix, int64 [classes, classes], on the CPU."""

    confusion: Tensor

    @property
    def images(self) -> int:
        return int(self.confusion.sum())

    @property
    def right(self) -> int:
        """The number of images that were classified correctly."""
        return int(self.confusion.diagonal().sum())

    @property
    def accuracy(self) -> float:
        """The share of images classified correctly."""
        return self.right / self.images


@torch.no_grad()
def evaluate(network: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> Evaluation:
    """Runs the network in eval mode, in which it stays, over all batches.

    The host waits for the device only at the end.

    Args:
        network: gives the classes' spike counts [N, classes] of inputs, and resets its neurons itself, as a
            SpikingNetwork does.
        batches: inputs and labels, int64 [N].

    Raises:
        ValueError: there is no batch.
    """
    network.eval()
    found = sum(confusion(network(inputs), labels) for inputs, labels in batches)
    if not isinstance(found, Tensor):
        raise ValueError("batches is not accepted: there is none")
    return Evaluation(found.cpu())


def accuracy(network: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """The share of images that the network classifies correctly in eval mode: see :func:`evaluate`."""
    return evaluate(network, batches).accuracy
