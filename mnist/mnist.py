"""The MNIST experiment: trains, prunes and tests a spiking perceptron. See --help."""

import sys
from pathlib import Path

if not __package__:  # run as a file: its folder, where `mnist` would be this script, gives way to the repository
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from mnist.model import MnistNet
from training import checkpoint
from training.command_line import command
from training.data import RandomAffine, load
from training.experiment import Experiment, Pace
from training.loop import Trainer
from training.optimizers import build
from training.options import parse
from training.randomness import seed

EXPERIMENT = Experiment(
    name="mnist",
    network=MnistNet,
    datasets=("mnist", "digits"),
    paper=Pace(batch_size=128, learning_rate=1e-4, epochs=512),
    fast=Pace(batch_size=512, learning_rate=5e-3, epochs=20),
    interval_test=32,
    mean=(0.1307,),
    std=(0.3081,),
    augmentation=RandomAffine(degrees=30, translate=(0.15, 0.15), scale=(0.85, 1.11)),
    test_batch_size=1000,
)


@command
def main(argv: list[str] | None = None) -> int:
    options = parse(EXPERIMENT, argv)
    with checkpoint.Store(options) as store:
        dataset = load(options.dataset, options.dataset_dir)
        seed(options.seed)
        network = MnistNet(options.T).to(options.device)  # initialised on the CPU: one start for all devices
        trainer = Trainer(EXPERIMENT, options, network, build(network, options), dataset, store)
        if options.test:
            trainer.test()
        else:
            trainer.train()
    return 0


if __name__ == "__main__":
    sys.exit(main())
