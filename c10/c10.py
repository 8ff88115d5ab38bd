"""The CIFAR-10 experiment: trains, prunes and tests a spiking convolutional network. See --help."""

import sys
from pathlib import Path

if not __package__:  # run as a file: its folder, where `c10` would be this script, gives way to the repository
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from c10.model import Cifar10Net
from training import checkpoint
from training.command_line import command
from training.data import RandomCropFlip, load
from training.experiment import Experiment, Pace
from training.loop import Trainer
from training.optimizers import build
from training.options import parse
from training.randomness import seed

EXPERIMENT = Experiment(
    name="c10",
    network=Cifar10Net,
    datasets=("cifar10",),
    paper=Pace(batch_size=16, learning_rate=1e-4, epochs=2048),
    fast=Pace(batch_size=128, learning_rate=1e-3, epochs=30),
    interval_test=128,
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2023, 0.1994, 0.2010),
    augmentation=RandomCropFlip(padding=4),
    test_batch_size=50,  # 2 GiB at T = 8
    histograms=("static_conv.0.weight", "conv.1.weight", "fc.2.weight"),
)


@command
def main(argv: list[str] | None = None) -> int:
    options = parse(EXPERIMENT, argv)
    with checkpoint.Store(options) as store:
        dataset = load(options.dataset, options.dataset_dir)
        seed(options.seed)
        network = Cifar10Net(options.T).to(options.device)  # initialised on the CPU: one start for all devices
        trainer = Trainer(EXPERIMENT, options, network, build(network, options), dataset, store)
        if options.test:
            trainer.test()
        else:
            trainer.train()
    return 0


if __name__ == "__main__":
    sys.exit(main())
