"""Triton's kernels without a GPU, in a process of their own: run by its interpreter, or compiled for a GPU.

python triton_blocks.py values DTYPE       with TRITON_INTERPRET=1: compare with the kernels in C
python triton_blocks.py compile CAPABILITY...  compile for compute capabilities such as 90
"""

import re
import sys
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from spiking import StepwiseBatchNorm2d
from spiking_kernels import blocks_c, blocks_triton
from spiking_kernels.shapes import Shape, Statistics

SHAPES = [  # T, N, C, H, W, maximum, constant input, BatchNorm
    (1, 1, 8, 4, 4, False, False, True),
    (2, 3, 16, 8, 8, True, False, True),
    (8, 2, 80, 6, 6, True, False, True),
    (9, 1, 40, 5, 7, True, False, True),
    (3, 1, 300, 3, 5, False, False, True),
    (8, 1, 64, 5, 5, False, True, False),
    (4, 4, 100, 1, 1, False, False, False),
    (2, 2, 8, 16, 17, False, False, True),  # more pixels than one part of a sum has
    (1, 1, 1, 60, 60, False, False, True),  # with FEW: more than the greatest numbers of parts have at first
]
FEW = dict(MOMENTS=8, PARTS=3)  # the greatest numbers of parts; 37 times as many pixels would take half a minute
EPS = torch.finfo(torch.float32).eps


def computed(kernels, dtype, T, N, C, H, W, pool, constant, has_norm):
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(N if constant else T * N, C, H, W, generator=generator) * 2 + 0.7
    y, shape, found, results = (
        y.to(dtype).contiguous(memory_format=torch.channels_last),
        Shape(T, pool, constant),
        None,
        {},
    )
    if has_norm:
        norm = StepwiseBatchNorm2d(C, "m")
        with torch.no_grad():
            norm.weight.uniform_(-0.5, 2, generator=generator)
            norm.bias.uniform_(-0.5, 1, generator=generator)
            found = kernels.statistics(y, norm, T)
        results |= {key: getattr(found, key) for key in ("mean", "variance", "scale", "shift")}
        results |= dict(running_mean=norm.running_mean, running_var=norm.running_var, steps=norm.num_batches_tracked)
    counts = torch.full((H, W, C), 5)
    spikes = kernels.forward(y, found, shape, counts)
    gradient = torch.randn(spikes.shape, generator=generator).to(dtype).contiguous(memory_format=torch.channels_last)
    grads = kernels.backward(y, gradient, found, shape)
    return results | dict(zip(("grad_y", "grad_weight", "grad_bias"), grads, strict=True), spikes=spikes, counts=counts)


def values(dtype):
    for shape in SHAPES:
        limits = FEW if shape is SHAPES[-1] else dict(PARTS=blocks_triton.PARTS)
        with mock.patch.multiple(blocks_triton, **limits):
            ours, theirs = (computed(kernels, dtype, *shape) for kernels in (blocks_triton, blocks_c))
        for name, expected in theirs.items():
            if expected is None:
                assert ours[name] is None
                continue
            found = ours[name].double()
            if expected.dtype is torch.int64 or name == "spikes":  # these numbers are far enough from the threshold
                bound = 0.0
            else:
                # the interpreter cuts bfloat16 off where a GPU rounds
                units = 64 * EPS + (2**-7 if name == "grad_y" and dtype is torch.bfloat16 else 0)
                bound = units * float(expected.abs().max())
            error = float((found - expected.double()).abs().max())
            assert error <= bound, f"{name} of {shape} is off by {error}, not at most {bound}"


def not_finite():
    """Without statistics of the batch, a gradient that is not finite stays with its neuron."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(4, 3, 4, 4, generator=generator).contiguous(memory_format=torch.channels_last)
    gradient = torch.ones(4, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    gradient[3, 1, 2, 2] = torch.inf
    norm = StepwiseBatchNorm2d(3, "m")
    with torch.no_grad():
        found = Statistics.of(norm, *(x.repeat(2, 1) for x in (norm.running_mean, norm.running_var)), own=False)
    grads = [kernels.backward(y, gradient, found, Shape(2))[0] for kernels in (blocks_triton, blocks_c)]
    assert torch.equal(*(grad.isfinite() for grad in grads))
    assert int((~grads[0].isfinite()).sum()) in (1, 2)


COUNTERS = {"tracked"}  # to int64
POINTERS = {"y", "spikes", "grad", "dy"}  # to numbers of the run's precision; the others are float32
NUMBERS = {"eps", "momentum", "through"}


def compiled(kernel, capability, dtype, **constants):
    """Compiles a kernel for a compute capability, and checks that it adds nothing atomically."""
    numbers = {"N", "H", "W", "C", "P", "T", "parts", "tiles", "size"}
    signature = {}
    for parameter in kernel.params:
        name = parameter.name
        if name in constants:
            signature[name] = "constexpr"
        elif name in COUNTERS:
            signature[name] = "*i64"
        elif name in NUMBERS:
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if name in numbers else "*" + (dtype if name in POINTERS else "fp32")
    source = ASTSource(kernel, signature, constants)
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    assert built.asm["cubin"]
    assert f".target sm_{capability}" in built.asm["ptx"]
    assert not re.search(r"\b(atom|red)\.", built.asm["ptx"]), f"{kernel.__name__} adds in no fixed order"


def compile_all(capability):
    k = blocks_triton
    for dtype in ("fp32", "bf16") if capability >= 80 else ("fp32",):
        compiled(k._moments, capability, dtype, ROWS=k.ROWS, BC=64)
        compiled(k._merge, capability, dtype, PARTS=k.MOMENTS, BC=16)
        compiled(k._factors, capability, dtype, PARTS=k.PARTS, BC=16)
        common = dict(NORM=True, CONSTANT=False, BC=64)
        for K in (1, 4):
            tile = dict(Q=k.NEURONS // 64 // K, K=K)
            compiled(k._forward, capability, dtype, **common, **tile)
            for sums in (True, False):
                compiled(k._backward, capability, dtype, T=8, STEPS=8, SUMS=sums, **common, **tile)
        compiled(k._backward, capability, dtype, T=8, STEPS=8, SUMS=False, NORM=False, CONSTANT=True, Q=16, K=1, BC=64)


if __name__ == "__main__":
    what, *which = sys.argv[1:]
    if what == "values":
        values(getattr(torch, *which))
        not_finite()
    else:
        for capability in which:
            compile_all(int(capability))
