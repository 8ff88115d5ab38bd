"""The schedule of a run's learning rate and penalty: constant, as in the paper, or that of the fast recipe."""

import math
import warnings
from abc import ABC, abstractmethod
from argparse import Namespace
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from gradrewire import ConnectivitySchedule


class Schedule(ABC):
    """What the training loop needs of a schedule.

    Attributes:
        changes: the settings in the optimizers' groups that it changes during a run.
    """

    changes: tuple[str, ...] = ()

    @abstractmethod
    def advance(self, step: int) -> bool:
        """Prepares the optimizers for the next step, number ``step`` from 0; returns whether a setting has changed."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """The state for :meth:`restore`, besides the optimizers and the number of steps; plain data."""

    @abstractmethod
    def restore(self, step: int, state: dict[str, Any]) -> None:
        """Restores the settings that the optimizers had after ``step`` steps.

        Raises:
            ValueError: ``state`` is not that of such a schedule.
        """

    def complaint(self, connectivity: float) -> str | None:
        """A line for the end of a run that missed its connectivity; None if it did not."""
        return None


class PaperSchedule(Schedule):
    """The paper's recipe: the optimizers keep their settings."""

    def advance(self, step: int) -> bool:
        return False

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, step: int, state: dict[str, Any]) -> None:
        if state:
            raise ValueError("a schedule, where this run has none")


class FastSchedule(Schedule):
    """The fast recipe: one cycle of the learning rate, and with --connectivity a scheduled penalty.

    A run has up to :attr:`SEGMENTS` segments of equally many steps. Settings change only between segments.

    The learning rate has one cycle (L. N. Smith and N. Topin, "Super-Convergence", 2018): it rises
    to the optimizers' learning rate until :attr:`BEGIN`, then falls to 0 along half a cosine. A ConnectivitySchedule
    sets the penalty; the connectivity falls from :attr:`BEGIN` to :attr:`END`.

    Args:
        optimizers: with a connectivity, the first is a GradRewiring.
        steps: of the whole run, >= 1.
        connectivity: in (0, 1]; None for a constant penalty.
    """

    SEGMENTS = 200
    BEGIN, END = 0.05, 0.7

    def __init__(self, optimizers: list[Optimizer], steps: int, connectivity: float | None):
        self.optimizers, self.steps = optimizers, steps
        self.length = math.ceil(steps / self.SEGMENTS)
        self.begun = 0  # segments
        self.rates = [LambdaLR(optimizer, self._rate) for optimizer in optimizers]
        self.changes, self.penalty = ("lr",), None
        if connectivity is not None:
            shape = dict(begin=self.BEGIN, end=self.END, segments=self.SEGMENTS, foresight=False)
            self.penalty = ConnectivitySchedule(optimizers[0], connectivity, steps, **shape)
            self.changes = ("lr", "alpha")

    def advance(self, step: int) -> bool:
        if step % self.length:
            return False
        self._begin_segment()
        if self.penalty is not None:
            self.penalty.begin_segment(step)
        return True

    def state(self) -> dict[str, Any]:
        return {} if self.penalty is None else {"penalty": self.optimizers[0].param_groups[0]["alpha"]}

    def restore(self, step: int, state: dict[str, Any]) -> None:
        if state.keys() != self.state().keys():
            raise ValueError(f"a schedule of {sorted(state)}, not of {sorted(self.state())}")
        for penalty in state.values():
            if not isinstance(penalty, float) or not 0 <= penalty < math.inf:
                raise ValueError(f"a schedule's penalty of {penalty}")
            self.optimizers[0].param_groups[0]["alpha"] = penalty
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")  # the steps were taken before
            while self.begun * self.length < min(step, self.steps):
                self._begin_segment()

    def complaint(self, connectivity: float) -> str | None:
        wanted = None if self.penalty is None else self.penalty.connectivity
        if wanted is None or abs(connectivity - wanted) <= 0.1 * wanted:
            return None
        return (
            f"--connectivity: {100 * connectivity:.2f} % was reached, not {100 * wanted:g} %; the gradient alone "
            "prunes more, or the run has too few steps"
        )

    def _begin_segment(self) -> None:
        if self.begun:
            for rate in self.rates:
                rate.step()
        self.begun += 1

    def _rate(self, segment: int) -> float:
        """The learning rate in a segment, as a share of its peak; taken at the middle of the segment."""
        share = (segment * self.length + min((segment + 1) * self.length, self.steps)) / 2 / self.steps
        if share < self.BEGIN:
            return share / self.BEGIN
        return (1 + math.cos(math.pi * (share - self.BEGIN) / (1 - self.BEGIN))) / 2


def build(options: Namespace, optimizers: list[Optimizer], steps: int) -> Schedule:
    """The schedule of ``options.recipe``, for a run of ``steps`` steps."""
    return FastSchedule(optimizers, steps, options.connectivity) if options.recipe == "fast" else PaperSchedule()
