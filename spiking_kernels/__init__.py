"""Fused CPU kernels for the MNIST network and the rewiring optimizers: compiled at first use, called through ctypes.

They compute what the modules of SpikingJelly and torch compute, within rounding, in a fraction of the
time (benchmarks/RESULTS.md); where there is no C compiler, :func:`available` says so and the modules run.
``cpu.c`` explains how they work.
"""

import math

import torch
from torch import Tensor

from spiking_kernels.build import Unavailable as Unavailable
from spiking_kernels.build import available as available
from spiking_kernels.build import library as _library

MAX_T = 254  # periods are kept in a byte
LANES = 16
NOISE_GROUP = 512  # weights that share a sequence of normal numbers


def _padded(outputs: int) -> int:
    return -(-outputs // LANES) * LANES


class _LifLinearLif(torch.autograd.Function):
    @staticmethod
    def forward(ctx, current: Tensor, weight: Tensor, T: int, spikes: Tensor | None) -> Tensor:
        current, weight = current.contiguous(), weight.contiguous()
        (n, h), o = current.shape, len(weight)
        p = _padded(o)
        period = torch.empty(n, h, dtype=torch.uint8)
        scratch, sums = torch.empty(h, p), torch.empty(n, T + 2, p)
        inputs, counts = torch.empty(T, n, o), torch.empty(n, o)
        library = _library()
        library.constant_lif_linear_forward(
            current.data_ptr(),
            weight.data_ptr(),
            scratch.data_ptr(),
            sums.data_ptr(),
            period.data_ptr(),
            inputs.data_ptr(),
            None if spikes is None else spikes.data_ptr(),
            *(n, h, o, p, T),
        )
        library.lif_count_forward(inputs.data_ptr(), counts.data_ptr(), n * o, T)
        ctx.save_for_backward(current, weight, period, inputs)
        return counts

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        current, weight, period, inputs = ctx.saved_tensors
        (n, h), (T, _, o), grad = current.shape, inputs.shape, grad.contiguous()
        p = _padded(o)
        sums, scratch = torch.empty(n, T + 2, p), torch.empty(h, p)
        grad_inputs = torch.empty_like(inputs)
        grad_current, grad_weight = torch.empty_like(current), torch.empty_like(weight)
        library = _library()
        library.lif_count_backward(grad.data_ptr(), inputs.data_ptr(), grad_inputs.data_ptr(), n * o, T)
        library.constant_lif_linear_backward(
            grad_inputs.data_ptr(),
            current.data_ptr(),
            period.data_ptr(),
            weight.data_ptr(),
            sums.data_ptr(),
            scratch.data_ptr(),
            grad_current.data_ptr(),
            grad_weight.data_ptr(),
            *(n, h, o, p, T),
        )
        return grad_current, grad_weight, None, None


def _check(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.device.type != "cpu" or tensor.dtype != torch.float32:
            raise ValueError(f"{name} is {tensor.dtype} on {tensor.device}; the kernels take float32 on the CPU")


def lif_linear_lif(current: Tensor, weight: Tensor, T: int, spikes: Tensor | None = None) -> Tensor:
    """LIF neurons with currents that do not change over time, a linear layer without bias, LIF neurons.

    Args:
        current: the first neurons' input at every step, float32 [N, H].
        weight: of the linear layer, float32 [O, H].
        T: number of time steps, from 1 to 254.
        spikes: int64 [H], increased by the number of spikes of each of the first neurons in all N x T steps.

    Returns:
        The last neurons' spike counts, float32 [N, O].

    Raises:
        ValueError: a tensor or T is not accepted.
    """
    _check(current=current, weight=weight)
    if not 1 <= T <= MAX_T:
        raise ValueError(f"T={T!r} is not accepted: T must be from 1 to {MAX_T}")
    if current.dim() != 2 or weight.dim() != 2 or current.shape[1] != weight.shape[1]:
        raise ValueError(f"current {list(current.shape)} and weight {list(weight.shape)} must be [N, H] and [O, H]")
    if spikes is not None and (spikes.dtype != torch.int64 or spikes.shape != current.shape[1:]):
        raise ValueError(f"spikes must be int64 {list(current.shape[1:])}")
    return _LifLinearLif.apply(current, weight, T, spikes)


def affine_lookup(images: Tensor, index: Tensor, matrices: Tensor, table: Tensor) -> Tensor:
    """Images picked, moved and normalised in one pass.

    Args:
        images: uint8 [D, 1, H, W], contiguous.
        index: which to pick, int64 [N].
        matrices: their inverse maps in 16.16 fixed point, int32 [N, 6] (see training.data.RandomAffine.inverse).
        table: what a pixel becomes, float32 [256].

    Returns:
        float32 [N, 1, H, W].
    """
    _check(table=table)
    index, matrices = index.contiguous(), matrices.contiguous()
    accepted = images.dtype == torch.uint8 and images.dim() == 4 and images.shape[1] == 1 and images.is_contiguous()
    if not accepted or table.shape != (256,) or index.dtype != torch.int64 or matrices.dtype != torch.int32:
        raise ValueError("affine_lookup takes uint8 [D, 1, H, W], int64 [N], int32 [N, 6] and float32 [256]")
    if matrices.shape != (len(index), 6):
        raise ValueError("affine_lookup needs one matrix for each index")
    height, width = images.shape[2:]
    out = torch.empty(len(index), 1, height, width)
    foreign = _library().affine_lookup(
        images.data_ptr(),
        index.data_ptr(),
        matrices.data_ptr(),
        table.data_ptr(),
        out.data_ptr(),
        *(len(images), len(index), height, width),
    )
    if foreign:
        raise ValueError("affine_lookup needs indices of images that are there")
    return out


def grad_rewiring_step(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    max_exp_avg_sq: Tensor | None,
    sign: Tensor,
    theta: Tensor,
    *,
    betas: tuple[float, float],
    correction: float,
    eps: float,
    eta: float,
    weight_decay: float,
    maximize: bool,
    prior: float,
    mu: float,
) -> None:
    """One step of Grad Rewiring, in place, on contiguous float32 tensors of one shape (sign: int8).

    Args:
        correction: sqrt(1 - beta2^t).
        eta: the step size, lr / (1 - beta1^t).
        prior: alpha * eta, or 0 where the prior is off.
        mu: where the prior changes its sign.

    The other arguments are those of gradrewire.GradRewiring.
    """
    _library().grad_rewiring_step(
        param.data_ptr(),
        grad.data_ptr(),
        exp_avg.data_ptr(),
        exp_avg_sq.data_ptr(),
        None if max_exp_avg_sq is None else max_exp_avg_sq.data_ptr(),
        sign.data_ptr(),
        theta.data_ptr(),
        param.numel(),
        *(betas[0], 1 - betas[0], betas[1], 1 - betas[1], correction, eps, eta, weight_decay),
        *(-1.0 if maximize else 1.0, prior, mu),
    )


def deep_rewiring_draws(n: int, seed: int, probability: float) -> tuple[Tensor, Tensor]:
    """The random numbers that :func:`deep_rewiring_step` uses for n weights and a seed, in [0, 2^64).

    Returns:
        normal: float32 [n], standard normal. Soft Deep R gives a weight the number at its place; Deep R gives,
            in each group of NOISE_GROUP weights, the j-th active connection the j-th number of the group.
        chosen: bool [n], each True with the probability, in (0, 1]: of the connections to re-activate.
    """
    normal, chosen = torch.empty(n), torch.empty(n, dtype=torch.bool)
    _library().deep_rewiring_draws(normal.data_ptr(), chosen.data_ptr(), n, seed, probability)
    return normal, chosen


def deep_rewiring_step(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    max_exp_avg_sq: Tensor | None,
    sign: Tensor,
    theta: Tensor | None,
    *,
    seed: int,
    max_s: float,
    betas: tuple[float, float],
    correction: float,
    eps: float,
    eta: float,
    weight_decay: float,
    maximize: bool,
    penalty: float,
    temperature: float,
    theta_min: float | None,
) -> None:
    """One step of Deep R, soft where theta is given, in place, on contiguous float32 tensors of one shape (sign: int8).

    With the numbers of :func:`deep_rewiring_draws`, every operation is rounded as in the plain update on a CPU
    with fused multiply-add, but for torch's square root, which is not always the nearest float.

    Args:
        seed: of the step's random numbers, in [0, 2^64).
        correction: sqrt(1 - beta2^t).
        eta: the step size, lr / (1 - beta1^t).
        penalty: l1 * eta.
        temperature: of the noise, T * sqrt(eta); with 0, none is drawn.
        theta_min: lower bound of theta, or None.

    The other arguments are those of deeprewire.DeepRewiring.
    """
    _library().deep_rewiring_step(
        param.data_ptr(),
        grad.data_ptr(),
        exp_avg.data_ptr(),
        exp_avg_sq.data_ptr(),
        None if max_exp_avg_sq is None else max_exp_avg_sq.data_ptr(),
        sign.data_ptr(),
        None if theta is None else theta.data_ptr(),
        *(param.numel(), seed, max_s),
        *(betas[0], 1 - betas[0], betas[1], 1 - betas[1], correction, eps, eta, weight_decay),
        *(-1.0 if maximize else 1.0, penalty, temperature, -math.inf if theta_min is None else theta_min),
    )
