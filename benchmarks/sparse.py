"""Measures event-driven evaluation beside the dense one: python -m benchmarks.sparse.

The networks of the sparsity table have random weights, pruned at random, every layer to the same sparsity, and
scaled so that hidden neurons spike about as often as trained ones. Runs given on the command line are measured
beside them. All executions of a row run in turns in one process.
"""

import argparse
import copy
import sys
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import measuring
import spiking_kernels
from analysis.experiments import EXPERIMENTS
from analysis.export import load_pruned
from analysis.packages import imported
from analysis.sparse import BLOCK, event_driven
from benchmarks.tables import Tables, in_turns, mnist_images, parser, run, table
from mnist.model import MnistNet
from training.command_line import command, file_path

MNIST = EXPERIMENTS["mnist"]
SPARSITIES = (0.0, 0.75, 0.9, 0.95, 0.99)
GAIN = 2.4  # of the initial weights; as many hidden neurons spike then as in a trained network
CPU = torch.device("cpu")


def prune(weight: Tensor, sparsity: float, generator: torch.Generator) -> Tensor:
    """Prunes at random, to this sparsity exactly, and scales so that sums over inputs keep their spread."""
    pruned = weight.flatten().clone()
    order = torch.randperm(len(pruned), generator=generator)
    pruned[order[: round(sparsity * len(pruned))]] = 0
    return pruned.view_as(weight) / (1 - sparsity) ** 0.5


@torch.no_grad()
def random_network(sparsity: float) -> MnistNet:
    torch.manual_seed(0)
    network, generator = MnistNet(8), torch.Generator().manual_seed(0)
    for weight in measuring.prunable(network).values():
        weight.copy_(GAIN * prune(weight, sparsity, generator))
    return network.eval().requires_grad_(False)


def compact(network: MnistNet) -> Callable[[Tensor], Tensor]:
    """The fused dense evaluation of a smaller network: without the hidden neurons that lead to no output."""
    first, second = network.static_fc[1].weight, network.fc[1].weight
    leads_on = measuring.connected(second).any(0)
    first, second, T = first[leads_on].contiguous(), second[:, leads_on].contiguous(), network.T
    return lambda images: spiking_kernels.lif_linear_lif(images.flatten(1) @ first.t(), second, T)


def executions(network: MnistNet) -> dict[str, Callable[[Tensor], Tensor]]:
    plain, sparse = event_driven(network), event_driven(network)
    plain.fused = False
    made = {"dense, layers": network, "sparse, SciPy alone": plain}
    if not spiking_kernels.unavailable():
        fused = copy.deepcopy(network)
        fused.fused = True
        made |= {"dense, fused": fused, "dense, fused, compacted": compact(network)}
    return made | {"sparse": sparse}


def bench_networks(networks: dict[str, MnistNet], images: Tensor, rounds: int) -> Tables:
    """Images per second on the whole test set and one image at a time, and whether the spikes are the same."""
    batches, single = images.split(MNIST.test_batch_size), images[:100].split(1)
    rows, latencies = [], []
    for name, network in networks.items():
        made = executions(network)
        dense = torch.cat([network(batch) for batch in batches])
        with measuring.SpikeCounter(network) as spikes:
            network(batches[0])
        differing = int((torch.cat([made["sparse"](batch) for batch in batches]) != dense).sum())
        sparsity = f"{100 * measuring.total(measuring.count(measuring.masks(network))).sparsity:.2f} %"
        whole, one = (
            in_turns({key: lambda f=f, p=parts: [f(part) for part in p] for key, f in made.items()}, rounds, CPU)
            for parts in (batches, single)
        )
        best = min(value for key, value in whole.items() if key.startswith("dense"))
        about = (name, sparsity, f"{float(spikes.rates()['fc.0'].mean()):.3f}")
        speeds = [f"{len(images) / value:,.0f}" for value in whole.values()]
        rows.append((*about, *speeds, f"{best / whole['sparse']:.2f}", f"{differing} of {dense.numel()}"))
        latencies.append((name, sparsity, *(f"{value / len(single) * 1e3:.3f}" for value in one.values())))
    head = ("network", "sparsity", "hidden firing rate", *made, "sparse / best dense", "counts that differ")
    yield table(f"MNIST, images per second, batches of {len(batches[0])} ({rounds} rounds, medians)", head, rows)
    yield table(f"MNIST, ms for one image at a time ({rounds} rounds, medians)", (*head[:2], *made), latencies)


def over_sparsities(title: str, made: Callable[[float], dict[str, Callable]], rounds: int) -> Tables:
    """The table of the milliseconds that the functions ``made(sparsity)`` take."""
    rows = []
    for sparsity in SPARSITIES:
        seconds = in_turns(made(sparsity), rounds, CPU)
        rows.append((f"{100 * sparsity:.0f} %", *(f"{value * 1e3:.2f}" for value in seconds.values())))
    yield table(f"{title}, ms ({rounds} rounds, medians)", ("sparsity", *seconds), rows)


def bench_products(images: Tensor, rounds: int) -> Tables:
    """The libraries: the product of the first layer, [H, 784] with as many images as the sparse evaluation takes."""
    from scipy.sparse import csr_matrix

    x = images[:BLOCK].flatten(1).contiguous()

    def made(sparsity: float) -> dict[str, Callable]:
        weight = random_network(sparsity).static_fc[1].weight.detach()
        with warnings.catch_warnings(action="ignore"):  # sparse CSR tensors are in beta
            torch_csr = weight.to_sparse_csr()
        scipy_csr = csr_matrix(weight.numpy())
        return {
            "dense": lambda: x @ weight.t(),
            "torch.sparse CSR": lambda: torch_csr @ x.t().contiguous(),
            "SciPy CSR": lambda: scipy_csr @ x.t().contiguous().numpy(),
        }

    return over_sparsities(f"The first layer for {BLOCK} images", made, 5 * rounds)


def bench_convolution(rounds: int) -> Tables:
    """Why Cifar10Net has no sparse evaluation: one of its convolutions, dense and as gathering and CSR product."""
    from scipy.sparse import csr_matrix

    torch.manual_seed(0)
    spikes = (torch.rand(8, 256, 16, 16) < 0.1).float()
    convolution, generator = nn.Conv2d(256, 256, 3, padding=1, bias=False), torch.Generator().manual_seed(0)

    def gather() -> list[Tensor]:
        return [F.unfold(image[None], 3, padding=1)[0] for image in spikes]  # [256 x 9, 256] each

    def made(sparsity: float) -> dict[str, Callable]:
        weight = prune(convolution.weight.detach(), sparsity, generator)
        csr = csr_matrix(weight.flatten(1).numpy())
        return {
            "dense": lambda: F.conv2d(spikes, weight, padding=1),
            "sparse": lambda: [csr @ inputs.numpy() for inputs in gather()],
            "of which gathering": gather,
        }

    return over_sparsities("Convolution 256 to 256, 16x16, 8 images, one time step", made, 3 * rounds)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    made = parser("sparse", __doc__, rounds=7)
    text = "an MNIST run or an export of one, to measure too"
    made.add_argument("runs", nargs="*", type=file_path, metavar="RUN", help=text)
    return made.parse_args(argv)


@command
@torch.no_grad()
def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    imported("scipy.sparse", "this benchmark")

    def measure() -> Tables:
        images = MNIST.datasets[0].normalisation(CPU)(mnist_images(options.dataset_dir).test.images)
        networks = {f"random, {100 * s:.0f} %": random_network(s) for s in SPARSITIES}
        networks |= {path.name: load_pruned(path) for path in options.runs}
        yield from bench_networks(networks, images, options.rounds)
        yield from bench_products(images, options.rounds)
        yield from bench_convolution(options.rounds)

    return run(options, CPU, ("torch", "scipy", "spikingjelly"), measure)


if __name__ == "__main__":
    sys.exit(main())
