"""The device and how to use it: precision, deterministic algorithms, fused kernels."""

import os
from argparse import Namespace

import torch

import spiking_kernels
from training.errors import Refusal


def choose(options: Namespace) -> None:
    """Sets ``device`` and ``precision_used``, applies ``deterministic``, and turns ``compile`` off without kernels.

    ``precision`` becomes None if it is the device's default, so that a run can move to another device.

    Raises:
        Refusal: an option cannot work on this machine.
    """
    options.device = _device(options.gpu)
    default = "tf32" if options.device.type == "cuda" else "fp32"
    if options.precision == "tf32" and options.device.type != "cuda":
        raise Refusal("argument --precision: tf32 needs a GPU; the CPU takes fp32 or bf16")
    options.precision_used = options.precision or default
    if options.precision == default:
        options.precision = None
    if options.deterministic:
        _be_deterministic()
    options.compile = options.compile and _can_compile(options.device)


def name(device: torch.device) -> str:
    """The GPU's name, or "CPU" with the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' if threads > 1 else ''}"


def _device(gpu: int | None) -> torch.device:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpu is not None and gpu >= count:
        found = "there is no GPU" if count == 0 else f"the GPUs are 0 to {count - 1}"
        raise Refusal(f"argument -gpu/--gpu: there is no GPU {gpu} on this machine ({found})")
    if count == 0:
        print("No GPU found: running on the CPU.", flush=True)
        return torch.device("cpu")
    return torch.device("cuda", gpu or 0)


def _be_deterministic() -> None:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at the first matrix product on a GPU
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # costs time, and no code here reads it
    torch.backends.cudnn.benchmark = False


def _can_compile(device: torch.device) -> bool:
    missing = spiking_kernels.unavailable() if device.type == "cpu" else None
    if missing:
        print(f"No fused kernels, {missing}: running the plain layers.", flush=True)
    return not missing
