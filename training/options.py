"""The options of the experiments: what they mean, which contradict each other, how a run is named after them."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from training import device, dump_dir
from training.command_line import Parser, check_writable, folder_path, number, whole_number
from training.errors import Refusal
from training.experiment import Experiment
from training.files import checks
from training.naming import format_number, run_name

REPOSITORY = Path(__file__).resolve().parent.parent

# Every option, with its spellings on the command line; those of the published scripts have a single dash.
SPELLINGS = {
    "mode": ("-m", "--mode"),
    "sparsity": ("-s", "--sparsity"),
    "penalty": ("-penalty", "--penalty"),
    "soft": ("-soft", "--soft"),
    "temperature": ("-temperature", "--temperature"),
    "plain_gradient": ("--plain-gradient",),
    "recipe": ("--recipe",),
    "connectivity": ("--connectivity",),
    "batch_size": ("-b", "--batch-size"),
    "learning_rate": ("-lr", "--learning-rate"),
    "T": ("-T",),
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
OPTION_NAMES = {option: "/".join(spellings) for option, spellings in SPELLINGS.items()}  # in messages

# Options that say where a run happens or what to do with it, and do not change what it computes.
PLACE_OPTIONS = {
    *("compile", "deterministic", "checkpoint_minutes", "test", "name"),
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

    least_one, at_least_zero = whole_number(1), number(">= 0", lambda x: x >= 0)
    paper, fast = experiment.paper, experiment.fast
    add(
        "mode",
        choices=("deep", "grad", "no_prune"),
        default="no_prune",
        help="how to prune: deep (Deep R), grad (Grad R) or no_prune (default: %(default)s)",
    )
    add(
        "sparsity",
        type=number("from 0 to 1", lambda x: 0 <= x <= 1, share=True),
        metavar="S",
        help="target of the prior of grad, in [0.5, 1), and of soft deep, in [0, 1]: not the sparsity that is reached, "
        "which --connectivity sets; maximum sparsity of deep, in [0, 1] (default: none; grad and deep require it)",
    )
    add(
        "penalty",
        type=at_least_zero,
        metavar="P",
        help="strength of the prior (grad: alpha) or L1 penalty (deep: l1), >= 0 (default: 1e-3)",
    )
    add("soft", action="store_true", help="soft Deep R instead of Deep R, with -m deep (default: off)")
    add(
        "temperature",
        type=at_least_zero,
        metavar="T",
        help="temperature of Deep R's noise, with -m deep: sqrt(2 T) in the Deep R paper's symbols (default: 0)",
    )
    add(
        "plain_gradient",
        action="store_true",
        help="Grad R without its redefined gradient, with -m grad: pruned connections get no gradient, for ablations "
        "(default: off)",
    )
    add(
        "recipe",
        choices=("paper", "fast"),
        default="paper",
        help="paper: as published; fast: fewer epochs of larger batches with one cycle of the learning rate, whose "
        "number -N fixes (default: %(default)s)",
    )
    add(
        "connectivity",
        type=number("above 0, at most 1", lambda x: 0 < x <= 1, share=True),
        metavar="C",
        help="share of the connections that is left at the end, with -m grad --recipe fast: schedules the penalty "
        "(default: none, a constant penalty)",
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
    digits = "; digits: scikit-learn's 1797 small digits, which need no download" * ("digits" in experiment.datasets)
    add(
        "dataset",
        choices=experiment.datasets,
        default=experiment.datasets[0],
        help=f"data set{digits} (default: %(default)s)",
    )
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
        The options by their long names; ``dump_dir`` is None where none is given.

    Raises:
        Refusal: an option is not accepted, or contradicts another.
    """
    options = _parser(experiment).parse_args(argv)
    options.experiment = experiment.name
    pace = experiment.fast if options.recipe == "fast" else experiment.paper
    given = (options.batch_size, options.learning_rate, options.epoch)
    defaults = (pace.batch_size, pace.learning_rate, pace.epochs)
    options.batch_size, options.learning_rate, options.epoch = (
        default if value is None else value for value, default in zip(given, defaults, strict=True)
    )
    _check_connectivity(options)
    _check_mode(options)
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
    options.name = run_name(options, experiment)
    if options.dump_dir is None:
        options.dump_dir = dump_dir.default(REPOSITORY / "runs", experiment.name, options.name)
    check_writable("--dump-dir", options.dump_dir)
    return options


def _refuse(option: str, text: str) -> NoReturn:
    raise Refusal(f"argument {OPTION_NAMES[option]}: {text}")


def _check_connectivity(options: argparse.Namespace) -> None:
    """Checks --connectivity, and gives -s a default that fits it."""
    if options.connectivity is None:
        return
    if options.mode != "grad" or options.recipe != "fast":
        _refuse("connectivity", "needs -m grad and --recipe fast")
    if options.penalty is not None:
        _refuse("penalty", "not allowed with --connectivity, which schedules the penalty")
    if options.sparsity is None:
        options.sparsity = min(max(round(1 - options.connectivity, 9), 0.5), 0.9999)


def _check_mode(options: argparse.Namespace) -> None:
    mode = options.mode
    if mode == "no_prune":
        for option in ("sparsity", "penalty"):
            if getattr(options, option) is not None:
                _refuse(option, "needs a pruning mode, -m grad or -m deep")
    if mode != "deep":
        if options.soft:
            _refuse("soft", "needs -m deep")
        if options.temperature is not None:
            _refuse("temperature", "needs -m deep")
    if options.plain_gradient and mode != "grad":
        _refuse("plain_gradient", "needs -m grad")
    if mode != "no_prune":
        accepted = "in [0.5, 1)" if mode == "grad" else "in [0, 1]"
        if options.sparsity is None:
            _refuse("sparsity", f"required by -m {mode}, a number {accepted}")
        if mode == "grad" and not 0.5 <= options.sparsity < 1:
            _refuse("sparsity", f"-m grad accepts a number {accepted}, not {options.sparsity}")
        if options.penalty is None and options.connectivity is None:
            options.penalty = 1e-3
    if mode == "deep" and options.temperature is None:
        options.temperature = 0.0


def arguments(options: argparse.Namespace) -> dict[str, Any]:
    """The options that a checkpoint must agree on, for it and for the record: all but those of place."""
    return {key: value for key, value in vars(options).items() if key not in PLACE_OPTIONS}
