"""The MNIST experiment: trains, prunes and tests a spiking perceptron. See --help."""

import sys
from pathlib import Path

if not __package__:  # run as a file: import from the repository, not from this folder, where `mnist` is this script
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from mnist.data import DIGITS, MNIST
from mnist.model import MnistNet
from training.command_line import command
from training.experiment import Experiment, Pace

EXPERIMENT = Experiment(
    name="mnist",
    label="MNIST network",
    network=MnistNet,
    width=800,
    width_is="hidden neurons",
    datasets=(MNIST, DIGITS),
    paper=Pace(batch_size=128, learning_rate=1e-4, epochs=512),
    fast=Pace(batch_size=512, learning_rate=5e-3, epochs=20),
    interval_test=32,
    test_batch_size=1000,
)


@command
def main(argv: list[str] | None = None) -> int:
    from training import script  # here, because loading a network does not need it

    return script.run(EXPERIMENT, argv)


if __name__ == "__main__":
    sys.exit(main())
