"""The MNIST network: a spiking multilayer perceptron, 784-800-10."""

import torch
from spikingjelly.activation_based import layer
from torch import Tensor, nn

import spiking_kernels
from spiking import LIFNode, SpikingNetwork, lif
from spiking_kernels import proof


class MnistNet(SpikingNetwork):
    """Maps images [N, 1, 28, 28] to spike counts [N, 10]; no biases. See :class:`spiking.SpikingNetwork`."""

    def __init__(self, T: int = 8, step_mode: str = "m"):
        super().__init__(T, step_mode)
        self.static_fc = nn.Sequential(nn.Flatten(), nn.Linear(28 * 28, 800, bias=False))
        self.fc = nn.Sequential(lif(), layer.Linear(800, 10, bias=False), lif())
        self.step_mode = step_mode

    def static(self, images: Tensor) -> Tensor:
        return self.static_fc(images)  # [N, 800]

    def spiking(self, current: Tensor) -> Tensor:
        return self.fc(current)

    def obstacle(self, current: Tensor) -> str | None:
        """Why the fused kernel does not compute what these layers make of a current, in words; None if it does."""
        if type(self) is not MnistNet:
            return f"{type(self).__name__} is not MnistNet itself"
        if own := proof.overridden(self):
            return f"it has a {own} of its own"
        if self.step_mode != "m":
            return "it runs step by step"
        return (
            proof.context_obstacle()
            or proof.layers_obstacle(self.fc, "fc", LIFNode, self.T, harmless=self.counts_for)
            or proof.current_obstacle(current)
        )

    def fused_counts(self, current: Tensor) -> Tensor | None:
        if reason := self.obstacle(current):
            self.say_plain(reason)
            return None
        weight, hidden = self.fc[1].weight, None
        if self.spike_counts:
            hidden = torch.zeros(weight.shape[1], dtype=torch.int64, device="cpu")
        rounding = proof.autocast_dtype()
        counts = spiking_kernels.lif_linear_lif(current.float(), weight, self.T, hidden, rounding)  # [N, 10]
        if hidden is not None:
            first, _, last = self.fc._modules
            self.add_spikes({f"fc.{first}": hidden, f"fc.{last}": counts.detach().sum(0).long()})
        return counts
