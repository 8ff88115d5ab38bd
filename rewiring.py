"""What Grad Rewiring and Deep Rewiring share: Adam's part of the update, checks, state, ways to execute a step.

Symbols, in both algorithms: w a weight, s its fixed sign, theta its synaptic parameter,
w = s * max(theta, 0). A connection is connected (active) when w != 0, else pruned (dormant).
m and v are Adam's moments, eta_t = lr / (1 - beta1^t) the step size and
d_t = sqrt(v) / sqrt(1 - beta2^t) + eps the denominator.
"""

import contextlib
import functools
import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import chain
from numbers import Real
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import optimizer as torch_optimizer
from torch.optim.adam import adam as plain_adam
from torch.optim.optimizer import Optimizer, _default_to_fused_or_foreach

import sharding
from sharding import is_sharded, local

try:
    import spiking_kernels
except ImportError:  # this file was copied into another project without them
    spiking_kernels = None

__all__ = [
    "Lists",
    "RewiringOptimizer",
    "adam",
    "check_bool",
    "check_number",
    "each",
    "overlaps_itself",
    "spiking_kernels",
]

Lists = dict[str, list[Tensor]]  # the tensors of a step by what they are: "weight", "grad", "exp_avg", ...

# -- the arithmetic --------------------------------------------------------------------------------


def adam(
    lists: Lists,
    *,
    lr: float | Tensor,
    betas: tuple[float, float] | tuple[Tensor, Tensor],
    eps: float | Tensor,
    weight_decay: float | Tensor | None,
    amsgrad: bool,
    maximize: bool,
) -> tuple[list[Tensor], list[Tensor]]:
    """Advances Adam's moments by the gradients (Kingma and Ba, ICLR 2015, algorithm 1).

    Where ``lists`` has the "sizes" of a step instead of "step", it does not count the step: see :func:`step_sizes`.

    Returns:
        Adam's changes eta_t * m / d_t (new tensors of the weights' shapes) and the step sizes eta_t, 0-dimensional.
    """
    beta1, beta2 = betas
    if "step" in lists:
        torch._foreach_add_(lists["step"], 1)
        sizes = [step_sizes(step, lr, betas) for step in lists["step"]]
        etas, corrections = [eta for eta, _ in sizes], [root for _, root in sizes]
    else:
        etas, corrections = _pairs(lists["sizes"])
    grads, ms, vs = lists["grad"], lists["exp_avg"], lists["exp_avg_sq"]
    if maximize:
        grads = torch._foreach_neg(grads)
    if weight_decay is not None:
        weights, alpha = _scaled(lists["weight"], weight_decay)
        grads = torch._foreach_add(grads, weights, alpha=alpha)
    # not lerp_, which rounds differently from the trajectories that the paper's implementation takes
    torch._foreach_mul_(ms, each(beta1, ms))
    parts, alpha = _scaled(grads, 1 - beta1)
    torch._foreach_add_(ms, parts, alpha=alpha)
    torch._foreach_mul_(vs, each(beta2, vs))
    parts, value = _scaled(grads, 1 - beta2)
    torch._foreach_addcmul_(vs, parts, grads, value=value)
    if amsgrad:
        torch._foreach_maximum_(lists["max_exp_avg_sq"], vs)
        vs = lists["max_exp_avg_sq"]
    denominators = torch._foreach_sqrt(vs)
    torch._foreach_div_(denominators, corrections)
    torch._foreach_add_(denominators, each(eps, denominators))
    changes = torch._foreach_mul(ms, etas)
    torch._foreach_div_(changes, denominators)
    return changes, etas


def step_sizes(
    step: Tensor, lr: float | Tensor, betas: tuple[float, float] | tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """The step size eta_t and the root sqrt(1 - beta2^t) of a step t, or of some.

    They are float64 tensors where ``step`` lives: on the CPU, 0-dimensional ones enter a CUDA kernel by value, on the
    device they can be captured; in float32, 1 - 0.999^1 would be off by 3e-5.
    """
    beta1, beta2 = betas
    t = step.double()
    return lr / (1 - beta1**t), (1 - beta2**t).sqrt()


def _with_sizes(lists: Lists, lr: float | Tensor, betas: tuple[float, float]) -> Lists:
    """The lists for compiled code, with :func:`step_sizes`: in it, every weight would compute its powers in float64.

    The step is not counted yet. On a GPU all are one tensor [2, n], which takes as few kernels as those of one weight.
    """
    steps = lists["step"]
    others = {key: tensors for key, tensors in lists.items() if key != "step"}
    if not steps[0].is_cuda:
        return others | {"sizes": [*chain(*zip(*(step_sizes(step + 1, lr, betas) for step in steps), strict=True))]}
    return others | {"sizes": [torch.stack(step_sizes(torch.stack(steps) + 1, lr, betas))]}


def _pairs(sizes: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The two lists that :func:`_with_sizes` has put into one, or into one tensor."""
    if sizes[0].dim():
        etas, corrections = sizes[0].unbind()
        return [*etas.unbind()], [*corrections.unbind()]
    return sizes[: len(sizes) // 2], sizes[len(sizes) // 2 :]


def each(value: float | Tensor, tensors: list[Tensor]) -> float | list[Tensor]:
    """A number for all tensors, or one for each if it is a tensor: of that, foreach functions would ask the value."""
    return [value] * len(tensors) if isinstance(value, Tensor) else value


def _scaled(tensors: list[Tensor], scale: float | Tensor) -> tuple[list[Tensor], float]:
    """Tensors and a number that give scale * tensors: alpha= and value= take no tensor."""
    return (torch._foreach_mul(tensors, each(scale, tensors)), 1) if isinstance(scale, Tensor) else (tensors, scale)


# -- checks ----------------------------------------------------------------------------------------


def check_number(name: str, value: Any, accepted: str, condition: Callable[[float], bool]) -> None:
    """Raises ValueError, naming the argument, unless ``value`` is a finite number for which ``condition`` holds."""
    with contextlib.suppress(OverflowError):  # a whole number, or a fraction, that no float holds
        if isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value) and condition(value):
            return
    raise ValueError(f"{name}={value!r} is not accepted: {name} must be {accepted}")


def check_bool(name: str, value: Any, or_none: bool = False) -> None:
    """Raises ValueError, naming the argument, unless ``value`` is True or False, or None where that is accepted."""
    if not (isinstance(value, bool) or (or_none and value is None)):
        accepted = "True, False or None" if or_none else "True or False"
        raise ValueError(f"{name}={value!r} is not accepted: {name} must be {accepted}")


def _plain(value: Real) -> bool | int | float:
    """A number of another type, NumPy's say, as a float: it would have others computed in its own precision."""
    return value if type(value) in PLAIN else float(value)


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether elements of a tensor may share memory, as those of an expanded one do."""
    if tensor.is_contiguous():
        return False
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += stride * (size - 1)
    return False


# what torch.optim.Adam calls its settings, and what its state holds: always, and with amsgrad
ADAM_SETTINGS = {"lr", "betas", "eps", "weight_decay", "amsgrad", "foreach", "maximize", "capturable", "fused"}
ADAM_STATE = ("step", "exp_avg", "exp_avg_sq")
AMSGRAD_STATE = "max_exp_avg_sq"
OWN_STATE = ("sign", "theta")
GENERATOR = "generator"
# what to do where ranks differ
ADVICE = {
    "weights": "Load the same ones on every rank, or wrap the network in DistributedDataParallel before the first step",
    "states": "Load the optimizer's state on every rank",
    "settings": "Give every rank the same",
    "random numbers": "Give {} a generator seeded equally on every rank: "
    "generator=torch.Generator(device).manual_seed(0)",
    "updates": "Give every rank a C compiler, or all of them fused=False",
}
PLAIN = (bool, int, float)  # types of numbers that compute in full precision
RECOMPILE_LIMIT = 64  # each number of tensors that a group has is compiled once, with and without prior
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

Drawn = list[tuple[Tensor, dict[str, Tensor]]]  # parameters, each with the random numbers of its step


class RewiringOptimizer(Optimizer):
    """Base of the rewiring optimizers: an Adam whose update an algorithm redefines.

    A subclass checks its settings in :meth:`_check_settings`, names in :meth:`own_state` what it keeps, draws the
    random numbers of a step in :meth:`_draw`, and does the arithmetic in :attr:`_update`, on lists of tensors, with
    its settings as :meth:`_numbers` gives them.

    That one function serves every way to take a step: it gets one tensor at a time, or with ``foreach`` all of one
    device and dtype; with ``fused`` it is compiled for all of them at once. On the CPU a kernel of spiking_kernels
    takes the place of the compiled function where it can. A group with ``prune=False`` is updated by
    torch.optim.Adam's own function.

    A parameter may be sharded over several ranks, as a DTensor. Its state is sharded in the same way, and a step takes
    what this rank holds of each. A kernel that draws random numbers gives way to the plain update then.

    The state of a parameter holds ``step`` (0-dimensional, float32; on the CPU unless ``capturable``), ``exp_avg``,
    ``exp_avg_sq``, with amsgrad ``max_exp_avg_sq``, and where it is pruned ``sign`` (int8), each of the weight's shape.
    The settings of a group may change between steps: state that they need and that is missing is created then.
    The state follows its weight to another dtype or device. What others keep in it is left alone.

    Args:
        settings, named: of every group that does not name its own; ``named`` are those of :attr:`LATER`.
        generator: of the random numbers; None for the default one of each parameter's device.

    Attributes:
        check_ranks: whether the next step compares weights, state, settings and random numbers with those of the other
            ranks of torch.distributed. The first step does, and turns it off. Turn it off before, where the ranks
            train different weights on purpose.
    """

    # Settings that are given by name, with their defaults. They were added later: older states mean the defaults.
    LATER: ClassVar[dict[str, Any]] = dict(foreach=None, maximize=False, capturable=False, fused=False, prune=True)
    generator: torch.Generator | None = None
    check_ranks: bool = True

    def __init__(
        self,
        params: Iterable,
        settings: dict[str, Any],
        named: dict[str, Any],
        generator: torch.Generator | None = None,
    ):
        if unknown := named.keys() - self.LATER.keys():
            raise TypeError(f"{type(self).__name__} takes no argument {', '.join(sorted(unknown))}")
        if not isinstance(generator, torch.Generator | None):
            raise ValueError(f"generator={generator!r} is not accepted: generator must be a torch.Generator or None")
        self.generator = generator
        self._seen: dict[int, _Seen] = {}
        super().__init__(params, {**settings, **self.LATER, **named})

    # -- what an algorithm defines -------------------------------------------------------------

    _update: ClassVar[Callable[..., None]]  # of lists of tensors and settings; in place, with ``torch._foreach_*``

    def _check_settings(self, group: dict[str, Any], wait: bool) -> None:
        """Raises ValueError for a setting of the algorithm that is not accepted; ``wait`` as :meth:`number` has it."""
        raise NotImplementedError

    def own_state(self, group: dict[str, Any]) -> set[str]:
        """What the state of a group's parameters holds beside Adam's: ``sign``, ``theta``, nothing without prune."""
        raise NotImplementedError

    def _numbers(self, group: dict[str, Any]) -> dict[str, float | None]:
        """What the update takes beside Adam's settings; None for a term that is off."""
        raise NotImplementedError

    def _prepare_gradient(self, param: Tensor, group: dict[str, Any]) -> None:
        """Changes the gradient that the step of one parameter is about to take."""

    def _drawn(self, group: dict[str, Any]) -> list[str]:
        """What random numbers the step of a parameter needs, as :meth:`_draw` names them."""
        return []

    def _draw(self, param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """The random numbers that the step of one parameter needs, for what this rank holds of it."""
        return {}

    def _kernel(self, memory: Any, grad: Tensor, settings: Any) -> None:
        """Takes a step of one parameter with a kernel of spiking_kernels, which draws its own random numbers.

        ``memory`` and ``settings`` are a Memory and Settings of spiking_kernels.
        """
        raise NotImplementedError

    # -- settings ------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of parameters, with settings of its own if it names some.

        Raises:
            ValueError: a setting or a parameter is not accepted.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._accept_group(group)
            for param in group["params"]:
                self._check_param(param, group)
        except ValueError:
            self.param_groups.pop()
            raise

    def _accept_group(self, group: dict[str, Any], wait: bool = True) -> None:
        """Raises ValueError for a setting that is not accepted; without ``wait``, it reads no value on a device.

        Numbers of other types become Python's, which compute in full precision and which :func:`torch.load` takes.
        """
        lr, betas = self.number("lr", group["lr"], wait), group["betas"]
        for name, value in (("lr", lr), ("eps", group["eps"]), ("weight_decay", group["weight_decay"])):
            check_number(name, value, "a finite number >= 0", lambda x: x >= 0)
        if not isinstance(betas, (tuple, list)) or len(betas) != 2:
            raise ValueError(f"betas={betas!r} is not accepted: betas must be two numbers in [0, 1)")
        for i, beta in enumerate(betas):
            check_number(f"betas[{i}]", beta, "a number in [0, 1)", lambda x: 0 <= x < 1)
        for name in ("amsgrad", "maximize", "capturable", "fused", "prune"):
            check_bool(name, group[name])
        check_bool("foreach", group["foreach"], or_none=True)
        if group["fused"] and group["foreach"]:
            raise ValueError("foreach=True is not accepted with fused=True: choose one of them")
        if group["prune"]:
            self._check_settings(group, wait)
        group["betas"] = tuple(map(_plain, betas))
        group.update({key: _plain(value) for key, value in group.items() if isinstance(value, Real)})

    @staticmethod
    def number(name: str, value: Any, wait: bool) -> Any:
        """A setting that may be a one-element tensor, as a number; 0 for one on a device, unless it may ``wait``."""
        if not isinstance(value, Tensor):
            return value
        if value.numel() != 1 or value.is_complex() or value.is_meta:
            raise ValueError(
                f"{name}={value!r} is not accepted: {name} must be a number, or a tensor of one real element"
            )
        return float(value) if wait or value.is_cpu else 0.0

    def _check_param(self, param: Tensor, group: dict[str, Any]) -> None:
        """Raises ValueError for a parameter that no step could update."""
        if param.dtype not in DTYPES:
            accepted = ", ".join(map(str, DTYPES))
            raise ValueError(f"a parameter of dtype {param.dtype} is not accepted: it must be one of {accepted}")
        if param.layout is not torch.strided:
            raise ValueError(f"a parameter of layout {param.layout} is not accepted: it must be torch.strided")
        if torch.nn.parameter.is_lazy(param):  # it has no shape yet; the first step checks it
            return
        if overlaps_itself(param):
            raise ValueError(
                f"a parameter of shape {list(param.shape)} and strides {list(param.stride())} is not accepted: "
                "its weights share memory; clone() gives each its own"
            )
        if sharding.is_partial(param):
            raise ValueError(
                f"a parameter with the placements {param.placements} is not accepted: each must be Shard or Replicate"
            )
        if not group["prune"]:
            return
        if getattr(param, "_fsdp_flattened", False):
            raise ValueError(
                "a parameter of FullyShardedDataParallel is not accepted: it is a part of a flat tensor. "
                "Shard the network with torch.distributed.fsdp.fully_shard"
            )
        if self.generator is not None and self.generator.device != param.device and not param.is_meta:
            raise ValueError(
                f"generator on {self.generator.device} is not accepted: a parameter is on {param.device}; "
                f"use torch.Generator({str(param.device)!r})"
            )

    # -- state ---------------------------------------------------------------------------------

    def _state_keys(self, group: dict[str, Any]) -> list[str]:
        return [*ADAM_STATE, *([AMSGRAD_STATE] if group["amsgrad"] else []), *sorted(self.own_state(group))]

    def _check_state(self, param: Tensor, state: Any, **of_loaded: bool) -> None:
        """Raises ValueError unless a parameter's state has all of Adam's tensors, in its shape, or none of them."""
        if flaw := _flaw(state, param.shape, **of_loaded):
            raise ValueError(f"the state of {self._name(param)} is not accepted: {flaw}")

    def _begin_state(self, param: Tensor, group: dict[str, Any]) -> None:
        """Creates what the settings need in a parameter's state, with the dtype and the device of the weight."""
        state, (_, *keys) = self.state[param], self._state_keys(group)
        # torch's fused Adam takes the step where the weights are
        on_device = group["capturable"] or (group["fused"] and not group["prune"])
        state["step"] = _as_step(state.get("step", 0), param.device if on_device else "cpu")
        for key in set(OWN_STATE).difference(keys):
            state.pop(key, None)  # it belongs to earlier weights
        for key in keys:
            if key not in state:
                state[key] = _begun(key, param, state)
            value, dtype = state[key], torch.int8 if key == "sign" else param.dtype
            if value.dtype != dtype or value.device != param.device or overlaps_itself(value):
                state[key] = value.to(param.device, dtype).clone()

    @torch.no_grad()
    def load_parameters(self) -> None:
        """Takes the weights as they are now, after anything but :meth:`step` has changed them.

        The weights are made from the state at each step: w = s * max(theta, 0). Without this call, the next
        step puts back what was changed since the last one: restored or averaged weights, a row set to zero. With it,

        - where w != 0, s = sign(w) and theta = |w|, for a connection that was pruned or never was, too;
        - where w = 0, the connection is pruned: its sign stays, and theta is at most 0. It can come back as any
          pruned one can; ``optimizer.state[w]["sign"][row] = 0`` removes a row for ever.

        Deep R keeps no theta, but a sign: without this call it prunes a weight that was given the opposite sign.
        Moments and step stay, as those of torch.optim.Adam do. A network and an optimizer that are both restored
        by ``load_state_dict`` need no such call: theta is in the state. The state is changed in place, so that a
        captured CUDA graph goes on with it.
        """
        for group in self.param_groups:
            for param in group["params"]:
                if not group["prune"] or "sign" not in self.state.get(param, {}):
                    continue  # its next step takes the weights
                self._check_state(param, self.state[param])
                self._begin_state(param, group)
                weight, sign = local(param), local(self.state[param]["sign"])
                sign.copy_(torch.where(weight == 0, sign, weight.sign()))
                if "theta" in self.state[param]:
                    theta = local(self.state[param]["theta"])
                    theta.copy_(torch.where(weight == 0, theta.clamp(max=0), weight.abs()))

    def state_dict(self) -> dict[str, Any]:
        """The state, as every torch.optim optimizer gives it; the first group has that of the generator.

        There, torch.distributed.checkpoint takes it along.
        """
        state_dict = super().state_dict()
        if self.generator is not None:
            state_dict["param_groups"][0][GENERATOR] = self.generator.get_state()
        return state_dict

    def __getstate__(self) -> dict[str, Any]:
        drawn = {} if self.generator is None else {GENERATOR: self.generator}
        return {**super().__getstate__(), "check_ranks": self.check_ranks, **drawn}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "param_groups" in self.__dict__:  # load_state_dict calls; nothing has been changed so far
            drawn = self._generator_state(state["param_groups"])
            self._check_loaded(state["param_groups"], state["state"])
            if drawn is not None:
                self.generator.set_state(drawn)
        for group in state["param_groups"]:
            for key, value in self.LATER.items():
                group.setdefault(key, value)
            for param in group["params"]:
                entry = state["state"].get(param, {})
                if "sign" in entry:  # load_state_dict casts all state but `step` to the weight's dtype
                    entry["sign"] = entry["sign"].to(torch.int8)
                if "step" in entry:
                    entry["step"] = _as_step(entry["step"], param.device if group["capturable"] else "cpu")
        super().__setstate__(state)
        self._seen = {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads the state, and the settings with it, as every torch.optim optimizer does.

        The state of another optimizer with Adam's moments can be loaded too, to prune a trained network: its
        moments and steps are taken, sign and theta begin from the weights at the next step, unless it has them,
        and the settings stay those of this optimizer.

        Raises:
            ValueError: what the state lacks, or does not fit the parameters; nothing has been changed.
        """
        super().load_state_dict(state_dict)

    def _check_loaded(self, groups: list[dict[str, Any]], states: dict[Any, Any]) -> None:
        """Raises ValueError for what cannot be loaded; gives the groups of another optimizer this one's settings."""
        settings = self.defaults.keys() - self.LATER.keys() - {"differentiable"}  # torch adds it
        for number, (group, own) in enumerate(zip(groups, self.param_groups, strict=True)):
            foreign = not group.keys() & (settings - ADAM_SETTINGS)
            for param in group["params"]:
                self._check_state(param, states.get(param, {}), loaded=True, foreign=foreign)
            refused = f"param_groups[{number}] is not accepted: "
            if foreign:
                if group.get("maximize", False) != own["maximize"]:
                    raise ValueError(
                        f"{refused}its moments were made with maximize={group['maximize']!r}, "
                        f"this optimizer has {own['maximize']!r}"
                    )
                group.clear()
                group.update(own)
            if lacks := settings - group.keys():
                raise ValueError(f"{refused}it lacks {', '.join(sorted(lacks))}")
            loaded = {**self.LATER, **group}
            self._accept_group(loaded)
            for param in group["params"]:
                self._check_param(param, loaded)

    def _generator_state(self, groups: list[dict[str, Any]]) -> Tensor | None:
        """Takes the state of the generator out of loaded groups; None where this optimizer stays as it is.

        Raises:
            ValueError: it is not the state of such a generator, or this optimizer has none and draws.
        """
        states = [group.pop(GENERATOR) for group in groups if GENERATOR in group]
        draws = type(self)._draw is not RewiringOptimizer._draw
        if not states or not draws:
            return None
        if self.generator is None:
            name = type(self).__name__
            raise ValueError(f"the state has that of a generator: construct this {name} with generator=, to load it")
        try:
            torch.Generator(self.generator.device).set_state(state := states[0].cpu())
        except (AttributeError, TypeError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"the generator's state is not accepted by one on {self.generator.device}: {reason}"
            ) from None
        return state

    def _name(self, param: Tensor) -> str:
        """A parameter's place in the groups, for a message."""
        for number, group in enumerate(self.param_groups):
            for index, other in enumerate(group["params"]):
                if other is param:
                    name = f" ({group['param_names'][index]})" if "param_names" in group else ""
                    return f"parameter {index} of group {number}{name}"
        raise KeyError("the parameter is in no group")

    # -- the step ------------------------------------------------------------------------------

    @staticmethod
    def profile_hook_step(func: Callable[..., Any]) -> Callable[..., Any]:
        """The step as torch wraps that of every optimizer, for hooks and for the profiler.

        To record a step takes a fifth of the time of a fused one of 0.6 M weights: where nothing would see it, the
        step is called directly.
        """
        wrapped = Optimizer.profile_hook_step(func)

        @functools.wraps(func)
        def step(self: "RewiringOptimizer", *args: Any, **kwargs: Any) -> Any:
            own = self._optimizer_step_pre_hooks or self._optimizer_step_post_hooks
            of_all = torch_optimizer._global_optimizer_pre_hooks or torch_optimizer._global_optimizer_post_hooks
            if torch.compiler.is_compiling() or own or of_all or torch.autograd._profiler_enabled():
                return wrapped(self, *args, **kwargs)
            result = func(self, *args, **kwargs)
            self._optimizer_step_code()
            return result

        return step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates every parameter that has a gradient. Nothing in it waits for the device.

        Args:
            closure: reevaluates the model and returns the loss, with gradients enabled.

        Returns:
            What the closure returned, or None.

        Raises:
            ValueError: a setting, a parameter or its state is no longer accepted; nothing has been changed.
            RuntimeError: a gradient is sparse, a CUDA graph is being captured without ``capturable``, or the ranks of
                torch.distributed differ in the first step.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for lists, settings in self._prepared(torch.compiler.is_compiling()):
            self._update(lists, **settings)
        return loss

    def seen_finite(self) -> list[Tensor]:
        """The parameters of which the last step saw, in passing, that sums of their gradients and weights are finite.

        Only the kernels look. What has been changed since, as torch counts changes, is left out.
        """
        memories = [pair for seen in self._seen.values() for pair in zip(seen.params, seen.memory, strict=False)]
        return [param for param, memory in memories if memory is not None and memory.sums_are_finite(param)]

    @torch._disable_dynamo  # torch.compile traces only the arithmetic, so the random draws are those of an eager step
    def _prepared(self, traced: bool) -> list[tuple[Lists, dict[str, Any]]]:
        """Checks and creates all that a step needs, draws its random numbers, and takes what is not for torch.compile.

        Returns:
            The tensors and the settings of the updates that are left.
        """
        updates: list[tuple[Lists, dict[str, Any]]] = []
        groups = [(group, self._check_step(number, group)) for number, group in enumerate(self.param_groups)]
        if self.check_ranks:
            self._compare_ranks()
        for group, seen in groups:
            params, settings, foreach = seen.params, seen.settings, group["foreach"]
            if seen.looks is None:  # something is new
                for param in params:
                    self._begin_state(param, group)
                seen.tensors, seen.memory = self._tensors(seen), [self._memory(param, group) for param in params]
                seen.sharded = any(map(is_sharded, params))
                seen.looks = None if seen.sharded else _looks(seen.tensors)  # wrappers do not tell their memory
            if not params:
                continue
            if not group["prune"]:
                _adam_update(self._lists([(param, {}) for param in params], seen), settings["lr"], group)
                continue
            for param in params:
                self._prepare_gradient(param, group)
            if group["fused"]:
                self._fused(seen, group)
                continue
            if foreach is None:
                _, foreach = _default_to_fused_or_foreach(params, differentiable=False, use_fused=False)
            if traced:  # what enters by alpha= and value= stays a number, to round as it does in an eager step
                settings = {**_as_tensors(settings), **{key: settings[key] for key in ("betas", "weight_decay")}}
            drawn = [(param, self._draw(param, group)) for param in params]
            found = [self._lists(some, seen) for some in (_alike(drawn) if foreach else [[one] for one in drawn])]
            updates += [(lists, settings) for lists in found if not self._update_with_counts(lists, seen)]
        return updates

    def _fused(self, seen: "_Seen", group: dict[str, Any]) -> None:
        """Updates parameters in place, in one pass over memory."""
        rest: Drawn = []
        if seen.of_kernel is None and any(seen.memory):
            seen.of_kernel = spiking_kernels.Settings(**seen.settings)
        for param, memory in zip(seen.params, seen.memory, strict=True):
            if memory is not None:
                try:
                    self._kernel(memory, local(param.grad), seen.of_kernel)
                    continue
                except spiking_kernels.Unfit:  # the gradient is not contiguous, say
                    pass
            rest.append((param, self._draw(param, group)))
        for lists in (self._lists(some, seen) for some in _alike(rest)):
            if not self._update_with_counts(lists, seen):
                _compiled(self._update)(lists, **seen.settings)

    def _update_with_counts(self, lists: Lists, seen: "_Seen") -> bool:
        """Takes the step of sharded parameters if it counts over whole ones, which is not compiled; False if not."""
        if "whole" not in lists:
            return False
        self._update(lists, **seen.settings)
        return True

    def _lists(self, drawn: Drawn, seen: "_Seen") -> Lists:
        """The tensors of some parameters of a group, with the random numbers drawn for them."""
        lists = {"weight": [param for param, _ in drawn], "grad": [param.grad for param, _ in drawn]}
        lists |= {key: [self.state[param][key] for param, _ in drawn] for key in seen.keys}
        if seen.sharded:
            lists = {key: [*map(local, tensors)] for key, tensors in lists.items()}
            if "uniform" in drawn[0][1]:  # what is re-activated depends on a count over the whole tensor
                lists["whole"] = [param for param, _ in drawn]
        return lists | {key: [draws[key] for _, draws in drawn] for key in drawn[0][1]}

    def _check_step(self, number: int, group: dict[str, Any]) -> "_Seen":
        """Raises an error, in one line, for what a step of a group cannot use; what has not changed is good still."""
        seen, values = self._seen.get(number), self._values(group)
        if seen is None or seen.has_tensor or seen.values != values:
            self._accept_group(group, wait=False)
            old, seen = seen, _Seen(self._values(group), self._settings(group), self._state_keys(group))
            if old is not None and old.switches() == seen.switches():  # a scheduler changes numbers in every step
                seen.tensors, seen.looks, seen.memory = old.tensors, old.looks, old.memory
                seen.sharded = old.sharded
            self._seen[number] = seen
        seen.params = [param for param in group["params"] if param.grad is not None]
        on_gpu = seen.params and seen.params[0].is_cuda
        if on_gpu and not group["capturable"] and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("to capture step() in a CUDA graph, construct the optimizer with capturable=True")
        for param in seen.params:
            grad = param.grad
            if grad.layout is not torch.strided:
                raise RuntimeError(f"{type(self).__name__} does not support sparse gradients")
            if grad.shape != param.shape or grad.device != param.device:
                raise RuntimeError(
                    f"the gradient of {self._name(param)} is {list(grad.shape)} on {grad.device}, "
                    f"the parameter {list(param.shape)} on {param.device}"
                )
        if seen.looks is None or seen.looks != _looks(self._tensors(seen)):
            seen.looks = None
            for param in seen.params:
                self._check_param(param, group)
                if param in self.state:
                    self._check_state(param, self.state[param])
        return seen

    def _compare_ranks(self) -> None:
        """Raises RuntimeError, with what to do, if this rank differs from the first one of torch.distributed here."""
        params = [(self._name(param), param) for group in self.param_groups for param in group["params"]]
        if any(param.is_cuda for _, param in params) and torch.cuda.is_current_stream_capturing():
            return  # this would wait for the device
        self.check_ranks = False
        if not sharding.several_ranks():
            return
        groups = list(enumerate(self.param_groups))
        drawing = [group for _, group in groups if self._drawn(group)]
        names = (*ADAM_STATE, AMSGRAD_STATE, *OWN_STATE)
        states = [(f"{key} of {name}", self.state.get(p, {}).get(key)) for name, p in params for key in names]
        keys = sorted(self.defaults.keys() - {"foreach", "capturable", "fused", "differentiable"})
        settings = [(f"{key} of group {number}", group.get(key)) for number, group in groups for key in keys]
        facts: dict[str, dict[str, Any]] = {
            "weights": {name: sharding.checksum(param) for name, param in params},
            "states": {name: sharding.checksum(value) for name, value in states if isinstance(value, Tensor)},
            "settings": {name: repr(value) for name, value in settings if not isinstance(value, Tensor)},
            "random numbers": self._random_states(drawing),
            "updates": {"only one has kernels": any(group["fused"] for group in drawing) and _kernels()},
        }
        subject = f"{type(self).__name__} {[(list(param.shape), str(param.dtype)) for _, param in params]}"
        if found := sharding.disagreement(subject, facts):
            ranks, kind, which = found
            some = f"{', '.join(which[:3])}{f' and {len(which) - 3} more' if len(which) > 3 else ''}"
            raise RuntimeError(
                f"{kind} differ between ranks {' and '.join(map(str, ranks))}: {some}. "
                f"{ADVICE[kind].format(type(self).__name__)}. "
                "If ranks are meant to differ, set optimizer.check_ranks = False before the first step"
            )

    def _random_states(self, groups: list[dict[str, Any]]) -> dict[str, str]:
        """Digests of the states of the generators that groups draw from."""
        if groups and self.generator is not None:
            return {"the state of the generator": sharding.digest(self.generator.get_state())}
        devices = {param.device.type: param.device for group in groups for param in group["params"]}
        states = {kind: sharding.default_generator_state(device) for kind, device in sorted(devices.items())}
        return {f"the state of the default generator of {kind}": sharding.digest(x) for kind, x in states.items()}

    def _tensors(self, seen: "_Seen") -> list[Any]:
        """Each parameter with a gradient and, after it, its state."""
        return [x for param in seen.params for x in (param, *map(self.state.get(param, {}).get, seen.keys))]

    def _memory(self, param: Tensor, group: dict[str, Any]) -> Any:
        """What a kernel works on; None where none takes the update."""
        fits = group["fused"] and group["prune"] and param.is_cpu and param.dtype == torch.float32
        if not fits or not _kernels():
            return None
        if is_sharded(param) and self._drawn(group):  # it would draw the numbers of a tensor of this size
            return None
        try:
            state = {key: local(self.state[param][key]) for key in self._state_keys(group)}
            return spiking_kernels.Memory(local(param), **state)
        except spiking_kernels.Unfit:  # one is not contiguous, say
            return None

    def _settings(self, group: dict[str, Any]) -> dict[str, Any]:
        """What the update takes of a group's settings; None for a term that is off."""
        settings = {key: group[key] for key in ("betas", "eps", "amsgrad", "maximize")}
        # with more dimensions, lr would give them to a 0-dimensional weight
        lr = group["lr"].reshape(()) if isinstance(group["lr"], Tensor) else group["lr"]
        settings |= dict(lr=lr, weight_decay=group["weight_decay"] or None)
        return settings | (self._numbers(group) if group["prune"] else {})

    def _values(self, group: dict[str, Any]) -> list[Any]:
        """The settings of a group, to be compared with those of the last step; True and 1 are different ones."""
        values = [*map(group.get, self.defaults)]
        return [*map(type, values), *values]


@dataclass
class _Seen:
    """What a step found good of a group: the next one checks only what is no longer so."""

    values: list[Any]
    settings: dict[str, Any]  # of the update
    keys: list[str]  # of the state
    params: list[Tensor] = field(default_factory=list)
    tensors: list[Any] = field(default_factory=list)  # kept, so that no other tensor gets the id of one
    looks: list[Any] | None = None
    memory: list[Any] = field(default_factory=list)  # of each parameter, if a kernel can work on it
    of_kernel: Any = None  # the settings as the kernels take them
    sharded: bool = False  # some of the parameters

    @functools.cached_property
    def has_tensor(self) -> bool:
        """Whether a setting is a tensor, whose value may change without a trace."""
        return any(isinstance(value, Tensor) for value in self.values)

    def switches(self) -> list[Any]:
        """The settings on which it depends whether a parameter and its state are good."""
        return [self.settings["eps"], *(value for value in self.values if isinstance(value, bool))]


def _kernels() -> bool:
    """Whether the kernels for the CPU can be used."""
    return spiking_kernels is not None and spiking_kernels.unavailable() is None


def _looks(tensors: list[Any]) -> list[Any] | None:
    """All that the checks of tensors look at; None, so that they are checked at each step, if one has no memory."""
    try:
        storage = [x.untyped_storage().nbytes() for x in tensors]
        kind = [x.dtype for x in tensors], [x.device for x in tensors]
        # one list for each: faster than all of a tensor after the other
        shape = [x.shape for x in tensors], [*map(Tensor.stride, tensors)]
        return [[*map(id, tensors)], [*map(Tensor.data_ptr, tensors)], storage, *kind, *shape]
    except (AttributeError, RuntimeError):
        return None


def _flaw(state: Any, shape: torch.Size, loaded: bool = False, foreign: bool = False) -> str | None:
    """What is wrong with a parameter's state; None if nothing is.

    Args:
        loaded: look at its values too, which waits for the device.
        foreign: it is another optimizer's, which must be an Adam if it has any state.
    """
    if not isinstance(state, dict):
        return f"it is a {type(state).__name__}, not a dictionary"
    known = [key for key in (*ADAM_STATE, AMSGRAD_STATE, *OWN_STATE) if key in state]
    lacks = [key for key in ADAM_STATE if key not in state]
    if "theta" in state and "sign" not in state:
        lacks.append("sign")
    if known and lacks:
        return f"it has {', '.join(map(str, state))}, but lacks {', '.join(lacks)}"
    for key in known:
        value = state[key]
        if key == "step":
            if not (isinstance(value, Tensor) and value.numel() == 1) and not isinstance(value, Real):
                return f"step is {value!r}, not one number"
            if loaded and not 0 <= float(value) < math.inf:
                return f"step is {float(value)}, not a number of steps"
        elif not isinstance(value, Tensor) or value.layout is not torch.strided:
            return f"{key} is not a dense tensor"
        elif value.shape != shape:
            return f"{key} has the shape {list(value.shape)}, the parameter {list(shape)}"
        elif loaded and key == "sign" and not value.is_meta and bool((value != value.sign()).any()):
            return "sign has other values than -1, 0 and 1"
    if foreign and lacks and any(value is not None for value in state.values()):
        return f"it has {', '.join(map(str, state))}, but lacks {', '.join(lacks)}: it is not Adam's"
    return None


def _begun(key: str, param: Tensor, state: dict[str, Tensor]) -> Tensor:
    """What a parameter's state holds at first."""
    if key == "sign":
        return param.sign().to(torch.int8)
    return (param * state["sign"]).clamp_(min=0) if key == "theta" else torch.zeros_like(param)


def _as_step(value: Real | Tensor, device: torch.device | str) -> Tensor:
    """A number of steps as the state holds it."""
    step = value if isinstance(value, Tensor) else torch.tensor(float(value), dtype=torch.float32, device="cpu")
    return step.reshape(()).to(device, torch.float32)


def _alike(drawn: Drawn) -> Iterable[Drawn]:
    """Parameters and their random numbers, by device and dtype."""
    together = defaultdict(list)
    for param, draws in drawn:
        together[param.device, param.dtype].append((param, draws))
    return together.values()


def _adam_update(lists: Lists, lr: float | Tensor, group: dict[str, Any]) -> None:
    """Updates the parameters of a group that is not pruned, as torch.optim.Adam does."""
    beta1, beta2 = group["betas"]
    if isinstance(lr, Tensor) and lr.is_cuda and group["fused"]:
        lr = lr.float()  # torch's kernel for GPUs reads no other dtype
    on_device = group["capturable"] and all(weight.is_cuda for weight in lists["weight"])
    plain_adam(
        *(lists.get(key, []) for key in ("weight", "grad", "exp_avg", "exp_avg_sq", AMSGRAD_STATE, "step")),
        **{key: group[key] for key in ("amsgrad", "eps", "weight_decay", "maximize")},
        **dict(lr=lr, beta1=beta1, beta2=beta2, capturable=on_device, fused=group["fused"] or None),
        foreach=False if isinstance(lr, Tensor) and not on_device else group["foreach"],
    )


def _as_tensors(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings for compiled code: what may change is a tensor, so that another value is not compiled anew."""

    def tensor(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(tensor, value))
        if value is None or isinstance(value, bool):
            return value
        return value.double() if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64, device="cpu")

    return {key: tensor(value) for key, value in settings.items()}


def _flat(lists: Lists) -> Lists:
    """Aliases of tensors with one axis where they are contiguous, so that one compiled function serves all shapes.

    torch.compile takes the shape of a parameter to be fixed, and that of an alias not.
    """
    contiguous = all(tensor.is_contiguous() for tensors in lists.values() for tensor in tensors)
    return {
        key: [t.view(-1).detach() if contiguous and key != "sizes" else t.detach() for t in tensors]
        for key, tensors in lists.items()
    }


@functools.cache
def _compiled(update: Callable[..., None]) -> Callable[..., None]:
    """An update, compiled; the plain one from then on, and one line, where that fails."""
    try:
        compiled = torch.compile(update, dynamic=True)
    except RuntimeError as error:  # torch refuses a Python that is newer than it knows
        _warn_of_plain_updates(error)
        compiled = None
    limit = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"  # torch 2.6

    def run(lists: Lists, **settings: Any) -> None:
        nonlocal compiled
        sized = _with_sizes(lists, settings["lr"], settings["betas"])
        if compiled is not None:
            try:
                with torch._dynamo.config.patch(**{limit: RECOMPILE_LIMIT}):
                    compiled(_flat(sized), **_as_tensors(settings))
            except torch._dynamo.exc.BackendCompilerFailed as error:  # so far, no weight has been changed
                _warn_of_plain_updates(error)
                compiled = None
        if compiled is None:
            update(sized, **settings)
        torch._foreach_add_(lists["step"], 1)  # last: what stops a compilation has changed no weight

    return run


def _warn_of_plain_updates(error: Exception) -> None:
    reason = type(getattr(error, "inner_exception", error)).__name__
    warnings.warn(f"torch.compile fails ({reason}): fused=True is as slow as foreach=False", stacklevel=3)
