"""Checks every field of a checkpoint before any is loaded: its type, its range, and that it fits the run.

A checkpoint may come from another version or another run, or may have been edited. Each function raises ValueError
with one line that names the field and the problem; the caller names the file.
"""

import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Adam, AdamW, Optimizer

from measuring import connected, pack, prunable
from rewiring import RewiringOptimizer
from training import logs, randomness
from training.command_line.types import LARGEST
from training.files import checks

# The fields of a checkpoint and their types.
CONTENT = {
    "format": int,
    "arguments": dict,
    "versions": dict,
    "data": str,  # the data set's fingerprint
    "epoch": int,  # finished epochs
    "step": int,  # updates so far
    "position": int,  # batches done in the current epoch
    "best_accuracy": float,
    "epoch_loss": float,  # sums over the batches done in the current epoch
    "epoch_right": int,
    "seconds": dict,  # spent in the current epoch on training, tests and checkpoints
    "masks": dict,  # the connections at the end of the last epoch, one bit each
    "network": dict,
    "optimizers": list,
    "random": dict,
    "schedule": dict,  # training.schedule's
    "files": dict,  # the lengths of the log files
}
FINGERPRINT = re.compile(r"(\d{1,12})\+\d{1,12} images, crc32 [0-9a-f]{8}")
EXACT = 2**24  # an optimizer counts its steps in float32, which stops at this number
# These settings of an optimizer say how a step is executed. They depend on the machine, not on the run.
EXECUTION = ("foreach", "fused", "capturable", "differentiable")


# -- checks that need only the checkpoint ----------------------------------------------------------------


def check_content(saved: dict[str, Any]) -> None:
    """Checks the fields' types and ranges, and that the counters agree."""
    checks.keys("it", saved, CONTENT)
    for key, kind in CONTENT.items():
        _check_type(key, saved[key], kind)
    for name in ("arguments", "versions", "seconds", "schedule", "files"):
        _check_plain(name, saved[name])
    _check_counters(saved)
    if not {"torch", "spikingjelly"} <= saved["versions"].keys():
        raise ValueError(f"versions are of {', '.join(saved['versions']) or 'nothing'}, not of torch and spikingjelly")
    for name, version in saved["versions"].items():
        checks.text(f"the version of {name}", version)
    checks.keys("seconds", saved["seconds"], ("train", "test", "checkpoint"))
    for what, seconds in saved["seconds"].items():
        checks.number(f"seconds of {what}", seconds, 0)
    for name, length in saved["files"].items():
        if not logs.is_log(name) or re.search(r"[/\\:]", name):
            raise ValueError(f"files has {name!r}, which is not the name of a log file")
        checks.whole_number(f"the length of {name}", length)


def _check_counters(saved: dict[str, Any]) -> None:
    arguments, data = saved["arguments"], saved["data"]
    for name in ("batch_size", "epoch", "T", "interval_test", "interval_train"):
        checks.whole_number(f"{name} of arguments", arguments.get(name), 1, LARGEST)
    match, batch = FINGERPRINT.fullmatch(data), arguments["batch_size"]
    if match is None or int(match[1]) < batch:
        raise ValueError(f"data is {data[:60]!r}, not a fingerprint of at least {batch} training images")
    batches = int(match[1]) // batch
    epoch = checks.whole_number("epoch", saved["epoch"], 0, arguments["epoch"])
    position = checks.whole_number("position", saved["position"], 0, batches)
    if saved["step"] != epoch * batches + position:
        raise ValueError(f"step is {saved['step']} after {epoch} epochs of {batches} and {position} batches")
    checks.number("best_accuracy", saved["best_accuracy"], 0, 1 if epoch else 0)
    checks.number("epoch_loss", saved["epoch_loss"], 0, torch.inf if position else 0)
    checks.whole_number("epoch_right", saved["epoch_right"], 0, position * batch)


# -- checks against the run ------------------------------------------------------------------------------


def check_network(saved: dict[str, Any], network: nn.Module) -> None:
    """Checks the network's state in the checkpoint ``saved``, after :func:`check_content`."""
    state = saved["network"]
    checks.tensors("the network", state, network.state_dict())
    updates = saved["step"] * saved["arguments"]["T"]
    for name, module in network.named_modules():
        if isinstance(module, _BatchNorm) and module.track_running_stats:
            _check_range(f"{name}.running_var", state[f"{name}.running_var"], low=0)
            _check_range(f"{name}.num_batches_tracked", state[f"{name}.num_batches_tracked"], 0, updates)


def check_training(saved: dict[str, Any], network: nn.Module, optimizers: list[Optimizer]) -> None:
    """Checks the optimizers, masks and random states of the checkpoint ``saved``, after :func:`check_network`.

    The settings in it must be those of the ``optimizers``.
    """
    if len(saved["optimizers"]) != len(optimizers):
        raise ValueError(f"it has {len(saved['optimizers'])} optimizers, not {len(optimizers)}")
    names = {parameter: name for name, parameter in network.named_parameters()}
    for state, optimizer in zip(saved["optimizers"], optimizers, strict=True):
        _check_optimizer(state, optimizer, names, saved)
    weights = prunable(network)
    masks = {
        name: torch.empty((weight.numel() + 7) // 8, dtype=torch.uint8, device="meta")
        for name, weight in weights.items()
    }
    checks.tensors("masks", saved["masks"], masks)
    for name, mask in saved["masks"].items():
        surplus = 8 * mask.numel() - weights[name].numel()  # bits behind the last connection
        if surplus and int(mask[-1]) & (2**surplus - 1):
            raise ValueError(f"the mask of {name} has bits behind its last connection")
        if saved["position"] == 0 and not torch.equal(mask, pack(connected(saved["network"][name]))):
            raise ValueError(f"the mask of {name} is not that of its weights at the end of an epoch")
    randomness.check_states(saved["random"])


def _check_optimizer(old: Any, optimizer: Optimizer, names: dict[Tensor, str], saved: dict[str, Any]) -> None:
    """Checks the state ``old`` of an optimizer: its groups, and what it holds for each parameter."""
    kind, new = type(optimizer).__name__, optimizer.state_dict()
    checks.keys(kind, _check_type(kind, old, dict), new)
    if type(old["param_groups"]) is not list or len(old["param_groups"]) != len(new["param_groups"]):
        raise ValueError(f"{kind} has not {len(new['param_groups'])} parameter groups")
    for group, present in zip(old["param_groups"], new["param_groups"], strict=True):
        _check_type(f"a parameter group of {kind}", group, dict)
        _check_settings(kind, group, present, getattr(optimizer, "LATER", {}))
    parameters = [(parameter, group) for group in optimizer.param_groups for parameter in group["params"]]
    states = _check_type(f"{kind}'s state", old["state"], dict)
    # a RewiringOptimizer's state has that of Adam, and more; that of another subclass may have anything
    adam = type(optimizer) in (Adam, AdamW) or isinstance(optimizer, RewiringOptimizer)
    if adam:
        checks.keys(f"{kind}'s state", states, range(len(parameters)) if saved["step"] else ())
    elif unknown := states.keys() - range(len(parameters)):
        raise ValueError(f"{kind}'s state is of parameter {_shown(next(iter(unknown)))}, of {len(parameters)}")
    for index, state in states.items():
        parameter, group = parameters[index]
        name = names[parameter]
        _check_type(f"{kind}'s state of {name}", state, dict)
        if not adam:
            _check_plain(name, state)
            continue
        own = optimizer.own_state(group) if isinstance(optimizer, RewiringOptimizer) else set()
        maximum = {"max_exp_avg_sq"} if group["amsgrad"] else set()
        checks.keys(f"{kind}'s state of {name}", state, {"step", "exp_avg", "exp_avg_sq"} | maximum | own)
        _check_moments(name, state, parameter, saved["step"])
        if own:
            _check_connections(name, state, saved["network"][name])


def _check_settings(kind: str, old: dict[str, Any], new: dict[str, Any], later: dict[str, Any]) -> None:
    """Checks that a parameter group's settings are the ``new`` ones; older checkpoints lack the ``later`` ones."""
    old = {**{key: value for key, value in later.items() if key in new and key not in EXECUTION}, **old}
    checks.keys(kind, old, new)
    for key in new:
        if key in EXECUTION:
            if old[key] is not None and type(old[key]) is not bool:
                raise ValueError(f"{kind}'s {key} is {_shown(old[key])}, not True, False or None")
        elif checks.types(old[key]) != checks.types(new[key]) or old[key] != new[key]:
            raise ValueError(f"{kind}'s {key} is {_shown(old[key])}, not {_shown(new[key])}")


def _check_plain(name: str, values: dict[Any, Any]) -> None:
    """Checks that the keys are names, and the values finite numbers and tensors, texts, bools or None."""
    for key, value in values.items():
        checks.text(f"a key of {name}", key)
        what = f"{key} of {name}"
        if isinstance(value, Tensor):
            checks.tensor(what, value)
        elif isinstance(value, float):
            checks.number(what, value)
        elif isinstance(value, str):
            checks.text(what, value)
        elif value is not None and type(value) not in (bool, int):
            raise ValueError(f"{what} is {type(value).__name__}, not a number, a text or None")


def _check_moments(name: str, state: dict[str, Tensor], parameter: Tensor, steps: int) -> None:
    """Checks the tensors of a parameter's state, and the values that Adam's own tensors can have."""
    for key, value in state.items():
        shape = () if key == "step" else parameter.shape
        dtype = {"step": torch.float32, "sign": torch.int8}.get(key, parameter.dtype)
        checks.tensor(f"{key} of {name}", value, shape, dtype)
    if float(state["step"]) != min(steps, EXACT):
        raise ValueError(f"step of {name} is {float(state['step'])} after {steps} steps")
    _check_range(f"exp_avg_sq of {name}", state["exp_avg_sq"], low=0)
    if "max_exp_avg_sq" in state and not bool((state["max_exp_avg_sq"] >= state["exp_avg_sq"]).all()):
        raise ValueError(f"max_exp_avg_sq of {name} is less than exp_avg_sq")


def _check_connections(name: str, state: dict[str, Tensor], weight: Tensor) -> None:
    """Checks sign s and theta against the weight: w = s max(theta, 0), or, without theta, w = 0 or sign(w) = s."""
    sign = state["sign"]
    _check_range(f"sign of {name}", sign, -1, 1)
    if "theta" in state:
        if not torch.equal(weight, state["theta"].clamp(min=0) * sign):
            raise ValueError(f"theta and sign of {name} are not those of its weights: w = sign * max(theta, 0)")
    elif not bool(((weight == 0) | (weight.sign() == sign)).all()):
        raise ValueError(f"sign of {name} is not that of its weights")


def _check_range(name: str, values: Tensor, low: float, high: float = torch.inf) -> None:
    least, most = (end.item() for end in values.aminmax())
    if least < low or most > high:
        raise ValueError(f"{name} has values from {least} to {most}, not from {low} to {high}")


def _check_type(name: str, value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise ValueError(f"{name} is {type(value).__name__}, not {kind.__name__}")
    return value


def _shown(value: Any) -> str:
    text = repr(value) if isinstance(value, bool | int | float | str | list | tuple | None) else type(value).__name__
    return checks.short(text, 60)
