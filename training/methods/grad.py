"""Grad R: Gradient Rewiring (Chen et al., IJCAI 2021)."""

from argparse import Namespace
from typing import ClassVar

from torch import Tensor
from torch.optim import Optimizer

from gradrewire import GradRewiring
from training.command_line import number
from training.methods.method import PENALTY, SPARSITY, Method, Option, execution

CONNECTIVITY = Option(
    "--connectivity",
    number("above 0, at most 1", lambda x: 0 < x <= 1, share=True),
    "C",
    default="none, a constant penalty",
    place="settings",
    beside=" and --recipe fast",
    listed=False,
)
LEAST = 0.55  # the default of -s with --connectivity: with 0.5, the prior would lift pruned weights again

PLAIN_GRADIENT = Option("--plain-gradient", listed=False)


class GradR(Method):
    name = "grad"
    label = "Grad R"
    about = "Grad R"
    options: ClassVar = {
        CONNECTIVITY: "final share of connected weights; schedules the penalty",
        PENALTY: "strength of the prior (alpha), >= 0",
        SPARSITY: "target of the prior, in [0.5, 1); use --connectivity to set the final sparsity",
        PLAIN_GRADIENT: "no redefined gradient, for ablations: pruned connections get no gradient",
    }
    penalty = "alpha"

    def check(self, options: Namespace) -> None:
        if options.connectivity is not None:
            if options.recipe != "fast":
                CONNECTIVITY.refuse(f"needs -m grad{CONNECTIVITY.beside}")
            if options.penalty is not None:
                PENALTY.refuse("not allowed with --connectivity, which schedules the penalty")
            if options.sparsity is None:
                options.sparsity = min(max(round(1 - options.connectivity, 9), LEAST), 0.9999)
            elif options.sparsity == 0.5 and not options.test:  # older runs have it
                SPARSITY.refuse("must be above 0.5 with --connectivity; leave it out")
        elif options.penalty is None:
            options.penalty = 1e-3
        if options.sparsity is None:
            SPARSITY.refuse("required with -m grad: a number in [0.5, 1)")
        if not 0.5 <= options.sparsity < 1:
            SPARSITY.refuse(f"must be in [0.5, 1) with -m grad, not {options.sparsity}")

    def title(self, options: Namespace) -> str:
        return f"{self.label} without its redefined gradient" if options.plain_gradient else self.label

    def explain(self, options: Namespace) -> list[str]:
        if options.connectivity is not None:
            return [f"The penalty is scheduled so that {100 * options.connectivity:g} % of the weights stay connected."]
        return [
            f"-s {options.sparsity} is the target of the prior, not the final sparsity, which depends on -penalty, "
            "-lr and -N. To set the final connectivity, use --recipe fast --connectivity."
        ]

    def optimizer(self, weights: list[Tensor], options: Namespace) -> Optimizer:
        return GradRewiring(
            weights,
            lr=options.learning_rate,
            alpha=options.penalty or 0.0,  # None: --connectivity schedules it
            s=options.sparsity,
            plain_gradient=options.plain_gradient,
            **execution(options),
        )
