"""Grad Rewiring (Grad R): sparse training by gradient rewiring.

Chen, Yu, Fang, Huang, Tian, "Pruning of Deep Spiking Neural Networks through Gradient Rewiring",
IJCAI 2021, doi 10.24963/ijcai.2021/236. To leave 5 % of a network's connections, whatever the network::

    weights = [p for p in network.parameters() if p.dim() > 1]  # to prune
    others = [p for p in network.parameters() if p.dim() <= 1]  # biases, BatchNorm: updated as by Adam
    optimizer = GradRewiring([{"params": weights}, {"params": others, "prune": False}], lr=1e-2, alpha=0)
    schedule = ConnectivitySchedule(optimizer, connectivity=0.05, steps=500)
    for step in range(500):
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(network(x), y).backward()
        optimizer.step()  # the weights are sparse after every step
        schedule.step()
"""

import copy
import functools
import math
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

from rewiring import Lists, RewiringOptimizer, adam, check_bool, check_number, each, overlaps_itself, spiking_kernels
from sharding import is_sharded, local, sum_of_all

__all__ = ["ConnectivitySchedule", "GradRewiring", "grad_rewiring"]


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
    if alpha is not None:
        priors = torch._foreach_sub(thetas, each(mu, thetas))
        torch._foreach_sign_(priors)
        torch._foreach_mul_(priors, [alpha * eta for eta in etas])
        torch._foreach_mul_(priors, signs)  # alpha eta sign(theta - mu) s
    hs = thetas  # in the same memory
    torch._foreach_mul_(hs, signs)
    torch._foreach_sub_(hs, changes)  # h = s theta - eta m / d
    if alpha is not None:
        torch._foreach_sub_(hs, priors)
    torch._foreach_mul_(thetas, signs)  # theta = s h
    ws = torch._foreach_clamp_min(thetas, 0)
    torch._foreach_mul_(ws, signs)
    torch._foreach_copy_(weights, ws)  # w = s max(theta, 0)


class GradRewiring(RewiringOptimizer):
    r"""Adam on the synaptic parameter theta of every connection, under a Laplace prior.

    A weight is w = s * max(theta, 0) with a sign s that no step changes (:meth:`load_parameters` sets it anew): at
    the first step with a gradient s = sign(w) and theta = |w|; where s = 0 the weight stays 0. Then, at every step,
    from dL/dw of ALL connections (the redefined gradient: a pruned connection receives it too, so it can regrow),

    .. math::
        h &= s\theta - \eta_t m_t / d_t \\
        h &\leftarrow h - \alpha\,\eta_t\,\mathrm{sign}(\theta - \mu)\,s, \quad
            \mu = \ln(2(1 - s_{target})) / \alpha \quad\text{(only when alpha > eps)} \\
        \theta &\leftarrow s h, \qquad w \leftarrow s\,\max(\theta, 0)

    Here s is the sign, and s_target the argument ``s``; eta_t, m_t and d_t are Adam's step size, first moment and
    denominator, as in :mod:`rewiring`. The weights are masked in place by every step, so the network is sparse at any
    time.

    Args:
        params: parameters or parameter groups to prune; real floating point. Groups may have their own settings;
            one with ``prune=False`` is not pruned but updated as by torch.optim.Adam, and needs neither alpha nor s.
        lr: learning rate, >= 0; a one-element tensor is accepted too.
        betas: decay rates of Adam's moments, each in [0, 1).
        eps: term added to Adam's denominator, >= 0.
        weight_decay: L2 penalty, added to the gradient of w as in torch.optim.Adam, >= 0.
        amsgrad: use the running maximum of the second moment.
        alpha: strength of the prior (the scripts' -penalty), >= 0; up to eps it is off. A one-element tensor is
            accepted too, for a captured CUDA graph, which reads it at each replay; it needs s, and where it is at most
            eps, the prior is computed with alpha 0: the same weights, but for the signs of zeros.
        s: target sparsity: the probability mass of the prior below theta = 0, in [0.5, 1); needed when
            alpha > eps. A target of the prior, not a bound: the sparsity that is reached depends on
            alpha, lr and the number of steps.
        foreach, maximize, capturable: as in torch.optim.Adam; by name, as all that follow.
        fused: update in one pass over memory, see :class:`rewiring.RewiringOptimizer`.
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
        eps: float = 1e-8,  # the prior is off unless alpha is greater
        weight_decay: float = 0,
        amsgrad: bool = False,
        alpha: float | Tensor = 1e-5,
        s: float | None = None,
        **named: Any,
    ):
        settings = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, amsgrad=amsgrad, alpha=alpha, s=s)
        super().__init__(params, settings, named)

    _update = staticmethod(grad_rewiring)

    def _check_settings(self, group: dict[str, Any], wait: bool) -> None:
        alpha = self.number("alpha", group["alpha"], wait)
        check_number("alpha", alpha, "a finite number >= 0", lambda x: x >= 0)
        if alpha > group["eps"] or group["s"] is not None or isinstance(group["alpha"], Tensor):
            accepted = (
                "a target sparsity in [0.5, 1), required when alpha > eps. Give one, s=0.95 say; or give alpha=0, "
                "for no prior or for a ConnectivitySchedule, which sets alpha and s"
            )
            check_number("s", group["s"], accepted, lambda x: 0.5 <= x < 1)
        check_bool("plain_gradient", group["plain_gradient"])

    def own_state(self, group: dict[str, Any]) -> set[str]:
        return {"sign", "theta"} if group["prune"] else set()

    def _numbers(self, group: dict[str, Any]) -> dict[str, float | Tensor | None]:
        alpha = group["alpha"]
        if isinstance(alpha, Tensor):  # without looking at its value
            alpha = alpha.detach().reshape(()).double()
            on = alpha > group["eps"]
            mu = math.log(2 * (1 - group["s"])) / alpha
            return {"alpha": torch.where(on, alpha, 0.0), "mu": torch.where(on, mu, 0.0)}
        if alpha <= group["eps"]:
            return {"alpha": None, "mu": None}
        return {"alpha": alpha, "mu": math.log(2 * (1 - group["s"])) / alpha}

    def _prepare_gradient(self, param: Tensor, group: dict[str, Any]) -> None:
        if group["plain_gradient"]:
            if overlaps_itself(param.grad):  # an expanded one, say
                param.grad = param.grad.clone()
            local(param.grad).masked_fill_(local(param) == 0, 0)

    def _kernel(self, memory: Any, grad: Tensor, settings: Any) -> None:
        spiking_kernels.grad_rewiring_step(memory, grad, settings)


class ConnectivitySchedule:
    """Leads the weights of a GradRewiring to the connectivity C, by setting the penalty alpha of its groups.

    Call :meth:`step` after each step of the optimizer and of the learning-rate scheduler, if there is one. Connectivity
    is the share of the weights that are not 0, over all groups together. Groups with ``prune=False`` and weights with
    ``requires_grad=False`` are left out. The schedule wants connectivity 1 until ``begin``; from there it falls, fast
    at first and then ever more slowly, and is C from ``end`` on. It stays C after the last step, as long as
    :meth:`step` is called.

    At the start of each segment of the steps it looks for theta_q, the largest theta among the connections to prune in
    the segment, or 0 if enough are pruned. Grad R's prior lowers theta by alpha * eta_t in every step, so it prunes
    them within the segment if alpha is theta_q / (sum of its eta_t). The gradient moves theta too; the next segment
    corrects that. When the learning rate changes within a segment, alpha * lr stays the same.

    Until C is due, alpha is at most ``max_alpha``: a gradient that never changes its sign moves theta by eta_t in every
    step, so it can hold a connection against any alpha < 1. The schedule cannot raise the connectivity: where the
    gradient prunes more than is wanted, alpha is 0. The prior moves only weights that have a gradient and a learning
    rate above 0: others stay connected, but they count. A group that is added later joins with the next segment.

    Args:
        optimizer: the schedule sets alpha in its groups. It also sets s where s is None, 0.5 or set by an earlier
            schedule, so that mu = -REACH * (largest learning rate so far). At that mu a pruned connection stays near
            enough for the gradient to bring it back. (With s = 0.5, mu would be 0, and pruned weights would not stay
            pruned.)
        connectivity: C, in (0, 1].
        steps: of the whole schedule, >= 1; C is due after ``end * steps`` of them, and the rest train at C.
        begin, end: shares of ``steps``, 0 <= begin <= end <= 1.
        segments: the most segments in ``steps``, >= 1. Each costs one search for the k-th smallest theta.
        max_alpha: > 0.
        foresight: add to theta what Adam's momentum alone will do to it by the end of the segment. Without it, C is
            met less closely; the fast recipe does without, so that its published runs can be repeated.

    Attributes:
        taken: the number of steps so far.

    Raises:
        TypeError: ``optimizer`` is not a GradRewiring.
        ValueError: another argument is not accepted; the message names it. Or s is 0.5 beside an alpha in a tensor,
            for a captured graph, which would not see another s.
    """

    REACH = 7.0
    OWN = "scheduled_s"  # in a group, the s that a schedule has set there: it is kept with the optimizer's state

    def __init__(
        self,
        optimizer: GradRewiring,
        connectivity: float,
        steps: int,
        *,
        begin: float = 0.05,
        end: float = 0.7,
        segments: int = 200,
        max_alpha: float = 1.0,
        foresight: bool = True,
    ):
        if not isinstance(optimizer, GradRewiring):
            name = type(optimizer).__name__
            raise TypeError(f"ConnectivitySchedule sets the alpha of a GradRewiring; {name} has none")
        settings = dict(connectivity=connectivity, steps=steps, begin=begin, end=end, max_alpha=max_alpha)
        self._check({**settings, "segments": segments, "foresight": foresight})
        if not any(group["prune"] for group in optimizer.param_groups):
            raise ValueError("optimizer is not accepted: all of its groups have prune=False")
        self.optimizer, self.steps, self.foresight = optimizer, steps, foresight
        # NumPy's numbers are no plain data
        self.connectivity, self.begin, self.end, self.max_alpha = map(float, (connectivity, begin, end, max_alpha))
        self.length = math.ceil(steps / segments)  # of a segment
        self.sets_s, self.largest_lr = [], 0.0
        self.before = max((int(state["step"]) for state in optimizer.state.values() if "step" in state), default=0)
        self.begin_segment(0)

    def _is_free(self, group: dict[str, Any]) -> bool:
        """Whether the schedule sets a group's s: where it is None, 0.5, or what a schedule before has set.

        Raises ValueError for 0.5 beside an alpha in a tensor.
        """
        if group["prune"] and group["s"] == 0.5 and isinstance(group["alpha"], Tensor):
            raise ValueError("optimizer is not accepted: a group has s=0.5 and alpha in a tensor; give an s above 0.5")
        return group["s"] in (None, 0.5, group.get(self.OWN))

    @staticmethod
    def _check(settings: dict[str, Any]) -> None:
        """Raises ValueError for an argument, or an attribute in a state, that is not accepted."""
        from_1 = "a whole number >= 1", lambda x: type(x) is int and x >= 1
        from_0 = "a whole number >= 0", lambda x: type(x) is int and x >= 0
        not_negative = "a finite number >= 0", lambda x: x >= 0
        begin = settings["begin"]
        checks: dict[str, tuple[str, Callable[[Any], bool]]] = {
            "connectivity": ("the share of connections to leave, in (0, 1]", lambda x: 0 < x <= 1),
            "begin": ("a share of the steps, in [0, 1]", lambda x: 0 <= x <= 1),
            "end": (f"a share of the steps, from begin={begin!r} to 1", lambda x: begin <= x <= 1),
            "max_alpha": ("a finite number > 0", lambda x: x > 0),
            **dict(steps=from_1, segments=from_1, length=from_1, taken=from_0, before=from_0),
            **dict(largest_lr=not_negative, lrs=not_negative, alphas=not_negative),
        }
        for name, setting in settings.items():
            for value in setting if name in ("lrs", "alphas", "sets_s") else [setting]:
                if name in checks:
                    check_number(name, value, *checks[name])
                else:
                    check_bool(name, value)

    def step(self) -> None:
        """Sets alpha for the optimizer's next step."""
        if (self.taken + 1) % self.length == 0 or self.taken + 1 == self.steps:  # the last one may be shorter
            self.begin_segment(self.taken + 1)
        else:
            self.taken += 1
            self._set_alphas()

    def wanted(self, share: float) -> float:
        """The connectivity that is wanted after a share of the steps: C to a power that tends to 1 exponentially."""
        if share >= self.end:
            return self.connectivity
        passed = (share - self.begin) / (self.end - self.begin) if share > self.begin else 0.0
        return self.connectivity ** ((1 - math.exp(-5 * passed)) / (1 - math.exp(-5)))

    def begin_segment(self, taken: int) -> None:
        """Starts a segment after so many steps; :meth:`step` calls this when one is due."""
        groups = self.optimizer.param_groups
        length = min(self.length, self.steps - taken) if taken < self.steps else self.length
        weights = [(p, group) for group in groups if group["prune"] for p in group["params"] if p.requires_grad]
        size, theta_q = sum(p.numel() for p, _ in weights), 0.0
        if pruned := size - round(self.wanted((taken + length) / self.steps) * size):
            thetas = [self._theta(p, group, length) for p, group in weights]
            found = _smallest(thetas, pruned, [p for p, _ in weights])
            theta_q = max(0.0, found) if math.isfinite(found) else 0.0
        self.sets_s += map(self._is_free, groups[len(self.sets_s) :])  # groups may have been added
        self.taken, self.lrs, self.alphas = taken, [float(group["lr"]) for group in groups], []
        self.largest_lr = max(self.largest_lr, *self.lrs)
        for lr, group in zip(self.lrs, groups, strict=True):
            first = self.before + taken + 1
            moved = sum(lr / (1 - group["betas"][0] ** t) for t in range(first, first + length))
            self.alphas.append(theta_q / moved if moved > 0 else 0.0)
        self._set_alphas()

    def _theta(self, param: Tensor, group: dict[str, Any], length: int) -> Tensor:
        """The theta of a parameter now or, with foresight, after so many steps that Adam's momentum alone takes.

        Of a sharded parameter, what this rank holds.
        """
        state = {key: local(x) for key, x in self.optimizer.state.get(param, {}).items()}
        if "theta" not in state:
            return local(param.detach()).abs()
        if not self.foresight:
            return state["theta"]
        beta1, beta2 = group["betas"]
        t, v = state["step"].double(), state["exp_avg_sq"]
        if group["amsgrad"]:  # turned on since the last step, it is not there yet
            v = state.get("max_exp_avg_sq", v)
        d = v.sqrt().div_((1 - beta2**t).sqrt()).add_(group["eps"])
        etas = [float(group["lr"]) / (1 - beta1 ** (t + i)) for i in range(1, length + 1)]
        weight = sum(eta * beta1**i for i, eta in enumerate(etas, 1))  # of m / d, as m decays by beta1 in each step
        return state["theta"] - state["sign"] * (state["exp_avg"] / d).mul_(weight)

    def _set_alphas(self) -> None:
        limit = math.inf if self.taken >= self.end * self.steps else self.max_alpha
        of_groups = zip(self.optimizer.param_groups, self.lrs, self.alphas, self.sets_s, strict=False)
        for group, lr, alpha, sets_s in of_groups:
            if not group["prune"]:
                continue
            now = float(group["lr"])
            if now != lr:
                alpha = alpha * lr / now if now > 0 else 0.0
            alpha = min(alpha, limit)
            if isinstance(group["alpha"], Tensor):  # a captured graph reads it
                group["alpha"].fill_(alpha)
            else:
                group["alpha"] = alpha
            if sets_s:  # mu = ln(2 (1 - s)) / alpha
                group["s"] = group[self.OWN] = min(1 - math.exp(-self.REACH * self.largest_lr * alpha) / 2, 0.9999)

    def state_dict(self) -> dict[str, Any]:
        """The state of the schedule, for :meth:`load_state_dict`; plain data."""
        return {key: list(x) if type(x) is list else x for key, x in vars(self).items() if key != "optimizer"}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues a saved schedule. The optimizer's state may be loaded before or after.

        Raises:
            ValueError: ``state_dict`` is not that of a ConnectivitySchedule, or of more groups; nothing has changed.
        """
        present = self.state_dict()
        if state_dict.keys() != present.keys():
            raise ValueError(f"a ConnectivitySchedule's state has {sorted(present)}, not {sorted(state_dict)}")
        for key, value in present.items():
            given = state_dict[key]
            if type(value) is list and (type(given) is not list or len(given) > len(value)):
                raise ValueError(f"a ConnectivitySchedule's {key} are those of {len(value)} groups, not {given}")
        if len({len(given) for given in state_dict.values() if type(given) is list}) > 1:
            raise ValueError("a ConnectivitySchedule's sets_s, lrs and alphas are those of as many groups")
        self._check(state_dict)
        vars(self).update(copy.deepcopy(state_dict))
        self._set_alphas()


COUNTED_AT_ONCE = 2**22  # values; a sum of bools takes 8 bytes for each


def _smallest(tensors: list[Tensor], k: int, of: list[Tensor] | None = None) -> float:
    """The k-th smallest of all values of some tensors, k from 1; a NaN counts as larger than any number.

    Args:
        of: the parameters, if some are sharded: each tensor is what this rank holds, and the values of all ranks count.
    """
    if all(tensor.is_cpu for tensor in tensors) and not any(map(is_sharded, of or [])):
        return float(torch.cat([tensor.flatten() for tensor in tensors]).kthvalue(k).values)
    return _smallest_by_counting(tensors, k, of)


def _smallest_by_counting(tensors: list[Tensor], k: int, of: list[Tensor] | None = None) -> float:
    """The same on a GPU, where kthvalue is not deterministic, and sorting takes many times the memory of the values.

    It bisects the numbers of the widest dtype, in their order, by how many values are at most as large: in each of 32
    rounds, for float32, one pass over the values, and one wait for the device; or one all-reduce of a number, for
    values on several ranks.
    """
    dtype = functools.reduce(torch.promote_types, [tensor.dtype for tensor in tensors])
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    largest = torch.iinfo(integer).max

    def number(place: int) -> Tensor:
        """The number at a place in their order: its bits as a whole number, those of negative ones reversed."""
        bits = torch.tensor(place if place >= 0 else place ^ largest, dtype=integer, device="cpu")
        return bits.view(dtype)

    def place_of(value: float) -> int:
        bits = int(torch.tensor(value, dtype=dtype, device="cpu").view(integer))
        return bits if bits >= 0 else bits ^ largest

    parts = [
        (part, param)
        for tensor, param in zip(tensors, of or tensors, strict=True)
        for part in tensor.detach().reshape(-1).split(COUNTED_AT_ONCE)
    ]

    def at_most(value: Tensor) -> int:
        return sum_of_all([(part.to(dtype) <= value).sum() for part, _ in parts], [param for _, param in parts])

    low, high = place_of(-math.inf), place_of(math.inf) + 1  # beyond infinity, only NaN is left
    while low < high:
        middle = (low + high) // 2
        if at_most(number(middle)) >= k:
            high = middle
        else:
            low = middle + 1
    return float(number(low)) if low <= place_of(math.inf) else math.nan
