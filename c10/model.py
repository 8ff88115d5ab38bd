"""The CIFAR-10 network: six spiking convolutions and two fully connected layers, 36.7 M weights."""

from spikingjelly.activation_based import layer
from torch import Tensor, nn

from spiking import SpikingNetwork, StepwiseBatchNorm2d, lif

WIDTH = 256


def block() -> tuple[nn.Module, nn.Module, nn.Module]:
    convolution = layer.Conv2d(WIDTH, WIDTH, kernel_size=3, padding=1, bias=False)
    return convolution, StepwiseBatchNorm2d(WIDTH), lif()


class Cifar10Net(SpikingNetwork):
    """Maps images [N, 3, 32, 32] to spike counts [N, 10], each the average over ten output neurons.

    No biases but BatchNorm's. The dropout mask is drawn once per batch and held for all time steps.
    See :class:`spiking.SpikingNetwork`.
    """

    def __init__(self, T: int = 8, step_mode: str = "m"):
        super().__init__(T, step_mode)
        self.static_conv = nn.Sequential(
            nn.Conv2d(3, WIDTH, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(WIDTH),
        )
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
        self.boost = nn.AvgPool1d(10)
        self.step_mode = step_mode

    def static(self, images: Tensor) -> Tensor:
        return self.static_conv(images)  # [N, 256, 32, 32]

    def spiking(self, current: Tensor) -> Tensor:
        return self.fc(self.conv(current))

    def readout(self, counts: Tensor) -> Tensor:
        return self.boost(counts.unsqueeze(1)).squeeze(1)  # without a channel axis, AvgPool1d refuses an empty batch
