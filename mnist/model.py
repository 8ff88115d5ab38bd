"""The MNIST network: a spiking multilayer perceptron, 784-800-10."""

import torch
from spikingjelly.activation_based import functional, layer
from torch import Tensor, nn

import spiking_kernels
from spiking import SpikingNetwork, lif


class MnistNet(SpikingNetwork):
    """Maps images [N, 1, 28, 28] to spike counts [N, 10]; no biases. See :class:`spiking.SpikingNetwork`."""

    def __init__(self, T: int = 8, step_mode: str = "m"):
        super().__init__(T, step_mode)
        self.static_fc = nn.Sequential(nn.Flatten(), nn.Linear(28 * 28, 800, bias=False))
        self.fc = nn.Sequential(lif(), layer.Linear(800, 10, bias=False), lif())
        functional.set_step_mode(self.fc, step_mode)

    def static(self, images: Tensor) -> Tensor:
        return self.static_fc(images)  # [N, 800]

    def spiking(self, current: Tensor) -> Tensor:
        return self.fc(current)

    def simulate_fused(self, images: Tensor) -> Tensor | None:
        weight, tensors = self.fc[1].weight, (images, self.static_fc[1].weight, self.fc[1].weight)
        plain = any(t.device.type != "cpu" or t.dtype != torch.float32 for t in tensors)
        if plain or self.step_mode != "m" or self.T > spiking_kernels.MAX_T or spiking_kernels.available():
            return None
        hidden = None
        if self.spike_counts is not None:
            hidden = self.spike_counts.setdefault("fc.0", torch.zeros(800, dtype=torch.int64))
        counts = spiking_kernels.lif_linear_lif(self.static(images).float(), weight, self.T, hidden)  # [N, 10]
        if self.spike_counts is not None:
            output = self.spike_counts.setdefault("fc.2", torch.zeros(10, dtype=torch.int64))
            output += counts.detach().sum(0).long()
        return counts
