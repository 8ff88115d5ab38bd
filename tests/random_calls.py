"""Calls every kernel with shapes, values and settings that hypothesis makes: python -m tests.random_calls LIBRARY.

tests/sanitize.py compiles the kernels into LIBRARY. The calls go through the functions of spiking_kernels, so that the
memory is what these allocate: exactly as much as the C code is promised.
"""

import argparse
import ctypes
import math
import os
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import spiking_kernels
from spiking_kernels import blocks, build, convolutions, neurons
from spiking_kernels.shapes import Shape

EDGES = (0, 1, 7, 8, 9, 15, 16, 17, 63, 64, 65, 511, 512, 513, 4095, 4096, 4097)
F32 = np.finfo(np.float32)
SPECIAL = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 1.0, F32.max, F32.min, F32.tiny, F32.smallest_subnormal])
seeds = st.integers(0, 2**32 - 1)
numbers = st.sampled_from([0.0, 1e-8, 1e-3, 0.5, 0.9, 0.999, 1.0]) | st.floats(width=32)


def sizes(most, least=0):
    return st.sampled_from([size for size in EDGES if least <= size <= most]) | st.integers(least, most)


def placed(values, lead):
    """A tensor of the values but the first ``lead``, which stand before it in its memory; nothing stands behind it."""
    tensor = torch.empty(len(values), dtype=torch.from_numpy(values).dtype)
    tensor.copy_(torch.from_numpy(values))
    return tensor[lead:]


@st.composite
def floats(draw, *shape):
    lead, rng = draw(st.sampled_from([0, 0, 1, 3, 16])), np.random.default_rng(draw(seeds))
    values = rng.standard_normal(lead + math.prod(shape)) * 10.0 ** draw(st.integers(-3, 3))
    special = rng.random(len(values)) < draw(st.sampled_from([0, 0, 0.1, 1]))
    values[special] = rng.choice(SPECIAL, special.sum())
    return placed(values.astype(np.float32), lead).view(shape)


@st.composite
def integers(draw, dtype, low, high, *shape):
    lead, rng = draw(st.sampled_from([0, 0, 1, 3, 16])), np.random.default_rng(draw(seeds))
    return placed(rng.integers(low, high, lead + math.prod(shape), dtype, endpoint=True), lead).view(shape)


def lif_linear_lif(data):
    long = data.draw(st.sampled_from([False] * 19 + [True]))
    T = data.draw(st.integers(255, spiking_kernels.MAX_T) if long else st.integers(1, 20) | st.integers(1, 300))
    n = data.draw(sizes(1 if long else 9))
    h, o = data.draw(sizes(9 if long else 140, 1)), data.draw(sizes(17 if long else 40, 1))
    current, weight = data.draw(floats(n, h)).requires_grad_(), data.draw(floats(o, h)).requires_grad_()
    spikes = data.draw(st.none() | integers(np.int64, -5, 5, h))
    rounding = data.draw(st.sampled_from([None, None, torch.bfloat16, torch.float16]))
    try:
        counts = spiking_kernels.lif_linear_lif(current, weight, T, spikes, rounding)
    except spiking_kernels.Unfit:
        assert not weight.to(rounding or weight.dtype).isfinite().all()
        weight = weight.detach().nan_to_num().clamp(-6e4, 6e4).requires_grad_()  # finite in every precision
        counts = spiking_kernels.lif_linear_lif(current, weight, T, spikes, rounding)
    counts.backward(data.draw(floats(n, o)))


def apart(*sizes):
    """In the place of tensors.scratch: memory of its own for each, so that nothing stands behind it."""
    parts = [torch.empty(size) for size in sizes]
    return parts, [part.data_ptr() for part in parts]


def lif_linear_lif_learn(data):
    T, n = data.draw(st.integers(1, 20) | st.integers(1, 300)), data.draw(sizes(9))
    h, o = data.draw(sizes(140, 1)), data.draw(sizes(70, 1))
    current = data.draw(floats(n, h)) if data.draw(st.booleans()) else data.draw(floats(h, n)).t()
    weight, labels = data.draw(floats(o, h)), data.draw(integers(np.int64, 0, o - 1, n))
    foreign = data.draw(st.sampled_from([0, -1, o, -(2**63), 2**63 - 1]))
    if foreign and n:
        labels[data.draw(st.integers(0, n - 1))] = foreign
    try:
        spiking_kernels.lif_linear_lif_learn(current, weight, labels, T)
    except spiking_kernels.Unfit:
        assert foreign or not weight.isfinite().all()


def affine_lookup(data):
    many, n, height, width = (data.draw(sizes(most)) for most in (5, 20, 40, 40))
    images = data.draw(integers(np.uint8, 0, 255, many, 1, height, width))
    if not many:
        n = min(n, 1)
    index = data.draw(integers(np.int64, 0, max(many - 1, 0), n))
    foreign = data.draw(st.sampled_from([0, -1, many, -(2**63), 2**63 - 1]))
    if foreign and n:
        index[data.draw(st.integers(0, n - 1))] = foreign
    largest = data.draw(st.sampled_from([1 << 16, 1 << 22, (1 << 31) - 1]))
    matrices = data.draw(integers(np.int32, -largest, largest, n, 6))
    try:
        spiking_kernels.affine_lookup(images, index, matrices, data.draw(floats(256)))
    except spiking_kernels.Unfit:
        assert foreign or not many


def memory_of(data, n, theta=True):
    """What both updates work on, and a gradient."""
    tensors = {name: data.draw(floats(n)) for name in ("param", "exp_avg", "exp_avg_sq")}
    tensors |= dict(max_exp_avg_sq=data.draw(st.none() | floats(n)), theta=data.draw(floats(n)) if theta else None)
    largest = data.draw(st.sampled_from([1, 1, 1, 127]))
    tensors |= dict(sign=data.draw(integers(np.int8, -largest, largest, n)), step=torch.tensor(data.draw(numbers)))
    return spiking_kernels.Memory(**tensors), data.draw(floats(n))


def settings_of(data, *names):
    chosen = {name: data.draw(numbers) for name in ("lr", "eps", "weight_decay", *names)}
    betas = (data.draw(numbers), data.draw(numbers))
    return spiking_kernels.Settings(betas=betas, maximize=data.draw(st.booleans()), amsgrad=False, **chosen)


def grad_rewiring_step(data):
    memory, grad = memory_of(data, data.draw(sizes(5000)))
    spiking_kernels.grad_rewiring_step(memory, grad, settings_of(data, "alpha", "mu"))


def deep_rewiring_step(data):
    memory, grad = memory_of(data, data.draw(sizes(9000)), data.draw(st.booleans()))
    settings = settings_of(data, "l1", "T", *data.draw(st.sampled_from([[], ["theta_min"]])))
    settings.max_s = data.draw(st.floats(0, 1) | st.floats())
    spiking_kernels.deep_rewiring_step(memory, grad, settings, seed=data.draw(st.integers(0, 2**64 - 1)))


def deep_rewiring_draws(data):
    probability = data.draw(st.sampled_from([5e-324, 1e-9, 1.0]) | st.floats(0, 1, exclude_min=True))
    spiking_kernels.deep_rewiring_draws(data.draw(sizes(9000)), data.draw(st.integers(0, 2**64 - 1)), probability)


def lif_block(data):
    T, n, c = data.draw(st.integers(1, 9) | st.integers(1, 64)), data.draw(sizes(3, 1)), data.draw(sizes(600, 1))
    pool, constant, half = (data.draw(st.booleans()) for _ in range(3))
    most = max(8, min(130, 200_000 // (T * n * c)))
    height, width = data.draw(st.permutations([data.draw(st.integers(2, 4)), data.draw(sizes(most, 2))]))
    dtype = torch.bfloat16 if half else torch.float32
    y = data.draw(floats(T * n, height, width, c)).to(dtype).permute(0, 3, 1, 2)
    counts = data.draw(st.none() | integers(np.int64, -5, 5, height, width, c))
    for norm in (None, nn.BatchNorm2d(c), nn.BatchNorm2d(c).eval()):
        shape = Shape(T, pool, constant and norm is None)
        spikes = blocks.lif_block((y[-n:] if shape.constant else y).requires_grad_(), shape, norm, counts)
        gradient = data.draw(floats(*(spikes.shape[axis] for axis in (0, 2, 3, 1))))
        spikes.backward(gradient.to(dtype).permute(0, 3, 1, 2))


def convolution(data):
    m, height, width = data.draw(sizes(9, 1)), data.draw(sizes(17, 1)), data.draw(sizes(convolutions.WIDEST, 1))
    c, o = (convolutions.GROUP * data.draw(st.integers(1, 3)) for _ in range(2))
    rng, rate = np.random.default_rng(data.draw(seeds)), data.draw(st.sampled_from([0, 0.2, 1]))
    lead = data.draw(st.sampled_from([0, 0, 1, 3, 16]))
    values = (rng.random(lead + m * height * width * c) < rate).astype(np.float32)
    foreign = data.draw(st.sampled_from([False] * 9 + [True]))
    if foreign:
        values[rng.integers(lead, len(values))] = 0.5
    spikes = placed(values, lead).view(m, height, width, c).permute(0, 3, 1, 2).requires_grad_()
    left = torch.from_numpy(rng.random((o, c, 3, 3)) < data.draw(st.sampled_from([0, 0.1, 0.2])))
    weight = data.draw(floats(o, c, 3, 3)).where(left, 0).requires_grad_()
    build.library().convolution_fast()
    try:
        y = convolutions.convolution(spikes, weight)
    except spiking_kernels.Unfit:
        assert foreign or not weight.isfinite().all()
        spikes = (spikes != 0).float().contiguous(memory_format=torch.channels_last).requires_grad_()
        y = convolutions.convolution(spikes, weight.detach().nan_to_num().requires_grad_())
    y.backward(data.draw(floats(m, height, width, o)).permute(0, 3, 1, 2))


CALLS = (
    lif_linear_lif,
    lif_linear_lif_learn,
    lif_block,
    convolution,
    affine_lookup,
    grad_rewiring_step,
    deep_rewiring_draws,
    deep_rewiring_step,
)


class Counted:
    """A library whose calls are counted, and written down before they are made."""

    def __init__(self, library, last: Path):
        self.library, self.last, self.calls = library, last, Counter()

    def __getattr__(self, name):
        def call(*arguments):
            self.calls[name] += 1
            self.last.write_text(f"call {self.calls[name]}: {name}{arguments}\n")
            return getattr(self.library, name)(*arguments)

        return call


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("library")
    parser.add_argument("--calls", type=int, default=500, help="of each kernel")
    parser.add_argument("--only", choices=[call.__name__ for call in CALLS], help="one function of spiking_kernels")
    parser.add_argument("--last", type=Path, default=os.devnull, help="file in which the last call stands")
    options = parser.parse_args()
    counted = Counted(build.declared(ctypes.CDLL(options.library)), options.last)
    build.library, neurons.scratch = lambda: counted, apart
    for function in CALLS:
        if options.only in (None, function.__name__):
            limits = settings(
                max_examples=options.calls,
                derandomize=True,
                database=None,
                deadline=None,
                suppress_health_check=list(HealthCheck),
            )
            limits(given(st.data())(function))()
    for name in build.ARGUMENTS:
        if counted.calls[name]:
            print(f"{name:30} {counted.calls[name]} calls, no error", flush=True)
    missing = [name for name in build.ARGUMENTS if counted.calls[name] < options.calls]
    return int(bool(missing) and options.only is None)


if __name__ == "__main__":
    sys.exit(main())
