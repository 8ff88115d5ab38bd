"""Random numbers: seeds all generators at the start of a run, and saves and restores their states."""

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from training.files import checks


def seed(number: int) -> None:
    """Seeds the global generators of torch (on all devices), Python and NumPy. This project uses only torch's."""
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number % 2**32)  # noqa: NPY002 - the global generator is intended


def states(device: torch.device, data: Tensor) -> dict[str, Any]:
    """The states of all random-number generators; ``data`` is the state for the data's order and augmentation."""
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


def check_states(kept: dict[str, Any]) -> None:
    """Raises ValueError unless :func:`states` could have returned these states.

    A generator must accept its state and return it unchanged. A Mersenne Twister whose words are all 0 is refused,
    because it always draws the same number.
    """
    checks.keys("random", kept.keys() - {"cuda"}, ("python", "numpy", "torch", "data"))
    python, numpy = kept["python"], kept["numpy"]
    if checks.types(python) not in ((tuple, int, tuple, float), (tuple, int, tuple, type(None))) or python[0] != 3:
        raise ValueError("the random state of python is not a state of its version 3")
    if checks.types(numpy) != (tuple, str, list, int, int, float) or numpy[0] != "MT19937" or numpy[3] not in (0, 1):
        raise ValueError("the random state of numpy is not a state of MT19937")
    _check_twister("python", words=python[1][:-1], index=python[1][-1] if python[1] else None, normal=python[2])
    _check_twister("numpy", words=numpy[1], index=numpy[2], normal=numpy[4])
    generator = torch.Generator()
    for name in ("torch", "data"):
        state = checks.tensor(f"the random state of {name}", kept[name], generator.get_state().shape, torch.uint8)
        try:
            generator.set_state(state)
        except RuntimeError as error:
            raise ValueError(f"the random state of {name} is not accepted: {str(error).splitlines()[0]}") from None
        if not torch.equal(generator.get_state(), state) or len(torch.rand(8, generator=generator).unique()) == 1:
            raise ValueError(f"the random state of {name} is not the state of a generator")
    if "cuda" in kept:
        checks.tensor("the random state of cuda", kept["cuda"], (16,), torch.uint8)  # seed and offset


def _check_twister(name: str, words: Sequence[Any], index: Any, normal: Any) -> None:
    """Checks the state of a Mersenne Twister: its words, the index of the next one, a normal number that it keeps."""
    if len(words) != 624:
        raise ValueError(f"the random state of {name} has {len(words)} words, not 624")
    for word in words:
        checks.whole_number(f"a word of the random state of {name}", word, 0, 2**32 - 1)
    if not any(words):
        raise ValueError(f"the random state of {name} has words of 0 only")
    checks.whole_number(f"the index of the random state of {name}", index, 0, 624)
    if normal is not None:
        checks.number(f"the normal number of the random state of {name}", normal)


def set_states(kept: dict[str, Any], device: torch.device, data: torch.Generator) -> None:
    """Restores the generators, and ``data``, the generator of the data's order and augmentation.

    A run that moves from the CPU to a GPU has no state for the GPU's generator, which stays as it was seeded.

    Raises:
        ValueError: the GPU's generator does not accept its state.
    """
    if device.type == "cuda" and "cuda" in kept:
        try:
            torch.cuda.set_rng_state(kept["cuda"], device)
        except RuntimeError as error:
            raise ValueError(f"the random state of cuda is not accepted: {str(error).splitlines()[0]}") from None
    random.setstate(kept["python"])
    np.random.set_state(kept["numpy"])  # noqa: NPY002
    torch.set_rng_state(kept["torch"])
    data.set_state(kept["data"])
