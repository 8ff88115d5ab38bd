"""The command line of an experiment."""

import argparse
from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

from training import device, dump_dir, methods
from training.command_line import Parser, check_writable, either, folder_path, format_number, number, whole_number
from training.errors import Refusal
from training.experiment import Experiment
from training.files import checks
from training.naming import run_name
from training.ranks import Ranks

REPOSITORY = Path(__file__).resolve().parent.parent

# These options do not change what a run computes: where and how it runs, and what is derived from the other options.
PLACE_OPTIONS = {
    *("compile", "deterministic", "checkpoint_minutes", "test", "name", "defaults", "spellings", "ranks"),
    *("gpu", "device", "precision_used", "dataset_dir", "dump_dir"),
}
# These options change what is recorded, not what is computed. A checkpoint stores them, but they may differ on resume.
RECORDING_OPTIONS = {"interval_test", "interval_train"}


# in the options beside what the command line gives
TAKEN = ("experiment", "ranks", "defaults", "spellings", "name", "device", "precision_used")


def _parser(experiment: Experiment) -> argparse.ArgumentParser:
    parser = Parser(
        description=f"Trains, prunes and tests the {experiment.label}, a spiking neural network.",
        epilog="Run the same command again to resume an interrupted run from its last checkpoint. "
        "torchrun --standalone --nproc-per-node K trains it with K processes, each with its share of every batch.",
    )
    add = parser.add_argument
    least_one, positive = whole_number(1), number("> 0", lambda x: x > 0)
    paper, fast = experiment.paper, experiment.fast
    modes = [f"{name} ({method.about})" for name, method in sorted(methods.METHODS.items())]
    sets = [source.name for source in experiment.datasets]
    about_sets = "".join(f"; {source.name}: {source.about}" for source in experiment.datasets if source.about)
    # fmt: off
    add("-m", "--mode", choices=sorted(methods.METHODS), default=methods.DEFAULT,
        help=f"method: {either(modes)} (default: %(default)s)")
    for option, takers in methods.options().items():
        kind = {"action": "store_true"} if option.type is None else {"type": option.type, "metavar": option.metavar}
        about = "; ".join(f"{method.name}: {method.options[option]}" for method in takers)
        if len(takers) == 1:
            about = f"with -m {takers[0].name}{option.beside}: {takers[0].options[option]}"
        add(*option.spellings.split("/"), dest=option.name, help=f"{about} (default: {option.default})", **kind)
    add("--recipe", choices=("paper", "fast"), default="paper",
        help="paper: as published; fast: fewer epochs, larger batches, one cycle of the learning rate over -N epochs "
        "(default: %(default)s)")
    add("-b", "--batch-size", type=least_one, metavar="B",
        help=f"training batch size (default: {paper.batch_size}; fast: {fast.batch_size})")
    add("-lr", "--learning-rate", type=positive, metavar="LR",
        help="learning rate of all optimizers; fast: the peak of its cycle "
        f"(default: {format_number(paper.learning_rate)}; fast: {format_number(fast.learning_rate)})")
    add("-T", type=whole_number(1, checks.T_LIMIT), default=8, help="number of time steps (default: %(default)s)")
    add("--width", type=whole_number(1, checks.WIDTH_LIMIT), default=experiment.width, metavar="W",
        help=f"number of {experiment.width_is} (default: %(default)s)")
    add("-N", "--epoch", type=least_one, metavar="N",
        help="number of training epochs in all; a larger number extends a run of the paper's recipe "
        f"(default: {paper.epochs}; fast: {fast.epochs})")
    add("--seed", type=whole_number(0), default=2020,
        help="seed of the initial weights, the data order, the augmentation and all noise (default: %(default)s)")
    add("-gpu", "--gpu", type=gpu_number, metavar="ID",
        help="id of the GPU to use (default: the first GPU, or the CPU without a GPU)")
    add("--dataset", choices=sets, default=sets[0], help=f"data set{about_sets} (default: %(default)s)")
    add("--dataset-dir", type=folder_path, default=REPOSITORY / "data", metavar="DIR",
        help="folder of the data set; a missing one is downloaded there (default: data, in the repository)")
    add("--dump-dir", type=folder_path, metavar="DIR",
        help=f"folder for logs and models (default: runs/{experiment.name}, in the repository)")
    add("--compile", action="switch", default=True,
        help="use fused kernels where possible: faster, same results within rounding, but for other random numbers in "
        "Deep R (default: --compile)")
    add("--precision", choices=("fp32", "tf32", "bf16"),
        help="precision of matrix products and convolutions; all state stays fp32 "
        "(default: tf32 on a GPU, fp32 on the CPU)")
    add("--deterministic", action="store_true",
        help="use only deterministic algorithms, so that runs are bitwise reproducible on a GPU too (default: off)")
    add("--checkpoint-minutes", type=positive, default=10.0, metavar="M",
        help="minutes between checkpoints: a killed run loses at most that many minutes of training, and what it "
        "trained while the last one was written (default: 10)")
    add("-test", "--test", action="store_true", help="evaluate the saved model instead of training (default: off)")
    add("-i1", "--interval-test", type=least_one, default=experiment.interval_test, metavar="EPOCHS",
        help="epochs between full recordings on the test set (default: %(default)s)")
    add("-i2", "--interval-train", type=least_one, default=1024, metavar="STEPS",
        help="steps between recordings on the training set (default: %(default)s)")
    # fmt: on
    taken = [*TAKEN, *(action.dest for action in parser._actions)]
    for option, takers in methods.options().items():
        if taken.count(option.name) > 1:
            raise ValueError(f"option {option.spellings} of -m {takers[0].name} needs another name")
    return parser


def gpu_number(text: str) -> int:
    """The type of -gpu."""
    if text.lower() == "cpu":
        hint = "to use the CPU, hide the GPUs: CUDA_VISIBLE_DEVICES="
        raise argparse.ArgumentTypeError(f"must be the id of a GPU; {hint}")
    return whole_number(0)(text)


def read(experiment: Experiment, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses and checks the command line without looking at devices or folders.

    Returns:
        The options by their long names. Added are the name of the ``experiment``, and the ``defaults`` and
        ``spellings`` of all options. ``dump_dir`` is None unless it is given.

    Raises:
        Refusal: an option is not accepted, or contradicts another.
    """
    parser = _parser(experiment)
    options = parser.parse_args(argv)
    options.experiment, options.ranks = experiment.name, 1
    options.defaults = {action.dest: action.default for action in parser._actions}
    options.spellings = {action.dest: "/".join(action.option_strings) for action in parser._actions}
    pace = experiment.fast if options.recipe == "fast" else experiment.paper
    for name, default in zip(("batch_size", "learning_rate", "epoch"), astuple(pace), strict=True):
        if getattr(options, name) is None:
            setattr(options, name, default)
    method = methods.METHODS[options.mode]
    for option, takers in methods.options().items():
        if method not in takers and getattr(options, option.name) != options.defaults[option.name]:
            option.refuse(f"needs {either([f'-m {taker.name}' for taker in takers])}{option.beside}")
    method.check(options)
    return options


def parse(experiment: Experiment, argv: Sequence[str] | None = None, ranks: Ranks | None = None) -> argparse.Namespace:
    """:func:`read`, then chooses the device, names the run and makes its dump folder.

    ``options.ranks`` is the number of processes that train the run.

    Raises:
        Refusal: an option is not accepted, contradicts another, or cannot work on this machine.
    """
    options = read(experiment, argv)
    local_rank = None
    if ranks is not None:
        options.ranks, local_rank = ranks.size, ranks.local_rank
        if options.batch_size % ranks.size and not options.test:
            raise Refusal(
                f"argument -b/--batch-size: must be a multiple of {ranks.size}, the number of ranks, "
                f"not {options.batch_size}"
            )
    device.choose(options, local_rank)
    options.name = run_name(options)
    if options.dump_dir is None:
        try:
            runs = folder_path(str(REPOSITORY / "runs"))
        except argparse.ArgumentTypeError as error:
            raise Refusal(f"argument --dump-dir: the default {error}: give one") from None
        options.dump_dir = dump_dir.choose(runs, experiment.name, options.name)
    check_writable("--dump-dir", options.dump_dir)
    return options


def arguments(options: argparse.Namespace) -> dict[str, Any]:
    """The options that go into checkpoints, ``run.json`` and TensorBoard: all but :data:`PLACE_OPTIONS`."""
    return {key: value for key, value in vars(options).items() if key not in PLACE_OPTIONS}
