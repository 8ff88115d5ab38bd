"""LIF neurons with constant currents, a linear layer, and LIF neurons of which only the number of spikes matters.

The neurons are the paper's: tau 2, threshold 1, hard reset to 0, ATan surrogate with alpha 2, no gradient through
the reset. Whether a network is of this kind is checked before (spiking.SpikingNetwork.fused).
"""

import math

import torch
from torch import Tensor, nn

from spiking_kernels import build
from spiking_kernels.tensors import LARGEST, Unfit, apart, check, empty, flaw, laid_out, pointer, whole

MAX_T = 65534  # periods, and T + 1 where there is none, are kept in 16 bits
LANES = 16


def _padded(outputs: int) -> int:
    return -(-outputs // LANES) * LANES


# -- the same in torch's operations: for gradients of gradients, and from those that are no plain tensors ---------


class _Spike(torch.autograd.Function):
    """Whether a potential, less the threshold, is at least 0; the derivative is ATan's with alpha 2."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (x >= 0).to(x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad / (1 + (math.pi * x).square())


def _lif(inputs: Tensor) -> Tensor:
    """Inputs to spikes, both [T, N, neurons]."""
    v, spikes = torch.zeros_like(inputs[0]), []
    for x in inputs:
        v = v + (x - v) / 2
        spikes.append(_Spike.apply(v - 1))
        v = (1 - spikes[-1].detach()) * v
    return torch.stack(spikes)


def _rounded(x: Tensor, rounding: torch.dtype | None) -> Tensor:
    return x if rounding is None else x.to(rounding).float()


def _lif_linear_lif(current: Tensor, weight: Tensor, T: int, rounding: torch.dtype | None) -> Tensor:
    """:func:`lif_linear_lif` as layers compute it."""
    spikes = _lif(current.expand(T, *current.shape))
    return _lif(_rounded(nn.functional.linear(spikes, _rounded(weight, rounding)), rounding)).sum(0)


# -- the kernels --------------------------------------------------------------------------------------


class _LifLinearLif(torch.autograd.Function):
    @staticmethod
    def forward(ctx, current: Tensor, weight: Tensor, T: int, spikes: Tensor | None, rounding: torch.dtype | None):
        (n, h), o = current.shape, len(weight)
        p = _padded(o)
        period = empty(n, h, dtype=torch.uint16)
        scratch, sums, inputs, counts = empty(h, p), empty(n, T + 2, p), empty(T, n, o), empty(n, o)
        tensors = [current, _rounded(weight, rounding), scratch, sums, period, inputs, spikes]
        library = build.library()
        library.constant_lif_linear_forward(*map(pointer, tensors), n, h, o, p, T)
        inputs = _rounded(inputs, rounding)
        library.lif_count_forward(pointer(inputs), pointer(counts), n * o, T)
        ctx.T, ctx.rounding = T, rounding
        ctx.save_for_backward(current, weight, period, inputs)
        return counts

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        T, rounding, (current, weight, period, inputs) = ctx.T, ctx.rounding, ctx.saved_tensors
        (n, h), o = current.shape, len(weight)
        grad = laid_out(grad)
        # what was saved may come back as another tensor: torch.autograd.graph.saved_tensors_hooks
        floats = ((grad, (n, o)), (current, (n, h)), (weight, (o, h)), (inputs, (T, n, o)))
        flawed = any(flaw(tensor, torch.float32, shape) for tensor, shape in floats)
        if torch.is_grad_enabled() or flawed or flaw(period, torch.uint16, (n, h)):
            with torch.enable_grad():
                counts = _lif_linear_lif(current, weight, T, rounding)
            needs = ctx.needs_input_grad
            needed = [x for x, need in zip((current, weight), needs, strict=False) if need]
            found = iter(torch.autograd.grad(counts, needed, grad, create_graph=torch.is_grad_enabled()))
            return tuple(next(found) if need else None for need in needs)
        p = _padded(o)
        sums, scratch, grad_inputs = empty(n, T + 2, p), empty(h, p), empty(T, n, o)
        grad_current, grad_weight = empty(n, h), empty(o, h)
        library = build.library()
        library.lif_count_backward(pointer(grad), pointer(inputs), pointer(grad_inputs), n * o, T)
        grad_inputs, weight = _rounded(grad_inputs, rounding), _rounded(weight, rounding)
        tensors = [grad_inputs, current, period, weight, sums, scratch, grad_current, grad_weight]
        library.constant_lif_linear_backward(*map(pointer, tensors), n, h, o, p, T)
        return grad_current, _rounded(grad_weight, rounding), None, None, None


def lif_linear_lif(
    current: Tensor, weight: Tensor, T: int, spikes: Tensor | None = None, rounding: torch.dtype | None = None
) -> Tensor:
    """LIF neurons with currents that do not change over time, a linear layer without bias, LIF neurons.

    Args:
        current: the first neurons' input at every step, float32 [N, H].
        weight: of the linear layer, float32 [O, H].
        T: number of time steps, from 1 to 65534.
        spikes: int64 [H], increased by the number of spikes of each of the first neurons in all N x T steps.
        rounding: a lower precision, which the linear layer's weights and outputs take, as under torch.autocast.

    Returns:
        The last neurons' spike counts, float32 [N, O].

    Raises:
        Unfit: a tensor or T is not accepted; a ValueError, whose text names it.
    """
    whole("T", T, 1, MAX_T)
    for name, tensor in (("current", current), ("weight", weight)):
        if reason := flaw(tensor, torch.float32, contiguous=False):
            raise Unfit(f"{name} {reason}")
    if current.dim() != 2 or weight.dim() != 2 or current.shape[1] != weight.shape[1]:
        raise Unfit(f"current {list(current.shape)} and weight {list(weight.shape)} must be [N, H] and [O, H]")
    (n, h), o = current.shape, len(weight)
    for name, size, least in (("N", n, 0), ("H", h, 1), ("O", o, 1)):
        whole(name, size, least, LARGEST)
    current, weight = laid_out(current), laid_out(weight)
    if spikes is not None:
        check({"spikes": (spikes, (h,))}, torch.int64)
        apart({"spikes": spikes}, {"current": current, "weight": weight})
    return _LifLinearLif.apply(current, weight, T, spikes, rounding)
