"""The training mode, to a list of optimizers that a training step walks."""

from argparse import Namespace

from torch import nn
from torch.optim import Adam, Optimizer

from deeprewire import DeepRewiring
from gradrewire import GradRewiring
from measuring import prunable


def build(network: nn.Module, options: Namespace) -> list[Optimizer]:
    """Builds the optimizers of ``options.mode``: its own for the weights that can be pruned, Adam for the rest."""
    lr, weights = options.learning_rate, list(prunable(network).values())
    # a CUDA graph captures the step
    fast = {"fused": options.compile, "capturable": options.compile and options.device.type == "cuda"}
    if options.mode == "no_prune":
        return [Adam(network.parameters(), lr=lr, **fast)]
    if options.mode == "grad":
        alpha = 0.0 if options.penalty is None else options.penalty  # --connectivity schedules it
        settings = {"alpha": alpha, "s": options.sparsity, "plain_gradient": options.plain_gradient}
        pruning = GradRewiring(weights, lr=lr, **settings, **fast)
    else:
        pruning = DeepRewiring(
            weights,
            lr=lr,
            l1=options.penalty,
            max_s=options.sparsity,
            T=options.temperature,
            soft=options.soft,
            **fast,
        )
    pruned = {id(weight) for weight in weights}
    others = [parameter for parameter in network.parameters() if id(parameter) not in pruned]
    return [pruning, Adam(others, lr=lr, **fast)] if others else [pruning]
