"""The CIFAR-10 network: six spiking convolutions and two fully connected layers, 36.7 M weights."""

from spikingjelly.activation_based import functional, layer
from torch import Tensor, nn

from spiking import SpikingNetwork, StepwiseBatchNorm2d, lif

WIDTH = 256


def conv3x3(in_channels: int) -> layer.Conv2d:
    return layer.Conv2d(in_channels, WIDTH, kernel_size=3, padding=1, bias=False)


def block() -> tuple[nn.Module, nn.Module, nn.Module]:
    return conv3x3(WIDTH), StepwiseBatchNorm2d(WIDTH), lif()


class Cifar10Net(SpikingNetwork):
    """Maps images [N, 3, 32, 32] to spike counts [N, 10], each the average over ten output neurons.

    No biases but BatchNorm's. The dropout mask is drawn once per batch and held for all time steps.
    See :class:`spiking.SpikingNetwork`.
    """

    def __init__(self, T: int = 8, step_mode: str = "m"):
        super().__init__(T, step_mode)
        self.static_conv = nn.Sequential(conv3x3(3), nn.BatchNorm2d(WIDTH))
        self.conv = nn.Sequential(
            lif(),
            *block(),
            *block(),
            layer.MaxPool2d(2, 2),  # 32x32 -> 16x16
            *block(),
            *block(),
            *block(),
            layer.MaxPool2d(2, 2),  # 16x16 -> 8x8
        )
        self.fc = nn.Sequential(
            layer.Flatten(),
            layer.Dropout(0.5),
            layer.Linear(WIDTH * 8 * 8, 2048, bias=False),
            lif(),
            layer.Linear(2048, 100, bias=False),
            lif(),
        )
        self.boost = layer.VotingLayer(10)
        functional.set_step_mode(self.conv, step_mode)
        functional.set_step_mode(self.fc, step_mode)

    def static(self, images: Tensor) -> Tensor:
        return self.static_conv(images)  # [N, 256, 32, 32]

    def spiking(self, current: Tensor) -> Tensor:
        return self.fc(self.conv(current))

    def readout(self, counts: Tensor) -> Tensor:
        return self.boost(counts)
