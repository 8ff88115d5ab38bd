"""The fused kernels against the modules that they replace."""

import subprocess

import pytest
import torch
from optim_helpers import parameters, train
from spikingjelly.activation_based import functional, layer
from test_models import spiking_mnist
from torch import nn

import spiking_kernels
from gradrewire import GradRewiring
from mnist import mnist
from spiking import lif
from training import data, measure

needs_kernels = pytest.mark.skipif(
    spiking_kernels.available() is not None, reason=f"no fused kernels: {spiking_kernels.available()}"
)


def reference(current, weight, T):
    """The same by SpikingJelly's neurons and torch's linear layer: counts [N, O] and the first spikes [T, N, H]."""
    linear = layer.Linear(*weight.shape[::-1], bias=False)
    linear.weight = nn.Parameter(weight)
    first, second = lif(), lif()
    for module in (first, linear, second):
        functional.set_step_mode(module, "m")
    spikes = first(current.expand(T, *current.shape))
    return second(linear(spikes)).sum(0), spikes, linear.weight


def currents(n, h, seed=0):
    """Currents of every kind: below threshold, at its edge, and neurons that fire with all periods."""
    x = torch.randn(n, h, generator=torch.Generator().manual_seed(seed)) * 1.5
    edges = torch.tensor([0.0, 1.0, 2.0, 4 / 3, 8 / 7, 1.9999999, 2.0000002, -3.0, 1e30, -1e30, 1.0039216])
    flat = x.flatten()
    flat[: min(len(edges), len(flat))] = edges[: len(flat)]
    return x


@needs_kernels
@pytest.mark.parametrize("T", [1, 2, 7, 8, 9, 32, 254])
@pytest.mark.parametrize(("n", "h", "o"), [(1, 1, 1), (3, 800, 10), (5, 65, 16), (2, 130, 17), (4, 63, 33)])
def test_lif_linear_lif(T, n, h, o):
    # multiples of 1/64: their sums are exact in any order, so that rounding decides about no spike
    weight = (torch.randn(o, h, generator=torch.Generator().manual_seed(1)) * 32).round() / 64
    ours, theirs = (currents(n, h).requires_grad_() for _ in range(2))
    our_weight = weight.clone().requires_grad_()
    first_counts = torch.full((h,), 5, dtype=torch.int64)  # is added to
    counts = spiking_kernels.lif_linear_lif(ours, our_weight, T, first_counts)
    expected, spikes, their_weight = reference(theirs, weight, T)
    assert torch.equal(counts, expected)
    assert torch.equal(first_counts - 5, spikes.sum((0, 1)).long())
    assert n * h < 10 or counts.sum() > 0
    gradient = torch.randn(counts.shape, generator=torch.Generator().manual_seed(2))
    counts.backward(gradient)
    expected.backward(gradient)
    for ours_, theirs_ in ((ours.grad, theirs.grad), (our_weight.grad, their_weight.grad)):
        assert n * h < 10 or theirs_.abs().sum() > 0
        torch.testing.assert_close(ours_, theirs_, rtol=1e-4, atol=1e-5 * float(theirs_.abs().max()))


@needs_kernels
@pytest.mark.parametrize("size", [28, 17])
def test_affine_lookup_is_bitwise_the_plain_path(size):
    images = torch.randint(0, 256, (300, 1, size, size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    matrices = mnist.RECIPE.augmentation.draw(images, torch.Generator().manual_seed(1))
    index = torch.randperm(300, generator=torch.Generator().manual_seed(2))[:128]
    normalise = data.Normalisation((0.1307,), (0.3081,), torch.device("cpu"))
    expected = normalise(mnist.RECIPE.augmentation.apply(images[index], matrices[:128]))
    assert torch.equal(spiking_kernels.affine_lookup(images, index, matrices[:128], normalise.table()), expected)


@needs_kernels
def test_fused_batches_are_bitwise_the_plain_ones(monkeypatch):
    calls, lookup = [], spiking_kernels.affine_lookup
    monkeypatch.setattr(spiking_kernels, "affine_lookup", lambda *a: calls.append(1) or lookup(*a))
    images = torch.randint(0, 256, (50, 1, 28, 28), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    split = data.Split(images, torch.arange(50) % 10)
    normalise = data.Normalisation((0.1307,), (0.3081,), torch.device("cpu"))
    epochs = []
    for fused in (True, False):
        generator = torch.Generator().manual_seed(3)
        batches = data.TrainingBatches(split, 8, mnist.RECIPE.augmentation, normalise, generator, fused=fused)
        epochs.append([*batches, *batches])
    assert len(calls) == 12
    for (x, y), (a, b) in zip(*epochs, strict=True):
        assert torch.equal(x, a)
        assert torch.equal(y, b)


@needs_kernels
@pytest.mark.parametrize("T", [1, 8, 300])
@pytest.mark.parametrize("batch", [1, 6])
def test_the_fused_mnist_network_is_the_network(T, batch, monkeypatch):
    calls, kernel = [], spiking_kernels.lif_linear_lif
    monkeypatch.setattr(spiking_kernels, "lif_linear_lif", lambda *a: calls.append(1) or kernel(*a))
    plain, fused = spiking_mnist(T, "m"), spiking_mnist(T, "m")
    fused.fused = True
    images, labels = torch.randn(batch, 1, 28, 28, generator=torch.Generator().manual_seed(0)), torch.arange(batch)
    results = []
    for network in (plain, fused):
        with measure.SpikeCounter(network) as spikes:
            counts = network(images)
        measure.loss_function(counts, labels, T).backward()
        results.append((counts.detach(), spikes.rates(), [p.grad for p in network.parameters()]))
    assert calls == ([] if T == 300 else [1])  # periods beyond a byte are left to the modules
    (counts, rates, gradients), (others, other_rates, other_gradients) = results
    assert T == 1 or counts.sum() > 0
    # the hidden layer's spikes are the same ones; at the output rounding may decide
    assert torch.equal(other_rates["fc.0"], rates["fc.0"])
    torch.testing.assert_close(others, counts, rtol=0, atol=1)
    torch.testing.assert_close(other_rates["fc.2"], others.sum(0) / (batch * T))
    for gradient, other in zip(gradients, other_gradients, strict=True):
        torch.testing.assert_close(other, gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max()) + 1e-12)


@needs_kernels
def test_the_fused_network_leaves_other_tensors_to_the_modules():
    network = spiking_mnist(4, "m").double()
    network.fused = True
    assert network(torch.randn(2, 1, 28, 28, dtype=torch.float64)).dtype == torch.float64


@needs_kernels
@pytest.mark.parametrize("settings", [{}, dict(alpha=0.0), dict(amsgrad=True, weight_decay=0.02, maximize=True)])
@pytest.mark.parametrize("size", [1, 15, 16, 1000, 5000])
def test_fused_grad_rewiring(settings, size, monkeypatch):
    calls, kernel = [], spiking_kernels.grad_rewiring_step
    monkeypatch.setattr(spiking_kernels, "grad_rewiring_step", lambda *a, **k: calls.append(1) or kernel(*a, **k))
    runs = []
    for fused in (False, True):
        params = parameters(shapes=[(size,), (6, 3, 3, 3)])
        params[1].data[0] = 0
        optimizer = GradRewiring(params, **{"lr": 0.01, "alpha": 0.1, "s": 0.9, **settings}, fused=fused)
        train(optimizer, params, steps=40)
        runs.append([(p.detach(), optimizer.state[p]) for p in params])
    assert len(calls) == 2 * 40
    for (p, p_state), (q, q_state) in zip(*runs, strict=True):
        torch.testing.assert_close(q, p, rtol=1e-5, atol=1e-7)
        assert p_state.keys() == q_state.keys()
        for key, value in p_state.items():
            torch.testing.assert_close(q_state[key], value, rtol=1e-5, atol=1e-7)


@needs_kernels
@pytest.mark.parametrize("n", [(1 << 22) + 1000, 1000])
def test_fused_grad_rewiring_of_many_weights(n):
    """Beyond 4 million weights the kernel writes past the cache: another branch."""
    w = torch.linspace(-0.1, 0.1, n)
    runs = []
    for fused in (False, True):
        p = nn.Parameter(w.clone())
        optimizer = GradRewiring([p], lr=0.05, alpha=1.0, s=0.9, fused=fused)
        for _ in range(2):
            p.grad = w.flip(0).sin()
            optimizer.step()
        runs.append((p.detach(), optimizer.state[p]["theta"]))
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-7)


@needs_kernels
@pytest.mark.parametrize("size", [3, 40])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_fused_grad_rewiring_hides_no_nan(size, amsgrad):
    p = nn.Parameter(torch.ones(size))
    optimizer = GradRewiring([p], alpha=0.1, s=0.9, fused=True, amsgrad=amsgrad)
    p.grad = torch.ones(size)
    p.grad[1] = torch.nan
    optimizer.step()
    assert p.isnan().tolist() == [i == 1 for i in range(size)]


@needs_kernels
@pytest.mark.parametrize(
    "bad",
    [
        lambda: spiking_kernels.lif_linear_lif(torch.zeros(2, 3, dtype=torch.float64), torch.zeros(4, 3), 2),
        lambda: spiking_kernels.lif_linear_lif(torch.zeros(2, 3), torch.zeros(4, 5), 2),
        lambda: spiking_kernels.lif_linear_lif(torch.zeros(2, 3), torch.zeros(4, 3), 0),
        lambda: spiking_kernels.lif_linear_lif(torch.zeros(2, 3), torch.zeros(4, 3), 255),
        lambda: spiking_kernels.lif_linear_lif(torch.zeros(2, 3), torch.zeros(4, 3), 2, torch.zeros(3)),
        lambda: spiking_kernels.affine_lookup(
            torch.zeros(2, 1, 28, 28, dtype=torch.uint8),
            torch.tensor([2]),
            torch.zeros(1, 6, dtype=torch.int32),
            torch.zeros(256),
        ),
        lambda: spiking_kernels.affine_lookup(
            torch.zeros(2, 1, 28, 28, dtype=torch.uint8),
            torch.tensor([1, 0]),
            torch.zeros(1, 6, dtype=torch.int32),
            torch.zeros(256),
        ),
    ],
)
def test_what_the_kernels_cannot_take_is_refused(bad):
    """They work on bare memory: nothing may reach them that they do not expect."""
    with pytest.raises(ValueError, match=r"must|take|needs"):
        bad()


def test_without_a_compiler_the_plain_layers_run(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("CC", "no-such-compiler")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for cached in (spiking_kernels._library, spiking_kernels.available):
        cached.cache_clear()
    try:
        options = mnist.parse(mnist.RECIPE, ["--dump-dir", str(tmp_path / "runs")])
        assert not options.compile
        out = capsys.readouterr().out
        assert out.splitlines()[-1] == (
            "No fused kernels, there is no C compiler (no-such-compiler): running the plain layers."
        )
        network = spiking_mnist(2, "m")
        network.fused = True
        assert network(torch.randn(3, 1, 28, 28)).shape == (3, 10)
    finally:
        for cached in (spiking_kernels._library, spiking_kernels.available):
            cached.cache_clear()


def test_a_compiler_that_fails_is_reported_in_one_line(monkeypatch, tmp_path):
    def fail(command, **kwargs):
        raise subprocess.CalledProcessError(1, command, stderr="cpu.c:1: no OpenMP\nmore")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(spiking_kernels.Unavailable, match=r"^the C compiler fails \(cpu.c:1: no OpenMP\)$"):
        spiking_kernels.build()
    assert list((tmp_path / "gradrewire").iterdir()) == []


@needs_kernels
def test_no_compile_runs_none_of_them(tmp_path, mnist_folder, monkeypatch):
    used = []
    for name in ("lif_linear_lif", "affine_lookup", "grad_rewiring_step"):
        kernel = getattr(spiking_kernels, name)
        monkeypatch.setattr(
            spiking_kernels, name, lambda *a, name=name, kernel=kernel, **k: used.append(name) or kernel(*a, **k)
        )
    argv = ["-m", "grad", "-s", "0.95", "-b", "8", "-N", "1", "--dataset-dir", str(mnist_folder), "--dump-dir"]
    assert mnist.main([*argv, str(tmp_path / "a"), "--no-compile"]) == 0
    assert used == []
    assert mnist.main([*argv, str(tmp_path / "b")]) == 0
    assert set(used) == {"lif_linear_lif", "affine_lookup", "grad_rewiring_step"}
