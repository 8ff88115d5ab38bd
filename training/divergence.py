"""Divergence: finds, on the device, which loss, gradient or parameter was the first that is not finite."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

NEVER = 2**62


@dataclass(frozen=True)
class NonFinite:
    """What was first not finite (the loss, a gradient or a parameter), and at which step, counted from 0."""

    what: str
    step: int


class FiniteCheck:
    """Checks the loss, all gradients and all parameters at each step, without waiting for the device.

    A tensor counts as finite if its sum is finite, on a GPU that of its absolute values: this takes only one pass. A
    sum that overflows counts as not finite.
    """

    def __init__(self, network: nn.Module, device: torch.device):
        names, parameters = zip(*network.named_parameters(), strict=True)
        self.parameters = parameters
        self.names = ["the loss", *(f"the gradient of {n}" for n in names), *(f"the parameter {n}" for n in names)]
        # the first step at which each was not finite
        self.first = torch.full((len(self.names),), NEVER, dtype=torch.int64, device=device)
        self.steps = torch.zeros((), dtype=torch.int64, device=device)

    @torch.no_grad()
    def update(self, loss: Tensor) -> None:
        """Checks a step's loss and gradients, and the parameters after it."""
        zero = torch.zeros_like(loss)
        tensors = [zero if parameter.grad is None else parameter.grad for parameter in self.parameters]
        tensors.extend(self.parameters)
        # on a GPU one kernel sums many tensors; on the CPU that function is slower than a sum of each
        sums = torch._foreach_norm(tensors, 1) if loss.is_cuda else [tensor.sum() for tensor in tensors]
        values = torch.stack([loss.detach(), *sums])
        torch.minimum(self.first, torch.where(values.isfinite(), NEVER, self.steps), out=self.first)
        self.steps += 1

    def found(self) -> NonFinite | None:
        """What was first not finite, if anything; waits for the device."""
        first = self.first.tolist()
        step = min(first)
        return None if step == NEVER else NonFinite(self.names[first.index(step)], step)
