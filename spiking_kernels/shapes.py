"""What the kernels of a block share, in C and in Triton: its shape, its statistics, its images in memory."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """What a block computes in T time steps; with ``constant``, one image is the input of all of them."""

    T: int
    pool: bool = False
    constant: bool = False

    def output(self, y: Tensor) -> tuple[int, ...]:
        """The shape of the spikes of an input [T N, C, H, W], or [N, C, H, W] where it is constant."""
        n, c, h, w = y.shape
        return (n * self.T if self.constant else n, c, h // 2 if self.pool else h, w // 2 if self.pool else w)

    def sizes(self, y: Tensor) -> tuple[int, ...]:
        """T, N, H, W and C."""
        n, c, h, w = y.shape
        return self.T, n if self.constant else n // self.T, h, w, c


@dataclass(frozen=True)
class Statistics:
    """Of a normalisation, all float32 [T, C]: neurons get scale * y + shift.

    ``own`` says that mean and variance (biased) are those of y, so that its gradient flows through them, too. With
    ``ranks``, y is this process's share of a batch, and they are those of the whole one (see spiking.Ranks).
    """

    mean: Tensor
    variance: Tensor
    scale: Tensor
    shift: Tensor
    eps: float
    own: bool
    ranks: Any = None

    @classmethod
    def of(cls, norm: nn.BatchNorm2d, mean: Tensor, variance: Tensor, own: bool, ranks: Any = None) -> "Statistics":
        """Of a BatchNorm that normalises by these."""
        scale = norm.weight * (variance + norm.eps).rsqrt()
        return cls(mean, variance, scale, norm.bias - mean * scale, norm.eps, own, ranks)

    def through(self, sums: Tensor, values: int) -> Tensor:
        """What flows through the statistics: means of the whole batch, from the float64 sums of ``values`` numbers."""
        if self.ranks is not None:
            sums, values = self.ranks.sum(sums.clone()), values * self.ranks.size
        return sums / values if self.own else torch.zeros_like(sums)  # also where a sum is not finite


def update_running(norm: nn.BatchNorm2d, mean: Tensor, variance: Tensor, values: int) -> None:
    """Updates running statistics by those of each time step, [T, C] with biased variances of ``values``, in order."""
    for m, v in zip(mean, variance * (values / (values - 1)), strict=True):
        norm.running_mean.mul_(1 - norm.momentum).add_(m, alpha=norm.momentum)
        norm.running_var.mul_(1 - norm.momentum).add_(v, alpha=norm.momentum)


def per_channel(x: Tensor) -> Tensor:
    """[T, C] for images [T, N, C, H, W]: [T, 1, C, 1, 1]."""
    return x[:, None, :, None, None]


def images(n: int, c: int, h: int, w: int, like: Tensor) -> Tensor:
    """Memory for channels-last images [N, C, H, W], of a tensor's dtype on its device."""
    return torch.empty((n, h, w, c), dtype=like.dtype, device=like.device).permute(0, 3, 1, 2)
