"""What benchmarks.gpu measures, each part in a process of its own: it adds its tables to the report, row by row."""

import argparse
import gc
import importlib.util
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import islice

import torch
from spikingjelly.activation_based import functional
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import measuring
from benchmarks.bench import C10, MNIST, STEP_HEAD, WARMUP, Execution, ceiling, step_rows
from benchmarks.gpu_report import Report
from benchmarks.optimizers import OPTIMIZERS, SHAPES, bench_optimizers
from benchmarks.tables import Tables, in_turns, noise, table
from spiking import StepwiseBatchNorm2d, lif
from training import data
from training.command_line import Parser, command, folder_path
from training.data.dataset import one_line
from training.device import precisions
from training.step import set_precision

FAST = "compiled and captured, batch of the fast recipe"
SMALL = {"c10": "--width 8 -T 2 -b 4", "mnist": "--width 16 -T 2 -b 4"}


def images(experiment, n: int, tests: int = 10) -> data.Dataset:
    """Noise: neither speed nor equality depends on the pixels."""
    shape = experiment.datasets[0].shape
    return data.Dataset(noise(n, *shape), noise(tests, *shape))


# -- equality ----------------------------------------------------------------------------------------

STEPS = 20
MODES = {
    "Grad R": "-m grad -s 0.95",
    "dense": "-m no_prune",
    "Deep R": "-m deep -s 0.95",
    "soft Deep R": "-m deep -soft -s 0.95",
}
GAIN = 3  # of the initial weights, so that more neurons fire from the first step on
# Largest differences of the first loss, of all losses, and of the change of all weights in these steps, relative to
# the CPU's in fp32. Where rounding lets one spike fall differently, all that follows differs a little: on a CPU the
# changes differ by up to 0.1 for fused kernels and 0.5 for bf16; for twice the learning rate by 0.8, for other batches
# by 1.4, and where nothing is learned by 1.
BOUNDS = {"fp32": (0.005, 0.05, 0.2), "tf32": (0.05, 0.15, 0.4), "bf16": (0.05, 0.2, 0.6)}


@dataclass
class Trained:
    """The losses of some steps, what they changed in all parameters together, and the connectivity after them."""

    losses: Tensor
    change: Tensor
    connectivity: float
    captured: bool


def trained(experiment, dataset: data.Dataset, device: torch.device, mode: str, line: str) -> Trained:
    gc.collect()  # an execution before this one, whose batches hold it
    execution = Execution(experiment, dataset, device, line, mode=mode)
    execution.network.train()
    set_precision(execution.precision, device)
    with torch.no_grad():
        for weight in measuring.prunable(execution.network).values():
            weight.mul_(GAIN)

    def weights() -> Tensor:
        return torch.cat([p.detach().double().cpu().flatten() for p in execution.network.parameters()])

    before = weights()
    losses = [float(execution.step(*batch)[0]) for batch in islice(execution.endless, STEPS)]
    connectivity = measuring.total(measuring.count(measuring.masks(execution.network))).connectivity
    return Trained(torch.tensor(losses), weights() - before, connectivity, execution.step.graph is not None)


def equality_row(reference: Trained, found: Trained, precision: str) -> tuple[str, ...]:
    losses = (found.losses - reference.losses).abs() / reference.losses
    change = float((found.change - reference.change).norm() / reference.change.norm())
    differences = (float(losses[0]), float(losses.max()), change)
    equal = all(d <= bound for d, bound in zip(differences, BOUNDS[precision], strict=True))  # NaN is not
    shares = (f"{100 * trained.connectivity:.2f} %" for trained in (reference, found))
    return *(f"{d:.1e}" for d in differences), *shares, "yes" if found.captured else "no", "yes" if equal else "DIFFERS"


def bench_equality(device: torch.device, small: bool) -> Tables:
    """The same batches from the same weights, on the CPU by the plain layers and on the device."""
    # Not the same random numbers: dropout lets all pass, and Deep R's temperature is 0.
    nn.functional.dropout = lambda x, *args, **kwargs: x
    lines = {"c10": f"-lr 1e-3 --width {8 if small else 16} -b 16", "mnist": "-lr 1e-3 -b 128"}
    head = ("mode", "precision", "first loss", "all losses", "weights", "connected, CPU", "here", "captured", "equal")
    bounds = "; ".join(f"{name}: {' / '.join(f'{b:g}' for b in BOUNDS[name])}" for name in precisions(device))
    rows = []
    for mode, options in list(MODES.items())[: 2 if small else None]:
        for experiment in (C10, MNIST):
            line, dataset = lines[experiment.name] + (" -T 2" if small else ""), images(experiment, 160)
            reference = trained(experiment, dataset, torch.device("cpu"), options, f"{line} --no-compile")
            for precision in precisions(device):
                name = (f"{experiment.name}, {mode}", precision)
                try:
                    found = trained(experiment, dataset, device, options, f"{line} --precision {precision}")
                    rows.append((*name, *equality_row(reference, found, precision)))
                except Exception as error:  # of one mode; the others go on
                    rows.append((*name, one_line(error)[:200], *("-",) * (len(head) - 3)))
                yield table(f"{STEPS} steps beside the CPU's in fp32: relative differences ({bounds})", head, rows)


# -- the blocks of the CIFAR-10 network --------------------------------------------------------------

BLOCKS = {  # N, C, H and W, maximum, constant input, BatchNorm
    "first neurons, 32x32": (16, 256, 32, False, True, False),
    "BatchNorm and neurons, 32x32": (16, 256, 32, False, False, True),
    "BatchNorm, neurons and maximum, 32x32": (16, 256, 32, True, False, True),
    "BatchNorm and neurons, 16x16": (16, 256, 16, False, False, True),
    "BatchNorm, neurons and maximum, 16x16": (16, 256, 16, True, False, True),
    "hidden neurons": (16, 2048, 1, False, False, False),
}


def bench_blocks(device: torch.device, small: bool) -> Tables:
    """Forward and backward of each block, by its kernel and by the plain layers."""
    from spiking_kernels import blocks, shapes

    T, rows = 2 if small else 8, []
    head = ("block", "precision", "spikes that differ", "gradient, relative", "ms, layers", "ms, kernel", "speed-up")
    for name, (n, c, size, pool, constant, has_norm) in BLOCKS.items():
        n, c = (2, 8) if small else (n, c)
        for dtype in (torch.float32, torch.bfloat16):
            y = torch.randn(n if constant else T * n, c, size, size, device=device).mul(2).add(0.7).to(dtype)
            y = y.contiguous(memory_format=torch.channels_last).requires_grad_()
            norms = [StepwiseBatchNorm2d(c, "m").to(device) if has_norm else None for _ in range(2)]
            neurons = lif()
            functional.set_step_mode(neurons, "m")

            def layers(y=y, norm=norms[0], constant=constant, pool=pool, neurons=neurons, dtype=dtype):
                x = y.expand(T, *y.shape) if constant else y.unflatten(0, (T, -1))
                functional.reset_net(neurons)
                spikes = neurons(x if norm is None else norm(x)).flatten(0, 1).to(dtype)
                return nn.functional.max_pool2d(spikes, 2) if pool else spikes

            def kernel(y=y, norm=norms[1], constant=constant, pool=pool):
                return blocks.lif_block(y, shapes.Shape(T, pool, constant), norm)

            results, gradient = {}, None

            def both_ways(function, y=y, results=results):
                nonlocal gradient
                y.grad = None
                spikes = function()
                gradient = torch.randn_like(spikes) if gradient is None else gradient
                spikes.backward(gradient)
                results[function] = spikes.detach(), y.grad.float()

            try:
                turns = {f.__name__: partial(both_ways, f) for f in (layers, kernel)}
                ms = {way: 1e3 * seconds for way, seconds in in_turns(turns, 2 if small else 20, device, 3).items()}
                (expected, expected_grad), (spikes, grad) = results[layers], results[kernel]
                differ = f"{float((spikes != expected).float().mean()):.1e}"
                off = f"{float((grad - expected_grad).norm() / expected_grad.norm()):.1e}"
                cells = (differ, off, *(f"{ms[way]:.3f}" for way in turns), f"{ms['layers'] / ms['kernel']:.1f}")
            except Exception as error:  # of one block; the others go on
                cells = (one_line(error)[:200], *("-",) * 4)
            rows.append((name, str(dtype).removeprefix("torch."), *cells))
            yield table(f"The blocks' kernels beside the plain layers, T {T}, batch {n}", head, rows)


# -- speed -------------------------------------------------------------------------------------------


def ways(experiment, precision: str, small: bool) -> dict[str, dict]:
    """The executions in a precision, by their names, as Execution takes them."""
    line = f"--precision {precision} {SMALL[experiment.name] if small else ''}"
    plain = f"{line} --no-compile"
    found = {"step by step, plain (--no-compile)": dict(line=plain, step_mode="s")} if precision == "fp32" else {}
    found |= {
        "layer by layer, plain (--no-compile)": dict(line=plain),
        "compiled, not captured": dict(line=line, graph=False),
        "compiled and captured": dict(line=line),
    }
    if experiment is C10 and precision == "bf16":
        found[FAST] = dict(line=f"--recipe fast {line}")
    return found


def bench_steps(experiment, chosen: tuple[str, ...], device: torch.device, small: bool) -> Tables:
    n, tests, steps, rounds = (160, 10, 2, 1) if small else (12_800, 1000, 20, 3)
    dataset = images(experiment, n, tests)
    for precision in chosen:
        rows = []
        for row in step_rows(experiment, dataset, device, ways(experiment, precision, small), rounds, steps):
            rows.append(row)
            yield table(f"{experiment.label}, Grad R, {precision}", ("execution", *STEP_HEAD), rows)
    if experiment is C10 and precision == "bf16":
        yield from ceiling(device)


# -- profile -----------------------------------------------------------------------------------------

LAUNCHES = re.compile(r"cu(da)?(Launch|GraphLaunch|Memcpy|Memset)")  # calls of CUDA's interfaces


def profile_table(execution: Execution, steps: int, title: str) -> dict:
    """The kernels that take most of a training step, and how often the host launches one; on the CPU, operators."""
    on_gpu = execution.device.type == "cuda"
    kinds = [ProfilerActivity.CPU, ProfilerActivity.CUDA] if on_gpu else [ProfilerActivity.CPU]
    with profile(activities=kinds) as found:
        execution.train(steps)
        if on_gpu:
            torch.cuda.synchronize()
    # on a GPU, a range of the host's code has an event, too, with the time of the kernels in it
    events = [event for event in found.key_averages() if not (on_gpu and getattr(event, "is_user_annotation", False))]
    kind, key = (DeviceType.CUDA, "self_device_time_total") if on_gpu else (DeviceType.CPU, "self_cpu_time_total")
    kernels = [(getattr(event, key), event) for event in events if event.device_type == kind]
    kernels.sort(key=lambda pair: -pair[0])
    total = sum(time for time, _ in kernels) or 1
    rows = [
        (f"`{event.key[:110]}`", f"{event.count / steps:g}", f"{time / steps:.0f}", f"{100 * time / total:.1f} %")
        for time, event in kernels[:25]
    ]
    rows.append(("all", f"{sum(e.count for _, e in kernels) / steps:g}", f"{total / steps:.0f}", "100 %"))
    launched = sum(event.count for event in events if LAUNCHES.match(event.key))
    rows.append(("launches, copies and memsets by the host", f"{launched / steps:g}" if on_gpu else "-", "-", "-"))
    return table(title, ("kernel", "calls/step", "µs/step", "share"), rows)


def bench_profile(device: torch.device, small: bool) -> Tables:
    plain = "layer by layer, plain (--no-compile)"
    executions = ways(C10, "bf16", small)
    for name in (FAST, "compiled and captured", plain):
        execution = None
        gc.collect()  # the execution before, whose batches hold it
        execution = Execution(C10, images(C10, 1280), device, **executions[name])
        execution.train(2 if small else WARMUP)
        yield profile_table(execution, 2 if small else 10, f"CIFAR-10 training step, bf16: {name}")


def bench_updates(device: torch.device, small: bool) -> Tables:
    """Each optimizer in turns with Adam: two of them fit on any card, and a row is there as soon as it is measured."""
    sizes, names = dict(reversed(SHAPES.items())), list(OPTIMIZERS)  # the large ones tell more
    if small:
        sizes, names = {"few weights": ([(8, 4)], 1)}, ["Adam, fused", "Grad R, fused"]
    for what, size in sizes.items():
        rows = []
        for name in names:
            (made,) = bench_optimizers(device, 1 if small else 3, {what: size}, {"Adam, fused", name})
            rows += [row for row in made["rows"] if row[0] == name]
            yield table(f"{made['title']}: {what}", made["head"], rows)  # a table takes the place of one of its title


# --


@dataclass(frozen=True)
class Part:
    """A part of the report.

    Attributes:
        share: of the time; what a part leaves, the next ones have.
        measure: called with the device, and whether sizes are small.
        needs: a module without which it is left out.
    """

    title: str
    share: float
    measure: Callable[[torch.device, bool], Tables]
    needs: str = "torch"


PARTS = {
    "equality": Part("Equality with the CPU", 0.12, bench_equality),
    "blocks": Part("Kernels of the CIFAR-10 network's blocks", 0.06, bench_blocks, "spiking_kernels.blocks_triton"),
    "c10-bf16": Part("CIFAR-10 in bf16", 0.09, partial(bench_steps, C10, ("bf16",))),
    "c10-tf32": Part("CIFAR-10 in tf32", 0.06, partial(bench_steps, C10, ("tf32",))),  # on the CPU: fp32
    "c10-fp32": Part("CIFAR-10 in fp32", 0.04, partial(bench_steps, C10, ("fp32",))),
    "mnist": Part("MNIST", 0.06, partial(bench_steps, MNIST, ("bf16", "tf32", "fp32"))),
    "profile": Part("Profile", 0.06, bench_profile),
    "optimizers": Part("Optimizers", 0.09, bench_updates),
}


def card(device: torch.device) -> str:
    if device.type != "cuda":
        return "CPU alone"
    major, minor = torch.cuda.get_device_capability(device)
    memory = torch.cuda.get_device_properties(device).total_memory / 2**30
    return f"{torch.cuda.get_device_name(device)}, compute capability {major}.{minor}, {memory:.0f} GiB"


@command
def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=folder_path, required=True)
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args(argv)
    device, part, report = torch.device(options.device), PARTS[options.part], Report(options.out)
    report.head["card"] = card(device)
    if importlib.util.find_spec(part.needs) is None:
        report.add(part.title, note=f"Left out: there is no {part.needs}.")
        return 0
    for made in part.measure(device, options.small):
        report.add(part.title, made)
    return 0


if __name__ == "__main__":
    sys.exit(main())
