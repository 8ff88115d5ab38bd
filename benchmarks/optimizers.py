"""One step of the optimizers, beside Adam's."""

import torch
from torch import nn
from torch.optim import Adam

from benchmarks.tables import Tables, in_turns, table
from deeprewire import DeepRewiring
from gradrewire import GradRewiring

GRAD, DEEP = dict(alpha=1e-3, s=0.95), dict(l1=1e-3, max_s=0.9, T=1e-3)
COLD = {**DEEP, "T": 0.0}
SHAPES = {  # and how many steps are timed together
    "MnistNet's 0.6 M weights": ([(800, 784), (10, 800)], 20),
    "36.7 M weights in one tensor": ([(36_700_000,)], 1),
}
# Class, share of the weights that are pruned before, settings.
OPTIMIZERS = {
    "Adam, fused": (Adam, 0.0, dict(fused=True)),
    "Adam, foreach": (Adam, 0.0, dict(foreach=True)),
    "Grad R, fused": (GradRewiring, 0.0, dict(fused=True, **GRAD)),
    "Grad R, foreach": (GradRewiring, 0.0, dict(foreach=True, **GRAD)),
    "Grad R, one tensor at a time": (GradRewiring, 0.0, dict(foreach=False, **GRAD)),
    "Deep R, one tensor at a time": (DeepRewiring, 0.0, dict(foreach=False, **DEEP)),
    "soft Deep R, one tensor at a time": (DeepRewiring, 0.0, dict(foreach=False, soft=True, **DEEP)),
    "Deep R, few dormant, fused": (DeepRewiring, 0.0, dict(fused=True, **DEEP)),
    "Deep R, 90 % dormant, fused": (DeepRewiring, 0.9, dict(fused=True, **DEEP)),
    "Deep R, 90 % dormant, temperature 0, fused": (DeepRewiring, 0.9, dict(fused=True, **COLD)),
    "soft Deep R, fused": (DeepRewiring, 0.0, dict(fused=True, soft=True, **DEEP)),
    "soft Deep R, temperature 0, fused": (DeepRewiring, 0.0, dict(fused=True, soft=True, **COLD)),
}


def made(kind, dormant: float, settings: dict, shapes: list[tuple[int, ...]], device: torch.device):
    """An optimizer after its first step, with gradients, and with this share of its weights pruned."""
    params = [nn.Parameter(torch.randn(shape, device=device) * 0.03) for shape in shapes]
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer = kind(params, **settings)
    optimizer.step()
    with torch.no_grad():
        for p in params:
            p.mul_(torch.rand_like(p) >= dormant)
    return optimizer


def bench_optimizers(device: torch.device, rounds: int, sizes=SHAPES, names=frozenset(OPTIMIZERS)) -> Tables:
    for what, (shapes, repeats) in sizes.items():
        optimizers = {name: made(*chosen, shapes, device) for name, chosen in OPTIMIZERS.items() if name in names}

        def steps(optimizer, repeats=repeats):
            for _ in range(repeats):
                optimizer.step()

        turns = {name: lambda o=o: steps(o) for name, o in optimizers.items()}
        # the fused ones by themselves: what the others allocate and free would disturb them
        close = {name: turns.pop(name) for name in optimizers if name.endswith("fused")}
        seconds = in_turns(close, rounds * 6, device, 4) | in_turns(turns, rounds, device)
        rows = []
        for name, optimizer in optimizers.items():
            parameter = next(iter(optimizer.state))
            state = sum(t.nbytes for t in optimizer.state[parameter].values() if t.dim()) / parameter.numel()
            relative = seconds[name] / seconds["Adam, fused"]
            rows.append((name, f"{seconds[name] / repeats * 1e3:.3f}", f"{relative:.2f}", f"{state:.0f}"))
        head = (what, "ms", "x fused Adam", "bytes of state per weight")
        title = f"One optimizer step ({rounds * 6} rounds of the fused ones, {rounds} of the others, medians)"
        yield table(title, head, rows)
