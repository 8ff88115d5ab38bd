"""The convolutions of a spiking network on the CPU, in float32: sums of what the spikes meet, in C.

Such a convolution is 3 x 3, with stride 1, padded by 1 with zeros, and has no bias. Where few weights are left, the
gradient of the spikes is made from these alone; elsewhere it is torch's. The kernels are in ``convolutions.c``.
"""

import functools

import torch
from torch import Tensor, nn

from spiking_kernels import build, proof
from spiking_kernels.plain import gradients
from spiking_kernels.shapes import images
from spiking_kernels.tensors import LARGEST, Unfit, check, empty, flaw, laid_out, pointer

GROUP = 32  # the kernels take so many channels at a time
WIDEST, ROW = 128, 1 << 14  # of W and of W C: a thread has the lists of a few rows on its stack, 0.5 MB at most
MOST = 1 << 20  # of O C: numbers of places in memory are ints in C
PARTS, PIXELS = 32, 1 << 12  # backward, the images are in so many parts, or in fewer with so many pixels each
SPARSE = 0.25  # of the weights are left, at most, where the gradient of the spikes goes by the weights


@functools.cache
def are_fast() -> bool:
    """Whether the kernels are available, and the processor has vectors for them: AVX2 with FMA, or AVX-512."""
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
    if not o or not c or o % GROUP or c % GROUP or o * c > MOST:
        raise Unfit(f"{c} channels and {o} are no multiples of {GROUP}, or too many")
    if not 0 < w <= WIDEST or w * c > ROW or not 0 < h <= LARGEST or not 0 < m * h * w * max(c, o) <= LARGEST:
        raise Unfit(f"{m} images of {h} x {w} with {c} channels, and {o} of the output, are none, or too large")
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
        ctx.shapes = spikes.shape, weight.shape
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
        given = (flaw(grad, torch.float32, contiguous=False), _flaw(spikes), flaw(weight, torch.float32))
        if torch.is_grad_enabled() or any(given) or ctx.shapes != (spikes.shape, weight.shape):
            plain = functools.partial(nn.functional.conv2d, padding=1)
            return tuple(gradients(plain, (spikes, weight), needed, grad))
        grad = laid_out(grad, torch.channels_last)
        of_spikes = _spikes_gradient(spikes, weight, grad) if needed[0] else None
        return of_spikes, _weights_gradient(spikes, weight, grad) if needed[1] else None


def _parts(images: Tensor) -> int:
    m, _, h, w = images.shape
    return min(max(m * h * w // PIXELS, 1), m, PARTS)


def _by_torch(spikes: Tensor, weight: Tensor, grad: Tensor, which: int) -> Tensor:
    settings = None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [which == 0, which == 1, False]
    return torch.ops.aten.convolution_backward(grad, spikes, weight, *settings)[which].contiguous(
        memory_format=torch.contiguous_format if which else torch.channels_last
    )


def _spikes_gradient(spikes: Tensor, weight: Tensor, grad: Tensor) -> Tensor:
    if int(weight.count_nonzero()) > SPARSE * weight.numel():
        return _by_torch(spikes, weight, grad, 0)
    (m, c, h, w), o, library, parts = spikes.shape, len(weight), build.library(), _parts(spikes)
    starts, places = (empty(size, dtype=torch.int32) for size in (c + 1, 9 * c * o))
    values, planes = empty(9 * c * o), empty(parts, o, library.convolution_plane(w))
    found = images(m, c, h, w, like=grad)
    pointers = map(pointer, (weight, grad, found, starts, places, values, planes))
    library.convolution_spikes_gradient(*pointers, parts, m, h, w, c, o)
    return found


def _weights_gradient(spikes: Tensor, weight: Tensor, grad: Tensor) -> Tensor:
    (m, c, h, w), o, parts = spikes.shape, len(weight), _parts(spikes)
    partial, total = empty(parts, 9 * c * o), empty(3, 3, c, o)
    pointers = map(pointer, (spikes, grad, partial, total))
    if build.library().convolution_weights_gradient(*pointers, parts, m, h, w, c, o):  # hooks changed the saved spikes
        return _by_torch(spikes, weight, grad, 1)
    return total.permute(3, 2, 0, 1).contiguous()
