"""Measures speed and prints tables: make bench, or python -m benchmarks.bench.

What is compared runs in turns in one process, and every ratio is to the baseline measured beside it. The numbers
are medians, because the machine may be shared and noisy. Of a slow execution, only some steps are measured, and the
time of an epoch is computed from them; the tables say from how many.
"""

import statistics
import sys
import time
from collections.abc import Callable

import torch
from spikingjelly.activation_based import functional
from torch import Tensor, nn
from torch.optim import Adam
from torch.utils.data import DataLoader, TensorDataset
from torchvision import transforms

import measuring
import spiking_kernels
from analysis.experiments import EXPERIMENTS
from benchmarks.optimizers import bench_optimizers
from benchmarks.tables import in_turns, mnist_images, noise, parser, run, synchronize, table
from gradrewire import GradRewiring
from training import data
from training.command_line import command
from training.step import TrainingStep, autocast, set_precision

MNIST, C10 = EXPERIMENTS["mnist"], EXPERIMENTS["c10"]
PARTS = ("mnist", "scaling", "optimizers", "equality", "c10")


def grad_r(network: nn.Module, fused: bool, device: torch.device) -> list[torch.optim.Optimizer]:
    fast = dict(fused=fused, capturable=fused and device.type == "cuda")
    others = [p for p in network.parameters() if p.dim() == 1]
    pruning = GradRewiring(measuring.prunable(network).values(), lr=1e-4, alpha=1e-3, s=0.95, **fast)
    return [pruning, Adam(others, lr=1e-4, **fast)] if others else [pruning]


class Execution:
    """An experiment's network, trained in one way, a number of steps at a time."""

    def __init__(
        self, experiment, dataset, device, batch_size, fused, T=8, step_mode="m", precision="fp32", loader=None, seed=0
    ):
        torch.manual_seed(seed)
        self.network, self.device, self.precision = experiment.network(T, step_mode).to(device), device, precision
        self.network.fused = fused
        source = experiment.datasets[0]
        normalisation = source.normalisation(device)
        generator = torch.Generator().manual_seed(0)
        self.batches = loader or data.TrainingBatches(
            dataset.train.to(device), batch_size, source.augmentation, normalisation, generator, fused=fused
        )
        self.test_set = data.TestBatches(dataset.test.to(device), experiment.test_batch_size, normalisation)
        optimizers = grad_r(self.network, fused, device)
        self.step = TrainingStep(self.network, optimizers, precision, device, graph=fused)
        self.iterator = iter(())

    def train(self, steps: int) -> None:
        set_precision(self.precision, self.device)
        self.network.train()
        for _ in range(steps):
            batch = next(self.iterator, None)
            if batch is None:
                self.iterator = iter(self.batches)
                batch = next(self.iterator)
            images, labels = (tensor.to(self.device) for tensor in batch)
            self.step(images, labels)

    def test(self) -> float:
        with autocast(self.precision, self.device):
            return measuring.accuracy(self.network, self.test_set)

    def test_with_rates(self) -> None:
        with measuring.SpikeCounter(self.network) as spikes:
            self.test()
        spikes.rates()


def torchvision_loader(dataset: data.Dataset, batch_size: int) -> DataLoader:
    """The plain way: per-image transforms of PIL images in two worker processes."""
    move = transforms.RandomAffine(degrees=30, translate=(0.15, 0.15), scale=(0.85, 1.11))
    to_tensor, normalise = transforms.ToTensor(), transforms.Normalize(MNIST.datasets[0].mean, MNIST.datasets[0].std)
    transform = transforms.Compose([transforms.ToPILImage(), move, to_tensor, normalise])

    class Transformed(TensorDataset):
        def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
            image, label = super().__getitem__(index)
            return transform(image), label

    images = Transformed(dataset.train.images, dataset.train.labels)
    return DataLoader(images, batch_size, shuffle=True, drop_last=True, num_workers=2, persistent_workers=True)


def bench_mnist(dataset: data.Dataset, device: torch.device, rounds: int) -> list[dict]:
    batch, steps = MNIST.paper.batch_size, len(dataset.train) // MNIST.paper.batch_size

    def execution(step_mode: str, fused: bool, **settings) -> Execution:
        return Execution(MNIST, dataset, device, batch, fused, step_mode=step_mode, **settings)

    plain = "step by step, eager; torchvision's transforms in workers"
    executions = {
        plain: execution("s", False, loader=torchvision_loader(dataset, batch)),
        "step by step, eager; data in memory": execution("s", False),
        "layer by layer, eager; data in memory": execution("m", False),
        "layer by layer, fused (--compile)": execution("m", True),
        "the same, bf16 products": execution("m", True, precision="bf16"),
    }
    if device.type == "cuda":
        executions["the same, tf32 products"] = execution("m", True, precision="tf32")
    x, w, g = (torch.randn(*shape, device=device) for shape in ((batch, 784), (800, 784), (batch, 800)))

    def products(n: int) -> None:
        for _ in range(n):
            x @ w.t()
            g.t() @ x

    share = {name: 30 if "eager" in name else steps for name in executions}
    functions = {name: lambda e=e, n=share[name]: e.train(n) for name, e in executions.items()}
    functions["its two products with the 784x800 matrix alone"] = lambda: products(steps)
    seconds = in_turns(functions, rounds, device)
    epoch = {name: value * steps / share.get(name, steps) for name, value in seconds.items()}
    floor = epoch["its two products with the 784x800 matrix alone"]
    flop = steps * 2 * 2 * batch * 784 * 800
    rows = [
        (
            name,
            f"{value:.2f}",
            f"{steps * batch / value:,.0f}",
            f"{value / floor:.2f}",
            f"{epoch[plain] / value:.1f}",
            f"{flop / value / 1e9:.0f}",
            str(share.get(name, steps)),
        )
        for name, value in epoch.items()
    ]
    head = ("MNIST training epoch, Grad R", "s", "images/s", "x products", "speed-up", "GFLOP/s in products", "steps")
    tables = [table(f"MNIST training ({rounds} rounds, medians)", head, rows)]

    del executions[plain]
    functions = {name: e.test for name, e in executions.items()}
    functions |= {f"{name}, firing rates recorded": e.test_with_rates for name, e in executions.items()}
    seconds = in_turns(functions, rounds, device)
    rows = [(name, f"{seconds[name]:.3f}", f"{seconds[f'{name}, firing rates recorded']:.3f}") for name in executions]
    head = ("MNIST test set, 10 000 images", "s", "s with firing rates")
    return [*tables, table(f"MNIST evaluation ({rounds} rounds, medians)", head, rows)]


def bench_profile(dataset: data.Dataset, device: torch.device) -> list[dict]:
    """Where the time of a fused MNIST training step goes: its parts, one after the other."""
    execution = Execution(MNIST, dataset, device, MNIST.paper.batch_size, fused=True)
    execution.train(20)
    network, optimizer, batches = execution.network, execution.step.optimizers[0], iter(execution.batches)
    parts: dict[str, list[float]] = {}

    def timed(name: str, part: Callable[[], object]) -> object:
        synchronize(device)
        start = time.perf_counter()
        result = part()
        synchronize(device)
        parts.setdefault(name, []).append(time.perf_counter() - start)
        return result

    for _ in range(min(200, len(execution.batches))):
        optimizer.zero_grad()
        images, labels = timed("batch: pick, augment, normalise", lambda: next(batches))
        current = timed("first layer (product)", lambda x=images: network.static(x))
        leaf = current.detach().requires_grad_()
        if device.type != "cpu" or spiking_kernels.unavailable():
            counts = timed("LIF, linear, LIF", lambda x=leaf: network.spiking(x.expand(8, *x.shape)).sum(0))
            functional.reset_net(network)
        else:
            weight = network.fc[1].weight
            counts = timed(
                "LIF, linear, LIF (kernel)", lambda x=leaf, w=weight: spiking_kernels.lif_linear_lif(x, w, 8)
            )
        loss = timed("loss", lambda c=counts, y=labels: measuring.loss_function(c, y, 8))
        timed("backward: loss, LIF, linear, LIF", loss.backward)
        timed("backward: first layer (product)", lambda c=current, g=leaf: c.backward(g.grad))
        timed("Grad R update", optimizer.step)
    medians = {name: statistics.median(seconds) for name, seconds in parts.items()}
    total = sum(medians.values())
    rows = [(name, f"{value * 1e3:.3f}", f"{100 * value / total:.0f} %") for name, value in medians.items()]
    return [table("Where a fused MNIST training step goes (medians)", ("part", "ms", "share"), rows)]


def bench_scaling(dataset: data.Dataset, device: torch.device, rounds: int) -> list[dict]:
    """Seconds per training step of the fused execution, over T and over the batch size."""
    tables = []
    for what, values in (("T", (2, 4, 8, 16, 32)), ("batch size", (1, 4, 16, 64, 128, 256))):
        executions = {}
        for value in values:
            T, batch = (value, 128) if what == "T" else (8, value)
            executions[str(value)] = Execution(MNIST, dataset, device, batch, fused=True, T=T)
        seconds = in_turns({name: lambda e=e: e.train(50) for name, e in executions.items()}, rounds, device)
        rows = [(name, f"{value / 50 * 1e3:.3f}") for name, value in seconds.items()]
        tables.append(table(f"MNIST, fused training step over {what}", (what, "ms"), rows))
    return tables


def bench_equality(dataset: data.Dataset, device: torch.device) -> list[dict]:
    """300 identical steps, eager and fused, and the sparsity after one epoch in both; learning rate 1e-3."""
    losses, sparsity = {}, {}
    for name, fused in (("eager fp32, step by step", False), ("fused fp32", True)):
        step_mode, batch = "m" if fused else "s", MNIST.paper.batch_size
        execution = Execution(MNIST, dataset, device, batch, fused, step_mode=step_mode, seed=2020)
        for group in execution.step.optimizers[0].param_groups:
            group["lr"] = 1e-3
        losses[name] = []
        for images, labels in execution.batches:
            loss, _ = execution.step(images, labels)
            losses[name].append(float(loss))
        masks = measuring.masks(execution.network)
        sparsity[name] = measuring.total(measuring.count(masks)).sparsity
    rows = []
    for step in (0, 1, 2, 5, 10, 20, 50, 100, 150, 200, 250, 299):
        if step < min(map(len, losses.values())):
            rows.append((str(step), *(f"{values[step]:.6f}" for values in losses.values())))
    rows.append(("mean of the first 300", *(f"{statistics.mean(values[:300]):.6f}" for values in losses.values())))
    rows.append(("sparsity after the epoch", *(f"{100 * value:.2f} %" for value in sparsity.values())))
    return [table("MNIST, loss over identical steps", ("step", *losses), rows)]


def bench_cifar10(device: torch.device, rounds: int, batch: int) -> list[dict]:
    """Training steps on noise; an epoch is 3125 steps of 16."""
    n = max(64, 4 * batch)
    split = noise(n, (3, 32, 32), torch.Generator().manual_seed(0))
    dataset = data.Dataset(split, split)
    kinds = [("step by step, eager, fp32", "s", False, "fp32"), ("layer by layer, eager, fp32", "m", False, "fp32")]
    if device.type == "cuda":
        kinds += [(f"layer by layer, CUDA graph, {p}", "m", True, p) for p in ("fp32", "tf32", "bf16")]
    rows, base, steps = [], None, 100 if device.type == "cuda" else 1
    for name, step_mode, fused, precision in kinds:
        execution = Execution(C10, dataset, device, batch, fused, step_mode=step_mode, precision=precision)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            execution.train(10)
        seconds = in_turns({"step": lambda e=execution: e.train(steps)}, rounds, device, int(device.type == "cuda"))
        value = seconds["step"] / steps
        base = base or value
        memory = f"{torch.cuda.max_memory_allocated() / 2**30:.1f}" if device.type == "cuda" else "-"
        test = "-"
        if device.type == "cuda":
            test = f"{in_turns({'test': execution.test}, 1, device)['test'] / n * 10_000:.2f}"
        speed = (f"{value * 1e3:.1f}", f"{value * 50_000 / batch:,.1f}", f"{base / value:.1f}")
        rows.append((name, *speed, f"{81.4e9 * batch / value / 1e12:.2f}", memory, test))
        del execution
    head = (f"CIFAR-10, Grad R, batch {batch}, T 8", "ms/step", "s/epoch", "speed-up", "TFLOP/s", "GiB", "s/test set")
    return [table(f"CIFAR-10 training ({rounds} rounds of {steps} steps, medians)", head, rows)]


def ceiling(device: torch.device) -> list[dict]:
    rows = []
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        a = torch.randn(2048, 2048, device=device).to(dtype)
        seconds = in_turns({"": lambda a=a: a @ a}, 7, device, take=min)[""]
        rows.append((f"2048x2048 product, {name}", f"{2 * 2048**3 / seconds / 1e9:.0f}"))
    return [table("What this machine reaches (best of 7)", ("", "GFLOP/s"), rows)]


@command
def main(argv: list[str] | None = None) -> int:
    made = parser(__doc__, rounds=5)
    made.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="what to measure (default: all)")
    options = made.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def measure() -> list[dict]:
        on_gpu, rounds = device.type == "cuda", options.rounds
        if not on_gpu and (reason := spiking_kernels.unavailable()):
            print(f"No fused kernels ({reason}): the fused rows are those of the plain layers.")
        dataset, tables = mnist_images(options.dataset_dir), ceiling(device)
        if "mnist" in options.only:
            tables += bench_mnist(dataset, device, rounds) + bench_profile(dataset, device)
        if "scaling" in options.only:
            tables += bench_scaling(dataset, device, rounds)
        if "optimizers" in options.only:
            tables += bench_optimizers(device, rounds)
        if "equality" in options.only:
            tables += bench_equality(dataset, device)
        if "c10" in options.only:
            tables += bench_cifar10(device, rounds if on_gpu else 1, batch=16 if on_gpu else 4)
        return tables

    return run(options, device, ("torch", "torchvision", "spikingjelly"), measure)


if __name__ == "__main__":
    sys.exit(main())
