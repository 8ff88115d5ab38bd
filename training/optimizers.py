"""The training mode, to a list of optimizers that a training step walks."""

from argparse import Namespace

from torch import nn
from torch.optim import Adam, Optimizer

from deeprewire import DeepRewiring
from gradrewire import GradRewiring
from training.measure import prunable


def build(network: nn.Module, options: Namespace) -> list[Optimizer]:
    """Builds the optimizers of ``options.mode``: its own for the weights that can be pruned, Adam for the rest."""
    lr, fused, weights = options.learning_rate, options.compile, list(prunable(network).values())
    if options.mode == "no_prune":
        return [Adam(network.parameters(), lr=lr, fused=fused)]
    if options.mode == "grad":
        pruning = GradRewiring(weights, lr=lr, alpha=options.penalty, s=options.sparsity, fused=fused)
    else:
        pruning = DeepRewiring(
            weights,
            lr=lr,
            l1=options.penalty,
            max_s=options.sparsity,
            T=options.temperature,
            soft=options.soft,
            fused=fused and options.device.type == "cuda",  # on the CPU torch.compile costs more than it saves
        )
    pruned = {id(weight) for weight in weights}
    others = [parameter for parameter in network.parameters() if id(parameter) not in pruned]
    return [pruning, Adam(others, lr=lr, fused=fused)] if others else [pruning]
