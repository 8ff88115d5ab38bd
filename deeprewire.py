"""Deep Rewiring (Deep R), hard and soft: the baseline of Grad Rewiring.

Bellec, Kappel, Maass, Legenstein, "Deep Rewiring: Training very sparse deep networks", ICLR 2018,
here derived from Adam as in Chen et al., IJCAI 2021, doi 10.24963/ijcai.2021/236.
"""

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from rewiring import Lists, RewiringOptimizer, adam, check_bool, check_number, each, spiking_kernels
from sharding import draw_like, sums

__all__ = ["DeepRewiring", "deep_rewiring"]


def deep_rewiring(
    lists: Lists,
    *,
    l1: float | Tensor,
    T: float | Tensor | None,
    max_s: float | Tensor,
    theta_min: float | Tensor | None,
    eps: float | Tensor,
    **adam_settings: Any,
) -> None:
    """One step of Deep R, soft where there is "theta", on lists of tensors, in place: the reference of all others.

    Args:
        lists: the weights w with their "grad" dL/dw, Adam's moments, "sign" s, standard normal "noise" N where T is
            not None, and for Deep R with max_s < 1 "uniform" random numbers. Where these are parts of sharded tensors,
            "whole" has the sharded weights.
        eps, adam_settings: as :func:`rewiring.adam` takes them.
    """
    weights, signs, thetas = lists["weight"], lists["sign"], lists.get("theta")
    actives = [w != 0 for w in weights]  # a
    changes, etas = adam(lists, eps=eps, **adam_settings)  # eta m / d, and eta
    torch._foreach_mul_(changes, actives)
    penalties = torch._foreach_mul(signs, [(l1 * eta).to(weights[0].dtype) for eta in etas])
    torch._foreach_mul_(penalties, actives)
    if thetas:
        hs = torch._foreach_mul(thetas, signs)
        torch._foreach_sub_(hs, changes)
    else:
        hs = torch._foreach_sub(weights, changes)
    torch._foreach_sub_(hs, penalties)  # h = s theta or w, - eta a m / d - l1 eta a s
    if T is not None:  # + T sqrt(eta) N
        torch._foreach_mul_(lists["noise"], [T * eta.sqrt() for eta in etas])
        torch._foreach_add_(hs, lists["noise"])
    if thetas:
        torch._foreach_mul_(hs, signs)
        if theta_min is not None:
            torch._foreach_clamp_min_(hs, each(theta_min, hs))
        torch._foreach_copy_(thetas, hs)  # theta = max(s h, theta_min)
        torch._foreach_clamp_min_(hs, 0)
        torch._foreach_mul_(hs, signs)  # w = s max(theta, 0)
    else:
        kept = [a & (y > 0) for a, y in zip(actives, torch._foreach_mul(hs, signs), strict=True)]
        torch._foreach_mul_(hs, kept)  # where the sign flipped, w = 0
        if "uniform" in lists:
            hs = [
                torch.where(_reactivated(h, sign, uniform, max_s, whole), sign.to(h.dtype).mul_(eps), h)
                for h, sign, uniform, whole in zip(hs, signs, lists["uniform"], lists.get("whole", hs), strict=True)
            ]
    torch._foreach_copy_(weights, hs)


def _wide(device: torch.device) -> torch.dtype:
    """The type for counts: float64, which is exact, but on an Apple GPU, which has none, float32 (exact to 2^24)."""
    return torch.float32 if device.type == "mps" else torch.float64


def _reactivated(w: Tensor, sign: Tensor, uniform: Tensor, max_s: float | Tensor, whole: Tensor) -> Tensor:
    """Which dormant connections to re-activate, so that the dormant fraction of the whole is max_s in expectation."""
    dormant = w == 0
    candidates = dormant & (sign != 0)
    dormant_count, candidate_count = sums(whole, dormant.sum(), candidates.sum())
    excess = dormant_count.to(_wide(w.device)) - max_s * whole.numel()
    # no candidate and no excess is 0 / 0: NaN, which no uniform is below
    return candidates & (uniform < excess / candidate_count)


class DeepRewiring(RewiringOptimizer):
    r"""Adam on the active connections, with an L1 penalty, noise and random re-activation.

    The sign s of a connection is set at the first step with a gradient, s = sign(w), and no step changes it
    (:meth:`load_parameters` sets it anew). A connection is active where w != 0. eta_t, m_t and d_t are Adam's step
    size, first moment and denominator, as in :mod:`rewiring`. With N standard normal noise, Deep R moves the active
    connections by

    .. math:: w \leftarrow w - \eta_t m_t / d_t - l_1 \eta_t s + T \sqrt{\eta_t} N

    and makes those dormant (w = 0) whose sign flipped. Then, if more than max_s of the tensor is dormant,
    each dormant connection is re-activated with probability (dormant - max_s) / dormant, at w = s * eps,
    so that the dormant fraction is max_s again, in expectation. (Where s = 0 a connection can never be
    active; then the connections that can be are drawn with the probability that gives max_s all the same.)

    Soft Deep R keeps a synaptic parameter theta, theta = |w| at first, and has no re-activation: with
    a = 1 where the connection is active, else 0,

    .. math::
        h &= s\theta - \eta_t a\, m_t / d_t - l_1 \eta_t a s + T \sqrt{\eta_t} N, \quad \theta \leftarrow s h \\
        \theta &\leftarrow \max(\theta, \theta_{min}), \quad
            \theta_{min} = -\frac{T^2}{2} \frac{max_s}{l_1 (1 - max_s)} \quad\text{(if } l_1 > 0, max_s < 1) \\
        w &\leftarrow s \max(\theta, 0)

    Dormant connections feel the noise, which is how they come back, but neither gradient nor penalty:
    with T = 0, soft Deep R can only lose connections.

    Args:
        params: parameters or parameter groups to prune; real floating point. Groups may have their own settings;
            one with ``prune=False`` is not pruned but updated as by torch.optim.Adam, and needs no max_s.
        lr: learning rate, >= 0; a one-element tensor is accepted too.
        betas: decay rates of Adam's moments, each in [0, 1).
        eps: term added to Adam's denominator, and the value at which Deep R re-activates: > 0 unless soft.
        weight_decay: L2 penalty, added to the gradient of w as in torch.optim.Adam, >= 0.
        amsgrad: use the running maximum of the second moment.
        T: temperature, >= 0: it stands for sqrt(2 T) of the Deep R paper.
        l1: L1 penalty (the scripts' -penalty), >= 0.
        max_s: maximum sparsity (soft: target sparsity), in [0, 1]; required.
        soft: soft Deep R instead of Deep R.
        generator: of the noise and the re-activation, on the parameters' device; by name, as all that follow. Seeded
            equally, it gives the same numbers on every rank of torch.distributed, whatever else is drawn there. Its
            state is part of :meth:`state_dict`.
        foreach, maximize, capturable, fused: as of :class:`gradrewire.GradRewiring`.

    State of each parameter: that of Adam, ``sign`` (int8) and, when soft, ``theta``, which the weights are made from
    at every step: whatever else changes weights needs :meth:`load_parameters` to be called after it.
    Noise and re-activation draw from ``generator``, or else from the default generator of the parameter's device; the
    kernel draws one seed from it for each step and parameter: different draws from the same distribution.

    Raises:
        ValueError: an argument, or a setting of a group, is not accepted; the message names it.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,  # Deep R re-activates at it
        weight_decay: float = 0,
        amsgrad: bool = False,
        T: float = 0,
        l1: float = 1e-5,
        max_s: float | None = None,
        soft: bool = False,
        **named: Any,
    ):
        settings = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, amsgrad=amsgrad)
        generator = named.pop("generator", None)
        super().__init__(params, dict(**settings, T=T, l1=l1, max_s=max_s, soft=soft), named, generator)

    _update = staticmethod(deep_rewiring)

    def _check_settings(self, group: dict[str, Any], wait: bool) -> None:
        check_number("T", group["T"], "the temperature, a finite number >= 0", lambda x: x >= 0)
        check_number("l1", group["l1"], "a finite number >= 0", lambda x: x >= 0)
        check_bool("soft", group["soft"])
        what = "the target sparsity of soft Deep R" if group["soft"] else "the maximum sparsity"
        check_number("max_s", group["max_s"], f"{what}, in [0, 1], required: max_s=0.95, say", lambda x: 0 <= x <= 1)
        if not group["soft"]:
            accepted = "> 0 unless soft: Deep R re-activates connections at it"
            check_number("eps", group["eps"], accepted, lambda x: x > 0)

    def _check_param(self, param: Tensor, group: dict[str, Any]) -> None:
        super()._check_param(param, group)
        numbers = torch.finfo(param.dtype)
        if group["prune"] and not group["soft"] and group["eps"] <= numbers.smallest_normal * numbers.eps / 2:
            raise ValueError(
                f"eps={group['eps']!r} is not accepted: Deep R re-activates at it, and it is 0 in {param.dtype}"
            )

    def own_state(self, group: dict[str, Any]) -> set[str]:
        return ({"sign", "theta"} if group["soft"] else {"sign"}) if group["prune"] else set()

    def _numbers(self, group: dict[str, Any]) -> dict[str, float | None]:
        T, l1, max_s, theta_min = group["T"], group["l1"], group["max_s"], None
        penalty = l1 * (1 - max_s)
        if group["soft"] and penalty > 0:
            theta_min = -(T * T) / 2 * max_s / penalty
        return {"T": T or None, "l1": l1, "max_s": max_s, "theta_min": theta_min}

    def _drawn(self, group: dict[str, Any]) -> list[str]:
        noise = ["noise"] if group["prune"] and group["T"] > 0 else []
        return noise + (["uniform"] if group["prune"] and not group["soft"] and group["max_s"] < 1 else [])

    def _draw(self, param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """Normal noise, and uniforms for re-activation."""
        # of few bits, uniforms would be coarse and often 0: far more would be re-activated than are due
        dtype = torch.promote_types(param.dtype, torch.float32)
        fill = {"noise": Tensor.normal_, "uniform": Tensor.uniform_}
        return {
            name: draw_like(param, dtype, functools.partial(fill[name], generator=self.generator))
            for name in self._drawn(group)
        }

    def _kernel(self, memory: Any, grad: Tensor, settings: Any) -> None:
        draws = settings.T > 0 or (settings.max_s < 1 and "theta" not in memory.named)
        seed = torch.empty((), dtype=torch.int64, device="cpu")
        seed = int(seed.random_(generator=self.generator)) if draws else 0
        spiking_kernels.deep_rewiring_step(memory, grad, settings, seed=seed)
