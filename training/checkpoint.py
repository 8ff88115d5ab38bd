"""One file per run from which training goes on: a dictionary of state_dicts, counters and arguments."""

import os
from argparse import Namespace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from training.options import OPTION_NAMES, Refusal, arguments

FORMAT = 1


def path_of(options: Namespace) -> Path:
    """Where the checkpoint of a run is."""
    return options.dump_dir / "models" / options.name / "checkpoint.pt"


def save(path: Path, state: dict[str, Any]) -> None:
    """Writes a checkpoint; a kill at any moment leaves the previous one or the new one, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def load(options: Namespace) -> dict[str, Any] | None:
    """Reads the checkpoint of a run, on the CPU; None when there is none.

    Only tensors, numbers, texts and containers of them are read (weights_only): no code in it can run.

    Raises:
        Refusal: the file is not a checkpoint of this program, or of a run with other arguments; or there
            is none, and -test asks for one.
    """
    path = path_of(options)
    if not path.exists():
        if options.test:
            raise Refusal(f"argument -test: there is no saved model {path}; the same command without -test makes one")
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["format"] != FORMAT:
            raise ValueError(f"format {state['format']} instead of {FORMAT}")
        saved = dict(state["arguments"])
    except Exception as error:  # what a damaged file raises is up to zipfile, pickle and torch
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise Refusal(
            f"{path} is damaged or not a checkpoint of this program ({reason}); move it away to start the run afresh"
        ) from None
    _check_arguments(path, saved, options)
    if not options.test and options.epoch < state["epoch"]:
        raise Refusal(
            f"argument -N/--epoch: the run in {path.parent} has done {state['epoch']} epochs, more than {options.epoch}"
        )
    return state


def _check_arguments(path: Path, saved: dict[str, Any], options: Namespace) -> None:
    present = arguments(options)
    for key in sorted(present.keys() | saved.keys()):
        was, now = saved.get(key, "absent"), present.get(key, "absent")
        if was != now and key != "epoch":  # -N may change: a run can be prolonged
            raise Refusal(
                f"argument {OPTION_NAMES.get(key, key)}: the run in {path.parent} was made with {was}, not {now}; "
                "use the same, or another --dump-dir"
            )


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Loads an optimizer's state, but for the settings that say how it is executed: those stay this machine's."""
    execution = ("foreach", "fused", "capturable", "differentiable")
    groups = [
        {**saved, **{key: present[key] for key in execution if key in present}}
        for saved, present in zip(state["param_groups"], optimizer.param_groups, strict=True)
    ]
    optimizer.load_state_dict({**state, "param_groups": groups})


def versions() -> dict[str, str]:
    """The versions that a run's results depend on."""
    return {name: version(name) for name in ("torch", "spikingjelly")}


def random_states(device: torch.device, data: torch.Generator) -> dict[str, torch.Tensor]:
    """The states of every random-number generator that training draws from."""
    states = {"cpu": torch.get_rng_state(), "data": data.get_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_random_states(states: dict[str, torch.Tensor], device: torch.device, data: torch.Generator) -> None:
    """Puts the generators back; a run that changed from CPU to GPU keeps the GPU's as it is seeded."""
    torch.set_rng_state(states["cpu"])
    data.set_state(states["data"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
