"""The MNIST network: a spiking multilayer perceptron, 784-800-10."""

from spikingjelly.activation_based import functional, layer
from torch import Tensor, nn

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
