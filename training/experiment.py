"""What an experiment is."""

from dataclasses import dataclass
from typing import Any

from spiking import SpikingNetwork


@dataclass(frozen=True)
class Pace:
    """The defaults of an experiment's options that --recipe decides on."""

    batch_size: int
    learning_rate: float
    epochs: int


@dataclass(frozen=True)
class Experiment:
    """What an experiment fixes, and its defaults for the options.

    ``paper`` and ``fast`` are the defaults with either --recipe.
    ``datasets`` are the names that --dataset accepts, the first being the default. ``mean`` and ``std`` are
    those of the normalisation, per channel, of pixels in [0, 1]. ``augmentation`` is one of training.data's.
    ``test_batch_size`` bounds the memory of an evaluation and has no influence on its result.
    ``histograms`` are the weights whose distribution is recorded, None for all that are pruned.
    """

    name: str
    network: type[SpikingNetwork]
    datasets: tuple[str, ...]
    paper: Pace
    fast: Pace
    interval_test: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augmentation: Any
    test_batch_size: int
    histograms: tuple[str, ...] | None = None
