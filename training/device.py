"""The device and how to use it: precision, deterministic algorithms, fused kernels."""

import contextlib
import ctypes
import math
import os
import re
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import torch

import spiking_kernels
from training.errors import Refusal

LIMIT = Path("/sys/fs/cgroup/cpu.max")  # of this container, on Linux: microseconds of the processor, and in which time


def choose(options: Namespace, local_rank: int | None = None) -> None:
    """Sets ``device`` and ``precision_used``, applies ``deterministic``, and turns ``compile`` off without kernels.

    Where torchrun has started the process, its ``local_rank`` decides about the GPU.

    ``precision`` becomes None if it is the device's default, so that a run can move to another device.

    Raises:
        Refusal: an option cannot work on this machine.
    """
    options.device = _device(options.gpu if local_rank is None else _of_rank(options.gpu, local_rank))
    default = "tf32" if options.device.type == "cuda" else "fp32"
    if options.precision == "tf32" and options.device.type != "cuda":
        raise Refusal("argument --precision: tf32 needs a GPU; the CPU takes fp32 or bf16")
    options.precision_used = _possible(options.precision or default, options.device)
    if options.precision == default:
        options.precision = None
    if options.deterministic:
        _be_deterministic()
    if options.device.type == "cuda":  # without --compile, the neurons need Triton as well
        options.compile = _has_triton(options.device) and options.compile
    else:
        options.compile = options.compile and _has_kernels()
        keep_freed_memory()


def keep_freed_memory() -> None:
    """Lets the C library keep freed memory for later tensors of this process, where it is glibc.

    It would return large tensors to the system, which then clears each page of the next one: nearly a third of a
    CIFAR-10 step in bf16.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # another C library, or Windows
        return
    mallopt(-4, 0)  # M_MMAP_MAX: nothing outside the heap
    mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the free bytes at the end of the heap that are kept


def cores() -> int:
    """How many cores of the processor this process may use.

    A batch system may have bound it to some of them, and a container may have the time of a few.
    """
    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # no Linux, another version of cgroups, or no limit
        quota, period = LIMIT.read_text().split()
        found = min(found, max(1, math.ceil(int(quota) / int(period))))
    return found


def name(device: torch.device) -> str:
    """The GPU's name, or "CPU" with the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' if threads > 1 else ''}"


def _of_rank(gpu: int | None, local_rank: int) -> int | None:
    """The id of a rank's GPU; None without GPUs."""
    count = _gpus()
    if gpu is not None:
        hint = "to choose among them, set CUDA_VISIBLE_DEVICES"
        raise Refusal(f"argument -gpu/--gpu: not allowed with torchrun, which gives each rank a GPU; {hint}")
    if 0 < count <= local_rank:
        raise Refusal(f"there is no GPU {local_rank} for this rank on its machine: start at most {count} ranks there")
    if count and not torch.distributed.is_nccl_available():  # as PyTorch for Windows
        raise Refusal("this PyTorch has no NCCL, which ranks on GPUs need: hide the GPUs with CUDA_VISIBLE_DEVICES=-1")
    return local_rank if count else None


def _gpus() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _device(gpu: int | None) -> torch.device:
    count = _gpus()
    if gpu is not None and gpu >= count:
        found = "there is no GPU" if count == 0 else f"the GPUs are 0 to {count - 1}"
        raise Refusal(f"argument -gpu/--gpu: there is no GPU {gpu} on this machine ({found})")
    if count == 0:
        apple = " (Apple's is not used)" if torch.backends.mps.is_available() else ""
        print(f"No GPU found{apple}: running on the CPU.", flush=True)
        return torch.device("cpu")
    device = torch.device("cuda", gpu or 0)
    _use(device)
    return device


def _use(device: torch.device) -> None:
    """Makes a GPU the current device: that is where streams and captured graphs begin.

    Raises:
        Refusal: this torch cannot use it.
    """
    capability, made_for = torch.cuda.get_device_capability(device), torch.cuda.get_arch_list()
    if not runs_on(capability, made_for):
        raise Refusal(
            f"argument -gpu/--gpu: {torch.cuda.get_device_name(device)} has compute capability "
            f"{capability[0]}.{capability[1]}, and this PyTorch {torch.__version__} is made for {' '.join(made_for)}: "
            "install one that is made for it (https://pytorch.org/get-started/previous-versions), choose another GPU, "
            "or hide it with CUDA_VISIBLE_DEVICES= to run on the CPU"
        )
    try:
        torch.cuda.set_device(device)
        torch.cuda.synchronize(device)  # the first call that needs it
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise Refusal(f"argument -gpu/--gpu: {device} cannot be used ({_first_line(error)})") from None


def runs_on(capability: tuple[int, int], made_for: Sequence[str]) -> bool:
    """Whether a GPU of a compute capability runs code for one of some architectures, as torch names them.

    Code for a GPU (sm_80) runs on those of the same major version that are not older; that of sm_90a on no other one.
    Intermediate code (compute_80) is translated for every GPU that is not older.
    """
    targets = re.findall(r"(sm|compute)_(\d+)(\d)([a-z]?)", " ".join(made_for))
    for kind, major, minor, feature in targets:
        target = (int(major), int(minor))
        if feature == "a":
            fits = capability == target
        elif feature or kind == "sm":  # f: a family
            fits = capability[0] == target[0] and capability >= target
        else:
            fits = capability >= target
        if fits:
            return True
    return not targets  # names of another kind


def precisions(device: torch.device) -> tuple[str, ...]:
    """Those of ``--precision`` that a device has instructions for; in another one it takes many times fp32's time."""
    if device.type == "cuda":
        return ("fp32", "tf32", "bf16") if torch.cuda.get_device_capability(device) >= (8, 0) else ("fp32",)
    # a torch without oneDNN has no such operation
    bf16 = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return ("fp32", "bf16") if bf16 else ("fp32",)


def _possible(precision: str, device: torch.device) -> str:
    """The precision that is used; fp32 where a device has no other."""
    if precision in precisions(device):
        return precision
    if precision == "bf16":
        reason = "this CPU has no instructions for it"
        if device.type == "cuda":
            reason = f"{name(device)} has a compute capability below 8.0"
        print(f"No bf16, as {reason}: running in fp32.", flush=True)
    return "fp32"


def _be_deterministic() -> None:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at the first matrix product on a GPU
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # costs time, and no code here reads it
    torch.backends.cudnn.benchmark = False


def _has_kernels() -> bool:
    missing = spiking_kernels.unavailable()
    if missing:
        print(f"No fused kernels, {missing}: running the plain layers.", flush=True)
    return not missing


def _has_triton(device: torch.device) -> bool:
    """Whether Triton can build and start a kernel; if not, SpikingJelly's neurons run without it as well."""
    try:
        from training import triton_kernel

        triton_kernel.run(device)
    except Exception as error:  # of many kinds: it calls a C compiler, and loads what that made
        reason = "it is not installed" if isinstance(error, ImportError) else _first_line(error)
        print(
            f"No Triton kernels ({reason}): running the plain layers, as with --no-compile. "
            "They need triton, a C compiler and Python's headers (python3-dev).",
            flush=True,
        )
        os.environ["SJ_LIF_CUDA_IMPLEMENTATION"] = "torch"  # read when the first neuron runs
        return False
    return True


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]:.200}" if lines else type(error).__name__
