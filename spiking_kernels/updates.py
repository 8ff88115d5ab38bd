"""One step of Grad Rewiring or of Deep R on a tensor of weights, and the random numbers that Deep R takes."""

import math
from bisect import bisect_right
from typing import Any

import torch
from torch import Tensor

from spiking_kernels import build
from spiking_kernels.tensors import Unfit, apart, check, empty, pointer, whole

NOISE_GROUP = 512  # weights that share a sequence of normal numbers
MOST_WEIGHTS, MOST_SEEDS = 1 << 48, 1 << 64


class Memory:
    """The tensors that the steps of a parameter work on, all but the gradient, as long as they stay as they are.

    Raises:
        Unfit: a tensor is not accepted, or two share memory.
    """

    def __init__(
        self,
        param: Tensor,
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
        max_exp_avg_sq: Tensor | None = None,
        *,
        sign: Tensor,
        theta: Tensor | None = None,
    ):
        self.param, self.state = param, (exp_avg, exp_avg_sq, max_exp_avg_sq, sign, theta)
        self.shape = getattr(param, "shape", None)
        named = dict(param=param, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq, sign=sign)
        named |= {k: x for k, x in (("max_exp_avg_sq", max_exp_avg_sq), ("theta", theta)) if x is not None}
        for name, tensor in named.items():
            check(name, tensor, torch.int8 if name == "sign" else torch.float32, self.shape)
        apart(named, named.keys() - {"sign"})
        self.named, self.starts = named, sorted(tensor.data_ptr() for tensor in named.values())
        self.first, *self.others = map(pointer, (param, *self.state))

    def pointers(self, grad: Tensor) -> list[int | None]:
        """The addresses of all, the gradient after the parameter.

        Raises:
            Unfit: the gradient is not accepted, or shares memory with what is written.
        """
        check("grad", grad, torch.float32, self.shape)
        start, size = grad.data_ptr(), grad.nbytes
        near = bisect_right(self.starts, start - size)
        if near < len(self.starts) and self.starts[near] < start + size:  # no tensor is larger than the gradient
            apart({**self.named, "grad": grad}, self.named.keys() - {"sign"})
        torch.autograd.graph.increment_version(self.param)  # or a graph that needs it would not know
        return [self.first, start, *self.others]


def _adam(
    betas: tuple[float, float], correction: float, eps: float, eta: float, weight_decay: float, maximize: bool
) -> tuple[float, ...]:
    """What both updates take of Adam; correction is sqrt(1 - beta2^t), eta the step size, lr / (1 - beta1^t)."""
    beta1, beta2 = betas
    return beta1, 1 - beta1, beta2, 1 - beta2, correction, eps, eta, weight_decay, -1.0 if maximize else 1.0


def grad_rewiring_step(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    max_exp_avg_sq: Tensor | None,
    sign: Tensor,
    theta: Tensor,
    *,
    prior: float,
    mu: float,
    memory: Memory | None = None,
    **adam: Any,
) -> None:
    """One step of Grad Rewiring, in place, on contiguous float32 tensors of one shape (sign: int8).

    Args:
        prior: alpha * eta, or 0 where the prior is off.
        mu: where the prior changes its sign.
        memory: that of the tensors, if they were checked before.
        adam: the arguments of :func:`_adam`.

    Raises:
        Unfit: a tensor is not accepted, or two share memory; nothing has been changed.
    """
    if memory is None:
        check("theta", theta, torch.float32)  # Deep R may have none
        memory = Memory(param, exp_avg, exp_avg_sq, max_exp_avg_sq, sign=sign, theta=theta)
    build.library().grad_rewiring_step(*memory.pointers(grad), param.numel(), *_adam(**adam), prior, mu)


def deep_rewiring_draws(n: int, seed: int, probability: float) -> tuple[Tensor, Tensor]:
    """The random numbers that :func:`deep_rewiring_step` uses for n weights and a seed, in [0, 2^64).

    Returns:
        normal: float32 [n], standard normal. Soft Deep R gives a weight the number at its place; Deep R gives,
            in each group of NOISE_GROUP weights, the j-th active connection the j-th number of the group.
        chosen: bool [n], each True with the probability, in (0, 1]: of the connections to re-activate.

    Raises:
        Unfit: a number is not accepted.
    """
    whole("n", n, 0, MOST_WEIGHTS)
    whole("seed", seed, 0, MOST_SEEDS - 1)
    if not 0 < probability <= 1:
        raise Unfit(f"probability={probability!r} is not accepted: must be in (0, 1]")
    normal, chosen = empty(n), empty(n, dtype=torch.bool)
    build.library().deep_rewiring_draws(normal.data_ptr(), chosen.data_ptr(), n, seed, probability)
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
    penalty: float,
    temperature: float,
    theta_min: float | None,
    memory: Memory | None = None,
    **adam: Any,
) -> None:
    """One step of Deep R, soft where theta is given, in place, on contiguous float32 tensors of one shape (sign: int8).

    With the numbers of :func:`deep_rewiring_draws`, every operation is rounded as in the plain update on a CPU
    with fused multiply-add, but for torch's square root, which is not always the nearest float.

    Args:
        seed: of the step's random numbers, in [0, 2^64).
        max_s: as of :class:`deeprewire.DeepRewiring`.
        penalty: l1 * eta.
        temperature: of the noise, T * sqrt(eta); with 0, none is drawn.
        theta_min: lower bound of theta, or None.
        memory, adam: as of :func:`grad_rewiring_step`.

    Raises:
        Unfit: a tensor or the seed is not accepted, or two tensors share memory; nothing has been changed.
    """
    whole("seed", seed, 0, MOST_SEEDS - 1)
    memory = memory or Memory(param, exp_avg, exp_avg_sq, max_exp_avg_sq, sign=sign, theta=theta)
    build.library().deep_rewiring_step(
        *memory.pointers(grad),
        *(param.numel(), seed, max_s, *_adam(**adam)),
        *(penalty, temperature, -math.inf if theta_min is None else theta_min),
    )
