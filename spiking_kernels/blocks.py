"""A block of a spiking convolutional network behind its convolution: BatchNorm per time step, LIF neurons, maximum.

The neurons are those of :mod:`spiking_kernels.neurons`; the maximum is over 2 x 2 spikes, if there is one.
Images are channels-last in memory, float32 or bfloat16; the arithmetic in between is float32. Only the
convolution's output and the spikes are kept for the backward pass. The kernels are in C on the CPU (``blocks_c``
and ``blocks.c``) and in Triton on CUDA (``blocks_triton``).
"""

import functools
import importlib.util
from collections.abc import Iterable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from spiking_kernels import blocks_c, build
from spiking_kernels.neurons import lif_steps
from spiking_kernels.plain import gradients
from spiking_kernels.shapes import Shape, Statistics, per_channel
from spiking_kernels.tensors import CPU, LARGEST, Unfit, check, flaw, laid_out, whole

DTYPES = (torch.float32, torch.bfloat16)


def _plain(y: Tensor, weight: Tensor | None, bias: Tensor | None, found: Statistics | None, shape: Shape) -> Tensor:
    """What :class:`_Block` computes, in torch's operations: for gradients of gradients."""
    x = y.float()
    x = x.expand(shape.T, *x.shape) if shape.constant else x.unflatten(0, (shape.T, -1))
    if found is not None:
        mean, variance = found.mean, found.variance
        if found.own:
            mean, variance = x.mean((1, 3, 4)), x.var((1, 3, 4), correction=0)
        scale = weight * (variance + found.eps).rsqrt()
        x = x * per_channel(scale) + per_channel(bias - mean * scale)
    spikes = lif_steps(x).flatten(0, 1)
    return (nn.functional.max_pool2d(spikes, 2) if shape.pool else spikes).to(y.dtype)


def _flaw(images: object) -> str | None:
    """Why the kernels cannot work on images, in words that can follow their name; None if they can."""
    dtype, device = getattr(images, "dtype", None), getattr(images, "device", CPU)
    dtype, device = dtype if dtype in DTYPES else torch.float32, device if device.type == "cuda" else CPU
    if reason := flaw(images, dtype, contiguous=False, device=device):
        return reason
    return None if images.dim() == 4 else f"has the shape {list(images.shape)}, not four axes"


def _kernels(y: Tensor) -> ModuleType:
    if y.is_cpu:
        return blocks_c
    from spiking_kernels import blocks_triton

    return blocks_triton


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, weight, bias, found: Statistics | None, shape: Shape, counts) -> Tensor:
        ctx.found, ctx.shape, ctx.of = found, shape, y.shape
        ctx.save_for_backward(y, weight, bias)
        return _kernels(y).forward(y, found, shape, counts)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        found, shape, (y, weight, bias) = ctx.found, ctx.shape, ctx.saved_tensors
        # what was saved may come back as another tensor: torch.autograd.graph.saved_tensors_hooks
        other = grad.dtype is not y.dtype or y.shape != ctx.of
        if torch.is_grad_enabled() or _flaw(grad) or _flaw(y) or other:
            if found is not None and found.ranks is not None:
                raise RuntimeError("over several ranks there are no gradients of gradients, nor hooks on saved tensors")
            plain = functools.partial(_plain, found=found, shape=shape)
            return *gradients(plain, (y, weight, bias), ctx.needs_input_grad[:3], grad), None, None, None
        y, grad = (laid_out(x, torch.channels_last) for x in (y, grad))
        return *_kernels(y).backward(y, grad, found, shape), None, None, None


# -- the proof on a GPU ------------------------------------------------------------------------------


def _unavailable(device: torch.device) -> str | None:
    """Why there are no kernels for a device, in one line; None if there are."""
    return build.unavailable() if device.type == "cpu" else flaw_on(device)


@functools.cache
def flaw_on(device: torch.device) -> str | None:
    """Compares the kernels with torch's operations on small blocks; what is wrong, in one line, or None.

    A GPU gets its kernels from a compiler that may fail, and this code may never have run on such a GPU.
    """
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    dtypes = DTYPES if device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0) else DTYPES[:1]
    try:
        for dtype in dtypes:
            for shape in (Shape(3), Shape(3, pool=True), Shape(3, constant=True)):
                with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
                    if not all(map(_near, *_both_ways(shape, dtype, device))):
                        return f"on {device} they compute something else than the layers"
    except Exception as error:
        return f"on {device} they fail with {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return None


def _both_ways(shape: Shape, dtype: torch.dtype, device: torch.device) -> list[list[Tensor]]:
    """Spikes and gradients of a block, by the kernels and by torch's operations. Draws no random numbers."""
    n, c = 2 if shape.constant else 2 * shape.T, 40
    wave = torch.arange(n * c * 36, dtype=torch.float64, device=CPU).mul_(0.7).sin_().mul_(3).add_(0.5)
    y, results = wave.view(n, c, 6, 6).to(device, dtype).contiguous(memory_format=torch.channels_last), []
    for plain in (False, True):
        norm = None if shape.constant else nn.BatchNorm2d(c, device=device, dtype=torch.float32)
        x = y.clone().requires_grad_()
        if plain:
            found = norm and Statistics(*[y] * 4, norm.eps, own=True)  # of which that computes its own
            spikes = _plain(x, norm and norm.weight, norm and norm.bias, found, shape)
        else:
            spikes = lif_block(x, shape, norm)
        wave = torch.arange(spikes.numel(), dtype=torch.float64, device=CPU).mul_(1.3).cos_()
        spikes.backward(wave.view(spikes.shape).to(device, dtype))
        results.append([spikes.detach(), x.grad, *([norm.weight.grad, norm.bias.grad] if norm else [])])
    return results


def _near(ours: Tensor, theirs: Tensor) -> bool:
    """Whether all but a few numbers are equal within rounding, which may decide about a spike."""
    ours, theirs = ours.double(), theirs.double()
    return bool(((ours - theirs).abs() <= 0.01 * theirs.abs() + 1e-3 * theirs.abs().max()).double().mean() > 0.98)


def check_tensors(current: object, own: Iterable[Tensor], T: int, rounding: torch.dtype | None) -> None:
    """Raises Unfit unless the blocks of a network take its first neurons' current [N, C, H, W] and its own tensors.

    These are its parameters and the running statistics of its BatchNorms.
    """
    if reason := _flaw(current):
        raise Unfit(f"the current {reason}")
    if rounding not in (None, torch.bfloat16):
        raise Unfit(f"products are rounded to {rounding}")
    if reason := _unavailable(current.device):
        raise Unfit(reason)
    whole("T", T, 1, _kernels(current).MAX_T)
    for tensor in own:  # those of a BatchNorm have one axis
        check("a parameter or statistic", tensor, torch.float32, contiguous=tensor.dim() == 1, device=current.device)


def lif_block(
    y: Tensor, shape: Shape, norm: nn.BatchNorm2d | None = None, counts: Tensor | None = None, ranks: Any = None
) -> Tensor:
    """Spikes of LIF neurons at rest, behind a BatchNorm for each time step if there is one.

    Args:
        y: their input, or that of the BatchNorm: float32 or bfloat16 [T N, C, H, W]; [N, C, H, W] where constant,
            without a BatchNorm.
        norm: in training mode it takes batch statistics and updates its running statistics T times.
        counts: int64 [H, W, C], increased by each neuron's spikes.
        ranks: the processes that each have a share of the images, see :class:`spiking.Ranks`; None for one.

    Returns:
        Spikes of y's dtype, channels-last [T N, C, H, W], or [T N, C, H / 2, W / 2] after the maximum.

    Raises:
        Unfit: a tensor or T is not accepted; a ValueError, whose text names it.
    """
    if reason := _flaw(y):
        raise Unfit(f"y {reason}")
    whole("T", shape.T, 1, _kernels(y).MAX_T)
    y = laid_out(y, torch.channels_last)
    _check_sizes(y, shape)
    if not shape.constant and len(y) % shape.T:
        raise Unfit(f"y has {len(y)} images, not a multiple of T={shape.T}")
    if counts is not None:
        check("counts", counts, torch.int64, (*y.shape[2:], y.shape[1]), device=y.device)
    if norm is None:
        return _Block.apply(y, None, None, None, shape, counts)
    _check_norm(norm, y, shape)
    with torch.no_grad():
        kernels, T = _kernels(y), shape.T
        found = kernels.statistics(y, norm, T, ranks) if norm.training else _running_statistics(norm, T)
    return _Block.apply(y, norm.weight, norm.bias, found, shape, counts)


def batch_norm(y: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    """What a BatchNorm in training mode makes of images, float32 or bfloat16 [N, C, H, W], channels-last on the CPU.

    It is one of torch's, but for the batch statistics: torch adds up such images in float32, one pixel after the other,
    and misses their variance by up to 3e-5 of it. The kernels do so in float64.

    Raises:
        Unfit: y or a tensor of the BatchNorm is not accepted.
    """
    if reason := _flaw(y):
        raise Unfit(f"y {reason}")
    if not y.is_cpu or y.is_neg() or not y.is_contiguous(memory_format=torch.channels_last):
        raise Unfit("y does not lie channels-last in the CPU's memory")
    if reason := build.unavailable():
        raise Unfit(reason)
    if not norm.track_running_stats or type(norm.momentum) is not float or not norm.eps > 0:
        raise Unfit("the BatchNorm has no moving average, or no positive eps")
    _check_sizes(y, Shape(1))
    _check_norm(norm, y, Shape(1))
    with torch.no_grad():
        found = blocks_c.statistics(y, norm, 1)
    return _Norm.apply(y, norm.weight, norm.bias, found.mean[0], found.variance[0], norm.eps)


class _Norm(torch.autograd.Function):
    """torch's batch normalisation of images by their statistics, which are given."""

    @staticmethod
    def forward(ctx, y, weight, bias, mean: Tensor, variance: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(y, weight, bias, mean, variance)
        ctx.eps = eps
        return nn.functional.batch_norm(y, mean, variance, weight, bias, eps=eps)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, weight, bias, mean, variance = ctx.saved_tensors
        needed = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():  # for gradients of gradients

            def normalised(y: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
                return nn.functional.batch_norm(y, None, None, weight, bias, training=True, eps=ctx.eps)

            return *gradients(normalised, (y, weight, bias), needed, grad), None, None, None
        statistics = None, None, mean, (variance + ctx.eps).rsqrt(), True, ctx.eps
        found = torch.ops.aten.native_batch_norm_backward(grad, y, weight, *statistics, needed)
        return *(x if need else None for x, need in zip(found, needed, strict=True)), None, None, None


def _check_sizes(y: Tensor, shape: Shape) -> None:
    """Raises Unfit for images [N, C, H, W] that are none, or whose sizes are too large for a kernel's int."""
    for name, size in zip("NCHW", y.shape, strict=True):
        whole(name, size, 2 if shape.pool and name in "HW" else 1, LARGEST)
    whole("T N H W", y.numel() // y.shape[1] * (shape.T if shape.constant else 1), 1, LARGEST)


def _check_norm(norm: nn.BatchNorm2d, y: Tensor, shape: Shape) -> None:
    if shape.constant:
        raise Unfit("a BatchNorm gets an input of its own at each time step, not a constant one")
    for name in ("weight", "bias", "running_mean", "running_var"):
        check(f"the BatchNorm's {name}", getattr(norm, name), torch.float32, y.shape[1:2], device=y.device)
    check("the BatchNorm's num_batches_tracked", norm.num_batches_tracked, torch.int64, (), device=y.device)
    if norm.training and y.numel() == shape.T * y.shape[1]:
        raise Unfit("a channel has one value in a time step, and no variance")


def _running_statistics(norm: nn.BatchNorm2d, T: int) -> Statistics:
    mean, variance = (x.repeat(T, 1) for x in (norm.running_mean, norm.running_var))  # copies, which nobody changes
    return Statistics.of(norm, mean, variance, own=False)
