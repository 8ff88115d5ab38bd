"""The script of an experiment, from its command line to its last line."""

from collections.abc import Sequence

from training import checkpoint
from training.experiment import Experiment
from training.loop import Trainer
from training.methods import METHODS
from training.options import parse
from training.randomness import seed


def run(experiment: Experiment, argv: Sequence[str] | None = None) -> int:
    """Trains, resumes or tests the experiment's network as the command line says; returns 0.

    Raises:
        Refusal: an option, the data or the checkpoint is not accepted.
    """
    options = parse(experiment, argv)
    with checkpoint.Store(options) as store:
        dataset = experiment.dataset(options.dataset).load(options.dataset_dir)
        seed(options.seed)
        network = experiment.network(options.T, width=options.width)
        network = network.to(options.device)  # initialised on the CPU: the same weights on every device
        optimizers = METHODS[options.mode].build(network, options)
        trainer = Trainer(experiment, options, network, optimizers, dataset, store)
        if options.test:
            trainer.test()
        else:
            trainer.train()
    return 0
