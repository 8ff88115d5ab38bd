"""The proof that a kernel computes what a network's layers do: compared setting by setting, not assumed."""

import functools
import weakref
from collections.abc import Callable, MutableMapping
from itertools import chain
from numbers import Number
from operator import is_
from typing import Any

import torch
from spikingjelly.activation_based import functional, layer, surrogate
from torch import nn
from torch.jit import is_tracing
from torch.nn.modules.module import (
    _global_backward_hooks,
    _global_backward_pre_hooks,
    _global_forward_hooks,
    _global_forward_pre_hooks,
)
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

import spiking_kernels
from spiking_kernels.tensors import Unfit

STATE = frozenset({"_memories", "_memories_rv"})  # of a neuron, and where it starts; may hold tensors
# Tensors and layers are compared as such; the rest changes nothing that is computed.
APART = frozenset({"_parameters", "_buffers", "_modules", "training", "_is_full_backward_hook", "v_seq"})
GLOBAL_HOOKS = (_global_backward_hooks, _global_backward_pre_hooks, _global_forward_hooks, _global_forward_pre_hooks)
# layers go by their weights
SIZES = frozenset({"in_features", "out_features", "in_channels", "out_channels", "num_features"})


def difference(
    module: nn.Module,
    like: nn.Module,
    name: str,
    free: frozenset[str] = frozenset(),
    harmless: Callable[[Any], bool] | None = None,
) -> str | None:
    """How a module differs from another one in what it computes, in words; None if it does not.

    Compared are the exact types, all attributes, hooks, and layers within, and which parameters and buffers
    there are, but not what is in them. Asked again about a module that has not changed since, it is quick.

    Args:
        name: what the module is called.
        free: attributes that may differ.
        harmless: whether a hook is known to change nothing, and not to matter if it is not called; None: none is.
    """
    last, allowed, unchanged = _last.get(like, (None, None, None))
    if module is last and free == allowed and unchanged():
        return None
    reason = _difference(module, like, name, free, None)
    if reason is None:
        _last[like] = module, free, _watch(module)
    elif harmless is not None:
        reason = _difference(module, like, name, free, harmless)
    return reason


def _watch(module: nn.Module) -> Callable[[], bool]:
    """A function that says whether all that decided about a module is as it is now.

    Attributes decide, and what is in those that are dictionaries or sets. A change there gives a key another object,
    changes the keys, or fills what was empty, as the dictionaries of hooks were.
    """
    modules = [*module.modules()]
    types, attributes = [*map(type, modules)], [*map(vars, modules)]
    held = [value for own in attributes for value in own.values() if isinstance(value, (dict, set))]
    empty, filled = [x for x in held if not x], attributes + [x for x in held if x]
    views = [x.values() for x in filled if isinstance(x, dict)]
    keys, values = [*chain.from_iterable(filled)], [*chain.from_iterable(views)]

    def unchanged() -> bool:
        return (
            not any(empty)
            and [*map(type, modules)] == types
            and all(map(is_, map(vars, modules), attributes))
            and [*chain.from_iterable(filled)] == keys
            and all(map(is_, chain.from_iterable(views), values))
        )

    return unchanged


# The last module that was like another one, with `free` and `unchanged`, by the other one. It is kept until another
# takes its place; networks that take turns are compared in full each time.
_last: MutableMapping[nn.Module, tuple[Any, ...]] = weakref.WeakKeyDictionary()


def _difference(
    module: nn.Module, like: nn.Module, name: str, free: frozenset[str], harmless: Callable[[Any], bool] | None
) -> str | None:
    if type(module) is not type(like):
        is_a, not_a = (f"{kind.__module__}.{kind.__qualname__}" for kind in (type(module), type(like)))
        return f"{name} is a {is_a}, not a {not_a}"
    own, other = vars(module), vars(like)
    for key, expected in other.items():
        value = own.get(key)
        if key in APART or key in free or "state_dict" in key or _same(value, expected):
            continue
        if "hooks" not in key:
            return f"{name} has {key.lstrip('_')} {_shown(value)}, not {_shown(expected)}"
        if harmless is None or not all(map(harmless, value.values())):
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
    if len({*map(id, layers.values())}) < len({*map(id, others.values())}):  # neurons would keep their potentials
        return f"{name} has one layer in two places"
    for (key, child), expected in zip(layers.items(), others.values(), strict=True):
        if reason := _difference(child, expected, f"{name}.{key}", free, harmless):
            return reason
    return None


@functools.cache
def _names(kind: type) -> frozenset[str]:
    return frozenset(dir(kind))


def overridden(instance: object) -> str | None:
    """An attribute of an object that stands in the place of what its class has; None where there is none."""
    return next(filter(_names(type(instance)).__contains__, vars(instance)), None)


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


def check_layers(
    layers: nn.Module,
    name: str,
    node: type[nn.Module],
    free: frozenset[str] = frozenset(),
    harmless: Callable[[Any], bool] | None = None,
) -> nn.Linear:
    """Proves that :func:`spiking_kernels.lif_linear_lif` computes what layers do from rest.

    Args:
        layers: they must be LIF, linear without bias, LIF, with the paper's neurons, in 'm' mode.
        name: what the layers are called.
        node: the exact type of the neurons.
        free: attributes that may differ.
        harmless: whether a hook need not be called.

    Returns:
        The linear layer.

    Raises:
        Unfit: it does not, or cannot run here; the text says why.
    """
    if reason := difference(layers, paper_layers(node), name, SIZES | free, harmless):
        raise Unfit(reason)
    if reason := spiking_kernels.unavailable():
        raise Unfit(reason)
    _, linear, _ = vars(layers)["_modules"].values()
    return linear


def check_network(network: nn.Module, kind: type[nn.Module]) -> None:
    """Proves that a network computes what its class does, layer by layer, and that nothing else sees its operations.

    Raises:
        Unfit: it may compute something else, or a kernel would hide operations from what watches them.
    """
    if type(network) is not kind:
        raise Unfit(f"{type(network).__name__} is not {kind.__name__} itself")
    if own := overridden(network):
        raise Unfit(f"it has a {own} of its own")
    check_unwatched()
    if network.step_mode != "m":
        raise Unfit("it runs step by step")


def check_unwatched() -> None:
    """Proves that nothing sees operations but autograd.

    Raises:
        Unfit: a kernel would hide operations from what watches them.
    """
    for obstacle, found in (
        ("there are hooks on all modules", any(GLOBAL_HOOKS)),
        ("torch.jit traces the network", is_tracing()),
        ("a transform of torch.func is active", torch._C._are_functorch_transforms_active()),
        ("a mode of torch's dispatcher is active", torch._C._len_torch_dispatch_stack()),
        ("a mode of torch's functions is active", _other_modes(_get_current_function_mode_stack())),
    ):
        if found:
            raise Unfit(obstacle)


def _other_modes(stack: list[Any]) -> bool:
    return any(type(mode) is not DeviceContext for mode in stack)  # which a default device is


def check_learns(*parameters: nn.Parameter) -> None:
    """Proves that a backward pass would put the gradients of parameters into ``grad``, and no more.

    It cannot see hooks of autograd's AccumulateGrad nodes, as DistributedDataParallel has them, nor whether
    torch.autograd.graph.saved_tensors_hooks are at work.

    Raises:
        Unfit: one gets no gradient, or adds to one, or has another layout, or something sees it.
    """
    if not torch.is_grad_enabled() or torch.is_anomaly_enabled():
        raise Unfit("autograd is off, or looks for anomalies")
    if len({*map(id, parameters)}) < len(parameters):
        raise Unfit("one tensor has two places in it")
    for parameter in parameters:
        if not (parameter.requires_grad and parameter.is_leaf) or parameter.grad is not None:
            raise Unfit("a parameter gets no gradient, or has one")
        if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
            raise Unfit("a parameter has hooks")
        if not parameter.is_contiguous():
            raise Unfit("a parameter is not contiguous")


def autocast_dtype(device: str) -> torch.dtype | None:
    """The dtype to which torch.autocast rounds products on a type of device now, or None."""
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
