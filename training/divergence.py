"""Divergence: finds, on the device, which loss, gradient or parameter was the first that is not finite."""

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from typing import ClassVar

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

    A tensor counts as finite if its sum is finite: the sum takes only one pass. A sum that overflows counts as not
    finite. On a GPU, where each kernel costs time, tensors of one shape are summed together.
    """

    # elements of a tensor, at most, that is copied to be summed with others, by the type of the device
    STACKED: ClassVar[dict[str, int]] = {"cuda": 1 << 20}

    def __init__(self, network: nn.Module, device: torch.device):
        named = dict(network.named_parameters())
        together = defaultdict(list)  # names of parameters that are summed together
        for name, parameter in named.items():
            small = parameter.numel() <= self.STACKED.get(device.type, 0)
            together[parameter.shape if small else name].append(name)
        self.groups = [[named[name] for name in names] for names in together.values()]
        in_order = ["the loss", *(f"the gradient of {n}" for n in named), *(f"the parameter {n}" for n in named)]
        names = [name for names in together.values() for name in names]
        self.names = ["the loss", *(f"the gradient of {n}" for n in names), *(f"the parameter {n}" for n in names)]
        self.rank = [in_order.index(name) for name in self.names]
        # the first step at which each was not finite
        self.first = torch.full((len(self.names),), NEVER, dtype=torch.int64, device=device)
        self.steps = torch.zeros((), dtype=torch.int64, device=device)
        # the same number on the CPU, as torch takes longer to add 1
        self.count = memoryview(self.steps.numpy()) if self.steps.is_cpu else None

    def update(self, loss: Tensor, finite: Iterable[Tensor] = ()) -> None:
        """Checks a step's loss and gradients, and the parameters after it.

        Args:
            finite: parameters whose sums, and those of their gradients, are known to be finite.
        """
        if not (self.first.is_cpu and self._all_finite(loss, {*map(id, finite)})):
            self._note(loss)
        if self.count is None:
            self.steps.add_(1)
        else:
            self.count[()] += 1

    def _all_finite(self, loss: Tensor, known: set[int]) -> bool:
        """Whether all is finite; on the CPU, where nothing waits, that takes few operations."""
        parameters = [p for group in self.groups for p in group if id(p) not in known]
        gradients = [p.grad for p in parameters if p.grad is not None]
        sums = (tensor.detach().sum() for tensor in (*gradients, *parameters))
        return all(map(math.isfinite, chain([loss.detach() if loss.requires_grad else loss], sums)))

    @torch.no_grad()
    def _note(self, loss: Tensor) -> None:
        """Notes the step for what is not finite, if it is the first one."""
        zero = torch.zeros_like(loss)
        gradients = [[zero if p.grad is None else p.grad for p in group] for group in self.groups]
        values = torch.cat([loss.detach()[None], *map(_sums, gradients), *map(_sums, self.groups)])
        torch.minimum(self.first, torch.where(values.isfinite(), NEVER, self.steps), out=self.first)

    def found(self) -> NonFinite | None:
        """What was first not finite, if anything; waits for the device."""
        step, _, name = min(zip(self.first.tolist(), self.rank, self.names, strict=True))
        return None if step == NEVER else NonFinite(name, step)


def _sums(tensors: list[Tensor]) -> Tensor:
    """The sum of each of some tensors, in one tensor."""
    if len(tensors) > 1 and len({tensor.shape for tensor in tensors}) == 1:
        return torch.stack(tensors).unsqueeze(1).flatten(1).sum(1)  # of those without axes, too
    return torch.stack([tensor.sum() for tensor in tensors])
