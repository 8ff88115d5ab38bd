"""Deep R: Deep Rewiring, hard and soft (Bellec et al., ICLR 2018)."""

from argparse import Namespace
from typing import ClassVar

from torch import Tensor
from torch.optim import Optimizer

from deeprewire import DeepRewiring
from training.command_line import number
from training.methods.method import PENALTY, SPARSITY, Method, Option, execution

SOFT = Option("-soft/--soft", place="first", listed=False)
TEMPERATURE = Option(
    "-temperature/--temperature", number(">= 0", lambda x: x >= 0), "T", default="0", place="last", unnamed=0.0
)


class DeepR(Method):
    name = "deep"
    label = "Deep R"
    about = "Deep R"
    options: ClassVar = {
        PENALTY: "L1 penalty (l1), >= 0",
        SPARSITY: "maximum sparsity of each layer, in [0, 1], or the target of the prior with -soft",
        SOFT: "soft Deep R",
        TEMPERATURE: "strength of the noise, sqrt(2 T) in the Deep R paper",
    }
    penalty = "l1"

    def check(self, options: Namespace) -> None:
        if options.sparsity is None:
            SPARSITY.refuse("required with -m deep: a number in [0, 1]")
        if options.penalty is None:
            options.penalty = 1e-3
        if options.temperature is None:
            options.temperature = 0.0

    def title(self, options: Namespace) -> str:
        return f"Soft {self.label}" if options.soft else self.label

    def explain(self, options: Namespace) -> list[str]:
        hard = "the maximum sparsity of each layer, not the final one: beyond it, connections are regrown"
        soft = "the target of the prior, not the final sparsity, which depends on -penalty, -temperature, -lr and -N"
        meaning = f"-s {options.sparsity} is {soft if options.soft else hard}."
        return [f"{meaning} To set the final connectivity, use -m grad --recipe fast --connectivity."]

    def optimizer(self, weights: list[Tensor], options: Namespace) -> Optimizer:
        return DeepRewiring(
            weights,
            lr=options.learning_rate,
            l1=options.penalty,
            max_s=options.sparsity,
            T=options.temperature,
            soft=options.soft,
            **execution(options),
        )
