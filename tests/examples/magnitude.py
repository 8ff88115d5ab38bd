"""A method in one file: SGD with momentum that keeps the largest weights of every layer."""

from argparse import Namespace
from typing import ClassVar

import torch
from torch import Tensor

from training.command_line import number
from training.methods.method import Method, Option

KEEP = Option(
    "--keep",  # in the names of runs: …-keep-1e-1-magnitude
    number("above 0, at most 1", lambda x: 0 < x <= 1),
    "K",
    default="none; required",
    place="settings",
)


class MagnitudeSGD(torch.optim.SGD):
    """SGD that sets all but the largest weights to 0 after each step, and counts for how many steps each is 0."""

    def __init__(self, params: list[Tensor], keep: float, **settings: float):
        super().__init__(params, **settings)
        self.param_groups[0]["keep"] = keep

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        super().step(closure)
        for group in self.param_groups:
            for weight in group["params"]:
                pruned = weight.numel() - round(group["keep"] * weight.numel())
                if pruned:
                    weight.masked_fill_(weight.abs() <= weight.abs().flatten().kthvalue(pruned).values, 0)
                age = self.state[weight].setdefault("age", torch.zeros_like(weight, dtype=torch.int16))
                age.add_(1).masked_fill_(weight != 0, 0)


class Magnitude(Method):
    name = "magnitude"
    label = "magnitude"
    about = "SGD that keeps the largest weights"
    options: ClassVar = {KEEP: "share of the weights of each layer to keep"}

    def check(self, options: Namespace) -> None:
        if options.keep is None:
            KEEP.refuse("required with -m magnitude")

    def optimizer(self, weights: list[Tensor], options: Namespace) -> MagnitudeSGD:
        return MagnitudeSGD(weights, options.keep, lr=options.learning_rate, momentum=0.9)
