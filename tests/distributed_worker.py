"""One of two processes that train together: python distributed_worker.py RANK FOLDER CASE…

It runs the cases, and saves what each returns, or the error it ended with, in the folder. The same trainings can be run
by one process, on whole batches.
"""

import contextlib
import copy
import functools
import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import rewiring
import sharding
from deeprewire import DeepRewiring
from gradrewire import ConnectivitySchedule, GradRewiring

STEPS, SAMPLES, RANKS = 50, 8, 2
SECONDS = 300  # after which a rank that waits for another one gives up


class Mlp(nn.Sequential):
    """Gradients are rounded, in float64. The rows of some weights are an odd number, one has a single row."""

    def __init__(self):
        torch.manual_seed(0)
        layers = nn.Linear(7, 11), nn.Tanh(), nn.Linear(11, 4), nn.Tanh(), nn.Linear(4, 1)
        super().__init__(*(layer.double() for layer in layers))

    def loss(self, x, y):
        return (self(x) - y).square().mean()


class Exact(nn.Module):
    """Float32 gradients without any rounding: the mean of small fractions, however it is computed."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(11, 7) * 0.1)
        self.bias = nn.Parameter(torch.randn(7) * 0.1)

    def forward(self, x):
        x = (x * 64).round().clamp(-64, 64).float() / 64
        return x @ self.weight.t().sum(1) + x @ self.bias + x[:, 0] * self.weight[3, 2]

    def loss(self, x, y):
        return self(x).mean()


METHODS = {
    "grad": (GradRewiring, dict(alpha=0.1, s=0.9)),
    "deep": (DeepRewiring, dict(T=0.02, l1=0.01, max_s=0.4)),
    "soft deep": (DeepRewiring, dict(T=0.02, l1=0.01, max_s=0.5, soft=True)),
    "schedule": (GradRewiring, dict(alpha=0.0)),
}
PATHS = {"plain": dict(foreach=False), "foreach": dict(foreach=True), "fused": dict(fused=True)}


def optimizer_of(network, method, seed=0, **settings):
    """Weights are pruned, biases are not."""
    kind, own = METHODS[method]
    if kind is DeepRewiring and seed is not None:
        settings["generator"] = torch.Generator().manual_seed(seed)
    groups = [
        {"params": [p for p in network.parameters() if p.dim() > 1]},
        {"params": [p for p in network.parameters() if p.dim() == 1], "prune": False},
    ]
    return kind(groups, lr=0.01, **own, **settings)


def distributed(network, kind):
    """The network for a rank, and the one whose weights are trained."""
    if kind == "ddp":
        whole = copy.deepcopy(network)
        for p in whole.parameters():
            p.data += dist.get_rank()  # DistributedDataParallel takes those of rank 0
        return nn.parallel.DistributedDataParallel(whole)
    if kind == "fsdp":
        from torch.distributed.fsdp import fully_shard

        for layer in network.children():
            if list(layer.parameters()):
                fully_shard(layer)
        return fully_shard(network)
    return network


def whole(tensor):
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def weights_of(network):
    return [whole(p) for p in network.parameters()]


def resumed(network, method, path, optimizer):
    """Another optimizer with the state of one; its generator has another seed."""
    other = optimizer_of(network, method, seed=9, **PATHS[path])
    if not sharding.is_sharded(next(network.parameters())):
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        return other
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    saved = copy.deepcopy(get_optimizer_state_dict(network, optimizer))
    set_optimizer_state_dict(network, other, saved)
    return other


def training(kind, method, path="plain", feature=None, seed=0, steps=STEPS, exact=False):
    """The weights after some steps, each on 8 samples, of which a rank has its share.

    Args:
        kind: "one" process, or a rank of "ddp" or "fsdp".
        feature: "accumulation" of gradients, gradient "scaler", "compile" or "checkpoint".
        seed: of the optimizer's generator; None without one.
        exact: train the network whose gradients are exact; with the path "fused", it is trained in any case.
    """
    ranks, rank = (1, 0) if kind == "one" else (RANKS, dist.get_rank())
    network = Exact() if exact or path == "fused" else Mlp()
    trained, loss_of = distributed(network, kind), type(network).loss
    optimizer = optimizer_of(trained, method, seed, **PATHS[path])
    schedule = ConnectivitySchedule(optimizer, 0.25, STEPS, segments=10) if method == "schedule" else None
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10) if feature == "scaler" else None
    parts = 2 if feature == "accumulation" else 1

    def step(x, y):
        optimizer.zero_grad()
        for number, (some, wanted) in enumerate(zip(x.chunk(parts), y.chunk(parts), strict=True)):
            last = number == parts - 1  # only then, the ranks' gradients come together
            if kind == "fsdp":
                trained.set_requires_gradient_sync(last)
            with contextlib.nullcontext() if last or kind != "ddp" else trained.no_sync():
                loss = loss_of(trained, some[rank::ranks], wanted[rank::ranks]) / parts
                (scaler.scale(loss) if scaler else loss).backward()
        if not scaler:
            optimizer.step()

    if feature == "compile":
        step = torch.compile(step, backend="eager")
    torch.manual_seed(5)
    data = torch.Generator().manual_seed(1)
    for number in range(steps):
        x = torch.randn(SAMPLES, 7, generator=data, dtype=torch.float64)
        step(x, x[:, :1] - x[:, 2:3])
        if scaler:
            if number % 10 == 3 and (kind != "fsdp" or rank == 0):  # in the part of one rank
                sharding.local(optimizer.param_groups[0]["params"][0].grad)[0] = float("inf")
            scaler.step(optimizer)
            scaler.update()
        if schedule:
            schedule.step()
        torch.rand(rank + 1)  # each rank draws other numbers
        if feature == "checkpoint" and number == steps // 2:
            optimizer = resumed(trained, method, path, optimizer)
    return weights_of(trained)


# -- what the first step compares, and what is refused ---------------------------------------------


def steps_of(method="deep", weights=0, seed=0, default_seed=0, check=True, shape=(6, 5), before=None, **settings):
    """The weights after two steps on gradients that are the same on all ranks."""
    torch.manual_seed(weights)
    p = nn.Parameter(torch.randn(shape))
    optimizer = optimizer_of(nn.ParameterList([p]), method, seed, **settings)
    optimizer.check_ranks = check
    torch.manual_seed(default_seed)
    if before:
        before(optimizer, p)
    for gradient in (-0.5, 0.5):
        p.grad = torch.full_like(p, gradient)
        optimizer.step()
    return [p.detach()]


def step_without_check(optimizer, p):
    """One that changes no weight, but begins the state."""
    p.grad, optimizer.check_ranks = torch.zeros_like(p), False
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    optimizer.param_groups[0]["lr"], optimizer.check_ranks = 0.01, True


def later(optimizer, p):
    """Weights that differ after the first step are no longer compared."""
    p.grad = torch.zeros_like(p)
    optimizer.step()
    p.data += dist.get_rank()


def flat_parameters():
    from torch.distributed.fsdp import FullyShardedDataParallel

    network = FullyShardedDataParallel(Mlp(), use_orig_params=True, device_id=torch.device("cpu"))
    DeepRewiring(network.parameters(), max_s=0.5)


def partial_sums():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial

    p = DTensor.from_local(torch.ones(4, 3), init_device_mesh("cpu", (RANKS,)), [Partial()])
    GradRewiring([nn.Parameter(p)], alpha=0)


def by_columns(method, ranks=RANKS, mixed=False, **settings):
    """The weights after steps on a weight of which each rank has some columns; others change it halfway.

    Most of the dormant connections are in the first columns, so that a count on one rank is not that of the weight.

    Args:
        mixed: train four such weights together: each rank has columns, rows, all of a DTensor, and a plain tensor.
    """
    p = torch.linspace(-0.02, 0.05, 31 * 40).view(31, 40).t().contiguous()
    weights = [p * factor for factor in (1.0, 0.7, 1.3, 0.4)] if mixed else [p]
    if ranks > 1:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import Replicate, Shard, distribute_tensor

        mesh = init_device_mesh("cpu", (ranks,))
        sharded = zip(weights, (Shard(1), Shard(0), Replicate()), strict=False)
        weights[:3] = [distribute_tensor(weight, mesh, [placement]) for weight, placement in sharded]
    weights = nn.ParameterList(weights)
    optimizer = optimizer_of(weights, method, seed=3, **settings)
    schedule = ConnectivitySchedule(optimizer, 0.5, 8, segments=4) if method == "schedule" else None
    for number, gradient in enumerate((1.0, -0.1, 1.0, -0.1, 0.2, 1.0, 0.1, -0.1)):
        if number == 4:
            for weight in weights:
                sharding.local(weight.detach()).mul_(0.5)
            optimizer.load_parameters()
        for weight in weights:
            weight.grad = torch.full_like(weight, gradient)
        optimizer.step()
        if schedule:
            schedule.step()
    return [whole(weight) for weight in weights]


COLUMNS = {
    "columns of Deep R": ("deep", dict(amsgrad=True)),
    "columns of soft Deep R": ("soft deep", dict(maximize=True)),
    "columns of Grad R": ("grad", dict(plain_gradient=True, weight_decay=0.1)),
    "columns of a schedule": ("schedule", dict(foreach=True, amsgrad=True)),
    "mixed weights of Deep R": ("deep", dict(mixed=True)),
    "mixed weights of Deep R, foreach": ("deep", dict(mixed=True, foreach=True)),
    "mixed weights of a schedule": ("schedule", dict(mixed=True)),
}


def cases(rank):
    """What each rank does, by name."""
    return {
        "the same": lambda: steps_of(),
        "other weights": lambda: steps_of(weights=rank),
        "other weights of Grad R": lambda: steps_of("grad", weights=rank),
        "other weights on purpose": lambda: steps_of(weights=rank, check=False),
        "other networks": lambda: steps_of(shape=(3 + rank, 2)),
        "other seeds": lambda: steps_of(seed=rank),
        "other default seeds": lambda: steps_of(seed=None, default_seed=rank),
        "the same default seeds": lambda: steps_of(seed=None),
        "other default seeds that nobody draws from": lambda: steps_of("grad", default_seed=rank),
        "a state on one rank": lambda: steps_of("grad", before=step_without_check if rank == 0 else None),
        "other settings": lambda: steps_of(weight_decay=0.1 * rank),
        "other ways to execute": lambda: steps_of("grad", foreach=rank == 1),
        "only one rank": lambda: steps_of("soft deep") if rank == 0 else [],
        "later": lambda: steps_of("grad", before=later),
        "flat parameters": flat_parameters,
        "partial sums": partial_sums,
        "without a generator": lambda: training("ddp", "deep", seed=None),
        **{name: functools.partial(by_columns, method, **own) for name, (method, own) in COLUMNS.items()},
    }


def main(rank, folder, *names):
    torch.set_num_threads(1)
    rewiring._compiled = lambda update: update  # a compiler would take most of the time
    store = dist.FileStore(str(Path(folder) / "store"), RANKS)
    dist.init_process_group("gloo", store=store, rank=int(rank), world_size=RANKS, timeout=timedelta(seconds=SECONDS))
    found, known = {}, cases(int(rank))
    for name in names:
        dist.barrier()
        try:
            found[name] = known[name]() if name in known else training(*name.split(", "))
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
    os._exit(0)  # an orderly end aborts now and then, as training/ranks.py says
