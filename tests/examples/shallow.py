"""A network and its experiment in one file: one layer of spiking neurons."""

import sys

from torch import Tensor, nn

from examples.stripes import STRIPES
from mnist.data import MNIST
from spiking import SpikingNetwork, lif
from training.command_line import command
from training.experiment import Experiment, Pace


class ShallowNet(SpikingNetwork):
    """Maps images [N, 1, 28, 28] to spike counts [N, 10], the sums over ``width`` neurons for each class."""

    def __init__(self, T: int = 8, step_mode: str = "m", width: int = 4):
        super().__init__(T, step_mode)
        self.static_fc = nn.Sequential(nn.Flatten(), nn.Linear(28 * 28, 10 * width, bias=False))
        self.fc = nn.Sequential(lif())
        self.step_mode = step_mode

    def static(self, images: Tensor) -> Tensor:
        return self.static_fc(images)

    def spiking(self, current: Tensor) -> Tensor:
        return self.fc(current)

    def readout(self, counts: Tensor) -> Tensor:
        return counts.view(len(counts), 10, -1).sum(2)


EXPERIMENT = Experiment(
    name="shallow",
    label="shallow network",
    network=ShallowNet,
    width=4,
    width_is="neurons for each class",
    datasets=(STRIPES, MNIST),
    paper=Pace(batch_size=8, learning_rate=1e-2, epochs=2),
    fast=Pace(batch_size=20, learning_rate=1e-2, epochs=1),
    interval_test=1,
    test_batch_size=10,
)


@command
def main(argv: list[str] | None = None) -> int:
    from training import script  # which loading a network does not need

    return script.run(EXPERIMENT, argv)


if __name__ == "__main__":
    sys.exit(main())
