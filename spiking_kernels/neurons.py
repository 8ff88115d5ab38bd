"""LIF neurons with constant currents, a linear layer, and LIF neurons of which only the number of spikes matters.

The neurons are the paper's: tau 2, threshold 1, hard reset to 0, ATan surrogate with alpha 2, no gradient through
the reset. :func:`spiking_kernels.proof.check_layers` proves that a network's layers are of this kind.
"""

import functools

import torch
from torch import Tensor, nn

from spiking_kernels import build
from spiking_kernels.plain import gradients
from spiking_kernels.tensors import LARGEST, Unfit, apart, check, empty, flaw, laid_out, pointer, scratch, whole

MAX_T = 65534  # a period, or T + 1 where there is none, takes 16 bits
LANES = 16


def _padded(outputs: int) -> int:
    return -(-outputs // LANES) * LANES


# -- the same in torch's operations: for gradients of gradients, and for gradients that are no plain tensors -----


def lif_steps(inputs: Tensor) -> Tensor:
    """Inputs to spikes, both [T, N, neurons]."""
    from spikingjelly.activation_based import neuron, surrogate  # here, because the updates do not need it

    return neuron.LIFNode(surrogate_function=surrogate.ATan(), detach_reset=True, step_mode="m")(inputs)


def _rounded(x: Tensor, rounding: torch.dtype | None) -> Tensor:
    return x if rounding is None else x.to(rounding).float()


def _lif_linear_lif(current: Tensor, weight: Tensor, T: int, rounding: torch.dtype | None) -> Tensor:
    """:func:`lif_linear_lif` as layers compute it."""
    spikes = lif_steps(current.expand(T, *current.shape))
    return lif_steps(_rounded(nn.functional.linear(spikes, _rounded(weight, rounding)), rounding)).sum(0)


# -- the kernels --------------------------------------------------------------------------------------


class _LifLinearLif(torch.autograd.Function):
    @staticmethod
    def forward(ctx, current: Tensor, weight: Tensor, T: int, spikes: Tensor | None, rounding: torch.dtype | None):
        (n, h), (o, _) = current.shape, weight.shape
        p = _padded(o)
        period = empty(n, h, dtype=torch.uint16)
        transposed, sums, inputs, counts = empty(h, p), empty(n, T + 2, p), empty(T, n, o), empty(n, o)
        tensors, library = (current, _rounded(weight, rounding), transposed, sums, period, inputs), build.library()
        if library.constant_lif_linear_forward(*map(Tensor.data_ptr, tensors), pointer(spikes), n, h, o, p, T):
            raise Unfit("weight is not finite")
        inputs = _rounded(inputs, rounding)
        library.lif_count_forward(inputs.data_ptr(), counts.data_ptr(), n * o, T)
        ctx.T, ctx.rounding = T, rounding
        ctx.save_for_backward(current, weight, period, inputs)
        return counts

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        T, rounding, (current, weight, period, inputs) = ctx.T, ctx.rounding, ctx.saved_tensors
        (n, h), (o, _) = current.shape, weight.shape
        grad = laid_out(grad)
        # what was saved may come back as another tensor: torch.autograd.graph.saved_tensors_hooks
        shapes = ((grad, (n, o)), (current, (n, h)), (weight, (o, h)), (period, (n, h)), (inputs, (T, n, o)))
        if torch.is_grad_enabled() or any(
            flaw(x, torch.uint16 if x is period else torch.float32, shape) for x, shape in shapes
        ):
            plain = functools.partial(_lif_linear_lif, T=T, rounding=rounding)
            return *gradients(plain, (current, weight), ctx.needs_input_grad[:2], grad), None, None, None
        p = _padded(o)
        sums, transposed, grad_inputs = empty(n, T + 2, p), empty(h, p), empty(T, n, o)
        grad_current, grad_weight = empty(n, h), empty(o, h)
        library = build.library()
        library.lif_count_backward(grad.data_ptr(), inputs.data_ptr(), grad_inputs.data_ptr(), n * o, T)
        grad_inputs, weight = _rounded(grad_inputs, rounding), _rounded(weight, rounding)
        tensors = (grad_inputs, current, period, weight, sums, transposed, grad_current, grad_weight)
        library.constant_lif_linear_backward(*map(Tensor.data_ptr, tensors), n, h, o, p, T)
        return grad_current, _rounded(grad_weight, rounding), None, None, None


def _check_sizes(current: Tensor, weight: Tensor) -> None:
    if current.dim() != 2 or weight.dim() != 2 or current.shape[1] != weight.shape[1]:
        raise Unfit(f"current {list(current.shape)} and weight {list(weight.shape)} must be [N, H] and [O, H]")
    (n, h), (o, _) = current.shape, weight.shape
    for name, size, least in (("N", n, 0), ("H", h, 1), ("O", o, 1)):
        whole(name, size, least, LARGEST)


def lif_linear_lif(
    current: Tensor, weight: Tensor, T: int, spikes: Tensor | None = None, rounding: torch.dtype | None = None
) -> Tensor:
    """LIF neurons with currents that do not change over time, a linear layer without bias, LIF neurons.

    Args:
        current: the first neurons' input at every step, float32 [N, H].
        weight: of the linear layer, float32 [O, H].
        T: number of time steps, from 1 to MAX_T.
        spikes: int64 [H], increased by the number of spikes of each of the first neurons in all N x T steps.
        rounding: a lower precision, to which the linear layer's weights and outputs are rounded, as torch.autocast
            does.

    Returns:
        The last neurons' spike counts, float32 [N, O].

    Raises:
        Unfit: a tensor or T is not accepted, or a weight is not finite; a ValueError, whose text names it.
    """
    whole("T", T, 1, MAX_T)
    check("current", current, torch.float32, contiguous=False)
    check("weight", weight, torch.float32, contiguous=False)
    _check_sizes(current, weight)
    current, weight = laid_out(current), laid_out(weight)
    if spikes is not None:
        check("spikes", spikes, torch.int64, (weight.shape[1],))
        apart({"spikes": spikes, "current": current, "weight": weight}, {"spikes"})
    return _LifLinearLif.apply(current, weight, T, spikes, rounding)


def lif_linear_lif_learn(
    current: Tensor, weight: Tensor, labels: Tensor, T: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss of :func:`lif_linear_lif`'s spike counts, and its gradients: all but the products of a training step.

    The loss is the mean squared error between firing rates, counts / T, and one-hot labels. Nothing is recorded for
    autograd.

    Args:
        current: the first neurons' input at every step, float32 [N, H], contiguous as it is or transposed.
        weight: of the linear layer, float32 [O, H], contiguous.
        labels: int64 [N], from 0 to O - 1, contiguous.
        T: number of time steps, from 1 to MAX_T.

    Returns:
        The loss, float32, and the number of samples whose label has the most spikes, the first one of several, int64,
        both without axes; the gradients of the current, float32 [N, H], and of the weights, float32 [O, H].

    Raises:
        Unfit: a tensor or T is not accepted, a weight is not finite, or a label is not one.
    """
    whole("T", T, 1, MAX_T)
    reason = flaw(current, torch.float32)
    if turned := reason is not None and flaw(current, torch.float32, contiguous=False) is None and current.dim() == 2:
        reason = flaw(current.t(), torch.float32)
    if reason:
        raise Unfit(f"current {reason}")
    check("weight", weight, torch.float32)
    _check_sizes(current, weight)
    check("labels", labels, torch.int64, current.shape[:1])
    (n, h), (o, _) = current.shape, weight.shape
    p = _padded(o)
    loss, right, grad_current, grad_weight = empty(), empty(dtype=torch.int64), empty(n, h), empty(o, h)
    # transposed weights, sums, inputs, counts, and the periods, of half a float each
    _kept, parts = scratch(h * p, n * (T + 2) * p, n * T * o, n * o, -(-n * h // 2))
    tensors, outputs = (current, weight, labels), (grad_current, grad_weight, loss, right)
    pointers = (*map(Tensor.data_ptr, tensors), *parts, *map(Tensor.data_ptr, outputs))
    if build.library().constant_lif_linear_learn(*pointers, n, h, o, p, T, turned):
        raise Unfit("weight is not finite, or labels has one that is none")
    return loss, right, grad_current, grad_weight
