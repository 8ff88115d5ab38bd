"""The convolutions of a spiking network on the CPU, in float32: sums of what the spikes meet, in C.

Such a convolution is 3 x 3, with stride 1, padded by 1 with zeros, and has no bias. The kernels are in
``convolutions.c``. The gradient of the spikes, which are not sparse there, is torch's.
"""

import functools

import torch
from torch import Tensor, nn

from spiking_kernels import build, proof
from spiking_kernels.shapes import images
from spiking_kernels.tensors import LARGEST, Unfit, check, empty, flaw, gradients, pointer

GROUP = 32  # the kernels take so many channels at a time
ROW = 1 << 14  # of W C, at most: lists of a few rows are on the stack
WIDEST = 128  # of W
PARTS, PIXELS = 32, 1 << 12  # the gradients of so many parts of the images are summed apart, if each has so many pixels


@functools.cache
def are_fast() -> bool:
    """Whether the kernels can be had, and the processor has vectors for them: AVX2 with FMA, or AVX-512."""
    return build.unavailable() is None and bool(build.library().convolution_fast())


def convolution(spikes: Tensor, weight: Tensor) -> Tensor:
    """The convolution of spikes with weights [O, C, 3, 3], within rounding.

    Args:
        spikes: float32 [M, C, H, W] on the CPU, channels-last, each 0 or 1.
        weight: float32, finite.

    Returns:
        float32 [M, O, H, W], channels-last.

    Raises:
        Unfit: an argument is not accepted, or C or O is no multiple of 32.
    """
    if reason := _flaw(spikes):
        raise Unfit(f"spikes {reason}")
    check("weight", weight, torch.float32)
    (m, c, h, w), o = spikes.shape, len(weight) if weight.dim() else 0
    if weight.shape != (o, c, 3, 3):
        raise Unfit(f"weight has the shape {list(weight.shape)}, not [O, {c}, 3, 3]")
    if not o or not c or o % GROUP or c % GROUP:
        raise Unfit(f"{c} channels and {o} are no multiples of {GROUP}")
    if not 0 < w <= WIDEST or w * c > ROW or not 0 < h <= LARGEST or not 0 < m * h * w * max(c, o) <= LARGEST:
        raise Unfit(f"images of {h} x {w} with {c} channels are empty, or too large")
    if proof.autocast_dtype("cpu") is not None:
        raise Unfit("products are rounded")
    if not bool(weight.isfinite().all()):
        raise Unfit("a weight is infinite or not a number, which counts even without a spike")
    if reason := build.unavailable():
        raise Unfit(reason)
    return _Convolution.apply(spikes, weight)


def _flaw(images: Tensor) -> str | None:
    """Why the kernels cannot read images, in words that can follow their name; None if they can."""
    if reason := flaw(images, torch.float32, contiguous=False):
        return reason
    if images.dim() != 4 or not images.is_contiguous(memory_format=torch.channels_last) or images.is_neg():
        return "do not lie channels-last in memory"
    return None


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, spikes, weight) -> Tensor:
        ctx.save_for_backward(spikes, weight)
        (m, c, h, w), o = spikes.shape, len(weight)
        filters = weight.view(o // GROUP, GROUP, c, 3, 3).permute(0, 3, 2, 4, 1).contiguous()
        y = images(m, o, h, w, like=spikes)
        if build.library().convolution_forward(*map(pointer, (spikes, filters, y)), m, h, w, c, o):
            raise Unfit("a number is no spike, neither 0 nor 1")
        return y

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        spikes, weight = ctx.saved_tensors
        needed = ctx.needs_input_grad
        # what was saved may come back as another tensor: torch.autograd.graph.saved_tensors_hooks
        if torch.is_grad_enabled() or flaw(grad, torch.float32, contiguous=False) or _flaw(spikes):
            with torch.enable_grad():
                y = nn.functional.conv2d(spikes, weight, padding=1)
            return tuple(gradients(y, (spikes, weight), needed, grad))
        grad = grad.resolve_neg().contiguous(memory_format=torch.channels_last)
        grad_spikes = grad_weight = None
        if needed[0]:
            settings = None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True, False, False]
            grad_spikes = torch.ops.aten.convolution_backward(grad, spikes, weight, *settings)[0]
        if needed[1]:
            (m, c, h, w), o = spikes.shape, len(weight)
            parts = min(max(m * h * w // PIXELS, 1), m, PARTS)
            partial, total = empty(parts, 9 * c * o), empty(3, 3, c, o)
            pointers = map(pointer, (spikes, grad, partial, total))
            build.library().convolution_backward(*pointers, parts, m, h, w, c, o)
            grad_weight = total.permute(3, 2, 0, 1).contiguous()
        return grad_spikes, grad_weight
