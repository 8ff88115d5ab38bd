"""What the optimizers' tests share."""

import json

import numpy as np
import pytest
import torch

import spiking_kernels
from deeprewire import DeepRewiring
from gradrewire import GradRewiring

# one optimizer per branch of the arithmetic
VARIANTS = {
    "grad": (GradRewiring, dict(alpha=0.1, s=0.9)),
    "grad without prior": (GradRewiring, dict(alpha=0.0)),
    "deep": (DeepRewiring, dict(l1=0.01, max_s=0.2, T=0.02)),
    "deep without noise": (DeepRewiring, dict(l1=0.01, max_s=0.2)),
    "deep without bound": (DeepRewiring, dict(l1=0.01, max_s=1.0)),
    "soft deep": (DeepRewiring, dict(l1=0.01, max_s=0.6, T=0.02, soft=True)),
    "soft deep without penalty": (DeepRewiring, dict(l1=0.0, max_s=0.6, T=0.02, soft=True)),
}
# the ways to update, as settings; the fused one on the CPU by a kernel
PATHS = [
    pytest.param(dict(foreach=False), id="one tensor at a time"),
    pytest.param(dict(foreach=True), id="foreach"),
    pytest.param(
        dict(fused=True),
        id="fused",
        marks=pytest.mark.skipif(spiking_kernels.available() is not None, reason="no fused kernels"),
    ),
]
SHAPES = [(30, 20), (6, 3, 3, 3), (1,), (7,)]


def parameters(seed=0, dtype=torch.float32, shapes=SHAPES, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.nn.Parameter((torch.randn(s, generator=generator, dtype=torch.float64) * 0.1).to(device, dtype))
        for s in shapes
    ]


def train(optimizer, params, steps=30, seed=1):
    """Takes steps on gradients of fixed noise; the default generator is seeded for what the optimizer draws."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.device, p.dtype)
        optimizer.step()


def golden_errors(file, **path):
    """Replays a golden trajectory; returns the worst relative error and the number of differing zeros."""
    facts = dict(file)
    settings = json.loads(str(facts["hyper"]))
    optimizer_class = {"GradRewiring": GradRewiring, "DeepRewiring": DeepRewiring}[settings.pop("cls")]
    settings["betas"] = tuple(settings.get("betas", (0.9, 0.999)))
    params = [torch.nn.Parameter(torch.tensor(facts[f"p{i}_init"])) for i in range(2)]
    optimizer = optimizer_class(params, **path, **settings)
    pairs = []
    for t in range(len(facts["g0"])):
        for i, p in enumerate(params):
            p.grad = torch.tensor(facts[f"g{i}"][t])
        optimizer.step()
        pairs += [
            (p.detach().numpy().copy(), facts[f"p{i}_step{t + 1}"])
            for i, p in enumerate(params)
            if f"p{i}_step{t + 1}" in facts
        ]
    pairs += [
        (optimizer.state[p][key].numpy(), facts[f"{key}{i}_step40"])
        for i, p in enumerate(params)
        for key in ("theta", "exp_avg", "exp_avg_sq")
        if f"{key}{i}_step40" in facts
    ]
    assert len(pairs) >= 8  # the file was understood
    worst = max(float(np.max(np.abs(a - b) / np.maximum(np.abs(b), 1e-30))) for a, b in pairs)
    zeros = sum(int(((a == 0) != (b == 0)).sum()) for a, b in pairs)
    return worst, zeros
