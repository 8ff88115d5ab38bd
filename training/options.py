"""The command line of the experiments: what it accepts, what it refuses, how a run is named."""

import argparse
import functools
import math
import os
import re
import shlex
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, NoReturn

import torch

import spiking_kernels
from training.divergence import DivergedError
from training.interrupt import Interrupted

REPOSITORY = Path(__file__).resolve().parent.parent
LARGEST = 2**63 - 1  # of whole numbers: what a tensor can hold

# Options that say where a run happens or what to do with it, and do not change what it computes.
PLACE_OPTIONS = {
    *("compile", "deterministic", "checkpoint_minutes", "test", "name"),
    *("gpu", "device", "precision_used", "dataset_dir", "dump_dir"),
}
# Options that change what is recorded, not what is computed: a checkpoint holds them, and need not agree on them.
RECORDING_OPTIONS = {"interval_test", "interval_train"}

# How messages spell the options that a checkpoint must agree on.
OPTION_NAMES = {
    "mode": "-m/--mode",
    "sparsity": "-s/--sparsity",
    "penalty": "-penalty",
    "soft": "-soft",
    "temperature": "-temperature",
    "plain_gradient": "--plain-gradient",
    "recipe": "--recipe",
    "connectivity": "--connectivity",
    "batch_size": "-b/--batch-size",
    "learning_rate": "-lr/--learning-rate",
    "T": "-T",
    "epoch": "-N/--epoch",
    "seed": "--seed",
    "dataset": "--dataset",
    "precision": "--precision",
    "interval_test": "-i1/--interval-test",
    "interval_train": "-i2/--interval-train",
}


class Refusal(Exception):
    """Something the user asked for that is not accepted; its text is the one line to print."""


@dataclass(frozen=True)
class Pace:
    """The defaults of an experiment's options that --recipe decides on."""

    batch_size: int
    learning_rate: float
    epochs: int


@dataclass(frozen=True)
class Recipe:
    """What an experiment fixes, and its defaults for the options.

    ``paper`` and ``fast`` are the defaults with either --recipe.
    ``datasets`` are the names that --dataset accepts, the first being the default. ``mean`` and ``std`` are
    those of the normalisation, per channel, of pixels in [0, 1]. ``augmentation`` is one of training.data's.
    ``test_batch_size`` bounds the memory of an evaluation and has no influence on its result.
    ``histograms`` are the weights whose distribution is recorded, None for all that are pruned.
    """

    name: str
    datasets: tuple[str, ...]
    paper: Pace
    fast: Pace
    interval_test: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augmentation: Any
    test_batch_size: int
    histograms: tuple[str, ...] | None = None


def command(main: Callable[..., int]) -> Callable[..., int]:
    """Decorates a script's main: a failure becomes one line, with status 2 when it is the user's to mend.

    A :class:`Refusal` gives status 2; a run that diverges, too little memory or an error of the operating
    system 1; a signal that stops a run 128 and its number.
    """

    @functools.wraps(main)
    def wrapped(*args: Any) -> int:
        try:
            return main(*args)
        except Refusal as refusal:
            return _fail(str(refusal), 2)
        except DivergedError as error:
            return _fail(str(error), 1)
        except OSError as error:
            return _fail(f"{error}; what was saved before is as it was", 1)
        except Interrupted as stop:
            name = signal.Signals(stop.number).name
            print(f"Stopped by {name} {stop}, and saved. To go on: {shlex.join(['python', *sys.argv])}", flush=True)
            return 128 + stop.number
        except KeyboardInterrupt:
            return _fail("interrupted; what was saved before is as it was", 130)
        except (MemoryError, RuntimeError) as error:
            line = _explained(error)
            if line is None:
                raise
            return _fail(line, 2 if "--deterministic" in line else 1)

    return wrapped


def _explained(error: Exception) -> str | None:
    """The line for an error of torch that is not a fault of the program; None for all others."""
    text = str(error)
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in text:
        return f"out of memory ({text.splitlines()[0] if text else 'no more is known'}); a smaller -b or -T takes less"
    if operation := re.match(r"(\S+) does not have a deterministic implementation", text):
        return f"argument --deterministic: {operation[1]} has no deterministic implementation on this device"
    return None


def _fail(message: str, status: int) -> int:
    print(f"{Path(sys.argv[0]).name}: error: {' '.join(message.split())}", file=sys.stderr)
    return status


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that refuses in one line, by Refusal, and takes negative numbers of any form for values."""

    def __init__(self, **settings: Any):
        super().__init__(**settings)
        # argparse's own pattern takes -1e-3 and -inf for options, not for values that can be explained
        self._negative_number_matcher = re.compile(r"-(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$|-inf$|-nan$", re.IGNORECASE)

    def error(self, message: str) -> NoReturn:  # one line instead of the usage and a line
        raise Refusal(f"{message} (see --help)")


def whole_number(least: int, most: int = LARGEST) -> Callable[[str], int]:
    """The type of an option that takes a whole number in [least, most]."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:  # this, or it has thousands of digits
            value = None
        if value is None or not least <= value <= most:
            from_least = f">= {least}" if value is None or value < least else "below 2^63"
            accepted = from_least if most == LARGEST else f"from {least} to {most}"
            raise argparse.ArgumentTypeError(f"must be a whole number {accepted}, not {_shown(text)}")
        return value

    return parse


def _shown(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:40] + "…")


def _number(accepted: str, condition: Callable[[float], bool]) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or not condition(value):
            raise argparse.ArgumentTypeError(f"must be a finite number {accepted}, not {_shown(text)}")
        return value

    return parse


def folder_path(text: str) -> Path:
    """The type of an option that takes a folder, which need not exist."""
    if not text.strip():
        raise argparse.ArgumentTypeError("must be the path of a folder, not an empty text")
    return Path(text).expanduser()


def _parser(recipe: Recipe) -> argparse.ArgumentParser:
    parser = Parser(
        description=f"Trains, prunes and tests the {recipe.name} network of spiking neurons.",
        epilog="The same command continues an interrupted run from its last checkpoint.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    least_one, at_least_zero = whole_number(1), _number(">= 0", lambda x: x >= 0)
    add(
        "-m",
        "--mode",
        choices=("deep", "grad", "no_prune"),
        default="no_prune",
        help="how to prune: deep (Deep R), grad (Grad R) or no_prune (default: %(default)s)",
    )
    add(
        "-s",
        "--sparsity",
        type=_number("from 0 to 1", lambda x: 0 <= x <= 1),
        metavar="S",
        help="target sparsity of grad, in [0.5, 1), and of soft deep, in [0, 1]; maximum sparsity of deep, in [0, 1] "
        "(default: none; grad and deep require it)",
    )
    add(
        "-penalty",
        type=at_least_zero,
        metavar="P",
        help="strength of the prior (grad: alpha) or L1 penalty (deep: l1), >= 0 (default: 1e-3)",
    )
    add("-soft", action="store_true", help="soft Deep R instead of Deep R, with -m deep (default: off)")
    add(
        "-temperature",
        type=at_least_zero,
        metavar="T",
        help="temperature of Deep R's noise, with -m deep: sqrt(2 T) in the Deep R paper's symbols (default: 0)",
    )
    add(
        "--plain-gradient",
        action="store_true",
        help="Grad R without its redefined gradient, with -m grad: pruned connections receive none, for ablations "
        "(default: off)",
    )
    add(
        "--recipe",
        choices=("paper", "fast"),
        default="paper",
        help="paper: as published; fast: fewer epochs of larger batches with one cycle of the learning rate, whose "
        "number -N fixes (default: %(default)s)",
    )
    add(
        "--connectivity",
        type=_number("above 0, at most 1", lambda x: 0 < x <= 1),
        metavar="C",
        help="share of the connections to be left in the end, with -m grad --recipe fast: schedules the penalty "
        "(default: none, a constant penalty)",
    )
    fast = recipe.fast
    add(
        "-b",
        "--batch-size",
        type=least_one,
        metavar="B",
        help=f"training batch size (default: {recipe.paper.batch_size}; fast: {fast.batch_size})",
    )
    add(
        "-lr",
        "--learning-rate",
        type=_number("> 0", lambda x: x > 0),
        metavar="LR",
        help="learning rate of all optimizers; fast: its peak "
        f"(default: {format_number(recipe.paper.learning_rate)}; fast: {format_number(fast.learning_rate)})",
    )
    add("-T", type=whole_number(1, 4096), default=8, help="number of time steps (default: %(default)s)")
    add(
        "-N",
        "--epoch",
        type=least_one,
        metavar="N",
        help="number of training epochs in all; may grow when a run is continued "
        f"(default: {recipe.paper.epochs}; fast: {fast.epochs})",
    )
    add(
        "--seed",
        type=whole_number(0),
        default=2020,
        help="seed of the initial weights, the data order, the augmentation and all noise (default: %(default)s)",
    )
    add(
        "-gpu",
        type=whole_number(0),
        metavar="ID",
        help="id of the GPU to use (default: the first GPU; the CPU where there is none)",
    )
    if len(recipe.datasets) > 1:
        add(
            "--dataset",
            choices=recipe.datasets,
            default=recipe.datasets[0],
            help="data set; digits: scikit-learn's 1797 small digits, which need no download (default: %(default)s)",
        )
    else:
        parser.set_defaults(dataset=recipe.datasets[0])
    add(
        "--dataset-dir",
        type=folder_path,
        default=REPOSITORY / "data",
        metavar="DIR",
        help="folder that holds the data set, or to download it to (default: data, in the repository)",
    )
    add(
        "--dump-dir",
        type=folder_path,
        default=REPOSITORY / "runs",
        metavar="DIR",
        help="folder for logs and models (default: runs, in the repository)",
    )
    add(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="run fused kernels where there are any: the same results within rounding, faster (default: --compile)",
    )
    add(
        "--precision",
        choices=("fp32", "tf32", "bf16"),
        help="of matrix products and convolutions; all state stays fp32 (default: tf32 on a GPU, fp32 on the CPU)",
    )
    add(
        "--deterministic",
        action="store_true",
        help="use deterministic algorithms only, on a GPU too, for runs that are the same bit for bit (default: off)",
    )
    add(
        "--checkpoint-minutes",
        type=_number("> 0", lambda x: x > 0),
        default=10.0,
        metavar="M",
        help="minutes between checkpoints inside an epoch; there is one after each epoch, too (default: 10)",
    )
    add("-test", action="store_true", help="only evaluate the saved model (default: off)")
    add(
        "-i1",
        "--interval-test",
        type=least_one,
        default=recipe.interval_test,
        metavar="EPOCHS",
        help="epochs between full recordings on the test set (default: %(default)s)",
    )
    add(
        "-i2",
        "--interval-train",
        type=least_one,
        default=1024,
        metavar="STEPS",
        help="steps between recordings on the training set (default: %(default)s)",
    )
    return parser


def read(recipe: Recipe, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line, and checks as much of it as needs no device and no folder.

    Returns:
        The options by their long names.

    Raises:
        Refusal: an option is not accepted, or contradicts another.
    """
    options = _parser(recipe).parse_args(argv)
    options.experiment = recipe.name
    pace = recipe.fast if options.recipe == "fast" else recipe.paper
    given = (options.batch_size, options.learning_rate, options.epoch)
    defaults = (pace.batch_size, pace.learning_rate, pace.epochs)
    options.batch_size, options.learning_rate, options.epoch = (
        default if value is None else value for value, default in zip(given, defaults, strict=True)
    )
    _check_connectivity(options)
    _check_mode(options)
    return options


def parse(recipe: Recipe, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses and checks the command line, and chooses the device.

    Returns:
        The options by their long names, with ``device`` (torch.device) and ``name`` (of the run).

    Raises:
        Refusal: an option is not accepted, contradicts another, or cannot work on this machine.
    """
    options = read(recipe, argv)
    options.device = _device(options.gpu)
    _choose_precision(options)
    if options.deterministic:
        _be_deterministic()
    options.name = run_name(options, recipe)
    options.compile = options.compile and _can_compile(options.device)
    check_writable("--dump-dir", options.dump_dir)
    return options


def _check_connectivity(options: argparse.Namespace) -> None:
    """Checks --connectivity, and gives -s a default that fits it."""
    if options.connectivity is None:
        return
    if options.mode != "grad" or options.recipe != "fast":
        raise Refusal("argument --connectivity: needs -m grad and --recipe fast")
    if options.penalty is not None:
        raise Refusal("argument -penalty: not with --connectivity, which schedules the penalty")
    if options.sparsity is None:
        options.sparsity = min(max(round(1 - options.connectivity, 9), 0.5), 0.9999)


def _check_mode(options: argparse.Namespace) -> None:
    mode = options.mode
    if mode == "no_prune":
        for option in ("sparsity", "penalty"):
            if getattr(options, option) is not None:
                raise Refusal(f"argument {OPTION_NAMES[option]}: needs a pruning mode, -m grad or -m deep")
    if mode != "deep":
        if options.soft:
            raise Refusal("argument -soft: needs -m deep")
        if options.temperature is not None:
            raise Refusal("argument -temperature: needs -m deep")
    if options.plain_gradient and mode != "grad":
        raise Refusal("argument --plain-gradient: needs -m grad")
    if mode != "no_prune":
        accepted = "in [0.5, 1)" if mode == "grad" else "in [0, 1]"
        if options.sparsity is None:
            raise Refusal(f"argument -s/--sparsity: required by -m {mode}, a number {accepted}")
        if mode == "grad" and not 0.5 <= options.sparsity < 1:
            raise Refusal(f"argument -s/--sparsity: -m grad accepts a number {accepted}, not {options.sparsity}")
        if options.penalty is None and options.connectivity is None:
            options.penalty = 1e-3
    if mode == "deep" and options.temperature is None:
        options.temperature = 0.0


def _device(gpu: int | None) -> torch.device:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpu is not None and gpu >= count:
        there = "there is no GPU" if count == 0 else f"the GPUs are 0 to {count - 1}"
        raise Refusal(f"argument -gpu: there is no GPU {gpu} on this machine ({there})")
    if count == 0:
        print("No GPU found: running on the CPU.", flush=True)
        return torch.device("cpu")
    return torch.device("cuda", gpu or 0)


def _choose_precision(options: argparse.Namespace) -> None:
    """Sets ``precision_used``; ``precision`` stays None for the device's default, for a run to change devices."""
    default = "tf32" if options.device.type == "cuda" else "fp32"
    if options.precision == "tf32" and options.device.type != "cuda":
        raise Refusal("argument --precision: tf32 needs a GPU; the CPU takes fp32 or bf16")
    options.precision_used = options.precision or default
    if options.precision == default:
        options.precision = None


def _be_deterministic() -> None:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when the first product runs on a GPU
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # it would cost time, and nothing here reads such
    torch.backends.cudnn.benchmark = False


def _can_compile(device: torch.device) -> bool:
    missing = spiking_kernels.available() if device.type == "cpu" else None
    if missing:
        print(f"No fused kernels, {missing}: running the plain layers.", flush=True)
    return not missing


def check_writable(option: str, folder: Path) -> None:
    """Makes the folder that an option names.

    Raises:
        Refusal: there is none afterwards in which files can be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise Refusal(f"argument {option}: cannot write to {folder}: {reason}") from None


def format_number(value: float) -> str:
    """Writes a number as run names do, shortest digits in powers of ten: 0.001 is 1e-3, 0.00025 is 2.5e-4."""
    if value == 0:
        return "0"
    exponent = Decimal(repr(value)).adjusted()
    mantissa = Decimal(repr(value)).scaleb(-exponent).normalize()
    return f"{mantissa:f}e{exponent}"


def run_name(options: argparse.Namespace, recipe: Recipe) -> str:
    """Names a run after every option that changes its outcome, but the number of epochs of the paper's recipe."""
    parts = ["soft"] if options.soft else []
    parts += ["lr", format_number(options.learning_rate), "b", str(options.batch_size), "T", str(options.T)]
    if options.connectivity is not None:
        parts += ["connectivity", format_number(options.connectivity)]
    if options.penalty is not None:
        parts += ["penalty", format_number(options.penalty)]
    if options.sparsity is not None:
        parts += ["s", repr(options.sparsity)]
    parts += [options.mode]
    if options.recipe != "paper":
        parts += [options.recipe, "N", str(options.epoch)]  # the schedule is that of the number of epochs
    if options.plain_gradient:
        parts += ["plain-gradient"]
    if options.seed != 2020:
        parts += ["seed", str(options.seed)]
    if options.temperature:
        parts += ["temperature", format_number(options.temperature)]
    if options.precision:
        parts += [options.precision]
    if options.dataset != recipe.datasets[0]:
        parts += [options.dataset]
    return "-".join(parts)


def arguments(options: argparse.Namespace) -> dict[str, Any]:
    """The options that a checkpoint must agree on, for it and for the record: all but those of place."""
    return {key: value for key, value in vars(options).items() if key not in PLACE_OPTIONS}
