"""The kernels for blocks of the CIFAR-10 network: in C against the layers, in Triton against those in C."""

import copy
import dataclasses
import importlib.util
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import triton_program
from spikingjelly.activation_based import functional
from torch import nn

import measuring
import spiking_kernels
from c10.model import Cifar10Net
from spiking import StepwiseBatchNorm2d, lif
from spiking_kernels import blocks, blocks_c, build
from spiking_kernels.shapes import Shape

needs_kernels = pytest.mark.skipif(
    spiking_kernels.unavailable() is not None, reason=f"no fused kernels: {spiking_kernels.unavailable()}"
)
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
EPS = torch.finfo(torch.float32).eps

# T, N, C, H, W, maximum, constant input, BatchNorm: sizes that no tile divides, one value per axis, many channels
SHAPES = [
    (1, 1, 8, 4, 4, False, False, True),
    (2, 3, 16, 8, 8, True, False, True),
    (8, 2, 256, 8, 8, True, False, True),
    (9, 2, 40, 5, 7, True, False, True),
    (8, 3, 300, 6, 5, False, False, True),
    (3, 1, 1, 1, 5, False, False, True),
    (8, 2, 64, 9, 9, False, True, False),
    (8, 4, 100, 1, 1, False, False, False),
    (64, 1, 17, 3, 2, True, False, True),
]


def norms(C, train=True):
    """Two BatchNorms alike, with weights and running statistics of every size."""
    generator = torch.Generator().manual_seed(1)
    norm = StepwiseBatchNorm2d(C, "m").train(train)
    with torch.no_grad():
        for tensor, low, high in (
            (norm.weight, -0.5, 2.0),
            (norm.bias, -0.5, 1.0),
            (norm.running_mean, -1.0, 1.0),
            (norm.running_var, 0.5, 2.0),
        ):
            tensor.uniform_(low, high, generator=generator)
    return norm, copy.deepcopy(norm)


def images(T, N, C, H, W, constant, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(N if constant else T * N, C, H, W, generator=generator) * 2 + 0.7


def by_layers(y, T, norm, pool, constant):
    """What a block computes, by the layers, and the potentials before the reset."""
    x = y.expand(T, *y.shape) if constant else y.unflatten(0, (T, -1))
    x = x if norm is None else norm(x)
    neurons = lif()
    functional.set_step_mode(neurons, "m")
    spikes = neurons(x).flatten(0, 1)
    with torch.no_grad():
        v, potentials = torch.zeros_like(x[0]), []
        for x_t in x:
            potentials.append(v + (x_t - v) / 2)
            v = torch.where(potentials[-1] >= 1, 0, potentials[-1])
    return nn.functional.max_pool2d(spikes, 2) if pool else spikes, torch.stack(potentials)


def scale(*tensors):
    return max(float(x.detach().abs().max()) for x in tensors)


def assert_near(ours, theirs, units, of=None):
    """Equal within some units of rounding of the largest value."""
    bound = units * EPS * max(scale(theirs if of is None else of), 1e-30)
    assert float((ours - theirs).detach().abs().max()) <= bound


@needs_kernels
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize(("T", "N", "C", "H", "W", "pool", "constant", "norm"), SHAPES)
def test_a_block_is_its_layers(T, N, C, H, W, pool, constant, norm, train):
    y = images(T, N, C, H, W, constant)
    our_norm, their_norm = norms(C, train) if norm else (None, None)
    ours, theirs = (y.clone().requires_grad_() for _ in range(2))
    counts = torch.full((H, W, C), 5)  # is added to
    spikes = blocks.lif_block(ours, Shape(T, pool, constant), our_norm, counts)
    expected, potentials = by_layers(theirs, T, their_norm, pool, constant)
    # a potential at the threshold, within rounding, may spike or not: such neurons are left out
    near = ((potentials - 1).abs() < 32 * EPS * scale(potentials)).any(0)
    assert near.float().mean() < 0.05
    fired, left_out = (potentials >= 1).sum((0, 1)).permute(1, 2, 0), near.any(0).permute(1, 2, 0)
    assert torch.equal(counts[~left_out], fired[~left_out] + 5)
    windows = nn.functional.max_pool2d(near.float(), 2) if pool else near.float()
    sure = (windows == 0).repeat(T, 1, 1, 1)
    assert torch.equal(spikes[sure], expected[sure])
    assert spikes.numel() < 9 or 0 < spikes.mean() < 1
    gradient = torch.randn(spikes.shape, generator=torch.Generator().manual_seed(2)) * sure
    spikes.backward(gradient)
    expected.backward(gradient)
    many = N * H * W
    assert_near(ours.grad, theirs.grad, 64)
    if norm:
        # of sums of T N H W terms, each with a rounding or two
        terms = 8 * (T * many) ** 0.5
        assert_near(our_norm.weight.grad, their_norm.weight.grad, 16 + terms)
        assert_near(our_norm.bias.grad, their_norm.bias.grad, 16 + terms)
        assert_near(our_norm.running_mean, their_norm.running_mean, 8 * T)
        assert_near(our_norm.running_var, their_norm.running_var, 8 * T)
        assert torch.equal(our_norm.num_batches_tracked, their_norm.num_batches_tracked)


@needs_kernels
def test_statistics_are_those_of_each_time_step():
    """Pooled over time they would be far off, and so would be a variance in float32 from sums of squares."""
    y = (
        images(3, 4, 24, 5, 5, False) * 1e-2
        + torch.tensor([10.0, 1000.0, -300.0]).repeat_interleave(4)[:, None, None, None]
    )
    norm, _ = norms(24)
    found = blocks_c.statistics(y.contiguous(memory_format=torch.channels_last), norm, 3)
    exact = y.double().unflatten(0, (3, 4))
    torch.testing.assert_close(found.mean.double(), exact.mean((1, 3, 4)), rtol=EPS, atol=0)
    torch.testing.assert_close(found.variance.double(), exact.var((1, 3, 4), correction=0), rtol=1e-5, atol=0)


def channels_last_batch(dtype=torch.float32):
    """Images whose channels-last sums in float32 lose digits: many pixels, with a mean."""
    y = torch.randn(8, 16, 64, 32, generator=torch.Generator().manual_seed(5)) * 2 + 7
    return y.to(dtype).contiguous(memory_format=torch.channels_last)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_batch_norm_of_channels_last_images_has_accurate_statistics(dtype):
    y, (norm, _) = channels_last_batch(dtype), norms(16)
    norm.step_mode, norm.fused = "s", True
    before, exact = copy.deepcopy(norm), y.double()
    variance, mean = torch.var_mean(exact, (0, 2, 3), correction=0)
    ours, other = y.clone().requires_grad_(), exact.clone().requires_grad_()
    normalised = norm(ours)
    double = copy.deepcopy(before).double()
    expected = double(other)
    gradient = torch.randn(y.shape, generator=torch.Generator().manual_seed(6)).to(dtype)
    gradient = gradient.contiguous(memory_format=torch.channels_last)
    normalised.backward(gradient)
    expected.backward(gradient.double())
    assert (normalised.dtype, ours.grad.dtype) == (dtype, dtype)
    assert normalised.is_contiguous(memory_format=torch.channels_last)
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(normalised.double(), expected, rtol=rounding, atol=max(rounding, 2e-6))
    torch.testing.assert_close(ours.grad.double(), other.grad, rtol=rounding, atol=2 * max(rounding, 1e-6))
    for name in ("weight", "bias"):  # torch's sums in float32 of 16384 numbers
        torch.testing.assert_close(getattr(norm, name).grad.double(), getattr(double, name).grad, rtol=1e-4, atol=1e-2)
    momentum, values = norm.momentum, y.numel() / 16
    for found, old, new in (
        (norm.running_mean, before.running_mean, mean),
        (norm.running_var, before.running_var, variance * values / (values - 1)),
    ):
        exactly = old.double() * (1 - momentum) + new * momentum
        torch.testing.assert_close(found.double(), exactly, rtol=4 * EPS, atol=4 * EPS)
    assert norm.num_batches_tracked == before.num_batches_tracked + 1


@needs_kernels
def test_the_networks_first_norm_takes_them():
    network = Cifar10Net(T=1, width=8)
    x = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(7))
    network.fused = True
    convolution, norm = network.static_conv
    with torch.no_grad():
        convolution.weight.abs_()  # a mean that is larger than the deviation
        network.static(x)
    y = convolution.double()(x.double())
    mean, variance = y.mean((0, 2, 3)), y.var((0, 2, 3))
    torch.testing.assert_close(norm.running_mean.double(), 0.1 * mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(norm.running_var.double(), 0.9 + 0.1 * variance, rtol=2 * EPS, atol=0)


@pytest.mark.parametrize("fused", [True, False])
def test_the_first_layer_may_be_another(fused):
    network, x = Cifar10Net(T=1, width=8), torch.rand(2, 3, 32, 32)
    convolution, norm = network.static_conv
    network.fused, network.static_conv = fused, convolution
    torch.testing.assert_close(network.static(x), convolution(x))
    network.static_conv = nn.Sequential(nn.Sequential(convolution, norm))
    assert network.static(x).shape == (2, 8, 32, 32)
    assert norm.fused is fused


@needs_kernels
def test_gradients_of_gradients_of_a_batch_norm():
    y = images(1, 3, 4, 5, 5, False).contiguous(memory_format=torch.channels_last)
    results = []
    for norm in norms(4):
        norm.step_mode, norm.fused = "s", not results
        x = y.clone(memory_format=torch.preserve_format if not results else torch.contiguous_format).requires_grad_()
        normalised = norm(x)
        assert (type(normalised.grad_fn).__name__ == "_NormBackward") == (not results)
        first = torch.autograd.grad(normalised.pow(3).sum(), (x, norm.weight, norm.bias), create_graph=True)
        second = torch.autograd.grad(sum((g * g).sum() for g in first), (x, norm.weight))
        results.append([normalised, *first, *second])
    for ours, theirs in zip(*results, strict=True):
        assert_near(ours, theirs, 1000)
    frozen, _ = norms(4)
    frozen.requires_grad_(False).step_mode = "s"
    frozen.fused = True
    x = y.clone().requires_grad_()
    frozen(x).sum().backward()
    assert frozen.weight.grad is None
    assert x.grad is not None


@needs_kernels
@pytest.mark.parametrize(
    "change",
    [
        lambda norm, y: setattr(norm, "momentum", None),
        lambda norm, y: setattr(norm, "weight", None),
        lambda norm, y: setattr(norm, "running_mean", norm.running_mean.double()),
        lambda norm, y: setattr(norm, "track_running_stats", False),
        lambda norm, y: setattr(norm, "eps", 0.0),
        lambda norm, y: norm.eval(),
        lambda norm, y: y.data.__setitem__(slice(None), 1),
    ],
    ids=["cumulative average", "no weight", "statistics in double", "not tracked", "no eps", "evaluation", "one value"],
)
def test_other_batch_norms_are_torchs(change):
    y = images(1, 3, 4, 5, 5, False).contiguous(memory_format=torch.channels_last)
    norm, other = norms(4)
    norm.step_mode, norm.fused = "s", True
    for each in (norm, other):
        change(each, y)
    try:
        expected = nn.BatchNorm2d.forward(other, y)
    except (RuntimeError, ValueError) as error:
        with pytest.raises(type(error)):
            norm(y)
    else:
        torch.testing.assert_close(norm(y), expected, rtol=1e-5, atol=1e-5)
    for (name, ours), theirs in zip(norm.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=name)


@needs_kernels
@pytest.mark.filterwarnings("ignore")
def test_a_trace_of_a_fused_network_runs_its_layers():
    torch.manual_seed(0)  # of 272 seeds, two have a spike that falls otherwise by rounding
    network, x = Cifar10Net(T=1, width=8), torch.rand(2, 3, 32, 32)
    network.fc[1].p, network.fused = 0.0, True
    with torch.no_grad():
        for weight in network.fc.parameters():
            weight *= 20
    traced = torch.jit.trace(network, x, check_trace=False)
    for batch in (x, x.square()):
        network.fused = False
        expected = network(batch)
        assert 0 < expected.mean() < 1
        torch.testing.assert_close(traced(batch), expected)


@needs_kernels
def test_a_batch_norm_refuses_what_it_would_compute_otherwise():
    norm, _ = norms(4)
    negative = torch._neg_view(torch.randn(3, 4, 5, 5).contiguous(memory_format=torch.channels_last))
    for y in (torch.randn(3, 4, 5, 5), torch.randn(2, 3, 4, 5, 5), torch.randn(3, 4, 5, 5).double(), negative):
        with pytest.raises(spiking_kernels.Unfit):
            blocks.batch_norm(y, norm)
    y = torch.randn(1, 4, 1, 1).contiguous(memory_format=torch.channels_last)
    with pytest.raises(spiking_kernels.Unfit, match="no variance"):
        blocks.batch_norm(y, norm)
    before = copy.deepcopy(norm.state_dict())
    for shape, axis in (((0, 4, 5, 5), "N"), ((2, 4, 0, 5), "H"), ((2, 4, 5, 0), "W")):
        with pytest.raises(spiking_kernels.Unfit, match=f"^{axis}=0 is not accepted"):
            blocks.batch_norm(torch.empty(shape, memory_format=torch.channels_last), norm)
    for name, tensor in norm.state_dict().items():
        assert torch.equal(tensor, before[name])


@needs_kernels
@pytest.mark.parametrize("T", [1, 2])
def test_statistics_that_change_before_the_backward_pass_do_not_change_it(T):
    torch.manual_seed(0)
    y, gradients = torch.randn(2 * T, 4, 5, 5).contiguous(memory_format=torch.channels_last), []
    for changed in (False, True):
        norm, _ = norms(4)
        norm.eval()
        spikes = blocks.lif_block(y, Shape(T), norm)
        if changed:
            norm.running_mean += 5
            norm.running_var *= 7
        gradients.append(torch.autograd.grad(spikes.sum(), (norm.weight, norm.bias)))
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)
    assert gradients[0][0].abs().sum() > 0


@needs_kernels
def test_what_comes_back_with_other_sizes_is_refused(monkeypatch):
    """By torch, and not after the kernel has read past the gradient."""
    monkeypatch.setattr(blocks.blocks_c, "backward", None)
    y = torch.randn(4, 4, 5, 5).contiguous(memory_format=torch.channels_last).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: torch.cat([x, x]) if x.dim() == 4 else x):
        spikes = blocks.lif_block(y, Shape(2), norms(4)[0])
    with pytest.raises(RuntimeError, match=r"invalid gradient|shape"):
        spikes.sum().backward()


@needs_kernels
def test_what_is_not_finite_stays_where_it_is_without_statistics_of_the_batch():
    """A gradient that is infinite spoils the gradients of one neuron, as in the layers."""
    torch.manual_seed(0)
    y = torch.randn(2 * 2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    gradient = torch.ones(4, 3, 4, 4)
    gradient[3, 1, 2, 2] = torch.inf
    norm = norms(3)[0].eval()
    given = y.clone(memory_format=torch.channels_last).requires_grad_()
    blocks.lif_block(given, Shape(2), norm).backward(gradient)
    bad = (~given.grad.isfinite()).nonzero().tolist()
    assert [3, 1, 2, 2] in bad
    assert {tuple(place[1:]) for place in bad} == {(1, 2, 2)}


@needs_kernels
@pytest.mark.parametrize("pool", [False, True])
def test_bfloat16_is_rounded_only_where_it_is_written(pool):
    """Spikes and sums are those of the same numbers in float32; the gradient is its nearest bfloat16."""
    T, N, C, H, W = 4, 2, 40, 6, 6
    half = images(T, N, C, H, W, False).bfloat16()
    halved, full = half.clone().requires_grad_(), half.float().requires_grad_()
    our_norm, their_norm = norms(C)
    spikes = blocks.lif_block(halved, Shape(T, pool), our_norm)
    expected = blocks.lif_block(full, Shape(T, pool), their_norm)
    assert spikes.dtype is torch.bfloat16
    assert torch.equal(spikes.float(), expected)
    gradient = torch.randn(spikes.shape, generator=torch.Generator().manual_seed(2)).bfloat16()
    spikes.backward(gradient)
    expected.backward(gradient.float())
    assert torch.equal(halved.grad, full.grad.bfloat16())
    assert torch.equal(our_norm.weight.grad, their_norm.weight.grad)
    assert torch.equal(our_norm.running_var, their_norm.running_var)


@needs_kernels
def test_the_gradient_goes_to_the_first_maximum():
    y = torch.tensor([[0.0, 3.0], [4.0, 0.0]]).expand(1, 1, 2, 2).clone().requires_grad_()
    blocks.lif_block(y, Shape(1, pool=True)).sum().backward()
    assert y.grad[0, 0, 0, 1] > 0
    assert int((y.grad != 0).sum()) == 1
    silent = torch.full((1, 1, 2, 2), 0.5, requires_grad=True)  # as in torch: of equal ones, the first
    blocks.lif_block(silent, Shape(1, pool=True)).sum().backward()
    assert silent.grad.flatten().nonzero().flatten().tolist() == [0]


@needs_kernels
def test_not_a_number_and_infinity_pass_through():
    y = torch.tensor([float("nan"), float("inf"), -float("inf"), 3.0]).view(1, 4, 1, 1)
    spikes = blocks.lif_block(y, Shape(3, constant=True)).view(3, 4)
    expected, _ = by_layers(y, 3, None, False, True)
    assert torch.equal(spikes, expected.view(3, 4))
    half = torch.tensor([float("nan"), 1.0]).bfloat16().view(1, 2, 1, 1).requires_grad_()
    blocks.lif_block(half, Shape(1, constant=True)).sum().backward()
    assert half.grad.isnan().flatten().tolist() == [True, False]


@needs_kernels
def test_gradients_of_gradients_are_those_of_the_layers():
    T, N, C, H, W = 3, 2, 8, 4, 4
    y = images(T, N, C, H, W, False)
    found = []
    for norm, block in zip(norms(C), (True, False), strict=True):
        x = y.clone().requires_grad_()
        spikes = blocks.lif_block(x, Shape(T, True), norm) if block else by_layers(x, T, norm, True, False)[0]
        gradient = torch.randn(spikes.shape, generator=torch.Generator().manual_seed(2))
        (first,) = torch.autograd.grad(spikes, x, gradient, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), (x, norm.weight)))
    for ours, theirs in zip(*found, strict=True):
        assert_near(ours, theirs, 1000)


@needs_kernels
@pytest.mark.parametrize("block", [True, False])
def test_hooks_are_called_once_where_torch_computes_the_gradients(block):
    found = []
    for factor in (1, 2):
        norm, _ = norms(5)
        x = images(3, 2, 5, 4, 6, False).contiguous(memory_format=torch.channels_last).requires_grad_()
        out = blocks.lif_block(x, Shape(3, True), norm) if block else blocks.batch_norm(x, norm)
        tensors = (x, norm.weight, norm.bias)
        for tensor in tensors if factor > 1 else ():
            tensor.register_hook(lambda g: 2 * g)
        gradient = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
        found.append(torch.autograd.grad(out, tensors, gradient, create_graph=True))
    for once, doubled in zip(*found, strict=True):
        assert torch.equal(doubled, 2 * once)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_do_not_depend_on_the_number_of_threads(dtype, kernel_threads):
    T, N, C, H, W = 8, 3, 48, 7, 9
    y, results = images(T, N, C, H, W, False).to(dtype), []
    for threads in (1, 2, 3, 7):
        kernel_threads(threads)
        norm, _ = norms(C)
        x = y.clone().requires_grad_()
        spikes = blocks.lif_block(x, Shape(T, True), norm)
        spikes.backward(torch.linspace(-1, 1, spikes.numel()).view_as(spikes).to(dtype))
        results.append((spikes, x.grad, norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var))
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("C", [8, 16, 24, 32, 96, 320])
@pytest.mark.parametrize("way", [{}, {"pool": True}, {"constant": True}])
def test_what_is_written_past_the_cache_is_the_same(way, C, dtype, monkeypatch):
    """Large outputs are: here small ones as well. Of 8 or 24 channels, a pixel is no whole number of lines.

    Only with AVX-512; elsewhere the option changes nothing.
    """
    shape, results = Shape(3, **way), []
    y = images(3, 2, C, 5, 7, shape.constant).to(dtype)
    for library in (build.library(), build.library("-DSTREAMED=1")):
        monkeypatch.setattr(build, "library", lambda library=library: library)
        norm = None if shape.constant else norms(C)[0]
        x = y.clone().requires_grad_()
        spikes = blocks.lif_block(x, shape, norm)
        spikes.backward(torch.linspace(-1, 1, spikes.numel()).view_as(spikes).to(dtype))
        results.append((spikes, x.grad, *([norm.weight.grad] if norm else [])))
        monkeypatch.undo()
    assert all(map(torch.equal, *results))
    assert 0 < results[0][0].float().mean() < 1


@needs_kernels
@pytest.mark.parametrize(
    ("y", "shape"),
    [
        (torch.zeros(4, 2, 3, 3, dtype=torch.float64), Shape(2)),
        (torch.zeros(4, 2, 3), Shape(2)),
        (torch.zeros(3, 2, 3, 3), Shape(2)),
        (torch.zeros(0, 2, 3, 3), Shape(2)),
        (torch.zeros(65, 2, 3, 3), Shape(65)),
        (torch.zeros(4, 2, 3, 3), Shape(0)),
        (torch.zeros(4, 2, 3, 3, device="meta"), Shape(2)),
        (torch.zeros(4, 2, 3, 3).to_sparse(), Shape(2)),
        (torch.zeros(4, 2, 1, 4), Shape(2, pool=True)),
        (torch.zeros(4, 2, 3, 3), Shape(2, constant=True)),
        (torch.zeros(2, 2, 1, 1), Shape(2)),  # one value has no variance
    ],
)
def test_what_a_block_cannot_take_is_refused(y, shape):
    norm, same = norms(2)
    with pytest.raises(spiking_kernels.Unfit):
        blocks.lif_block(y, shape, norm)
    assert torch.equal(norm.running_mean, same.running_mean)


@needs_kernels
@needs_triton
def test_kernels_that_compute_something_else_are_found_on_a_gpu(monkeypatch):
    """As tried on the CPU: a pass with an error, and one that fails."""
    flaw_on, cpu = blocks.flaw_on.__wrapped__, torch.device("cpu")
    state = torch.get_rng_state()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert flaw_on(cpu) is None
    assert torch.equal(torch.get_rng_state(), state)
    forward, backward, statistics = blocks_c.forward, blocks_c.backward, blocks_c.statistics

    def other_statistics(*arguments):
        found = statistics(*arguments)
        return dataclasses.replace(found, shift=found.shift + 0.2)

    wrong = {
        "forward": lambda *a: 1 - forward(*a),
        "backward": lambda *a: (backward(*a)[0] * 1.05, *backward(*a)[1:]),
        "statistics": other_statistics,
    }
    for name, function in wrong.items():
        with monkeypatch.context() as patch:
            patch.setattr(blocks_c, name, function)
            assert flaw_on(cpu) == "on cpu they compute something else than the layers"
    monkeypatch.setattr(blocks_c, "forward", lambda *a: 1 / 0)
    assert flaw_on(cpu) == "on cpu they fail with ZeroDivisionError: division by zero"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert flaw_on(cpu) == "Triton is not installed"


@needs_kernels
@pytest.mark.parametrize("mode", ["inference", "dtype", "device"])
@needs_triton
def test_the_comparison_on_a_gpu_does_not_depend_on_what_surrounds_it(mode):
    """What it finds is kept: a network that is first tested would train without kernels."""
    before = torch.get_default_dtype()
    surroundings = {"inference": torch.inference_mode(), "device": torch.device("meta")}.get(mode, nullcontext())
    try:
        torch.set_default_dtype(torch.float64 if mode == "dtype" else before)
        with surroundings:
            assert blocks.flaw_on.__wrapped__(torch.device("cpu")) is None
    finally:
        torch.set_default_dtype(before)


@needs_kernels
@pytest.mark.parametrize("tracked", [None, torch.tensor(0.0), torch.zeros(1, dtype=torch.int64)])
def test_a_norm_whose_counter_a_kernel_cannot_write_is_refused(tracked):
    norm, same = norms(2)
    norm.num_batches_tracked = tracked
    with pytest.raises(spiking_kernels.Unfit, match="the BatchNorm's num_batches_tracked"):
        blocks.lif_block(torch.randn(4, 2, 3, 3), Shape(2), norm)
    assert torch.equal(norm.running_mean, same.running_mean)


@needs_kernels
@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var"])
@pytest.mark.parametrize(
    "change",
    [torch.Tensor.double, lambda x: x[:1], lambda x: torch.stack([x, x], 1)[:, 0]],
    ids=["double", "1", "apart"],
)
def test_a_norm_whose_numbers_a_kernel_cannot_read_is_refused(name, change):
    norm, _ = norms(2, train=False)
    changed = change(getattr(norm, name).detach())
    setattr(norm, name, nn.Parameter(changed) if name in ("weight", "bias") else changed)
    with pytest.raises(spiking_kernels.Unfit, match=f"the BatchNorm's {name}"):
        blocks.lif_block(torch.zeros(4, 2, 3, 3), Shape(2), norm)


# -- the network --------------------------------------------------------------------------------------


def networks(T=8, width=8, gain=3.0):
    """Two networks alike, with weights large enough for spikes in all layers; the first is fused."""
    torch.manual_seed(0)
    fused = Cifar10Net(T, width=width)
    with torch.no_grad():
        for norm in fused.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.bias.fill_(0.8)  # or the later layers would be silent
        fused.fc[2].weight.mul_(gain)
        fused.fc[4].weight.mul_(gain)
        fused.fc[4].weight.abs_()
    plain = copy.deepcopy(fused)
    fused.fused = True
    return fused, plain


def batch(N):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(N, 3, 32, 32, generator=generator), torch.randint(0, 10, (N,), generator=generator)


@needs_kernels
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("T", "N", "width"), [(1, 2, 8), (2, 1, 24), (8, 3, 8), (9, 2, 16), (3, 2, 32), (8, 1, 64)])
def test_the_network_is_its_layers(T, N, width):
    fused, plain = networks(T, width)
    x, y = batch(N)
    outputs, losses, rates = [], [], []
    for network in (fused, plain):
        torch.manual_seed(4)  # of the dropout
        with measuring.SpikeCounter(network) as spikes:
            outputs.append(network(x))
        losses.append(measuring.loss_function(outputs[-1], y, T))
        losses[-1].backward()
        rates.append(spikes.rates())
    assert rates[0].keys() == rates[1].keys()
    # rounding may decide about a spike, and others follow
    alike = all(torch.equal(rates[0][name], rate) for name, rate in rates[1].items())
    assert T < 8 or min(float(rate.mean()) for rate in rates[1].values()) > 0
    for name, rate in rates[1].items():
        assert rates[0][name].shape == rate.shape, name
        assert float((rates[0][name] - rate).abs().sum()) <= 0.01 * float(rate.sum()), name
    losses = [float(loss.detach()) for loss in losses]
    assert abs(losses[0] - losses[1]) <= (0 if alike else 0.01) * losses[1]
    for (name, ours), theirs in zip(fused.named_parameters(), plain.parameters(), strict=True):
        assert theirs.grad.abs().max() > 0, name
        # rounding grows by each layer and each time step that a gradient passes
        bound = 1000 * EPS if alike else 0.3
        assert float((ours.grad - theirs.grad).norm()) <= bound * float(theirs.grad.norm()), name
    for (name, ours), theirs in zip(fused.named_buffers(), plain.buffers(), strict=True):
        if theirs.dtype is torch.int64:
            assert torch.equal(ours, theirs), name
        else:
            assert float((ours - theirs).abs().max()) <= (50 * T * EPS if alike else 0.01) * scale(theirs), name
    with torch.no_grad():
        for network in (fused.eval(), plain.eval()):
            outputs.append(network(x))
    assert float((outputs[2] - outputs[3]).abs().sum()) <= (0 if alike else 0.05) * float(outputs[3].sum())


@needs_kernels
def test_a_frozen_norm_keeps_its_statistics_in_a_network_that_trains():
    fused, plain = networks(4)
    x, y = batch(2)
    for network in (fused, plain):
        network.conv[2].eval()
        torch.manual_seed(4)
        measuring.loss_function(network(x), y, 4).backward()
    assert int(fused.conv[2].num_batches_tracked) == 0
    assert int(fused.conv[5].num_batches_tracked) == 4
    for ours, theirs in zip(fused.parameters(), plain.parameters(), strict=True):
        assert_near(ours.grad, theirs.grad, 1000)


@needs_kernels
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_filters_for_a_gpu_are_the_weights(dtype):
    """Channels-last, in the dtype of the products; their gradients are laid out as the weights are."""
    fused, _ = networks(1)
    weights = [fused.conv[place].weight for place in (1, 4, 8, 11, 14)]
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        filters = fused._filters()
    gradients = [torch.randn(8, 8, 3, 3, generator=torch.Generator().manual_seed(i)) for i in range(5)]
    gradients = [g.to(filters[0].dtype).contiguous(memory_format=torch.channels_last) for g in gradients]
    torch.autograd.backward(filters, gradients)
    for made, weight, gradient in zip(filters, weights, gradients, strict=True):
        assert made.dtype is (dtype or torch.float32)
        assert torch.equal(made, weight.to(made.dtype))
        assert made.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(weight.grad, gradient.float())
        assert weight.grad.is_contiguous()


@needs_kernels
def test_layers_with_hooks_or_of_different_sizes_keep_their_own_weights():
    fused, _ = networks(1)
    with measuring.SpikeCounter(fused):
        assert fused._filters() is None
    fused.conv[4] = type(fused.conv[4])(8, 12, kernel_size=3, padding=1, bias=False)
    assert fused._filters() is None


@needs_kernels
@pytest.mark.filterwarnings("error")
def test_the_network_with_the_filters_for_a_gpu_is_the_network(monkeypatch):
    """As tried on the CPU."""
    fused, plain = networks(2, 16)
    x, y = batch(2)
    made, filters = [], Cifar10Net._filters
    monkeypatch.setattr(Cifar10Net, "_filters", lambda self: made.append(filters(self)) or made[-1])
    for network, on_gpu in ((plain, False), (fused, True)):
        with monkeypatch.context() as patch:
            if on_gpu:
                patch.setattr(torch.Tensor, "is_cuda", True, raising=False)
            torch.manual_seed(4)
            measuring.loss_function(network(x), y, 2).backward()
    assert len(made) == 1
    for (name, ours), theirs in zip(fused.named_parameters(), plain.parameters(), strict=True):
        assert theirs.grad.abs().max() > 0, name
        # rounding may decide about a spike, and others follow
        assert float((ours.grad - theirs.grad).norm()) <= 0.3 * float(theirs.grad.norm()), name


def no_bias(network):
    network.conv[2] = nn.BatchNorm2d(8, affine=False)


def own_neuron(network):
    network.conv[3].v_threshold = 0.9


def strided(network):
    network.conv[4].stride = (2, 2)


def momentum(network):
    network.conv[5].momentum = None


def average(network):
    network.conv[7] = nn.AvgPool2d(2)


def hook(network):
    network.conv[8].register_forward_hook(lambda *args: None)


def shared(network):
    network.conv[6] = network.conv[3]


def step_by_step(network):
    network.step_mode = "s"


def double(network):
    network.conv[4].double()


def long(network):
    network.T = 65


def no_statistics(network):
    network.conv[9].track_running_stats, network.conv[9].running_mean, network.conv[9].running_var = False, None, None


def statistics_apart(network):
    """In memory that the kernels would read as if they stood side by side."""
    network.conv[12].running_mean = torch.zeros(8, 2)[:, 0]


def own_forward(network):
    network.fc[2].forward = lambda x: x


CHANGES = [
    no_bias, own_neuron, strided, momentum, average, hook, shared, step_by_step, long, no_statistics,
    statistics_apart, own_forward,
]  # fmt: skip


@needs_kernels
@pytest.mark.parametrize("change", CHANGES)
def test_a_network_that_computes_something_else_runs_its_layers(change, monkeypatch):
    fused, _ = networks(2)
    change(fused)
    monkeypatch.setattr(blocks, "lif_block", lambda *args: pytest.fail("a kernel runs"))
    monkeypatch.setattr(Cifar10Net, "_counts", lambda self, current: torch.zeros(1, 10))
    with pytest.warns(UserWarning, match="runs its plain layers, not the fused kernel"):
        fused(batch(1)[0])


@needs_kernels
def test_float16_products_run_the_layers():
    fused, _ = networks(1)
    with torch.autocast("cpu", torch.float16), pytest.warns(UserWarning, match="float16"), torch.no_grad():
        fused(batch(1)[0])


@needs_kernels
def test_a_transform_of_functions_gets_the_plain_layers():
    fused, plain = (network.eval().requires_grad_(False) for network in networks(2))
    x, _ = batch(2)
    with pytest.warns(UserWarning, match="a transform of torch.func is active"):
        found = torch.vmap(fused)(x[:, None])
    assert torch.equal(found, torch.vmap(plain)(x[:, None]))


# -- Triton -------------------------------------------------------------------------------------------

INTERPRETED = Path(__file__).parent / "triton_blocks.py"


@needs_triton
@needs_kernels
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_triton_kernels_compute_what_those_in_c_do(dtype):
    triton_program.interpret(INTERPRETED, dtype)


@needs_triton
@pytest.mark.parametrize("capabilities", [[90], pytest.param([75, 80, 86, 100], marks=pytest.mark.slow)])
def test_the_triton_kernels_compile(capabilities, tmp_path):
    triton_program.compile(INTERPRETED, tmp_path, *capabilities)
