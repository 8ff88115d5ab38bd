"""The CIFAR-10 experiment: trains, prunes and tests a spiking convolutional network. See --help."""

import sys
from pathlib import Path

if not __package__:  # run as a file: import from the repository, not from this folder, where `c10` is this script
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from c10.data import CIFAR10
from c10.model import Cifar10Net
from training.command_line import command
from training.experiment import Experiment, Pace

EXPERIMENT = Experiment(
    name="c10",
    label="CIFAR-10 network",
    datasets=(CIFAR10,),
    network=Cifar10Net,
    width=256,
    width_is="channels; the hidden fully connected layer has 8 times as many neurons",
    test_batch_size=50,  # 2 GiB at T = 8
    interval_test=128,
    histograms=("static_conv.0.weight", "conv.1.weight", "fc.2.weight"),
    paper=Pace(batch_size=16, learning_rate=1e-4, epochs=2048),
    fast=Pace(batch_size=128, learning_rate=1e-3, epochs=30),
)


@command
def main(argv: list[str] | None = None) -> int:
    from training import script  # here, because loading a network does not need it

    return script.run(EXPERIMENT, argv)


if __name__ == "__main__":
    sys.exit(main())
