"""Grad Rewiring (Grad R): sparse training by gradient rewiring.

Chen, Yu, Fang, Huang, Tian, "Pruning of Deep Spiking Neural Networks through Gradient Rewiring",
IJCAI 2021, doi 10.24963/ijcai.2021/236.
"""

import math
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

from rewiring import Lists, RewiringOptimizer, adam, check_bool, check_number, each, overlaps_itself, spiking_kernels

__all__ = ["GradRewiring", "grad_rewiring"]


def grad_rewiring(
    lists: Lists, *, alpha: float | Tensor | None, mu: float | Tensor | None, **adam_settings: Any
) -> None:
    """One step of Grad R on lists of tensors, in place: the reference of all others.

    Args:
        lists: the weights w with their "grad" dL/dw, Adam's moments, "sign" s and "theta".
        alpha, mu: of the prior; None without one.
        adam_settings: as :func:`rewiring.adam` takes them.
    """
    weights, signs, thetas = lists["weight"], lists["sign"], lists["theta"]
    changes, etas = adam(lists, **adam_settings)  # eta m / d, and eta
    hs = torch._foreach_mul(thetas, signs)
    torch._foreach_sub_(hs, changes)  # h = s theta - eta m / d
    if alpha is not None:  # h = h - alpha eta sign(theta - mu) s
        priors = torch._foreach_sub(thetas, each(mu, thetas))
        torch._foreach_sign_(priors)
        torch._foreach_mul_(priors, [alpha * eta for eta in etas])
        torch._foreach_mul_(priors, signs)
        torch._foreach_sub_(hs, priors)
    torch._foreach_mul_(hs, signs)
    torch._foreach_copy_(thetas, hs)  # theta = s h
    torch._foreach_clamp_min_(hs, 0)
    torch._foreach_mul_(hs, signs)
    torch._foreach_copy_(weights, hs)  # w = s max(theta, 0)


class GradRewiring(RewiringOptimizer):
    r"""Adam on the synaptic parameter theta of every connection, under a Laplace prior.

    A weight is w = s * max(theta, 0) with a sign s fixed for ever: at the first step with a gradient
    s = sign(w) and theta = |w|; where s = 0 the weight stays 0. Then, at every step, from dL/dw of ALL
    connections (the redefined gradient: a pruned connection receives it too, so it can regrow),

    .. math::
        h &= s\theta - \eta_t m_t / d_t \\
        h &\leftarrow h - \alpha\,\eta_t\,\mathrm{sign}(\theta - \mu)\,s, \quad
            \mu = \ln(2(1 - s_{target})) / \alpha \quad\text{(only when alpha > eps)} \\
        \theta &\leftarrow s h, \qquad w \leftarrow s\,\max(\theta, 0)

    The weights are masked in place by every step, so the network is sparse at any time.

    Args:
        params: parameters or parameter groups to prune; real floating point. Groups may have their own settings.
        lr: learning rate, >= 0; a one-element tensor is accepted too.
        betas: decay rates of Adam's moments, each in [0, 1).
        eps: term added to Adam's denominator, >= 0.
        weight_decay: L2 penalty, added to the gradient of w as in torch.optim.Adam, >= 0.
        amsgrad: use the running maximum of the second moment.
        alpha: strength of the prior (the scripts' -penalty), >= 0; up to eps it is off.
        s: target sparsity: the probability mass of the prior below theta = 0, in [0.5, 1); needed when
            alpha > eps. A target of the prior, not a bound: the sparsity that is reached depends on
            alpha, lr and the number of steps.
        foreach: use the multi-tensor path; None chooses as torch.optim.Adam does.
        maximize: maximize the objective instead of minimizing it.
        capturable: keep ``step`` on the device, so that a CUDA graph can capture the update.
        fused: update in one pass over memory: with a kernel on the CPU (contiguous float32, where
            spiking_kernels and a C compiler are there), else compiled by torch.compile.
        plain_gradient: for ablations, take the gradient of w = s * max(theta, 0) instead of the redefined one: it is 0
            for a pruned connection (``.grad`` is masked in place), whose theta moves by its momentum and the prior.

    State of each parameter: that of Adam, ``sign`` (int8) and ``theta``, which the weights are made from at every
    step: whatever else changes weights needs :meth:`load_parameters` to be called after it.

    Raises:
        ValueError: an argument, or a setting of a group, is not accepted; the message names it.
    """

    LATER: ClassVar[dict[str, Any]] = {**RewiringOptimizer.LATER, "plain_gradient": False}

    def __init__(
        self,
        params: Iterable,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        alpha: float = 1e-5,
        s: float | None = None,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        fused: bool = False,
        plain_gradient: bool = False,
    ):
        super().__init__(
            params,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            amsgrad=amsgrad,
            alpha=alpha,
            s=s,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            fused=fused,
            plain_gradient=plain_gradient,
        )

    _update = staticmethod(grad_rewiring)

    def _check_settings(self, group: dict[str, Any]) -> None:
        check_number("alpha", group["alpha"], "a finite number >= 0", lambda x: x >= 0)
        if group["alpha"] > group["eps"] or group["s"] is not None:
            accepted = (
                "a target sparsity in [0.5, 1), required when alpha > eps. Give one, s=0.95 say; or give alpha=0, "
                "for no prior or for a ConnectivitySchedule, which sets alpha and s"
            )
            check_number("s", group["s"], accepted, lambda x: 0.5 <= x < 1)
        check_bool("plain_gradient", group["plain_gradient"])

    def _own_state(self, group: dict[str, Any]) -> set[str]:
        return {"sign", "theta"}

    def _terms(self, group: dict[str, Any]) -> dict[str, float | None]:
        alpha = group["alpha"]
        if alpha <= group["eps"]:
            return {"alpha": None, "mu": None}
        return {"alpha": alpha, "mu": math.log(2 * (1 - group["s"])) / alpha}

    def _prepare_gradient(self, param: Tensor, group: dict[str, Any]) -> None:
        if group["plain_gradient"]:
            if overlaps_itself(param.grad):  # an expanded one, say
                param.grad = param.grad.clone()
            param.grad.masked_fill_(param == 0, 0)

    def _kernel(self, tensors: tuple[Tensor | None, ...], eta: float, group: dict[str, Any], **adam: Any) -> None:
        alpha, mu = self._terms(group).values()
        prior = {"prior": 0.0, "mu": 0.0} if alpha is None else {"prior": alpha * eta, "mu": mu}
        spiking_kernels.grad_rewiring_step(*tensors, eta=eta, **prior, **adam)
