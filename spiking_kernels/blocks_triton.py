"""The kernels of :mod:`spiking_kernels.blocks` for CUDA, in Triton.

Images are channels-last, [T, pixels, C] in memory, where the pixels are those of all N images. A program works on some
pixels (with the maximum: windows of 2 x 2) in some channels through all time steps. Sums are made of one tile's at a
time and added in a fixed order, so that results are the same in every run.

A tile has three axes: Q pixels or windows, K places in a window (1 without the maximum, else 4), and BC channels.
The backward passes need the potentials of all time steps, last first. A program keeps them in one tensor with a fourth
axis for time, from which a sum over a mask takes a step: registers have no index.
"""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from spiking_kernels.shapes import Shape, Statistics, images, update_running

MAX_T = 32  # potentials of a tile in registers
PI = tl.constexpr(3.14159265358979)
ROWS, TILES = 64, 4  # pixels at a time, and how often at least, in a part of the sums for the statistics
MOMENTS = 512  # parts of these sums, at most
NEURONS = 1024  # of a tile at one time step
PARTS = 128  # of the sums for the gradients


# -- statistics --------------------------------------------------------------------------------------


@triton.jit
def _moments(y, means, squares, P, C, tiles, ROWS: tl.constexpr, BC: tl.constexpr):
    """Mean, and sum of squared differences from it, of tiles x ROWS pixels, for each channel at one time step."""
    part, parts, t = tl.program_id(0), tl.num_programs(0), tl.program_id(2)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    mean, square, many = tl.zeros((BC,), tl.float32), tl.zeros((BC,), tl.float32), 0.0
    for tile in range(tiles):
        first = (part * tiles + tile) * ROWS
        if first < P:
            rows = first + tl.arange(0, ROWS)
            inside = (rows < P)[:, None] & (c < C)[None, :]
            at = (t.to(tl.int64) * P + rows)[:, None] * C + c[None, :]
            x = tl.load(y + at, inside, other=0.0).to(tl.float32)
            n = tl.minimum(P - first, ROWS).to(tl.float32)
            own = tl.sum(x, 0) / n
            off = tl.where(inside, x - own[None, :], 0.0)
            mean, square, many = _merged(mean, square, many, own, tl.sum(off * off, 0), n)
    to = (t * parts + part) * C + c
    tl.store(means + to, mean, c < C)
    tl.store(squares + to, square, c < C)


@triton.jit
def _merged(mean, square, many, other_mean, other_square, n):
    """Moments of two sets together (Chan, Golub and LeVeque, 1979)."""
    total = many + n
    away = other_mean - mean
    return mean + away * (n / total), square + other_square + away * away * (many * n / total), total


@triton.jit
def _merge(
    means, squares, weight, bias, running_mean, running_var, tracked, mean, variance, scale, shift,
    P, C, T, parts, size, eps, momentum, PARTS: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Statistics and scale and shift [T, C] from the moments of parts; updates the running statistics in order."""
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    inside = c < C
    part = tl.arange(0, PARTS)[:, None]
    n = tl.minimum(tl.maximum(P - part * size, 0), size).to(tl.float32)  # 0 for parts that do not exist
    gamma, beta = tl.load(weight + c, inside, other=0.0), tl.load(bias + c, inside, other=0.0)
    kept_mean, kept_var = tl.load(running_mean + c, inside, other=0.0), tl.load(running_var + c, inside, other=0.0)
    for t in range(T):
        at = (t * parts + part) * C + c[None, :]
        exists = (part < parts) & inside[None, :]
        means_ = tl.load(means + at, exists, other=0.0)
        m = tl.sum(n * means_, 0) / P
        away = means_ - m[None, :]
        square = tl.sum(tl.load(squares + at, exists, other=0.0) + n * away * away, 0)
        factor = gamma / tl.sqrt_rn(square / P + eps)
        tl.store(mean + t * C + c, m, inside)
        tl.store(variance + t * C + c, square / P, inside)
        tl.store(scale + t * C + c, factor, inside)
        tl.store(shift + t * C + c, beta - m * factor, inside)
        kept_mean = kept_mean * (1 - momentum) + m * momentum
        kept_var = kept_var * (1 - momentum) + square / (P - 1) * momentum
    tl.store(running_mean + c, kept_mean, inside)
    tl.store(running_var + c, kept_var, inside)
    if tl.program_id(0) == 0:
        tl.store(tracked, tl.load(tracked) + T)


# -- neurons -----------------------------------------------------------------------------------------


@triton.jit
def _places(q, N, H, W, K: tl.constexpr):
    """Of windows q [Q]: pixels [Q, K] and whether they exist; pixels of the output [Q] and whether they exist."""
    k = tl.arange(0, K)[None, :]
    if K == 1:
        return q[:, None] + k, (q < N * H * W)[:, None] & (k < K), q, q < N * H * W
    high, wide = (H + 1) // 2, (W + 1) // 2
    n, i, j = q // (high * wide), q // wide % high, q % wide
    row, column = 2 * i[:, None] + k // 2, 2 * j[:, None] + k % 2
    inside = (n < N)[:, None] & (row < H) & (column < W)
    whole = (n < N) & (i < H // 2) & (j < W // 2)
    return (n[:, None] * H + row) * W + column, inside, (n * (H // 2) + i) * (W // 2) + j, whole


@triton.jit
def _inputs(y, scale, shift, pixel, inside, c, t, step, P, C, NORM: tl.constexpr):
    """The inputs [Q, K, BC] of neurons at time step t, made of y at ``step``."""
    at = (step * P + pixel.to(tl.int64))[:, :, None] * C + c[None, None, :]
    x = tl.load(y + at, inside[:, :, None] & (c < C)[None, None, :], other=0.0).to(tl.float32)
    if NORM:
        a = tl.load(scale + t * C + c, c < C, other=0.0)[None, None, :]
        x = x * a + tl.load(shift + t * C + c, c < C, other=0.0)[None, None, :]
    return x


@triton.jit
def _forward(
    y, scale, shift, spikes, N, H, W, C, T,
    NORM: tl.constexpr, CONSTANT: tl.constexpr, Q: tl.constexpr, K: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    P = N * H * W
    outputs = N * (H // 2) * (W // 2) if K == 4 else P
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    pixel, inside, output, whole = _places(tl.program_id(0) * Q + tl.arange(0, Q), N, H, W, K)
    v = tl.zeros((Q, K, BC), tl.float32)
    for t in range(T):
        x = _inputs(y, scale, shift, pixel, inside, c, t, 0 if CONSTANT else t, P, C, NORM)
        h = v + (x - v) * 0.5
        v = tl.where(h >= 1.0, h - h, h)
        spike = tl.max(tl.where(h >= 1.0, 1.0, 0.0), 1)
        to = (t * outputs + output.to(tl.int64))[:, None] * C + c[None, :]
        tl.store(spikes + to, spike.to(spikes.dtype.element_ty), whole[:, None] & (c < C)[None, :])


@triton.jit
def _backward(
    y, scale, shift, grad, mean, mean_g, slope, partial, dy, N, H, W, C, tiles, T: tl.constexpr, STEPS: tl.constexpr,
    NORM: tl.constexpr, CONSTANT: tl.constexpr, SUMS: tl.constexpr, Q: tl.constexpr, K: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """With SUMS, the sums of g and g (y - mean) of some tiles, partial [parts, 2, T, C]; else the gradient of y."""
    P = N * H * W
    outputs = N * (H // 2) * (W // 2) if K == 4 else P
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    place = tl.arange(0, K)[None, :, None]
    steps = tl.arange(0, STEPS)[:, None, None, None]
    sums_g = tl.zeros((STEPS, BC), tl.float32)
    sums_gy = tl.zeros((STEPS, BC), tl.float32)
    for tile in range(tl.program_id(0) * tiles, tl.program_id(0) * tiles + tiles):
        pixel, inside, output, whole = _places(tile * Q + tl.arange(0, Q), N, H, W, K)
        exists = inside[:, :, None] & (c < C)[None, None, :]
        kept = tl.zeros((STEPS, Q, K, BC), tl.float32)
        v = tl.zeros((Q, K, BC), tl.float32)
        for t in range(T):
            x = _inputs(y, scale, shift, pixel, inside, c, t, 0 if CONSTANT else t, P, C, NORM)
            h = v + (x - v) * 0.5
            v = tl.where(h >= 1.0, h - h, h)
            kept = tl.where(steps == t, h[None, :, :, :], kept)
        carried = tl.zeros((Q, K, BC), tl.float32)
        total = tl.zeros((Q, K, BC), tl.float32)
        for i in range(T):
            t = T - 1 - i
            h = tl.sum(tl.where(steps == t, kept, 0.0), 0)
            from_ = (t * outputs + output.to(tl.int64))[:, None] * C + c[None, :]
            of_spike = tl.load(grad + from_, whole[:, None] & (c < C)[None, :], other=0.0).to(tl.float32)[:, None, :]
            if K == 4:  # it goes to the first maximum
                first = tl.min(tl.where(h >= 1.0, place, K), 1)[:, None, :]
                of_spike = tl.where(place == tl.where(first == K, 0, first), of_spike, 0.0)
            u = PI * (h - 1.0)
            carried = 0.5 * (of_spike / (1.0 + u * u) + tl.where(h >= 1.0, 0.0, carried))
            if CONSTANT:
                total += carried
            else:
                g, of_channel = carried, t * C + c
                at = (t * P + pixel.to(tl.int64))[:, :, None] * C + c[None, None, :]
                if NORM:
                    off = tl.load(y + at, exists, other=0.0).to(tl.float32)
                    off -= tl.load(mean + of_channel, c < C, other=0.0)[None, None, :]
                    if SUMS:
                        g = tl.where(exists, g, 0.0)
                        now = tl.arange(0, STEPS)[:, None] == t
                        sums_g += tl.where(now, tl.sum(tl.sum(g, 1), 0)[None, :], 0.0)
                        sums_gy += tl.where(now, tl.sum(tl.sum(g * off, 1), 0)[None, :], 0.0)
                    else:
                        g -= tl.load(mean_g + of_channel, c < C, other=0.0)[None, None, :]
                        g -= off * tl.load(slope + of_channel, c < C, other=0.0)[None, None, :]
                        g *= tl.load(scale + of_channel, c < C, other=0.0)[None, None, :]
                if not SUMS:
                    tl.store(dy + at, g.to(dy.dtype.element_ty), exists)
        if CONSTANT:
            at = pixel.to(tl.int64)[:, :, None] * C + c[None, None, :]
            tl.store(dy + at, total.to(dy.dtype.element_ty), exists)
    if SUMS:
        step = tl.arange(0, STEPS)[:, None]
        to = partial + (tl.program_id(0) * 2 * T + step) * C + c[None, :]
        tl.store(to, sums_g, (step < T) & (c < C)[None, :])
        tl.store(to + T * C, sums_gy, (step < T) & (c < C)[None, :])


@triton.jit
def _factors(
    partial, variance, grad_weight, grad_bias, mean_g, slope, C, T, parts, eps, through,
    PARTS: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """From the sums of parts: the gradients of weight and bias, and mean g and slope [T, C] of the gradient of y."""
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    part = tl.arange(0, PARTS)[:, None]
    of_weight = tl.zeros((BC,), tl.float32)
    of_bias = tl.zeros((BC,), tl.float32)
    for t in range(T):
        at, exists = partial + (part * 2 * T + t) * C + c[None, :], (part < parts) & (c < C)[None, :]
        sum_g, sum_gy = tl.sum(tl.load(at, exists, other=0.0), 0), tl.sum(tl.load(at + T * C, exists, other=0.0), 0)
        inverse = 1.0 / tl.sqrt_rn(tl.load(variance + t * C + c, c < C, other=1.0) + eps)
        of_bias += sum_g
        of_weight += sum_gy * inverse
        flows = through != 0.0  # else also a sum that is not finite
        tl.store(mean_g + t * C + c, tl.where(flows, sum_g * through, 0.0), c < C)
        tl.store(slope + t * C + c, tl.where(flows, sum_gy * through * inverse * inverse, 0.0), c < C)
    tl.store(grad_weight + c, of_weight, c < C)
    tl.store(grad_bias + c, of_bias, c < C)


# -- called from Python ------------------------------------------------------------------------------

# one rounding for a product and the sum that takes it; said, as Triton's default is about to change
FUSION = {"enable_fp_fusion": True}


def _channels(C: int) -> int:
    return min(64, triton.next_power_of_2(C))


def _on_its_device(function: Callable) -> Callable:
    """Triton launches on the current device, which need not be that of the tensors."""

    @functools.wraps(function)
    def launched(y: Tensor, *arguments: object) -> object:
        with torch.cuda.device_of(y):
            return function(y, *arguments)

    return launched


@_on_its_device
def statistics(y: Tensor, norm: nn.BatchNorm2d, T: int, ranks: Any = None) -> Statistics:
    """See :mod:`spiking_kernels.blocks_c`."""
    many, C, H, W = y.shape
    P, BC = many // T * H * W, _channels(C)
    tiles = max(TILES, triton.cdiv(P, ROWS * MOMENTS))
    parts = triton.cdiv(P, ROWS * tiles)
    means, squares = y.new_empty((2, T, parts, C), dtype=torch.float32)
    _moments[parts, triton.cdiv(C, BC), T](y, means, squares, P, C, tiles, ROWS, BC, **FUSION)
    made = y.new_empty((4, T, C), dtype=torch.float32)
    running = norm.running_mean, norm.running_var
    if ranks is not None:  # those of the share are of no use
        running = tuple(y.new_empty((2, C), dtype=torch.float32))
    tensors = (means, squares, norm.weight, norm.bias, *running, norm.num_batches_tracked, *made)
    settings = (P, C, T, parts, ROWS * tiles, norm.eps, norm.momentum, triton.next_power_of_2(parts), 16)
    _merge[triton.cdiv(C, 16),](*tensors, *settings, **FUSION)
    if ranks is None:
        return Statistics(*made, norm.eps, own=True)
    mean, variance = ranks.pooled(*made[:2])
    update_running(norm, mean, variance, P * ranks.size)
    return Statistics.of(norm, mean, variance, own=True, ranks=ranks)


def _tiles(y: Tensor, shape: Shape) -> tuple[int, int, int, int]:
    """The number of tiles, and their sizes Q, K and BC."""
    _, N, H, W, C = shape.sizes(y)
    BC, K = _channels(C), 4 if shape.pool else 1
    Q = max(1, NEURONS // (BC * K))
    windows = N * triton.cdiv(H, 2) * triton.cdiv(W, 2) if shape.pool else N * H * W
    return triton.cdiv(windows, Q), Q, K, BC


@_on_its_device
def forward(y: Tensor, found: Statistics | None, shape: Shape, counts: Tensor | None) -> Tensor:
    """See :mod:`spiking_kernels.blocks_c`."""
    if counts is not None and shape.pool:  # the spikes before the maximum are not written otherwise
        spikes = forward(y, found, replace(shape, pool=False), counts)
        return nn.functional.max_pool2d(spikes, 2)
    T, N, H, W, C = shape.sizes(y)
    tiles, Q, K, BC = _tiles(y, shape)
    spikes = images(*shape.output(y), like=y)
    scale, shift = (y, y) if found is None else (found.scale, found.shift)
    settings = (N, H, W, C, T, found is not None, shape.constant, Q, K, BC)
    _forward[tiles, triton.cdiv(C, BC)](y, scale, shift, spikes, *settings, **FUSION)
    if counts is not None:
        counts += spikes.sum(0, dtype=torch.float32).permute(1, 2, 0).long()
    return spikes


@_on_its_device
def backward(
    y: Tensor, grad: Tensor, found: Statistics | None, shape: Shape
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """See :mod:`spiking_kernels.blocks_c`."""
    T, N, H, W, C = shape.sizes(y)
    tiles, Q, K, BC = _tiles(y, shape)
    steps, groups = triton.next_power_of_2(T), triton.cdiv(C, BC)
    dy = images(*y.shape, like=y)
    if found is None:
        settings = (N, H, W, C, 1, T, steps, False, shape.constant, False, Q, K, BC)
        _backward[tiles, groups](y, y, y, grad, y, y, y, y, dy, *settings, **FUSION)
        return dy, None, None
    each = triton.cdiv(tiles, PARTS)
    parts = triton.cdiv(tiles, each)
    partial = y.new_empty((parts, 2, T, C), dtype=torch.float32)
    mean_g, slope = y.new_empty((2, T, C), dtype=torch.float32)
    grad_weight, grad_bias = y.new_empty((2, C), dtype=torch.float32)
    tensors = (y, found.scale, found.shift, grad, found.mean, mean_g, slope, partial, dy)
    _backward[parts, groups](*tensors, N, H, W, C, each, T, steps, True, False, True, Q, K, BC, **FUSION)
    outputs = (grad_weight, grad_bias, mean_g, slope)
    if found.ranks is None:
        through = found.own / (N * H * W)  # without it, no gradient flows through the statistics
        settings = (C, T, parts, found.eps, through, triton.next_power_of_2(parts), 16)
        _factors[triton.cdiv(C, 16),](partial, found.variance, *outputs, *settings, **FUSION)
    else:
        total, inverse = partial.sum(0, dtype=torch.float64), (found.variance.double() + found.eps).rsqrt()
        mean_all, mean_gy = found.through(total, N * H * W)
        made = ((total[1] * inverse).sum(0), total[0].sum(0), mean_all, mean_gy * inverse.square())
        torch._foreach_copy_(list(outputs), list(made))
    _backward[tiles, groups](*tensors, N, H, W, C, 1, T, steps, True, False, False, Q, K, BC, **FUSION)
    return dy, grad_weight, grad_bias
