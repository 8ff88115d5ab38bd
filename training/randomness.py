"""Random numbers: every generator of a run, seeded at its start, and kept by its checkpoints."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from training.options import Refusal


def seed(number: int) -> None:
    """Seeds the global generators of torch (of all devices), Python and NumPy; this project draws from torch's only."""
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number % 2**32)  # noqa: NPY002 - the global generator is meant


def states(device: torch.device, data: Tensor) -> dict[str, Any]:
    """The states of all random-number generators; ``data`` is that of the data's order and augmentation."""
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002
    kept = {
        "python": random.getstate(),
        "numpy": (kind, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
        "data": data,
    }
    if device.type == "cuda":
        kept["cuda"] = torch.cuda.get_rng_state(device)
    return kept


def set_states(path: Path, kept: dict[str, Any], device: torch.device, data: torch.Generator) -> None:
    """Puts the generators back; a run that changed from CPU to GPU keeps the GPU's as it is seeded.

    Raises:
        Refusal: a state of the checkpoint ``path`` is not one.
    """
    try:
        random.setstate(kept["python"])
        np.random.set_state(kept["numpy"])  # noqa: NPY002
        torch.set_rng_state(kept["torch"])
        data.set_state(kept["data"])
        if device.type == "cuda" and "cuda" in kept:
            torch.cuda.set_rng_state(kept["cuda"], device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise Refusal(f"{path} does not fit: a state of the random numbers is not accepted: {error}") from None
