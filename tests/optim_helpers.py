"""What the optimizers' tests share."""

import json
import math

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
        marks=pytest.mark.skipif(spiking_kernels.unavailable() is not None, reason="no fused kernels"),
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


# Bound for golden trajectories on any processor, as a share of a tensor's greatest value: its weights, and what is
# added to them, carry rounding of that scale, so that relative to a weight near 0 no bound holds.
TRAJECTORY_BOUND = 2e-6


def golden_errors(file, dtype=torch.float32, wrong=None, **path):
    """Replays a golden trajectory, with the settings that ``wrong`` changes, if any.

    Returns the greatest difference, as a share of the greatest value of its tensor, and the number of zeros in other
    places, but for weights below the bound.
    """
    facts = dict(file)
    settings = json.loads(str(facts["hyper"]))
    optimizer_class = {"GradRewiring": GradRewiring, "DeepRewiring": DeepRewiring}[settings.pop("cls")]
    settings.update(wrong(settings) if wrong else {})
    settings["betas"] = tuple(settings.get("betas", (0.9, 0.999)))
    params = [torch.nn.Parameter(torch.tensor(facts[f"p{i}_init"], dtype=dtype)) for i in range(2)]
    optimizer = optimizer_class(params, **path, **settings)
    pairs = []
    for t in range(len(facts["g0"])):
        for i, p in enumerate(params):
            p.grad = torch.tensor(facts[f"g{i}"][t], dtype=dtype)
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
    worst, zeros = 0.0, 0
    for actual, expected in pairs:
        scale = np.abs(expected).max()
        differences = np.abs(actual - expected)
        relative = differences.max() / scale if scale else (math.inf if differences.any() else 0.0)
        worst = np.maximum(worst, relative)  # unlike max, it keeps a NaN
        elsewhere = (actual == 0) != (expected == 0)
        zeros += int((elsewhere & (differences > TRAJECTORY_BOUND * scale)).sum())
    return worst, zeros


# the same trajectory of a wrong optimizer is off by far: settings that are changed, given the right ones
WRONG = {
    "second moment decays faster": lambda settings: dict(betas=(settings.get("betas", [0.9])[0], 0.98)),
    "learning rate 1 % greater": lambda settings: dict(lr=1.01 * settings["lr"]),
    "other denominator": lambda settings: dict(amsgrad=not settings.get("amsgrad", False)),
}


def assert_a_wrong_trajectory_is_told(file, wrong):
    """By at least 100 times the bound."""
    assert golden_errors(file, wrong=wrong)[0] > 100 * TRAJECTORY_BOUND
