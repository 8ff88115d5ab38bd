"""The script of an experiment, from its command line to its last line."""

import contextlib
from collections.abc import Sequence

from training import checkpoint, ranks
from training.experiment import Experiment
from training.interrupt import surviving_requests_to_save
from training.loop import Trainer
from training.methods import METHODS
from training.options import parse
from training.randomness import seed


def run(experiment: Experiment, argv: Sequence[str] | None = None) -> int:
    """Trains, resumes or tests the experiment's network as the command line says; returns 0.

    Under torchrun, all ranks train the run together; a test is done by the first one.

    Raises:
        Refusal: an option, the data or the checkpoint is not accepted.
    """
    with surviving_requests_to_save(), ranks.joined() as group:
        return _run(experiment, argv, group)


def _run(experiment: Experiment, argv: Sequence[str] | None, group: ranks.Ranks | None) -> int:
    together = contextlib.nullcontext if group is None else group.together
    with together():
        options = parse(experiment, argv, group)
    if group is not None:
        group.check_same("the command line and the machine", [options.name, options.test, options.device.type])
        if options.test and not group.first:
            return 0
        if options.test:
            group, together = None, contextlib.nullcontext
    with contextlib.ExitStack() as stack:
        with together():
            store = stack.enter_context(checkpoint.Store(options, writes=group is None or group.first))
        source = experiment.dataset(options.dataset)
        if group is None:
            dataset = source.load(options.dataset_dir)
        else:
            store.saved = group.from_first(store.saved)
            dataset = group.first_then_others(lambda: source.load(options.dataset_dir))
            group.check_same("argument --dataset-dir", dataset.fingerprint())
        seed(options.seed)
        network = experiment.network(options.T, width=options.width)
        network = network.to(options.device)  # initialised on the CPU: the same weights on every device
        network.ranks = group
        optimizers = METHODS[options.mode].build(network, options)
        with together():
            trainer = Trainer(experiment, options, network, optimizers, dataset, store, group)
        if options.test:
            trainer.test()
        else:
            trainer.train()
    return 0
