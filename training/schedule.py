"""How a run's learning rate and penalty change while it trains: not at all, as in the paper, or by the fast recipe."""

import math
import warnings
from argparse import Namespace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


class Constant:
    """The paper's recipe: the optimizers keep the settings that they were made with."""

    def advance(self, step: int) -> bool:
        """Prepares the optimizers for a step, the next one; says whether a setting has changed."""
        return False

    def state(self) -> dict[str, Any]:
        """What :meth:`restore` needs beside the optimizers and the number of steps; plain data."""
        return {}

    def complaint(self, connectivity: float) -> str | None:
        """What is to be said of the connectivity at the end of a run, if it is not the wanted one."""
        return None

    def restore(self, step: int, state: dict[str, Any]) -> None:
        """Puts the settings back that the optimizers had after ``step`` steps.

        Raises:
            ValueError: ``state`` is not that of such a schedule.
        """
        if state:
            raise ValueError("a schedule, where this run has none")


class Fast(Constant):
    """The fast recipe: one cycle of the learning rate, and a penalty that leads to a wanted connectivity.

    A run has up to :attr:`SEGMENTS` segments of equally many steps; settings change between them only, so that the
    steps of a segment can be replayed from one CUDA graph.

    The learning rate has one cycle (L. N. Smith and N. Topin, "Super-Convergence", 2018): until :attr:`BEGIN` it
    rises to the one that the optimizers were made with, and from there it falls to 0 along half a cosine.

    The connectivity that is wanted falls from 1 to C between :attr:`BEGIN` and :attr:`END`, quickly at first and ever
    more slowly, as under a constant penalty: its logarithm's distance to that of C decays exponentially, by a factor of
    e five times. It is C from there on. Grad R's prior moves theta down by alpha * eta_t in every step; so a segment
    has the alpha = theta_q / (sum of its eta_t) with which the prior alone would leave the wanted share of the
    connections, theta_q being the largest theta to be pruned (0 where enough are pruned already). What the gradient
    does meanwhile, the next segment makes up for. Until C is due, alpha is at most :attr:`MOST`: a connection whose
    gradient never changes its sign moves by eta_t, and holds out against any alpha < 1. There is no way up: where the
    gradient prunes more than is wanted, the penalty is 0.

    Args:
        optimizers: the first one a GradRewiring, where a connectivity is wanted.
        steps: of the whole run, >= 1.
        connectivity: C, in (0, 1]; None for a constant penalty.
    """

    SEGMENTS = 200
    BEGIN, END = 0.05, 0.7
    MOST = 1.0

    def __init__(self, optimizers: list[Optimizer], steps: int, connectivity: float | None):
        self.optimizers, self.steps, self.connectivity = optimizers, steps, connectivity
        self.length = math.ceil(steps / self.SEGMENTS)
        self.begun = 0  # segments
        self.rates = [LambdaLR(optimizer, self._rate) for optimizer in optimizers]

    def advance(self, step: int) -> bool:
        if step % self.length:
            return False
        self._begin_segment()
        if self.connectivity is not None:
            self._set_penalty(self._penalty(step))
        return True

    def state(self) -> dict[str, Any]:
        return {} if self.connectivity is None else {"penalty": self.optimizers[0].param_groups[0]["alpha"]}

    def restore(self, step: int, state: dict[str, Any]) -> None:
        if state.keys() != self.state().keys():
            raise ValueError(f"a schedule of {sorted(state)}, not of {sorted(self.state())}")
        for penalty in state.values():
            if not isinstance(penalty, float) or not 0 <= penalty < math.inf:
                raise ValueError(f"a schedule's penalty of {penalty}")
            self._set_penalty(penalty)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")  # the steps were taken before
            while self.begun * self.length < min(step, self.steps):
                self._begin_segment()

    def complaint(self, connectivity: float) -> str | None:
        wanted = self.connectivity
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
        """The learning rate in a segment, as a share of its peak: that of the segment's middle."""
        share = (segment * self.length + min((segment + 1) * self.length, self.steps)) / 2 / self.steps
        if share < self.BEGIN:
            return share / self.BEGIN
        return (1 + math.cos(math.pi * (share - self.BEGIN) / (1 - self.BEGIN))) / 2

    def wanted(self, share: float) -> float:
        """The connectivity that is wanted after a share of the run."""
        passed = min(max((share - self.BEGIN) / (self.END - self.BEGIN), 0.0), 1.0)
        return self.connectivity ** ((1 - math.exp(-5 * passed)) / (1 - math.exp(-5)))

    def _penalty(self, step: int) -> float:
        """Grad R's alpha for the segment that begins with a step."""
        length = min(self.length, self.steps - step)
        (group,), state = self.optimizers[0].param_groups, self.optimizers[0].state
        theta = torch.cat(
            [state[p]["theta"].flatten() if p in state else p.detach().abs().flatten() for p in group["params"]]
        )
        pruned = theta.numel() - round(self.wanted((step + length) / self.steps) * theta.numel())
        if pruned == 0:
            return 0.0
        moved = sum(group["lr"] / (1 - group["betas"][0] ** t) for t in range(step + 1, step + length + 1))
        penalty = max(0.0, float(_smallest(theta, pruned))) / moved
        return penalty if step >= self.END * self.steps else min(penalty, self.MOST)

    def _set_penalty(self, penalty: float) -> None:
        self.optimizers[0].param_groups[0]["alpha"] = penalty


def _smallest(values: Tensor, k: int) -> Tensor:
    """The k-th smallest of values [n], k from 1; on a GPU by sorting, as kthvalue is not deterministic there."""
    return values.sort().values[k - 1] if values.is_cuda else values.kthvalue(k).values


def build(options: Namespace, optimizers: list[Optimizer], steps: int) -> Constant:
    """The schedule of ``options.recipe`` for a run of so many steps in all."""
    return Fast(optimizers, steps, options.connectivity) if options.recipe == "fast" else Constant()
