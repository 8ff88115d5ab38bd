"""Runs that diverge: finds, on the device, the loss, gradient or parameter that was first not finite."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

NEVER = 2**62


@dataclass(frozen=True)
class NonFinite:
    """What was not finite first (the loss, a gradient or a parameter), and in which of the steps watched, from 0."""

    what: str
    step: int


class FiniteCheck:
    """Watches the loss, all gradients and all parameters at each step, without waiting for the device.

    A tensor counts as finite when its sum is, which takes one pass. So a sum that overflows counts as not finite.

    Args:
        network: its parameters are watched.
        device: where they are.
    """

    def __init__(self, network: nn.Module, device: torch.device):
        names, parameters = zip(*network.named_parameters(), strict=True)
        self.parameters = parameters
        self.names = ["the loss", *(f"the gradient of {n}" for n in names), *(f"the parameter {n}" for n in names)]
        self.first = torch.full((len(self.names),), NEVER, device=device)  # the steps, int64
        self.steps = torch.zeros((), dtype=torch.int64, device=device)

    @torch.no_grad()
    def update(self, loss: Tensor) -> None:
        """Looks at the loss and the gradients of a step, and at the parameters after it."""
        gradients = (parameter.grad for parameter in self.parameters)
        zero = torch.zeros_like(loss)
        sums = [zero if gradient is None else gradient.sum() for gradient in gradients]
        values = torch.stack([loss.detach(), *sums, *(parameter.sum() for parameter in self.parameters)])
        torch.minimum(self.first, torch.where(values.isfinite(), NEVER, self.steps), out=self.first)
        self.steps += 1

    def found(self) -> NonFinite | None:
        """What was not finite first, since the beginning; waits for the device."""
        first = self.first.tolist()
        step = min(first)
        return None if step == NEVER else NonFinite(self.names[first.index(step)], step)
