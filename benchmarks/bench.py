"""Measures speed and prints tables: make bench, or python -m benchmarks.bench.

What is compared runs in turns in one process, and every ratio is to the baseline measured beside it. The numbers
are medians, because the machine may be shared and noisy. Of a slow execution, only some steps are measured, and the
time of an epoch is computed from them; the tables say from how many.
"""

import argparse
import gc
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain, islice, repeat
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset, default_collate
from torchvision import transforms

import measuring
import spiking_kernels
from analysis.experiments import EXPERIMENTS
from benchmarks.optimizers import bench_optimizers
from benchmarks.tables import Row, Tables, in_turns, mnist_images, noise, parser, run, table
from training import data
from training.command_line import command
from training.data.dataset import one_line
from training.device import keep_freed_memory, precisions
from training.methods import METHODS
from training.options import read
from training.step import TrainingStep, autocast, set_precision

MNIST, C10 = EXPERIMENTS["mnist"], EXPERIMENTS["c10"]
PARTS = ("mnist", "scaling", "optimizers", "equality", "c10")
WARMUP = 10  # steps before time is taken: kernels are built, and the graph is captured
FLOP = {"mnist": 2 * 2 * 784 * 800, "c10": 81.4e9}  # of an image in training, at the published sizes; see README.md


class Execution:
    """An experiment's network, trained in one way, a number of steps at a time.

    ``mode`` and ``line`` are the experiment's command line; the precision is fp32 unless it says otherwise. Without
    ``graph``, what is compiled is not captured.
    """

    def __init__(
        self, experiment, dataset, device, line="", step_mode="m", loader=None, mode="-m grad -s 0.95", graph=True
    ):
        self.options = options = read(experiment, [*mode.split(), *line.split()])
        options.device = self.device = device
        self.published = (options.width, options.T) == (experiment.width, 8)  # sizes
        self.precision = options.precision or "fp32"
        torch.manual_seed(options.seed)
        self.network = experiment.network(options.T, step_mode, options.width).to(device)
        self.network.fused = options.compile
        source = experiment.datasets[0]
        normalisation = source.normalisation(device)
        generator, train = torch.Generator().manual_seed(0), dataset.train.to(device)
        self.batches = loader or data.TrainingBatches(
            train, options.batch_size, source.augmentation, normalisation, generator, options.compile
        )
        made = {} if loader else {"make": self.batches.make}  # as in a run, the step makes its batch of parts
        self.endless = chain.from_iterable(self.epoch() for _ in repeat(None))
        self.test_set = data.TestBatches(dataset.test.to(device), experiment.test_batch_size, normalisation)
        optimizers = METHODS[options.mode].build(self.network, options)
        self.step = TrainingStep(
            self.network, optimizers, self.precision, device, graph=graph and options.compile, **made
        )

    def epoch(self) -> Iterable[Sequence[Tensor]]:
        """What the step is called with: the parts of a batch, or a loader's batch."""
        return self.batches.parts() if isinstance(self.batches, data.TrainingBatches) else self.batches

    def train(self, steps: int) -> None:
        set_precision(self.precision, self.device)
        self.network.train()
        for batch in islice(self.endless, steps):
            self.step(*(part.to(self.device) for part in batch))

    def test(self) -> float:
        with autocast(self.precision, self.device):
            return measuring.accuracy(self.network, self.test_set)

    def test_with_rates(self) -> None:
        with measuring.SpikeCounter(self.network) as spikes:
            self.test()
        spikes.rates()


def _collate(transform: Callable[[Tensor], Tensor], pairs: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    return default_collate([(transform(image), label) for image, label in pairs])


def torchvision_loader(dataset: data.Dataset, batch_size: int) -> DataLoader:
    """The plain way: per-image transforms of PIL images in two worker processes."""
    move = transforms.RandomAffine(degrees=30, translate=(0.15, 0.15), scale=(0.85, 1.11))
    to_tensor, normalise = transforms.ToTensor(), transforms.Normalize(MNIST.datasets[0].mean, MNIST.datasets[0].std)
    transform = transforms.Compose([transforms.ToPILImage(), move, to_tensor, normalise])

    images = TensorDataset(dataset.train.images, dataset.train.labels)
    workers = dict(num_workers=2, persistent_workers=True, collate_fn=partial(_collate, transform))
    return DataLoader(images, batch_size, shuffle=True, drop_last=True, **workers)


def bench_mnist(dataset: data.Dataset, device: torch.device, rounds: int) -> Tables:
    batch, steps = MNIST.paper.batch_size, len(dataset.train) // MNIST.paper.batch_size
    plain = "step by step, eager; torchvision's transforms in workers"
    eager, loader = "--no-compile", torchvision_loader(dataset, batch)
    executions = {
        plain: Execution(MNIST, dataset, device, eager, "s", loader),
        "step by step, eager; data in memory": Execution(MNIST, dataset, device, eager, "s"),
        "layer by layer, eager; data in memory": Execution(MNIST, dataset, device, eager),
        "layer by layer, fused (--compile)": Execution(MNIST, dataset, device),
    }
    for precision in precisions(device)[1:]:
        executions[f"the same, {precision} products"] = Execution(MNIST, dataset, device, f"--precision {precision}")
    x, w, g = (torch.randn(*shape, device=device) for shape in ((batch, 784), (800, 784), (batch, 800)))

    def products(n: int) -> None:
        set_precision("fp32", device)
        for _ in range(n):
            x @ w.t()
            g.t() @ x

    share = {name: 30 if "eager" in name else steps for name in executions}
    functions = {name: lambda e=e, n=share[name]: e.train(n) for name, e in executions.items()}
    alone = "its two products with the 784x800 matrix alone"
    seconds = in_turns({**functions, alone: lambda: products(steps)}, rounds, device)
    epoch = {name: value * steps / share.get(name, steps) for name, value in seconds.items()}
    flop = steps * batch * FLOP["mnist"]
    rows = []
    for name, value in epoch.items():
        ratios = (f"{value / epoch[alone]:.2f}", f"{epoch[plain] / value:.1f}", f"{flop / value / 1e9:.0f}")
        rows.append((name, f"{value:.2f}", f"{steps * batch / value:,.0f}", *ratios, str(share.get(name, steps))))
    head = ("MNIST training epoch, Grad R", "s", "images/s", "x products", "speed-up", "GFLOP/s in products", "steps")
    yield table(f"MNIST training ({rounds} rounds, medians)", head, rows)

    del executions[plain]
    functions = {name: e.test for name, e in executions.items()}
    functions |= {f"{name}, firing rates recorded": e.test_with_rates for name, e in executions.items()}
    seconds = in_turns(functions, rounds, device)
    rows = [(name, f"{seconds[name]:.3f}", f"{seconds[f'{name}, firing rates recorded']:.3f}") for name in executions]
    head = ("MNIST test set, 10 000 images", "s", "s with firing rates")
    yield table(f"MNIST evaluation ({rounds} rounds, medians)", head, rows)


def bench_scaling(dataset: data.Dataset, device: torch.device, rounds: int) -> Tables:
    """Seconds per training step of the fused execution, over T and over the batch size."""
    for what, option, values in (("T", "-T", (2, 4, 8, 16, 32)), ("batch size", "-b", (1, 4, 16, 64, 128, 256))):
        executions = {str(value): Execution(MNIST, dataset, device, f"{option} {value}") for value in values}
        seconds = in_turns({name: lambda e=e: e.train(50) for name, e in executions.items()}, rounds, device)
        rows = [(name, f"{value / 50 * 1e3:.3f}") for name, value in seconds.items()]
        yield table(f"MNIST, fused training step over {what}", (what, "ms"), rows)


def bench_equality(dataset: data.Dataset, device: torch.device) -> Tables:
    """300 identical steps, eager and fused, and the sparsity after one epoch in both; learning rate 1e-3."""
    losses, sparsity = {}, {}
    for name, line, step_mode in (("eager fp32, step by step", "--no-compile", "s"), ("fused fp32", "--compile", "m")):
        execution = Execution(MNIST, dataset, device, f"-lr 1e-3 {line}", step_mode)
        losses[name] = [float(execution.step(*batch)[0]) for batch in execution.epoch()]
        sparsity[name] = measuring.total(measuring.count(measuring.masks(execution.network))).sparsity
    steps = [step for step in (0, 1, 2, 5, 10, 20, 50, 100, 150, 200, 250, 299) if step < len(execution.batches)]
    rows = [(str(step), *(f"{values[step]:.6f}" for values in losses.values())) for step in steps]
    rows.append(("mean of the first 300", *(f"{statistics.mean(values[:300]):.6f}" for values in losses.values())))
    rows.append(("sparsity after the epoch", *(f"{100 * value:.2f} %" for value in sparsity.values())))
    yield table("MNIST, loss over identical steps", ("step", *losses), rows)


STEP_HEAD = (
    *("ms/step", "s/epoch", "speed-up", "x products", "TFLOP/s"),
    *("GiB allocated", "GiB reserved", "s/test set", "steps timed"),
)


def step_rows(
    experiment, dataset, device, executions: dict[str, dict[str, Any]], rounds: int, steps: int
) -> Iterator[Row]:
    """Measures training steps in some executions, one after the other, each given by the arguments that it needs.

    CIFAR-10 steps take turns with their convolutions and products alone.

    Yields:
        For each its name and the cells of STEP_HEAD; the reason if it fails. The speed-up is over the first one.
        Epochs and test sets are as large as the published ones, whatever the size of the data.
    """
    images = {"mnist": 60_000, "c10": 50_000}[experiment.name]
    on_gpu, base = device.type == "cuda", None
    for name, settings in executions.items():
        try:
            gc.collect()  # the execution before, whose batches hold it
            if on_gpu:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            execution = Execution(experiment, dataset, device, **settings)
            execution.train(WARMUP if on_gpu else 1)
            memory, products = ("-",) * 2, "-"
            if on_gpu:
                most = (torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved())
                memory = tuple(f"{size / 2**30:.1f}" for size in most)
            functions = {"": lambda e=execution: e.train(steps)}
            if experiment is C10:
                alone = cifar10_products(execution)
                functions["alone"] = lambda f=alone: [f() for _ in range(steps)]
            seconds = in_turns(functions, rounds, device)
            value, batch = seconds[""] / steps, execution.batches.batch_size
            base = base or value
            if experiment is C10:
                products = f"{seconds[''] / seconds['alone']:.2f}"
            test = in_turns({"": execution.test}, 1, device, int(on_gpu))[""] / len(dataset.test) * 10_000
            speed = (f"{value * 1e3:.1f}", f"{value * images / batch:,.1f}", f"{base / value:.1f}", products)
            flop = f"{FLOP[experiment.name] * batch / value / 1e12:.2f}" if execution.published else "-"
            yield name, *speed, flop, *memory, f"{test:.2f}", f"{rounds} x {steps}"
        except Exception as error:  # of one execution, such as too little memory; the others go on
            yield name, one_line(error)[:200], *("-",) * (len(STEP_HEAD) - 1)
        finally:
            execution = functions = alone = None  # frees their memory


def cifar10_products(execution: Execution) -> Callable[[], None]:
    """The convolutions and products of a training step of Cifar10Net alone, forward and back, channels-last."""
    options, device = execution.options, execution.device
    dtype = torch.bfloat16 if execution.precision == "bf16" else torch.float32
    width, batch = options.width, options.batch_size
    rows = options.T * batch

    def made(*shape: int) -> Tensor:
        x = torch.randn(shape, device=device).to(dtype)
        return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x

    def spikes(*shape: int) -> Tensor:
        return (made(*shape) > 1).to(dtype).requires_grad_()

    convolution = partial(functional.conv2d, padding=1)
    layers = [(convolution, made(batch, 3, 32, 32), made(width, 3, 3, 3))]
    layers += [(convolution, spikes(rows, width, n, n), made(width, width, 3, 3)) for n in (32, 32, 16, 16, 16)]
    layers.append((functional.linear, spikes(rows, 64 * width), made(8 * width, 64 * width)))
    layers.append((functional.linear, spikes(rows, 8 * width), made(100, 8 * width)))
    with torch.no_grad():
        tasks = [(product, x, w.requires_grad_(), made(*product(x, w).shape)) for product, x, w in layers]

    def run() -> None:
        set_precision(execution.precision, device)
        for product, x, weight, gradient in tasks:
            torch.autograd.grad(product(x, weight), [t for t in (x, weight) if t.requires_grad], gradient)

    return run


def bench_cifar10(device: torch.device, rounds: int, batch: int, width: int) -> Tables:
    """Training steps on noise, beside their convolutions and products alone."""
    on_gpu, sizes = device.type == "cuda", f"-b {batch} --width {width}"
    dataset = data.Dataset(noise(4 * batch, 3, 32, 32), noise(4 * batch if on_gpu else batch, 3, 32, 32))
    executions = {
        "step by step, eager, fp32": dict(line=f"{sizes} --no-compile", step_mode="s"),
        "layer by layer, eager, fp32": dict(line=f"{sizes} --no-compile"),
    }
    for precision in precisions(device):
        executions[f"layer by layer, fused, {precision}"] = dict(line=f"{sizes} --precision {precision}")
    rows = list(step_rows(C10, dataset, device, executions, rounds, 100 if on_gpu else 1))
    yield table("CIFAR-10 training (medians)", (f"Grad R, width {width}, batch {batch}, T 8", *STEP_HEAD), rows)


def ceiling(device: torch.device) -> Tables:
    rows = []
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        if name not in precisions(device):
            continue
        a = torch.randn(2048, 2048, device=device).to(dtype)
        many = 50 if device.type == "cuda" else 1  # there, one takes less time than its launch

        def products(a: Tensor = a, many: int = many) -> None:
            for _ in range(many):
                a @ a

        set_precision(name, device)
        seconds = in_turns({"": products}, 7, device, take=min)[""]
        rows.append((f"2048x2048 product, {name}", f"{many * 2 * 2048**3 / seconds / 1e9:.0f}"))
    yield table("What this machine reaches (best of 7)", ("", "GFLOP/s"), rows)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    made = parser("bench", __doc__, rounds=5)
    made.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="what to measure (default: all)")
    return made.parse_args(argv)


@command
def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        keep_freed_memory()  # as a run does

    def measure() -> Tables:
        on_gpu, rounds = device.type == "cuda", options.rounds
        if not on_gpu and (reason := spiking_kernels.unavailable()):
            print(f"No fused kernels ({reason}): the fused rows are those of the plain layers.")
        dataset = mnist_images(options.dataset_dir)
        yield from ceiling(device)
        if "mnist" in options.only:
            yield from bench_mnist(dataset, device, rounds)
        if "scaling" in options.only:
            yield from bench_scaling(dataset, device, rounds)
        if "optimizers" in options.only:
            yield from bench_optimizers(device, rounds)
        if "equality" in options.only:
            yield from bench_equality(dataset, device)
        if "c10" in options.only:
            for width, batch in ((256, 16), (64, 128)):
                yield from bench_cifar10(device, rounds if on_gpu else min(rounds, 3), batch, width)

    return run(options, device, ("torch", "torchvision", "spikingjelly"), measure)


if __name__ == "__main__":
    sys.exit(main())
