"""What Grad Rewiring and Deep Rewiring share: argument checks, lazy state, Adam's moments.

Symbols, in both algorithms: w a weight, s its fixed sign, theta its synaptic parameter,
w = s * max(theta, 0). A connection is connected (active) when w != 0, else pruned (dormant).
m and v are Adam's moments, eta_t = lr / (1 - beta1^t) the step size and
d_t = sqrt(v) / sqrt(1 - beta2^t) + eps the denominator.
"""

import functools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, _default_to_fused_or_foreach

try:
    import spiking_kernels
except ImportError:  # this file was taken into another project without them
    spiking_kernels = None

__all__ = ["RewiringOptimizer", "check_bool", "check_number", "has_kernel", "moments", "moments_foreach"]


def check_number(name: str, value: Any, accepted: str, condition: Callable[[float], bool]) -> None:
    """Raises ValueError, naming the argument, unless ``value`` is a finite number for which ``condition`` holds."""
    number = isinstance(value, Real) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not condition(value):
        raise ValueError(f"{name}={value!r} is not accepted: {name} must be {accepted}")


def check_bool(name: str, value: Any, or_none: bool = False) -> None:
    """Raises ValueError, naming the argument, unless ``value`` is True or False, or None where that is accepted."""
    if not (isinstance(value, bool) or (or_none and value is None)):
        accepted = "True, False or None" if or_none else "True or False"
        raise ValueError(f"{name}={value!r} is not accepted: {name} must be {accepted}")


class RewiringOptimizer(Optimizer):
    """Base of the rewiring optimizers: an Adam whose update an algorithm redefines.

    A subclass names its extra settings in ``defaults``, checks them in :meth:`_check_settings`, fills
    the state of a parameter in :meth:`_init_state`, draws the random numbers of a step in :meth:`_draw`
    and does the arithmetic in :meth:`_single_tensor` and :meth:`_multi_tensor`; both must give bitwise
    the same weights on the CPU. ``fused`` updates each parameter in one pass over memory, with the
    single-tensor path compiled by torch.compile unless a subclass knows better.

    Every state holds ``step`` (0-dimensional, float32; on the CPU unless ``capturable``), ``exp_avg``,
    ``exp_avg_sq``, with amsgrad ``max_exp_avg_sq``, and ``sign`` (int8), each of the weight's shape.
    """

    def __init__(
        self,
        params: Iterable,
        defaults: dict[str, Any],
        *,
        foreach: bool | None,
        maximize: bool,
        capturable: bool,
        fused: bool,
    ):
        defaults.update(foreach=foreach, maximize=maximize, capturable=capturable, fused=fused)
        super().__init__(params, defaults)

    # -- what an algorithm defines -------------------------------------------------------------

    def _check_settings(self, group: dict[str, Any]) -> None:
        """Raises ValueError for a setting of the algorithm that is not accepted."""
        raise NotImplementedError

    def own_state(self, group: dict[str, Any]) -> set[str]:
        """The names of what a parameter's state holds beside Adam's, under the settings of its group."""
        return {"sign"}

    def _init_state(self, param: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        """Adds the algorithm's own tensors to the state of a parameter at its first gradient."""

    @staticmethod
    def _draw(param: Tensor, group: dict[str, Any]) -> tuple[Tensor | None, ...]:
        """The random numbers that the step of one parameter needs."""
        return ()

    @staticmethod
    def _single_tensor(
        param: Tensor, state: dict[str, Tensor], group: dict[str, Any], draws: tuple[Tensor | None, ...]
    ) -> None:
        """Updates one parameter in place."""
        raise NotImplementedError

    @staticmethod
    def _multi_tensor(
        params: list[Tensor],
        states: dict[str, list[Tensor]],
        group: dict[str, Any],
        draws: list[tuple[Tensor | None, ...]],
    ) -> None:
        """Updates parameters of one device and dtype in place, with ``torch._foreach_*``."""
        raise NotImplementedError

    def _fused_tensor(self, param: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        """Updates one parameter in place, in one pass over memory, with random numbers of its own."""
        # as a tensor, so that a scheduler's new learning rate is not compiled anew
        lr = torch.as_tensor(group["lr"], dtype=torch.float64)
        _compiled(self._single_tensor)(param, state, {**group, "lr": lr}, self._draw(param, group))

    # -- the optimizer --------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of parameters, with settings of its own if it names some.

        Raises:
            ValueError: a setting is not accepted, or a parameter is not real and floating-point.
        """
        if isinstance(param_group, dict):
            group = {**self.defaults, **param_group}
            self._check_common_settings(group)
            self._check_settings(group)
        super().add_param_group(param_group)
        for param in self.param_groups[-1]["params"]:
            try:
                self._check_param(param, self.param_groups[-1])
            except ValueError:
                self.param_groups.pop()
                raise

    def _check_param(self, param: Tensor, group: dict[str, Any]) -> None:
        if not param.is_floating_point():
            raise ValueError(
                f"a parameter of dtype {param.dtype} is not accepted: a connection's sign needs real floating point"
            )

    @staticmethod
    def _check_common_settings(group: dict[str, Any]) -> None:
        lr, betas = group["lr"], group["betas"]
        if isinstance(lr, Tensor):
            if lr.numel() != 1:
                raise ValueError(f"lr={lr!r} is not accepted: a tensor lr must have one element")
            lr = float(lr)
        check_number("lr", lr, "a finite number >= 0", lambda x: x >= 0)
        if not isinstance(betas, (tuple, list)) or len(betas) != 2:
            raise ValueError(f"betas={betas!r} is not accepted: betas must be two numbers in [0, 1)")
        for i, beta in enumerate(betas):
            check_number(f"betas[{i}]", beta, "a number in [0, 1)", lambda x: 0 <= x < 1)
        check_number("eps", group["eps"], "a finite number >= 0", lambda x: x >= 0)
        check_number("weight_decay", group["weight_decay"], "a finite number >= 0", lambda x: x >= 0)
        for name in ("amsgrad", "maximize", "capturable", "fused"):
            check_bool(name, group[name])
        check_bool("foreach", group["foreach"], or_none=True)
        if group["fused"] and group["foreach"]:
            raise ValueError("foreach=True is not accepted with fused=True: they are two ways to do one thing")

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("foreach", None)
            group.setdefault("maximize", False)
            group.setdefault("capturable", False)
            group.setdefault("fused", False)
            for param in group["params"]:
                entry = self.state.get(param, {})
                if "sign" in entry:  # load_state_dict casts all state but `step` to the weight's dtype
                    entry["sign"] = entry["sign"].to(torch.int8)
                if "step" in entry:
                    device = param.device if group["capturable"] else "cpu"
                    entry["step"] = torch.as_tensor(entry["step"], dtype=torch.float32, device=device)

    def _init_group(self, group: dict[str, Any]) -> list[Tensor]:
        """Returns the group's parameters that have a gradient, each with its state in place."""
        params = [param for param in group["params"] if param.grad is not None]
        for param in params:
            if param.grad.is_sparse:
                raise RuntimeError(f"{type(self).__name__} does not support sparse gradients")
            state = self.state[param]
            if len(state) == 0:
                device = param.device if group["capturable"] else "cpu"
                state["step"] = torch.zeros((), dtype=torch.float32, device=device)
                state["exp_avg"] = torch.zeros_like(param)
                state["exp_avg_sq"] = torch.zeros_like(param)
                if group["amsgrad"]:
                    state["max_exp_avg_sq"] = torch.zeros_like(param)
                state["sign"] = param.sign().to(torch.int8)
                self._init_state(param, state, group)
        return params

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates every parameter that has a gradient. Nothing in it waits for the device.

        Args:
            closure: reevaluates the model and returns the loss, with gradients enabled.

        Returns:
            What the closure returned, or None.

        Raises:
            RuntimeError: a gradient is sparse, or a CUDA graph is being captured without ``capturable``.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = self._init_group(group)
            if not params:
                continue
            if params[0].is_cuda and not group["capturable"] and not torch.compiler.is_compiling():
                _check_not_capturing()
            foreach = group["foreach"]
            if foreach is None and not group["fused"]:
                _, foreach = _default_to_fused_or_foreach(params, differentiable=False, use_fused=False)
            if not foreach:
                for param in params:
                    if group["fused"]:
                        self._fused_tensor(param, self.state[param], group)
                    else:
                        self._single_tensor(param, self.state[param], group, self._draw(param, group))
                continue
            alike = defaultdict(list)
            for param in params:
                alike[param.device, param.dtype].append(param)
            for some in alike.values():
                states = {key: [self.state[param][key] for param in some] for key in self.state[some[0]]}
                self._multi_tensor(some, states, group, [self._draw(param, group) for param in some])
        return loss


@functools.cache
def _compiled(update: Callable[..., None]) -> Callable[..., None]:
    return torch.compile(update, fullgraph=True, dynamic=True)


def _check_not_capturing() -> None:
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("to capture step() in a CUDA graph, construct the optimizer with capturable=True")


def has_kernel(param: Tensor, state: dict[str, Tensor]) -> bool:
    """Whether spiking_kernels can update a parameter: contiguous float32 on the CPU, where there is a C compiler."""
    tensors = (param, param.grad, *state.values())
    accepted = param.is_cpu and param.dtype == torch.float32 and all(t.is_contiguous() for t in tensors)
    return accepted and spiking_kernels is not None and spiking_kernels.available() is None


def moments(param: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Advances Adam's moments by the gradient of one parameter (Kingma and Ba, ICLR 2015, algorithm 1).

    Returns:
        Adam's change eta_t * m / d_t (a new tensor of the weight's shape) and the step size eta_t, 0-dimensional.

    Bias corrections are 0-dimensional float64 tensors where ``step`` lives: on the CPU they enter a
    CUDA kernel by value, on the device they can be captured; in float32, 1 - 0.999^1 would be off by 3e-5.
    """
    beta1, beta2 = group["betas"]
    grad = -param.grad if group["maximize"] else param.grad
    if group["weight_decay"] != 0:
        grad = grad.add(param, alpha=group["weight_decay"])
    state["step"].add_(1)
    t = state["step"].double()
    # not lerp_, which rounds differently from the trajectories that the paper's implementation takes
    state["exp_avg"].mul_(beta1).add_(grad, alpha=1 - beta1)
    state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    v = state["exp_avg_sq"]
    if group["amsgrad"]:
        v = torch.maximum(state["max_exp_avg_sq"], v, out=state["max_exp_avg_sq"])
    denominator = v.sqrt().div_((1 - beta2**t).sqrt()).add_(group["eps"])
    eta = group["lr"] / (1 - beta1**t)
    return state["exp_avg"].mul(eta).div_(denominator), eta


def moments_foreach(
    params: list[Tensor], states: dict[str, list[Tensor]], group: dict[str, Any]
) -> tuple[list[Tensor], list[Tensor]]:
    """:func:`moments` for a list of parameters of one device and dtype."""
    beta1, beta2 = group["betas"]
    grads = [param.grad for param in params]
    if group["maximize"]:
        grads = torch._foreach_neg(grads)
    if group["weight_decay"] != 0:
        grads = torch._foreach_add(grads, params, alpha=group["weight_decay"])
    torch._foreach_add_(states["step"], 1)
    ts = [step.double() for step in states["step"]]
    torch._foreach_mul_(states["exp_avg"], beta1)
    torch._foreach_add_(states["exp_avg"], grads, alpha=1 - beta1)
    torch._foreach_mul_(states["exp_avg_sq"], beta2)
    torch._foreach_addcmul_(states["exp_avg_sq"], grads, grads, value=1 - beta2)
    vs = states["exp_avg_sq"]
    if group["amsgrad"]:
        torch._foreach_maximum_(states["max_exp_avg_sq"], vs)
        vs = states["max_exp_avg_sq"]
    denominators = torch._foreach_sqrt(vs)
    torch._foreach_div_(denominators, [(1 - beta2**t).sqrt() for t in ts])
    torch._foreach_add_(denominators, group["eps"])
    etas = [group["lr"] / (1 - beta1**t) for t in ts]
    changes = torch._foreach_mul(states["exp_avg"], etas)
    torch._foreach_div_(changes, denominators)
    return changes, etas
