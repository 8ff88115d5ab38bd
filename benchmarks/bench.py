"""Measures speed, and prints a table: ``make bench``, or ``python -m benchmarks.bench --help``.

Everything that is compared runs in the same process, in turns, and every ratio is against the baseline
measured beside it: these are the medians of a shared, noisy machine. What a slow execution takes for an
epoch is extrapolated from some of its steps; the tables say from how many.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch
from spikingjelly.activation_based import functional
from torch import Tensor, nn
from torch.optim import Adam
from torch.utils.data import DataLoader, TensorDataset
from torchvision import transforms

import measuring
import spiking_kernels
from c10.c10 import EXPERIMENT as C10
from c10.model import Cifar10Net
from deeprewire import DeepRewiring
from gradrewire import GradRewiring
from mnist.mnist import EXPERIMENT as MNIST
from mnist.model import MnistNet
from training import data
from training.command_line import Parser, check_output, command, file_path, folder_path, output_file, whole_number
from training.record import processor
from training.step import TrainingStep, autocast, set_precision

Row = tuple[str, ...]


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def in_turns(
    functions: dict[str, Callable[[], object]], rounds: int, device: torch.device, warmup: int = 1
) -> dict[str, list[float]]:
    """Seconds that each function takes, once per round, in turns."""
    seconds = {name: [] for name in functions}
    for i in range(warmup + rounds):
        for name, function in functions.items():
            synchronize(device)
            start = time.perf_counter()
            function()
            synchronize(device)
            if i >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def median(seconds: list[float]) -> float:
    return statistics.median(seconds)


def table(title: str, head: Row, rows: list[Row]) -> dict:
    """Prints a Markdown table; returns it for the machine-readable copy."""
    print(f"\n### {title}\n")
    print("| " + " | ".join(head) + " |")
    print("|" + " --- |" * len(head))
    for row in rows:
        print("| " + " | ".join(row) + " |")
    sys.stdout.flush()
    return {"title": title, "head": head, "rows": rows}


# -- MNIST -------------------------------------------------------------------------------------------


def mnist_images(folder: Path | None) -> data.Dataset:
    """Real MNIST, or noise of its size: speed does not depend on the pixels."""
    if folder:
        return data.load("mnist", folder)
    generator = torch.Generator().manual_seed(0)
    splits = [
        data.Split(
            torch.randint(0, 256, (n, 1, 28, 28), generator=generator, dtype=torch.uint8),
            torch.randint(0, 10, (n,), generator=generator),
        )
        for n in (60_000, 10_000)
    ]
    return data.Dataset(*splits)


def grad_r(network: nn.Module, fused: bool, device: torch.device) -> list[torch.optim.Optimizer]:
    fast = dict(fused=fused, capturable=fused and device.type == "cuda")
    others = [p for p in network.parameters() if p.dim() == 1]
    pruning = GradRewiring(measuring.prunable(network).values(), lr=1e-4, alpha=1e-3, s=0.95, **fast)
    return [pruning, Adam(others, lr=1e-4, **fast)] if others else [pruning]


class Execution:
    """A network trained on its data in one way, a number of steps at a time."""

    def __init__(self, network, recipe, dataset, device, batch_size, fused, precision="fp32", loader=None):
        self.network, self.device, self.precision = network.to(device), device, precision
        self.network.fused = fused
        normalisation = data.Normalisation(recipe.mean, recipe.std, device)
        generator = torch.Generator().manual_seed(0)
        self.batches = loader or data.TrainingBatches(
            dataset.train.to(device), batch_size, recipe.augmentation, normalisation, generator, fused=fused
        )
        self.test_set = data.TestBatches(dataset.test.to(device), recipe.test_batch_size, normalisation)
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
    transform = transforms.Compose(
        [
            transforms.ToPILImage(),
            transforms.RandomAffine(degrees=30, translate=(0.15, 0.15), scale=(0.85, 1.11)),
            transforms.ToTensor(),
            transforms.Normalize(MNIST.mean, MNIST.std),
        ]
    )

    class Transformed(TensorDataset):
        def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
            image, label = super().__getitem__(index)
            return transform(image), label

    images = Transformed(dataset.train.images, dataset.train.labels)
    return DataLoader(images, batch_size, shuffle=True, drop_last=True, num_workers=2, persistent_workers=True)


def bench_mnist(dataset: data.Dataset, device: torch.device, rounds: int) -> list[dict]:
    batch, steps = MNIST.paper.batch_size, len(dataset.train) // MNIST.paper.batch_size

    def execution(step_mode: str, fused: bool, precision: str = "fp32", loader: DataLoader | None = None) -> Execution:
        torch.manual_seed(0)
        return Execution(MnistNet(8, step_mode), MNIST, dataset, device, batch, fused, precision, loader)

    plain = "step by step, eager; torchvision's transforms in workers"
    executions = {
        plain: execution("s", False, loader=torchvision_loader(dataset, batch)),
        "step by step, eager; data in memory": execution("s", False),
        "layer by layer, eager; data in memory": execution("m", False),
        "layer by layer, fused (--compile)": execution("m", True),
        "the same, bf16 products": execution("m", True, "bf16"),
    }
    if device.type == "cuda":
        executions["the same, tf32 products"] = execution("m", True, "tf32")
    x, w, g = (torch.randn(*shape, device=device) for shape in ((batch, 784), (800, 784), (batch, 800)))

    def products(n: int) -> None:
        for _ in range(n):
            x @ w.t()
            g.t() @ x

    share = {name: 30 if "eager" in name else steps for name in executions}
    functions = {name: lambda e=e, n=share[name]: e.train(n) for name, e in executions.items()}
    functions["its two products with the 784x800 matrix alone"] = lambda: products(steps)
    seconds = in_turns(functions, rounds, device)
    epoch = {name: median(s) * steps / share.get(name, steps) for name, s in seconds.items()}
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
    seconds = {name: median(s) for name, s in in_turns(functions, rounds, device).items()}
    rows = [(name, f"{seconds[name]:.3f}", f"{seconds[f'{name}, firing rates recorded']:.3f}") for name in executions]
    head = ("MNIST test set, 10 000 images", "s", "s with firing rates")
    return [*tables, table(f"MNIST evaluation ({rounds} rounds, medians)", head, rows)]


def bench_profile(dataset: data.Dataset, device: torch.device) -> list[dict]:
    """Where the time of a fused MNIST training step goes: its parts, one after the other."""
    execution = Execution(MnistNet(8), MNIST, dataset, device, MNIST.paper.batch_size, fused=True)
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
    total = sum(median(seconds) for seconds in parts.values())
    rows = [
        (name, f"{median(seconds) * 1e3:.3f}", f"{100 * median(seconds) / total:.0f} %")
        for name, seconds in parts.items()
    ]
    return [table("Where a fused MNIST training step goes (medians)", ("part", "ms", "share"), rows)]


def bench_scaling(dataset: data.Dataset, device: torch.device, rounds: int) -> list[dict]:
    """Seconds per training step of the fused execution, over T and over the batch size."""
    tables = []
    for what, values in (("T", (2, 4, 8, 16, 32)), ("batch size", (1, 4, 16, 64, 128, 256))):
        executions = {}
        for value in values:
            T, batch = (value, 128) if what == "T" else (8, value)
            executions[str(value)] = Execution(MnistNet(T), MNIST, dataset, device, batch, fused=True)
        seconds = in_turns({name: lambda e=e: e.train(50) for name, e in executions.items()}, rounds, device)
        rows = [(name, f"{median(s) / 50 * 1e3:.3f}") for name, s in seconds.items()]
        tables.append(table(f"MNIST, fused training step over {what}", (what, "ms"), rows))
    return tables


# -- optimizers --------------------------------------------------------------------------------------


def bench_optimizers(device: torch.device, rounds: int) -> list[dict]:
    tables = []
    for what, shapes in (
        ("MnistNet's 0.6 M weights", [(800, 784), (10, 800)]),
        ("36.7 M weights in one tensor", [(36_700_000,)]),
    ):

        def made(cls, shapes=shapes, dormant=0.0, **settings):
            params = [nn.Parameter(torch.randn(shape, device=device) * 0.03) for shape in shapes]
            for p in params:
                p.grad = torch.randn_like(p)
            optimizer = cls(params, **settings)
            optimizer.step()
            with torch.no_grad():
                for p in params:
                    p.mul_(torch.rand_like(p) >= dormant)
            return optimizer

        grad, deep = dict(alpha=1e-3, s=0.95), dict(l1=1e-3, max_s=0.9, T=1e-3)
        pruned = dict(deep, dormant=0.9)
        optimizers = {
            "Adam, fused": made(Adam, fused=True),
            "Adam, foreach": made(Adam, foreach=True),
            "Grad R, fused": made(GradRewiring, fused=True, **grad),
            "Grad R, foreach": made(GradRewiring, foreach=True, **grad),
            "Grad R, one tensor at a time": made(GradRewiring, foreach=False, **grad),
            "Deep R, one tensor at a time": made(DeepRewiring, foreach=False, **deep),
            "soft Deep R, one tensor at a time": made(DeepRewiring, foreach=False, soft=True, **deep),
            "Deep R, few dormant, fused": made(DeepRewiring, fused=True, **deep),
            "Deep R, 90 % dormant, fused": made(DeepRewiring, fused=True, **pruned),
            "Deep R, 90 % dormant, temperature 0, fused": made(DeepRewiring, fused=True, **{**pruned, "T": 0.0}),
            "soft Deep R, fused": made(DeepRewiring, fused=True, soft=True, **deep),
            "soft Deep R, temperature 0, fused": made(DeepRewiring, fused=True, soft=True, **{**deep, "T": 0.0}),
        }
        repeats = 1 if "36" in what else 20

        def steps(optimizer, repeats=repeats):
            for _ in range(repeats):
                optimizer.step()

        turns = {name: lambda o=o: steps(o) for name, o in optimizers.items()}
        # the fused ones by themselves: what the others allocate and free would disturb them
        close = {name: turns.pop(name) for name in optimizers if name.endswith("fused")}
        seconds = in_turns(close, rounds * 6, device, 4) | in_turns(turns, rounds, device)
        base = median(seconds["Adam, fused"])
        rows = []
        for name, optimizer in optimizers.items():
            parameter = next(iter(optimizer.state))
            state = sum(t.nbytes for t in optimizer.state[parameter].values() if t.dim()) / parameter.numel()
            value = median(seconds[name])
            rows.append((name, f"{value / repeats * 1e3:.3f}", f"{value / base:.2f}", f"{state:.0f}"))
        head = (what, "ms", "x fused Adam", "bytes of state per weight")
        tables.append(
            table(
                f"One optimizer step ({rounds * 6} rounds of the fused ones, {rounds} of the others, medians)",
                head,
                rows,
            )
        )
    return tables


# -- equality ----------------------------------------------------------------------------------------


def bench_equality(dataset: data.Dataset, device: torch.device) -> list[dict]:
    """300 identical steps, eager and fused, and the sparsity after one epoch in both; learning rate 1e-3."""
    losses, sparsity = {}, {}
    for name, fused in (("eager fp32, step by step", False), ("fused fp32", True)):
        torch.manual_seed(2020)
        network = MnistNet(8, "m" if fused else "s")
        execution = Execution(network, MNIST, dataset, device, MNIST.paper.batch_size, fused)
        for group in execution.step.optimizers[0].param_groups:
            group["lr"] = 1e-3
        losses[name] = []
        for images, labels in execution.batches:
            loss, _ = execution.step(images, labels)
            losses[name].append(float(loss))
        masks = {k: measuring.connected(w) for k, w in measuring.prunable(network).items()}
        sparsity[name] = measuring.total(measuring.count(masks)).sparsity
    rows = []
    for step in (0, 1, 2, 5, 10, 20, 50, 100, 150, 200, 250, 299):
        if step < min(map(len, losses.values())):
            rows.append((str(step), *(f"{values[step]:.6f}" for values in losses.values())))
    rows.append(("mean of the first 300", *(f"{statistics.mean(values[:300]):.6f}" for values in losses.values())))
    rows.append(("sparsity after the epoch", *(f"{100 * value:.2f} %" for value in sparsity.values())))
    return [table("MNIST, loss over identical steps", ("step", *losses), rows)]


# -- CIFAR-10 ----------------------------------------------------------------------------------------


def bench_cifar10(device: torch.device, rounds: int, batch: int) -> list[dict]:
    """Training steps on noise; an epoch is 3125 steps of 16."""
    generator = torch.Generator().manual_seed(0)
    n = max(64, 4 * batch)
    images = torch.randint(0, 256, (n, 3, 32, 32), generator=generator, dtype=torch.uint8)
    split = data.Split(images, torch.randint(0, 10, (n,), generator=generator))
    dataset = data.Dataset(split, split)
    kinds = [("step by step, eager, fp32", "s", False, "fp32"), ("layer by layer, eager, fp32", "m", False, "fp32")]
    if device.type == "cuda":
        kinds += [(f"layer by layer, CUDA graph, {p}", "m", True, p) for p in ("fp32", "tf32", "bf16")]
    rows, base, steps = [], None, 100 if device.type == "cuda" else 1
    for name, step_mode, fused, precision in kinds:
        torch.manual_seed(0)
        execution = Execution(Cifar10Net(8, step_mode), C10, dataset, device, batch, fused, precision)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            execution.train(10)
        seconds = in_turns({"step": lambda e=execution: e.train(steps)}, rounds, device, int(device.type == "cuda"))
        value = median(seconds["step"]) / steps
        base = base or value
        memory = f"{torch.cuda.max_memory_allocated() / 2**30:.1f}" if device.type == "cuda" else "-"
        test = median(in_turns({"test": execution.test}, 1, device)["test"]) / n if device.type == "cuda" else None
        rows.append(
            (
                name,
                f"{value * 1e3:.1f}",
                f"{value * 50_000 / batch:,.1f}",
                f"{base / value:.1f}",
                f"{81.4e9 * batch / value / 1e12:.2f}",
                memory,
                "-" if test is None else f"{test * 10_000:.2f}",
            )
        )
        del execution
    head = (f"CIFAR-10, Grad R, batch {batch}, T 8", "ms/step", "s/epoch", "speed-up", "TFLOP/s", "GiB", "s/test set")
    return [table(f"CIFAR-10 training ({rounds} rounds of {steps} steps, medians)", head, rows)]


def ceiling(device: torch.device) -> list[dict]:
    rows = []
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        a = torch.randn(2048, 2048, device=device).to(dtype)
        seconds = min(in_turns({"": lambda a=a: a @ a}, 7, device)[""])
        rows.append((f"2048x2048 product, {name}", f"{2 * 2048**3 / seconds / 1e9:.0f}"))
    return [table("What this machine reaches (best of 7)", ("", "GFLOP/s"), rows)]


@command
def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--dataset-dir", type=folder_path, help="folder with MNIST/raw (default: noise of MNIST's size)"
    )
    parser.add_argument(
        "--rounds", type=whole_number(1), default=5, help="how often each is measured (default: %(default)s)"
    )
    parser.add_argument("--json", type=file_path, help="also write the tables to this file")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=("mnist", "scaling", "optimizers", "equality", "c10"),
        default=("mnist", "scaling", "optimizers", "equality", "c10"),
        help="what to measure (default: all)",
    )
    arguments = parser.parse_args(argv)
    if arguments.json:
        check_output("--json", arguments.json, parents=True)  # before the minutes that it takes
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    hardware = torch.cuda.get_device_name() if device.type == "cuda" else processor()
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "torchvision", "spikingjelly"))
    print(f"{date.today()}, {hardware}, {torch.get_num_threads()} CPU threads, {platform.python_version()}, {versions}")
    if device.type == "cpu" and spiking_kernels.unavailable():
        print(f"No fused kernels ({spiking_kernels.unavailable()}): the fused rows are those of the plain layers.")
    dataset = mnist_images(arguments.dataset_dir)
    tables = ceiling(device)
    if "mnist" in arguments.only:
        tables += bench_mnist(dataset, device, arguments.rounds)
        tables += bench_profile(dataset, device)
    if "scaling" in arguments.only:
        tables += bench_scaling(dataset, device, arguments.rounds)
    if "optimizers" in arguments.only:
        tables += bench_optimizers(device, arguments.rounds)
    if "equality" in arguments.only:
        tables += bench_equality(dataset, device)
    if "c10" in arguments.only:
        on_gpu = device.type == "cuda"
        tables += bench_cifar10(device, arguments.rounds if on_gpu else 1, batch=16 if on_gpu else 4)
    if arguments.json:
        head = {"date": str(date.today()), "hardware": hardware, "versions": versions}
        with output_file("--json", arguments.json) as temporary:
            temporary.write_text(json.dumps({**head, "tables": tables}, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
