"""The options of the experiments: what they mean, which contradict each other, how a run is named after them."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from training import device, dump_dir, methods
from training.command_line import Parser, check_writable, either, folder_path, format_number, number, whole_number
from training.experiment import Experiment
from training.files import checks
from training.naming import run_name

REPOSITORY = Path(__file__).resolve().parent.parent

# Every option that does not belong to a method, with its spellings; those of the published scripts have a single dash.
SPELLINGS = {
    "mode": ("-m", "--mode"),
    "recipe": ("--recipe",),
    "batch_size": ("-b", "--batch-size"),
    "learning_rate": ("-lr", "--learning-rate"),
    "T": ("-T",),
    "width": ("--width",),
    "epoch": ("-N", "--epoch"),
    "seed": ("--seed",),
    "gpu": ("-gpu", "--gpu"),
    "dataset": ("--dataset",),
    "dataset_dir": ("--dataset-dir",),
    "dump_dir": ("--dump-dir",),
    "compile": ("--compile",),
    "precision": ("--precision",),
    "deterministic": ("--deterministic",),
    "checkpoint_minutes": ("--checkpoint-minutes",),
    "test": ("-test", "--test"),
    "interval_test": ("-i1", "--interval-test"),
    "interval_train": ("-i2", "--interval-train"),
}

# Options that say where a run happens or what to do with it, and do not change what it computes.
PLACE_OPTIONS = {
    *("compile", "deterministic", "checkpoint_minutes", "test", "name", "defaults"),
    *("gpu", "device", "precision_used", "dataset_dir", "dump_dir"),
}
# Options that change what is recorded, not what is computed: a checkpoint holds them, and need not agree on them.
RECORDING_OPTIONS = {"interval_test", "interval_train"}


def _parser(experiment: Experiment) -> argparse.ArgumentParser:
    parser = Parser(
        description=f"Trains, prunes and tests the {experiment.name} network of spiking neurons.",
        epilog="The same command continues an interrupted run from its last checkpoint.",
    )

    def add(option: str, **settings: Any) -> None:
        parser.add_argument(*SPELLINGS[option], dest=option, **settings)

    least_one = whole_number(1)
    paper, fast = experiment.paper, experiment.fast
    modes = [f"{name} ({method.about})" for name, method in sorted(methods.METHODS.items())]
    add(
        "mode",
        choices=sorted(methods.METHODS),
        default=methods.DEFAULT,
        help=f"method: {either(modes)} (default: %(default)s)",
    )
    for option, takers in methods.options().items():
        kind = {"action": "store_true"} if option.type is None else {"type": option.type, "metavar": option.metavar}
        texts = [f"{method.name}: {method.options[option]}" for method in takers]
        if len(takers) == 1:
            texts = [f"{takers[0].options[option]}, with -m {takers[0].name}"]
        parser.add_argument(
            *option.spellings, dest=option.name, help=f"{'; '.join(texts)} (default: {option.default})", **kind
        )
    add(
        "recipe",
        choices=("paper", "fast"),
        default="paper",
        help="paper: as published; fast: fewer epochs of larger batches with one cycle of the learning rate, whose "
        "number -N fixes (default: %(default)s)",
    )
    add(
        "batch_size",
        type=least_one,
        metavar="B",
        help=f"training batch size (default: {paper.batch_size}; fast: {fast.batch_size})",
    )
    add(
        "learning_rate",
        type=number("> 0", lambda x: x > 0),
        metavar="LR",
        help="learning rate of all optimizers; fast: its peak "
        f"(default: {format_number(paper.learning_rate)}; fast: {format_number(fast.learning_rate)})",
    )
    add("T", type=whole_number(1, checks.T_LIMIT), default=8, help="number of time steps (default: %(default)s)")
    add(
        "width",
        type=whole_number(1, checks.WIDTH_LIMIT),
        default=experiment.width,
        metavar="W",
        help=f"number of {experiment.width_is} (default: %(default)s)",
    )
    add(
        "epoch",
        type=least_one,
        metavar="N",
        help="number of training epochs in all; may grow when a run is continued "
        f"(default: {paper.epochs}; fast: {fast.epochs})",
    )
    add(
        "seed",
        type=whole_number(0),
        default=2020,
        help="seed of the initial weights, the data order, the augmentation and all noise (default: %(default)s)",
    )
    add(
        "gpu",
        type=_gpu,
        metavar="ID",
        help="id of the GPU to use (default: the first GPU; the CPU where there is none)",
    )
    names = [source.name for source in experiment.datasets]
    about = "".join(f"; {source.name}: {source.about}" for source in experiment.datasets if source.about)
    add("dataset", choices=names, default=names[0], help=f"data set{about} (default: %(default)s)")
    add(
        "dataset_dir",
        type=folder_path,
        default=REPOSITORY / "data",
        metavar="DIR",
        help="folder that holds the data set, or to download it to (default: data, in the repository)",
    )
    add(
        "dump_dir",
        type=folder_path,
        metavar="DIR",
        help=f"folder for logs and models (default: runs/{experiment.name}, in the repository)",
    )
    add(
        "compile",
        action="switch",
        default=True,
        help="use fused kernels where there are any: faster, and the same results within rounding (default: --compile)",
    )
    add(
        "precision",
        choices=("fp32", "tf32", "bf16"),
        help="precision of matrix products and convolutions; all state stays fp32 "
        "(default: tf32 on a GPU, fp32 on the CPU)",
    )
    add(
        "deterministic",
        action="store_true",
        help="use deterministic algorithms only, on a GPU too, for runs that are the same bit for bit (default: off)",
    )
    add(
        "checkpoint_minutes",
        type=number("> 0", lambda x: x > 0),
        default=10.0,
        metavar="M",
        help="minutes between checkpoints within an epoch; there is always one after each epoch (default: 10)",
    )
    add("test", action="store_true", help="only evaluate the saved model (default: off)")
    add(
        "interval_test",
        type=least_one,
        default=experiment.interval_test,
        metavar="EPOCHS",
        help="epochs between full recordings on the test set (default: %(default)s)",
    )
    add(
        "interval_train",
        type=least_one,
        default=1024,
        metavar="STEPS",
        help="steps between recordings on the training set (default: %(default)s)",
    )
    return parser


def _gpu(text: str) -> int:
    if text.lower() == "cpu":
        raise argparse.ArgumentTypeError("takes the id of a GPU; for the CPU, hide the GPUs: CUDA_VISIBLE_DEVICES=")
    return whole_number(0)(text)


def read(experiment: Experiment, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line, and checks as much of it as needs no device and no folder.

    Returns:
        The options by their long names, with ``experiment``, its name, and ``defaults``, those of the options;
        ``dump_dir`` is None where none is given.

    Raises:
        Refusal: an option is not accepted, or contradicts another.
    """
    parser = _parser(experiment)
    options = parser.parse_args(argv)
    options.experiment = experiment.name
    options.defaults = {action.dest: action.default for action in parser._actions}
    pace = experiment.fast if options.recipe == "fast" else experiment.paper
    given = (options.batch_size, options.learning_rate, options.epoch)
    defaults = (pace.batch_size, pace.learning_rate, pace.epochs)
    options.batch_size, options.learning_rate, options.epoch = (
        default if value is None else value for value, default in zip(given, defaults, strict=True)
    )
    method = methods.METHODS[options.mode]
    for option, takers in methods.options().items():
        if method not in takers and getattr(options, option.name) != options.defaults[option.name]:
            option.refuse(f"needs {either([f'-m {taker.name}' for taker in takers])}{option.beside}")
    method.check(options)
    return options


def parse(experiment: Experiment, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses and checks the command line, and chooses the device.

    Returns:
        The options by their long names, with ``device`` (torch.device) and ``name`` (of the run).

    Raises:
        Refusal: an option is not accepted, contradicts another, or cannot work on this machine.
    """
    options = read(experiment, argv)
    device.choose(options)
    options.name = run_name(options)
    if options.dump_dir is None:
        options.dump_dir = dump_dir.default(REPOSITORY / "runs", experiment.name, options.name)
    check_writable("--dump-dir", options.dump_dir)
    return options


def spelled(name: str) -> str:
    """An option as it is written on the command line, for a message; the name itself where there is none."""
    of_methods = {option.name: option.spellings for option in methods.options()}
    return "/".join({**SPELLINGS, **of_methods}.get(name, [name]))


def arguments(options: argparse.Namespace) -> dict[str, Any]:
    """The options that a checkpoint must agree on, for it and for the record: all but those of place."""
    return {key: value for key, value in vars(options).items() if key not in PLACE_OPTIONS}
