"""Dense training: Adam without pruning."""

from argparse import Namespace

from torch import nn
from torch.optim import Adam, Optimizer

from training.methods.method import Method, execution


class Dense(Method):
    name = "no_prune"
    label = "dense"
    about = "dense training"
    prunes = False

    def title(self, options: Namespace) -> str:
        return "Dense training"

    def build(self, network: nn.Module, options: Namespace) -> list[Optimizer]:
        return [Adam(network.parameters(), lr=options.learning_rate, **execution(options))]
