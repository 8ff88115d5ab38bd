"""The content of ``run.json``: what ran, where, and on which machine."""

import contextlib
import os
import platform
import re
import shlex
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from measuring import prunable
from training import device, logs
from training.options import REPOSITORY, arguments

CPUINFO = Path("/proc/cpuinfo")
# what may change while a run goes on
PLACE = ("precision", "device", "compute_capability", "ranks", "cpu", "versions", "git_commit")


def describe(options: Namespace, network: nn.Module, versions: dict[str, str]) -> dict[str, Any]:
    """The content of ``run.json``."""
    weights = prunable(network)
    prunable_weights = sum(weight.numel() for weight in weights.values())
    return {
        "format": 1,
        "experiment": options.experiment,
        "name": options.name,
        "command": shlex.join(["python", *sys.argv]),
        "arguments": arguments(options),
        "versions": {"python": ".".join(map(str, sys.version_info[:3])), **versions, **_gpu_versions(options.device)},
        "device": device.name(options.device),
        "ranks": options.ranks,
        "compute_capability": _compute_capability(options.device),
        "precision": options.precision_used,
        "cpu": processor(),
        "git_commit": git_commit(),
        "parameters": {
            "prunable": prunable_weights,
            "others": sum(parameter.numel() for parameter in network.parameters()) - prunable_weights,
            "layers": {name: list(weight.shape) for name, weight in weights.items()},
        },
    }


def earlier(folder: Path, now: dict[str, Any]) -> list[dict[str, Any]]:
    """Where a run has been before, in order: each ``PLACE`` that is not that of ``now``, by its last ``run.json``."""
    last = logs.info(folder)
    found: list[dict[str, Any]] = []
    for place in _places(last):
        known = {key: place[key] for key in PLACE if key in place}
        if known not in found and any(now[key] != value for key, value in known.items()):
            found.append(known)
    return found


def everywhere(info: dict[str, Any], key: str) -> Any:
    """What ``run.json`` says of a ``PLACE``; where a run has been elsewhere before, what it says of all, in order.

    Of a dictionary, as the versions are, this holds for each of its items.
    """
    values = [place.get(key) for place in _places(info)]
    if isinstance(info.get(key), dict):
        places = [value for value in values if isinstance(value, dict)]
        names = dict.fromkeys(name for place in reversed(places) for name in place)
        return {name: _in_order([place[name] for place in places if name in place]) for name in names}
    return _in_order(values)


def _in_order(values: list[Any]) -> Any:
    texts = list(dict.fromkeys(value for value in values if isinstance(value, str)))
    return ", then ".join(texts) if len(texts) > 1 else values[-1]


def _places(info: dict[str, Any]) -> list[dict[str, Any]]:
    """All places that ``run.json`` names, the last one included."""
    before = info.get("before")
    return [place for place in [*(before if isinstance(before, list) else []), info] if isinstance(place, dict)]


def _gpu_versions(device: torch.device) -> dict[str, str]:
    """The versions of the libraries that compute on a GPU; none for another device."""
    if device.type != "cuda":
        return {}
    return {"cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}


def _compute_capability(device: torch.device) -> str | None:
    """Such as "9.0"; None without a GPU."""
    if device.type != "cuda":
        return None
    return "{}.{}".format(*torch.cuda.get_device_capability(device))


def processor() -> str:
    """The machine's CPU, with the number of its cores."""
    try:
        names = [line for line in CPUINFO.read_text().splitlines() if line.startswith("model name")]
        return f"{len(names)} cores of {names[0].split(':')[1].strip()}"
    except (OSError, IndexError):  # not Linux, or one on ARM, which names no model there
        return f"{os.cpu_count()} cores of {_model()}"


def _model() -> str:
    """The processor's name, as macOS and lscpu have it, or else the name of its architecture."""
    english = {**os.environ, "LC_ALL": "C"}
    for command, line in ((["sysctl", "-n", "machdep.cpu.brand_string"], "(.+)"), (["lscpu"], r"Model name: *(\w.*)")):
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10, env=english).stdout
            if found := re.search(line, told):
                return found[1]
    return platform.processor() or platform.machine()


def git_commit() -> str | None:
    """The repository's commit, followed by "+" if files were changed; None if unknown."""
    command = ["git", "-C", REPOSITORY, "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
