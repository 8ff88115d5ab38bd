"""What the script of an experiment does."""

from collections.abc import Sequence

from training import checkpoint
from training.experiment import Experiment
from training.loop import Trainer
from training.methods import METHODS
from training.options import parse
from training.randomness import seed


def run(experiment: Experiment, argv: Sequence[str] | None = None) -> int:
    """Trains the experiment's network as the command line says, from its checkpoint on, or tests it; returns 0.

    Raises:
        Refusal: something that was asked for is not accepted.
    """
    options = parse(experiment, argv)
    with checkpoint.Store(options) as store:
        dataset = experiment.dataset(options.dataset).load(options.dataset_dir)
        seed(options.seed)
        network = experiment.network(options.T, width=options.width)
        network = network.to(options.device)  # initialised on the CPU: one start for all devices
        optimizers = METHODS[options.mode].build(network, options)
        trainer = Trainer(experiment, options, network, optimizers, dataset, store)
        if options.test:
            trainer.test()
        else:
            trainer.train()
    return 0
