"""The CIFAR-10 network: six spiking convolutions and two fully connected layers, 36.7 M weights as published."""

from spikingjelly.activation_based import layer
from torch import Tensor, nn

from spiking import SpikingNetwork, StepwiseBatchNorm2d, lif


def block(width: int) -> tuple[nn.Module, nn.Module, nn.Module]:
    convolution = layer.Conv2d(width, width, kernel_size=3, padding=1, bias=False)
    return convolution, StepwiseBatchNorm2d(width), lif()


class Cifar10Net(SpikingNetwork):
    """Maps images [N, 3, 32, 32] to spike counts [N, 10], each the average over ten output neurons.

    Only BatchNorm has biases. A dropout mask is drawn for each batch and used for all its time steps.

    Args:
        T, step_mode: see :class:`spiking.SpikingNetwork`.
        width: number of channels of every convolution; the hidden fully connected layer has 8 x width neurons.
    """

    def __init__(self, T: int = 8, step_mode: str = "m", width: int = 256):
        super().__init__(T, step_mode)
        self.static_conv = nn.Sequential(
            nn.Conv2d(3, width, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )
        self.conv = nn.Sequential(
            lif(),
            *block(width),
            *block(width),
            layer.MaxPool2d(2, 2),  # 32x32 -> 16x16
            *block(width),
            *block(width),
            *block(width),
            layer.MaxPool2d(2, 2),  # 16x16 -> 8x8
        )
        self.fc = nn.Sequential(
            layer.Flatten(),
            layer.Dropout(0.5),
            layer.Linear(width * 8 * 8, 8 * width, bias=False),
            lif(),
            layer.Linear(8 * width, 100, bias=False),
            lif(),
        )
        self.boost = nn.AvgPool1d(10)
        self.step_mode = step_mode

    def static(self, images: Tensor) -> Tensor:
        return self.static_conv(images)  # [N, width, 32, 32]

    def spiking(self, current: Tensor) -> Tensor:
        return self.fc(self.conv(current))

    def readout(self, counts: Tensor) -> Tensor:
        return self.boost(counts.unsqueeze(1)).squeeze(1)  # AvgPool1d needs a channel axis for an empty batch
