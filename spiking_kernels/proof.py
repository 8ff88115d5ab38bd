"""The proof that a fused kernel computes what a network's layers do: compared setting by setting, not assumed."""

import functools
import math
import operator
from collections.abc import Callable
from numbers import Number
from typing import Any, NamedTuple

import torch
from spikingjelly.activation_based import functional, layer, surrogate
from torch import Tensor, nn
from torch.utils._device import DeviceContext

import spiking_kernels
from spiking_kernels.tensors import flaw

STATE = frozenset({"_memories", "_memories_rv"})  # of a neuron, and where it starts; may hold tensors
# Tensors and layers are compared as such; the rest changes nothing that is computed.
APART = frozenset({"_parameters", "_buffers", "_modules", "training", "_is_full_backward_hook", "v_seq"})
SIZES = frozenset({"in_features", "out_features"})  # a linear layer goes by its weight


def _no_hook(hook: Any) -> bool:
    return False


def difference(
    module: nn.Module,
    like: nn.Module,
    name: str,
    free: frozenset[str] = frozenset(),
    harmless: Callable[[Any], bool] = _no_hook,
) -> str | None:
    """How a module differs from another one in what it computes, in words; None if it does not.

    Compared are the exact types, all attributes, hooks, and layers within, and which parameters and buffers
    there are, but not what is in them.

    Args:
        name: what the module is called.
        free: attributes that may differ.
        harmless: whether a hook is known to change nothing, and not to matter if it is not called.
    """
    return None if _alike(module, _plan(like, free)) else _difference(module, like, name, free, harmless)


def _difference(
    module: nn.Module, like: nn.Module, name: str, free: frozenset[str], harmless: Callable[[Any], bool]
) -> str | None:
    if type(module) is not type(like):
        return f"{name} is a {_type_name(module)}, not a {_type_name(like)}"
    own, other = vars(module), vars(like)
    for key in _settings(like, free):
        value, expected = own.get(key), other[key]
        if _same(value, expected):
            continue
        if "hooks" not in key:
            return f"{name} has {key.lstrip('_')} {_shown(value)}, not {_shown(expected)}"
        if not all(map(harmless, value.values())):
            return f"{name} has hooks"
    # what one has registered may be a plain attribute of the other, such as a bias that is not trained
    registered = {key for kind in ("_parameters", "_buffers", "_modules", "_memories") for key in other.get(kind, ())}
    if key := overridden(module) or next(iter(own.keys() & registered), None):
        return f"{name} has a {key} of its own"
    for kind in ("parameters", "buffers"):
        if lacks := other[f"_{kind}"].keys() - own[f"_{kind}"].keys():
            return f"{name} lacks its {lacks.pop()}"
        ours, theirs = ([key for key, tensor in d[f"_{kind}"].items() if tensor is not None] for d in (own, other))
        if ours != theirs:
            return f"{name} has the {kind} {', '.join(ours) or 'none'}, not {', '.join(theirs) or 'none'}"
    layers, others = own["_modules"], other["_modules"]
    if len(layers) != len(others):
        return f"{name} has {len(layers)} layers, not {len(others)}"
    for (key, child), expected in zip(layers.items(), others.values(), strict=True):
        if reason := _difference(child, expected, f"{name}.{key}", free, harmless):
            return reason
    return None


def _settings(module: nn.Module, free: frozenset[str]) -> list[str]:
    """The names of those attributes of a module that change what it computes."""
    return [key for key in vars(module) if key not in APART and key not in free and "state_dict" not in key]


class _Plan(NamedTuple):
    """What :func:`_alike` compares, of one module."""

    kind: type
    attributes: int
    get: Callable[[dict[str, Any]], tuple[Any, ...]]
    types: tuple[type, ...]
    values: tuple[Any, ...]
    memories: list[tuple[str, dict[str, Any]]]
    parameters: list[tuple[str, bool]]
    layers: list["_Plan"]


@functools.lru_cache(maxsize=16)
def _plan(like: nn.Module, free: frozenset[str]) -> _Plan:
    keys, own = _settings(like, free), vars(like)
    get = operator.itemgetter(*[key for key in keys if key not in STATE])
    return _Plan(
        kind=type(like),
        attributes=len(own),
        get=get,
        types=tuple(map(type, get(own))),
        values=get(own),
        memories=[(key, own[key]) for key in keys if key in STATE],
        parameters=[(key, tensor is None) for key, tensor in own["_parameters"].items()],
        layers=[_plan(child, free) for child in like.children()],
    )


def _alike(module: nn.Module, plan: _Plan) -> bool:
    """Whether there is no difference at first sight: this is asked before every batch, so it has to be quick."""
    kind, attributes, get, types, values, memories, parameters, layers = plan
    own = vars(module)
    if type(module) is not kind or len(own) != attributes:
        return False
    try:
        found = get(own)
    except KeyError:
        return False
    if tuple(map(type, found)) != types or found != values or own["_buffers"]:
        return False
    for key, memory in memories:
        if not _same(own.get(key), memory):
            return False
    if [(key, tensor is None) for key, tensor in own["_parameters"].items()] != parameters:
        return False
    children = own["_modules"]
    return len(children) == len(layers) and all(map(_alike, children.values(), layers))


@functools.cache
def _names(kind: type) -> frozenset[str]:
    return frozenset(dir(kind))


def overridden(instance: object) -> str | None:
    """An attribute of an object that stands in the place of what its class has; None where there is none."""
    names = _names(type(instance))
    return None if names.isdisjoint(vars(instance)) else next(iter(names & vars(instance).keys()))


def _type_name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 and "\n" not in text else f"{type(value).__name__}(...)"


def _same(a: Any, b: Any) -> bool:
    """Whether two settings are equal beyond doubt."""
    if a is b:
        return True
    if type(a) is not type(b):
        return isinstance(a, Number) and isinstance(b, Number) and a == b
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return isinstance(a, (float, int, str, tuple, set)) and a == b


@functools.cache
def paper_layers(node: type[nn.Module]) -> nn.Sequential:
    """LIF, linear, LIF as :func:`spiking_kernels.lif_linear_lif` knows them, with neurons of a type; of no size."""

    def lif() -> nn.Module:
        return node(
            tau=2.0,
            decay_input=True,
            v_threshold=1.0,
            v_reset=0.0,
            surrogate_function=surrogate.ATan(alpha=2.0),
            detach_reset=True,
        )

    with torch.device("meta"):
        layers = nn.Sequential(lif(), layer.Linear(1, 1, bias=False), lif())
    functional.set_step_mode(layers, "m")
    return layers


def layers_obstacle(
    layers: nn.Module,
    name: str,
    node: type[nn.Module],
    T: int,
    free: frozenset[str] = frozenset(),
    harmless: Callable[[Any], bool] = _no_hook,
) -> str | None:
    """Why :func:`spiking_kernels.lif_linear_lif` is not what layers compute in T steps from rest; None where it is.

    Args:
        layers: they must be LIF, linear without bias, LIF, with the paper's neurons, in 'm' mode.
        name: what the layers are called.
        node: the exact type of the neurons.
        free: attributes that may differ.
        harmless: whether a hook need not be called.
    """
    if reason := difference(layers, paper_layers(node), name, SIZES | free, harmless):
        return reason
    first, linear, last = layers
    if first is last:
        return f"{name} has one layer of neurons in two places"  # it would keep its potentials from one to the other
    if reason := flaw(linear.weight, torch.float32, contiguous=False):
        return f"the weight in {name} {reason}"
    if not linear.weight.numel() or not math.isfinite(float(linear.weight.detach().sum())):
        return f"{name} has no weights, or weights whose sum is not finite"  # layers multiply them by 0, too
    if type(T) is not int or not 1 <= T <= spiking_kernels.MAX_T:
        return f"T is {T!r}, not from 1 to {spiking_kernels.MAX_T}"
    return spiking_kernels.available()


def context_obstacle() -> str | None:
    """What looks at single operations now, which a kernel would hide from it; None where nothing does."""
    if torch.nn.modules.module._has_any_global_hook():
        return "there are hooks on all modules"
    if torch.jit.is_tracing():
        return "torch.jit traces the network"
    if torch._C._are_functorch_transforms_active():
        return "a transform of torch.func is active"
    if torch._C._len_torch_dispatch_stack():
        return "a mode of torch's dispatcher is active"
    if torch._C._len_torch_function_stack() and any(  # a default device is such a mode, too
        type(mode) is not DeviceContext for mode in torch.overrides._get_current_function_mode_stack()
    ):
        return "a mode of torch's functions is active"
    return None


def autocast_dtype() -> torch.dtype | None:
    """What products on the CPU take now, other than their inputs' dtype."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None


def current_obstacle(current: Tensor) -> str | None:
    """Why a current is not one that :func:`spiking_kernels.lif_linear_lif` takes, as it is or in a lower precision."""
    dtype = autocast_dtype() if getattr(current, "dtype", None) != torch.float32 else torch.float32
    if reason := flaw(current, dtype or torch.float32, contiguous=False):
        return f"the first neurons' input {reason}"
    return None if current.dim() == 2 else f"the first neurons' input has {current.dim()} axes, not 2"
