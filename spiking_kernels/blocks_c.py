"""The kernels of :mod:`spiking_kernels.blocks` for the CPU, in C. Images are channels-last in memory."""

from typing import Any

import torch
from torch import Tensor, nn

from spiking_kernels import build
from spiking_kernels.shapes import Shape, Statistics, images, update_running
from spiking_kernels.tensors import empty, pointer

MAX_T = 64  # the potentials of a tile at all time steps are on the stack


def _is_half(y: Tensor) -> bool:
    return y.dtype is torch.bfloat16


def statistics(y: Tensor, norm: nn.BatchNorm2d, T: int, ranks: Any = None) -> Statistics:
    """Of each time step of images y [T N, C, H, W] by itself; updates the running statistics T times, in order.

    With ranks, y is a share of the images.
    """
    many, c, h, w = y.shape
    mean, variance, sums = empty(T, c), empty(T, c), empty(many, 2, c, dtype=torch.float64)
    pointers = map(pointer, (y, sums, mean, variance))
    build.library().block_statistics(*pointers, T, many // T, h * w, c, _is_half(y))
    values = many // T * h * w
    if ranks is not None:
        mean, variance = ranks.pooled(mean, variance)
        values *= ranks.size
    update_running(norm, mean, variance, values)
    norm.num_batches_tracked += T
    return Statistics.of(norm, mean, variance, own=True, ranks=ranks)


def forward(y: Tensor, found: Statistics | None, shape: Shape, counts: Tensor | None) -> Tensor:
    """The spikes of neurons at rest whose input is y, normalised where statistics are given.

    ``counts``, int64 [H, W, C], is increased by each neuron's spikes.
    """
    spikes = images(*shape.output(y), like=y)
    scale, shift = (None, None) if found is None else (found.scale, found.shift)
    pointers = map(pointer, (y, scale, shift, spikes, counts))
    build.library().block_forward(*pointers, *shape.sizes(y), shape.pool, shape.constant, _is_half(y))
    return spikes


def backward(
    y: Tensor, grad: Tensor, found: Statistics | None, shape: Shape
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gradients of y, and of the normalisation's weight and bias, from that of the spikes."""
    library, (T, n, h, w, c) = build.library(), shape.sizes(y)
    scale = shift = grad_weight = grad_bias = None
    factors = [None] * 4
    grad_y = images(*y.shape, like=y)
    if found is not None:
        partial, total = (empty(k, 2, T, c, dtype=torch.float64) for k in (n, 1))
        scale, shift = found.scale, found.shift
        pointers = map(pointer, (y, scale, shift, grad, found.mean, partial, total, grad_y))
        library.block_backward_sums(*pointers, *shape.sizes(y), shape.pool, _is_half(y))
        inverse, (sum_g, sum_gy) = (found.variance.double() + found.eps).rsqrt(), total[0]
        grad_weight, grad_bias = (sum_gy * inverse).sum(0).float(), sum_g.sum(0).float()
        mean_g, mean_gy = found.through(total[0], n * h * w)
        factors = [found.mean, scale, mean_g.float(), (mean_gy * inverse.square()).float()]
    pointers = map(pointer, (y, scale, shift, grad, *factors, grad_y))
    library.block_backward(*pointers, *shape.sizes(y), shape.pool, shape.constant, _is_half(y))
    return grad_y, grad_weight, grad_bias
