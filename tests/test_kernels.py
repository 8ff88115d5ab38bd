"""The fused kernels against the modules that they replace."""

import numpy as np
import pytest
import torch
from optim_helpers import parameters, train
from sanitize import VARIANTS
from scipy import stats
from spikingjelly.activation_based import functional, layer
from test_models import spiking_mnist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import measuring
import spiking_kernels
from deeprewire import DeepRewiring
from gradrewire import GradRewiring
from mnist import mnist
from mnist.data import MNIST
from spiking import lif
from spiking_kernels import build
from training import data
from training.options import parse

needs_kernels = pytest.mark.skipif(
    spiking_kernels.unavailable() is not None, reason=f"no fused kernels: {spiking_kernels.unavailable()}"
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
@pytest.mark.parametrize("T", [1, 2, 7, 8, 9, 30, 31, 254, 255, 300])
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
@pytest.mark.parametrize("T", [1, 2, 7, 8, 9, 30, 31, 254, 255, 300])
@pytest.mark.parametrize(
    ("n", "h", "o"),
    [(1, 1, 1), (3, 800, 10), (128, 70, 10), (5, 65, 16), (2, 130, 17), (4, 63, 33), (7, 40, 130), (0, 3, 2)],
)
def test_a_whole_step_has_bitwise_the_gradients_of_its_parts(T, n, h, o):
    """And, but for the order of the loss's sum, the loss; of several classes with the most spikes the first counts."""
    generator = torch.Generator().manual_seed(1)
    current, weight = currents(n, h), torch.randn(o, h, generator=generator)
    current.flatten()[: n * h // 20] = torch.inf
    labels = torch.randint(0, o, (n,), generator=generator)
    x, w = current.clone().requires_grad_(), weight.clone().requires_grad_()
    counts = spiking_kernels.lif_linear_lif(x, w, T)
    expected = measuring.loss_function(counts, labels, T)
    expected.backward()
    given = current.clone()
    loss, right, grad_current, grad_weight = spiking_kernels.lif_linear_lif_learn(given, weight, labels, T)
    assert n * h < 10 or T == 1 or (counts.sum() > 0 and w.grad.nan_to_num().abs().sum() > 0)
    assert loss.shape == right.shape == ()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-6, atol=0, equal_nan=True)
    assert right.dtype == torch.int64
    assert n == 0 or torch.equal(right, measuring.correct(counts.detach(), labels))
    for ours, theirs in ((given, current), (grad_current, x.grad), (grad_weight, w.grad)):
        assert torch.equal(ours.isnan(), theirs.isnan())
        assert torch.equal(ours.nan_to_num(), theirs.nan_to_num())
    turned = spiking_kernels.lif_linear_lif_learn(current.t().contiguous().t(), weight, labels, T)
    for ours, theirs in zip(turned, (loss, right, grad_current, grad_weight), strict=True):
        assert torch.equal(ours.nan_to_num(), theirs.nan_to_num())
        assert ours.is_contiguous()


@needs_kernels
def test_a_step_refuses_what_the_layers_refuse_or_multiply_by_0():
    for labels, bad in (([0, 3], None), ([0, -1], None), ([0, 2**40], None), ([0, 1], torch.inf), ([0, 1], torch.nan)):
        weight = torch.ones(3, 6)
        if bad is not None:
            weight[1, 2] = bad
        with pytest.raises(spiking_kernels.Unfit, match=r"^weight is not finite, or labels has one that is none$"):
            spiking_kernels.lif_linear_lif_learn(currents(2, 6), weight, torch.tensor(labels), 8)
    for current in (torch.zeros(4, 6)[::2], torch.zeros(4, 12)[:, ::2], torch.zeros(2, 4, 6).transpose(0, 1)):
        with pytest.raises(spiking_kernels.Unfit, match=r"^current is not contiguous$"):
            spiking_kernels.lif_linear_lif_learn(current, torch.ones(3, 6), torch.zeros(len(current)).long(), 8)


@needs_kernels
@pytest.mark.parametrize("size", [28, 17, 70])
def test_affine_lookup_is_bitwise_the_plain_path(size):
    images = torch.randint(0, 256, (300, 1, size, size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    matrices = MNIST.augmentation.draw(images, torch.Generator().manual_seed(1))
    index = torch.randperm(300, generator=torch.Generator().manual_seed(2))[:128]
    normalise = data.Normalisation((0.1307,), (0.3081,), torch.device("cpu"))
    expected = normalise(MNIST.augmentation.apply(images[index], matrices[:128]))
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
        batches = data.TrainingBatches(split, 8, MNIST.augmentation, normalise, generator, fused=fused)
        epochs.append([*batches, *batches])
    assert len(calls) == 12
    for (x, y), (a, b) in zip(*epochs, strict=True):
        assert torch.equal(x, a)
        assert torch.equal(y, b)


class Turned(data.RandomAffine):
    @staticmethod
    def apply(images, matrices):
        return data.RandomAffine.apply(images, matrices).flip(-1)


class Halved(data.Normalisation):
    def __call__(self, images):
        return super().__call__(images) / (2 if images.shape[-2] == 28 else 1)  # the table is made of one row


def test_batches_that_the_kernel_would_make_otherwise_are_left_to_torch(monkeypatch):
    """Changed augmentations and normalisations, images of other layouts, and a machine without kernels."""
    images = torch.randint(0, 256, (20, 1, 28, 28), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    affine, cpu = dict(degrees=30, translate=(0.1, 0.1), scale=(0.9, 1.1)), torch.device("cpu")
    plain, normalise = data.RandomAffine(**affine), data.Normalisation((0.1,), (0.3,), cpu)
    own = data.RandomAffine(**affine)
    own.apply = lambda images, matrices: images
    strided = images.flatten(2).transpose(0, 2).contiguous().transpose(0, 2).unflatten(2, (28, 28))
    assert not strided.is_contiguous()
    assert torch.equal(strided, images)

    def batches(images, augmentation, normalisation, fused):
        generator, split = torch.Generator().manual_seed(3), data.Split(images, torch.arange(20) % 10)
        return data.TrainingBatches(split, 8, augmentation, normalisation, generator, fused=fused)

    for given in (
        (images, Turned(**affine), normalise),
        (images, own, normalise),
        (images, plain, Halved((0.1,), (0.3,), cpu)),
        (images.expand(-1, 3, -1, -1).contiguous(), plain, data.Normalisation((0.1,) * 3, (0.3,) * 3, cpu)),
        (strided, plain, normalise),
    ):
        fused = batches(*given, fused=True)
        assert not fused.fused
        for (x, _), (y, _) in zip(fused, batches(*given, fused=False), strict=True):
            assert torch.equal(x, y)
    assert batches(images, plain, normalise, fused=True).fused == (spiking_kernels.unavailable() is None)
    monkeypatch.setattr(spiking_kernels, "unavailable", lambda: "there is none")
    assert not batches(images, plain, normalise, fused=True).fused


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
        with measuring.SpikeCounter(network) as spikes:
            counts = network(images)
        measuring.loss_function(counts, labels, T).backward()
        results.append((counts.detach(), spikes.rates(), [p.grad for p in network.parameters()]))
    assert calls == [1]
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


@pytest.fixture(params=VARIANTS)
def kernels(request, monkeypatch):
    """The kernels as built for this processor, and those for AVX2, if it has that, and in plain C."""
    if options := VARIANTS[request.param]:
        library = build.library(*options)
        monkeypatch.setattr(build, "library", lambda: library)
    return spiking_kernels


@needs_kernels
@pytest.mark.parametrize("settings", [{}, dict(alpha=0.0), dict(amsgrad=True, weight_decay=0.02, maximize=True)])
@pytest.mark.parametrize("size", [1, 15, 16, 1000, 5000])
def test_fused_grad_rewiring(settings, size, kernels, monkeypatch):
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
def test_fused_grad_rewiring_of_many_weights(n, kernels):
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
def test_fused_grad_rewiring_hides_no_nan(size, amsgrad, kernels):
    p = nn.Parameter(torch.ones(size))
    optimizer = GradRewiring([p], alpha=0.1, s=0.9, fused=True, amsgrad=amsgrad)
    p.grad = torch.ones(size)
    p.grad[1] = torch.nan
    optimizer.step()
    assert p.isnan().tolist() == [i == 1 for i in range(size)]


# -- Deep R: its random numbers ----------------------------------------------------------------------


def philox(counters, key):
    """Philox4x32-10 of counters [N, 4] (four 32-bit words in uint64) and a key of two words."""
    (c0, c1, c2, c3), (k0, k1), low = counters.T.copy(), (int(k) for k in key), np.uint64(0xFFFFFFFF)
    for _ in range(10):
        a, b = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (
            (b >> np.uint64(32)) ^ c1 ^ np.uint64(k0),
            b & low,
            (a >> np.uint64(32)) ^ c3 ^ np.uint64(k1),
            a & low,
        )
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=1)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_the_tests_own_generator_gives_the_known_answers(counter, key, expected):
    """Of the generator's authors (Random123, kat_vectors)."""
    assert philox(np.array([counter], dtype=np.uint64), key)[0].tolist() == expected


def words(seed, first, n, stream):
    """4 n random words [4, n] of n consecutive counters."""
    counter = np.arange(first, first + n, dtype=np.uint64)
    columns = [counter & np.uint64(0xFFFFFFFF), counter >> np.uint64(32), np.full_like(counter, stream), 0 * counter]
    return philox(np.stack(columns, axis=1), [seed & 0xFFFFFFFF, seed >> 32]).T


SEEDS = [0, 1, 2**63 - 1, 2**64 - 1, 0x123456789ABCDEF]


@needs_kernels
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("n", [1, 63, 513, 10_000])
def test_deep_rewirings_normal_numbers_are_philox_and_box_muller(kernels, seed, n):
    """Computed again in double precision; where a float's u is near 1, it rounds -ln u by up to 2^-25."""
    blocks = -(-n // 64)
    x = words(seed, 0, 16 * blocks, stream=0).reshape(4, blocks, 16).transpose(1, 0, 2)  # [blocks, 4, 16]
    radius = np.sqrt(-2 * np.log((x[:, 0::2] // 2 + 0.5) / 2**31))
    angle = 2 * np.pi * x[:, 1::2] / 2**32
    expected = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=2).reshape(-1)[:n]
    tolerance = 1e-6 + 2**-25 / np.repeat(radius, 2, axis=1).reshape(-1)[:n]
    normal, _ = kernels.deep_rewiring_draws(n, seed, 0.5)
    assert (np.abs(normal.double().numpy() - expected) < tolerance).all()


@needs_kernels
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("probability", [1e-9, 1e-3, 0.3, 1.0])
def test_deep_rewirings_choice_is_geometric_gaps(kernels, seed, probability):
    n, chunk = 10_000, 4096
    expected = np.zeros(n, dtype=bool)
    for start in range(0, n, chunk):
        x = np.stack([words(seed, start + 64 * i, 16, stream=1) for i in range(chunk // 64 + 1)])
        u = (x.reshape(-1) + 0.5) / 2**32
        gaps = np.floor(np.log(u) / np.log1p(-probability)) if probability < 1 else np.zeros(len(u))
        places = start + np.cumsum(1 + gaps) - 1
        expected[places[places < min(n, start + chunk)].astype(int)] = True
    _, chosen = kernels.deep_rewiring_draws(n, seed, probability)
    assert np.array_equal(chosen.numpy(), expected)
    assert probability < 1 or chosen.all()


@needs_kernels
def test_deep_rewirings_normal_numbers_are_normal():
    z = spiking_kernels.deep_rewiring_draws(1 << 22, 7, 1e-9)[0].double().numpy()
    n = len(z)
    # five standard errors
    assert abs(z.mean()) < 5 / n**0.5
    assert abs(z.var() - 1) < 5 * (2 / n) ** 0.5
    assert abs(stats.skew(z)) < 5 * (6 / n) ** 0.5
    assert abs(stats.kurtosis(z)) < 5 * (24 / n) ** 0.5
    assert stats.kstest(z[: 1 << 20], "norm").pvalue > 1e-3
    for bound in (4, 4.5, 5):
        for tail in (z > bound, z < -bound):
            expected = n * stats.norm.sf(bound)
            assert abs(tail.sum() - expected) < 5 * max(expected, 1) ** 0.5
    assert np.abs(z).max() > 5
    # no correlation between neighbours, within pairs (16 apart), batches (64), groups (512), nor of their sizes
    for lag in (1, 2, 4, 8, 15, 16, 17, 32, 64, 512, 4096):
        for x in (z, z**2):
            assert abs(np.corrcoef(x[lag:], x[:-lag])[0, 1]) < 5 / n**0.5, lag


@needs_kernels
def test_deep_rewirings_numbers_of_different_seeds_are_independent():
    """Of consecutive seeds, and of seeds that differ in any bit."""
    n = 1 << 16
    normal, chosen = spiking_kernels.deep_rewiring_draws(n, 5, 0.1)
    for other in [6, *(5 ^ (1 << bit) for bit in range(64))]:
        z, c = spiking_kernels.deep_rewiring_draws(n, other, 0.1)
        assert abs(torch.corrcoef(torch.stack([normal, z]))[0, 1]) < 5 / n**0.5, other
        assert abs(torch.corrcoef(torch.stack([normal**2, z**2]))[0, 1]) < 5 / n**0.5, other
        assert abs(torch.corrcoef(torch.stack([chosen, c]).double())[0, 1]) < 5 / n**0.5, other
    # nor has the choice anything to do with the noise
    assert abs(torch.corrcoef(torch.stack([chosen.double(), normal.double()]))[0, 1]) < 5 / n**0.5


@needs_kernels
@pytest.mark.parametrize("probability", [1e-4, 0.01, 0.5, 0.99])
def test_deep_rewiring_chooses_each_weight_with_the_probability_independently(probability):
    n, seeds = 3 * 4096 + 100, 400
    chosen = torch.stack(
        [spiking_kernels.deep_rewiring_draws(n, seed, probability)[1] for seed in range(seeds)]
    ).double()
    deviation = (probability * (1 - probability)) ** 0.5
    assert abs(chosen.mean() - probability) < 5 * deviation / (n * seeds) ** 0.5
    # each place as often as another, at the ends of the chunks too
    for places in (slice(0, 10), slice(4090, 4100), slice(n - 10, n)):
        assert abs(chosen[:, places].mean() - probability) < 5 * deviation / (10 * seeds) ** 0.5
    # as many in a seed as a binomial distribution gives
    assert chosen.sum(1).var() == pytest.approx(n * deviation**2, rel=5 * (2 / seeds) ** 0.5)
    for lag in (1, 2, 64, 4096):
        pairs = (chosen[:, lag:] * chosen[:, :-lag]).mean()
        assert abs(pairs - probability**2) < 5 * probability * (3 / (n * seeds)) ** 0.5  # variance <= 3 p^2 / N


# -- Deep R: the update ------------------------------------------------------------------------------


@pytest.fixture
def exact_sqrt(monkeypatch):
    """torch's square root of float32, rounded to the nearest: the one that it takes from its library is not always."""
    monkeypatch.setattr(torch, "_foreach_sqrt", lambda tensors: [x.double().sqrt().to(x.dtype) for x in tensors])


def draws_of_the_kernel(param, group, seed):
    """What the kernel draws for a step, as DeepRewiring._draw gives it; the seed stands for the uniforms."""
    normal, _ = spiking_kernels.deep_rewiring_draws(param.numel(), seed, 0.5)
    if not group["soft"]:
        active, noise, size = param.detach().flatten() != 0, torch.zeros_like(normal), spiking_kernels.NOISE_GROUP
        for n, z, a in zip(noise.split(size), normal.split(size), active.split(size), strict=True):
            n[a] = z[: int(a.sum())]
        normal = noise
    draws = {"noise": normal.view_as(param)} if group["T"] > 0 else {}
    return draws if group["soft"] or group["max_s"] == 1 else {**draws, "uniform": seed}


def reactivated_by_the_kernel(w, sign, seed, max_s, _whole):
    dormant = w == 0
    candidates = dormant & (sign != 0)
    if not candidates.any() or dormant.sum() <= max_s * w.numel():
        return torch.zeros_like(dormant)
    probability = (int(dormant.sum()) - max_s * w.numel()) / int(candidates.sum())
    return candidates & spiking_kernels.deep_rewiring_draws(w.numel(), seed, min(probability, 1.0))[1].view_as(w)


@pytest.fixture
def seeds(monkeypatch):
    """Those that the kernel gets, in turn."""
    used, kernel = [], spiking_kernels.deep_rewiring_step
    monkeypatch.setattr(
        spiking_kernels, "deep_rewiring_step", lambda *a, **k: used.append(k["seed"]) or kernel(*a, **k)
    )
    return used


FMA = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


@needs_kernels
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        dict(T=0.0),
        dict(l1=0.0),
        dict(max_s=1.0),
        dict(max_s=0.0),
        dict(eps=1e-3, betas=(0.5, 0.9)),
        dict(weight_decay=0.02),
        dict(amsgrad=True),
        dict(maximize=True),
        dict(amsgrad=True, weight_decay=0.02, maximize=True, T=0.0),
    ],
)
def test_fused_deep_rewiring_is_bitwise_the_plain_update(settings, soft, kernels, seeds, exact_sqrt, monkeypatch):
    """Given its draws, over 60 steps, with tails of every kind: weights, state and zeros.

    Without fused multiply-add it differs by rounding, which may decide whether a connection changes its sign.
    """
    torch.manual_seed(0)  # of the kernel's seeds
    settings = {"lr": 0.01, "l1": 0.01, "max_s": 0.4, "T": 0.02, "soft": soft, **settings}
    ours, theirs = (parameters(shapes=[(1,), (15,), (16,), (513,), (30, 41), (6, 3, 3, 3), (9000,)]) for _ in range(2))
    for params in (ours, theirs):
        params[4].data[:4] = 0  # connections that never were
    fused, plain = DeepRewiring(ours, fused=True, **settings), DeepRewiring(theirs, foreach=False, **settings)
    monkeypatch.setattr("deeprewire._reactivated", reactivated_by_the_kernel)
    monkeypatch.setattr(plain, "_draw", lambda p, group: draws_of_the_kernel(p, group, seeds.pop(0)))
    generator, left, came = torch.Generator().manual_seed(0), 0, 0
    for _ in range(60):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        before = [q.detach() != 0 for q in theirs]
        fused.step()
        plain.step()
        left += sum(int((b & (q == 0)).sum()) for b, q in zip(before, theirs, strict=True))
        came += sum(int((~b & (q != 0)).sum()) for b, q in zip(before, theirs, strict=True))
    if soft or settings["max_s"] > 0:
        assert left > 50
        assert came > 50 or (settings["T"] == 0 if soft else settings["max_s"] == 1)
    else:  # none stays dormant to the end of a step
        assert int((theirs[6].abs() == torch.tensor(1e-8)).sum()) > 50
    for p, q in zip(ours, theirs, strict=True):
        assert fused.state[p].keys() == plain.state[q].keys()
        pairs = [(p.detach(), q.detach()), *((fused.state[p][key], value) for key, value in plain.state[q].items())]
        for a, b in pairs:
            assert a.dtype == b.dtype
            if FMA:
                assert torch.equal(a, b)
            else:
                assert int((~torch.isclose(a, b, rtol=1e-5, atol=1e-6)).sum()) <= a.numel() / 500


@needs_kernels
@pytest.mark.parametrize("soft", [False, True])
def test_fused_deep_rewiring_is_reproducible(soft):
    """Under a seed, and from a saved state of the generator; each step and parameter draws anew."""
    settings = dict(lr=0.01, l1=0.01, max_s=0.4, T=0.02, soft=soft, fused=True)

    def run(state=None):
        params = parameters()
        optimizer = DeepRewiring(params, **settings)
        train(optimizer, params, steps=5)
        if state is not None:
            torch.set_rng_state(state)
        saved = torch.get_rng_state()
        for _ in range(5):
            for p in params:
                p.grad = torch.ones_like(p)
            optimizer.step()
        return saved, [p.detach() for p in params]

    saved, first = run()
    _, second = run()
    torch.manual_seed(99)
    _, restored = run(state=saved)
    torch.manual_seed(99)
    _, other = run(state=torch.get_rng_state())
    for a, b, c, d in zip(first, second, restored, other, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
        assert a.numel() < 10 or not torch.equal(a, d)


@needs_kernels
@pytest.mark.parametrize(
    ("settings", "draws"),
    [
        (dict(T=0.0, max_s=0.4), True),
        (dict(T=0.02, max_s=1.0), True),
        (dict(T=0.0, max_s=1.0), False),
        (dict(T=0.02, max_s=0.4, soft=True), True),
        (dict(T=0.0, max_s=0.4, soft=True), False),
    ],
)
def test_fused_deep_rewiring_draws_one_seed_for_a_step_that_needs_one(settings, draws, seeds):
    params = parameters()
    optimizer = DeepRewiring(params, fused=True, **settings)
    torch.manual_seed(0)
    expected = [int(torch.empty((), dtype=torch.int64).random_()) if draws else 0 for _ in range(2 * len(params))]
    after = torch.get_rng_state()
    torch.manual_seed(0)
    for _ in range(2):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
    assert seeds == expected
    assert torch.equal(torch.get_rng_state(), after)
    assert not draws or (len(set(seeds)) == len(seeds) and max(seeds) > 2**60)


@needs_kernels
@pytest.mark.parametrize("soft", [False, True])
def test_fused_deep_rewiring_does_not_depend_on_the_number_of_threads(soft, kernel_threads):
    results = []
    for threads in (1, 2, 3, 7):
        kernel_threads(threads)
        params = parameters(shapes=[(100_003,), (30, 20)])
        optimizer = DeepRewiring(params, lr=0.01, l1=0.01, max_s=0.4, T=0.02, soft=soft, fused=True)
        train(optimizer, params, steps=20)
        results.append([p.detach() for p in params])
    assert float((results[0][0] == 0).float().mean()) > 0.1
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))


@needs_kernels
@pytest.mark.parametrize("size", [3, 40])
@pytest.mark.parametrize("settings", [{}, dict(soft=True), dict(amsgrad=True)])
def test_fused_deep_rewiring_hides_no_nan(size, settings, kernels):
    """Neither of active nor of dormant connections, as the plain update."""
    p = nn.Parameter(torch.ones(size))
    optimizer = DeepRewiring([p], max_s=1.0, fused=True, **settings)
    p.grad = torch.zeros(size)
    optimizer.step()
    p.data[2] = 0
    if "theta" in optimizer.state[p]:
        optimizer.state[p]["theta"][2] = -1
    p.grad[1:3] = torch.nan
    optimizer.step()
    assert p.isnan().tolist() == [i in (1, 2) for i in range(size)]


@needs_kernels
def test_the_kernels_leave_what_they_do_not_take_to_torch(monkeypatch):
    """Other types and layouts, of weights, gradients and state."""
    left = []
    monkeypatch.setattr("rewiring._compiled", lambda update: lambda lists, **_: left.extend(lists["weight"]))

    def step(param, grad, change_state=lambda state: None):
        for optimizer in (GradRewiring([param], alpha=0, fused=True), DeepRewiring([param], max_s=0.5, fused=True)):
            param.grad = torch.ones_like(param)
            optimizer.step()
            left.clear()
            param.grad = grad
            change_state(optimizer.state[param])
            optimizer.step()
            yield bool(left)

    plain = torch.ones(4, 6)
    assert list(step(nn.Parameter(plain.clone()), plain)) == [False, False]
    assert list(step(nn.Parameter(plain.double()), plain.double())) == [True, True]
    assert list(step(nn.Parameter(torch.ones(6, 4).t()), torch.ones(6, 4).t())) == [True, True]
    assert list(step(nn.Parameter(plain.clone()), torch.ones(6, 4).t())) == [True, True]

    def transpose(state):
        state["exp_avg"] = state["exp_avg"].t().contiguous().t()

    assert list(step(nn.Parameter(plain.clone()), plain, transpose)) == [True, True]
    assert list(step(nn.Parameter(plain.clone()), inferred(plain))) == [True, True]  # torch does not count its changes
    assert list(step(nn.Parameter(plain.clone()), plain)) == [False, False]

    def infer(state):
        with torch.inference_mode():
            state["exp_avg"] = torch.zeros(4, 6)

    assert list(step(nn.Parameter(plain.clone()), plain, infer)) == [True, True]


# -- what the kernels are handed ---------------------------------------------------------------------


def arguments_of(name):
    """The tensors that a kernel takes, by their names, and a function that calls it with them."""
    generator = torch.Generator().manual_seed(0)
    if name == "lif_linear_lif":
        tensors = {"current": currents(4, 6), "weight": torch.randn(3, 6, generator=generator)}
        tensors["spikes"] = torch.zeros(6, dtype=torch.int64)
        return tensors, lambda t: spiking_kernels.lif_linear_lif(t["current"], t["weight"], 8, t["spikes"])
    if name == "lif_linear_lif_learn":
        tensors = {"current": currents(4, 6), "weight": torch.randn(3, 6, generator=generator)}
        tensors["labels"] = torch.tensor([2, 0, 1, 2])
        return tensors, lambda t: spiking_kernels.lif_linear_lif_learn(t["current"], t["weight"], t["labels"], 8)
    if name == "affine_lookup":
        images = torch.randint(0, 256, (5, 1, 4, 4), generator=generator, dtype=torch.uint8)
        tensors = {"images": images, "index": torch.tensor([3, 0]), "table": torch.arange(256.0)}
        tensors["matrices"] = torch.tensor([[65536, 0, 0, 0, 65536, 0]] * 2, dtype=torch.int32)
        return tensors, lambda t: spiking_kernels.affine_lookup(t["images"], t["index"], t["matrices"], t["table"])
    names = ("param", "grad", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "theta")
    tensors = {key: torch.rand(3, 6, generator=generator) for key in names}
    tensors |= {"sign": torch.ones(3, 6, dtype=torch.int8), "step": torch.tensor(3.0)}
    return tensors, lambda t: update(name, spiking_kernels.Memory(**{k: t[k] for k in t.keys() - {"grad"}}), t["grad"])


def update(name, memory, grad):
    """A step of a kernel."""
    settings = dict(lr=0.1, betas=(0.9, 0.99), eps=1e-8, weight_decay=None, amsgrad=True, maximize=False)
    if name == "grad_rewiring_step":
        settings = spiking_kernels.Settings(**settings, alpha=None, mu=None)
        spiking_kernels.grad_rewiring_step(memory, grad, settings)
    else:
        settings = spiking_kernels.Settings(**settings, l1=0.0, T=None, max_s=0.5, theta_min=None)
        spiking_kernels.deep_rewiring_step(memory, grad, settings, seed=0)


def resized(x):
    x = x.clone()
    x.untyped_storage().resize_(0)
    return x


class Subclass(torch.Tensor):
    pass


SPOILT = {
    "dtype": lambda x: x.to(torch.float16 if x.dtype != torch.float16 else torch.float32),
    "float64": lambda x: x.double(),
    "meta": lambda x: x.to("meta"),
    "sparse": lambda x: x.to_sparse(),
    "subclass": lambda x: x.as_subclass(Subclass),
    "array": lambda x: x.numpy(),
    "nothing": lambda x: None,
    "shape": lambda x: torch.cat([x, x], 1 if x.dim() > 1 else 0) if x.dim() else torch.stack([x, x]),
    "axes": lambda x: x.unsqueeze(0),
    "freed": resized,
    "zeros": lambda x: torch._efficientzerotensor(x.shape, dtype=x.dtype),
}
KERNELS = ("lif_linear_lif", "lif_linear_lif_learn", "affine_lookup", "grad_rewiring_step", "deep_rewiring_step")


@needs_kernels
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("spoilt", SPOILT)
def test_tensors_that_the_kernels_cannot_take_are_refused_by_name(kernel, spoilt):
    """They work on bare memory: nothing may reach them that they do not expect."""
    tensors, call = arguments_of(kernel)
    call({key: tensor.clone() for key, tensor in tensors.items()})
    for name in tensors:
        given = {key: tensor.clone() for key, tensor in tensors.items()}
        given[name] = SPOILT[spoilt](given[name])
        if given[name] is None and name in ("spikes", "max_exp_avg_sq", "theta" if kernel.startswith("deep") else ""):
            continue  # it may be left out
        with pytest.raises(spiking_kernels.Unfit, match=rf"^{name} |^\w+ has the shape|must be \[N, H\] and \[O, H\]$"):
            call(given)
        assert all(torch.equal(given[key], tensor) for key, tensor in tensors.items() if key != name)


@needs_kernels
@pytest.mark.parametrize("kernel", ["grad_rewiring_step", "deep_rewiring_step"])
def test_tensors_that_share_memory_are_refused(kernel):
    tensors, call = arguments_of(kernel)
    memory = torch.rand(40)
    for name in tensors.keys() - {"sign"}:
        for other in tensors.keys() - {"sign", name}:
            given = {key: tensor.clone() for key, tensor in tensors.items()}
            end, size = tensors[name].numel(), tensors[other].numel()
            given[name] = memory[:end].view(tensors[name].shape)
            given[other] = memory[end - 1 : end - 1 + size].view(tensors[other].shape)
            with pytest.raises(spiking_kernels.Unfit, match=rf"^{name} shares .* {other}$|^{other} shares .* {name}$"):
                call(given)
            given[other] = memory[end : end + size].view(tensors[other].shape)  # side by side
            call(given)


def moved(x, to):
    x.data = to(x)
    return x


def inferred(x):
    with torch.inference_mode():
        return torch.empty(0).set_(x.untyped_storage(), 0, x.shape, x.stride())


CHANGED = {  # a gradient that was taken once; most are the same object
    "negated": torch._neg_view,
    "subclass": lambda x: x.as_subclass(Subclass),
    "nothing": lambda x: None,
    "dtype": lambda x: moved(x, lambda y: y.double()),
    "bits": lambda x: moved(x, lambda y: y.view(torch.int32)),
    "strides": lambda x: x.t_(),
    "shape": lambda x: x.unsqueeze_(0),
    "fewer": lambda x: moved(x, lambda y: y[:2]),
    "inferred": inferred,
    "freed": lambda x: x.untyped_storage().resize_(0) and x,
    "cut short": lambda x: x.untyped_storage().resize_(x.nbytes - 4) and x,
}


@needs_kernels
@pytest.mark.parametrize("kernel", ["grad_rewiring_step", "deep_rewiring_step"])
@pytest.mark.parametrize("change", CHANGED)
def test_a_gradient_that_does_not_stay_as_it_is_is_checked_again(kernel, change):
    tensors = {key: torch.rand(4, 4) for key in ("param", "exp_avg", "exp_avg_sq", "theta")}
    tensors |= {"sign": torch.ones(4, 4, dtype=torch.int8), "step": torch.tensor(3.0)}
    memory, grad = spiking_kernels.Memory(**tensors), torch.ones(4, 4)
    update(kernel, memory, grad)
    update(kernel, memory, grad)
    before = {key: tensor.clone() for key, tensor in tensors.items()}
    with pytest.raises(spiking_kernels.Unfit, match=r"^grad "):
        update(kernel, memory, CHANGED[change](grad))
    with pytest.raises(spiking_kernels.Unfit, match="shares memory"):
        update(kernel, memory, tensors["exp_avg"])
    assert all(torch.equal(tensors[key], tensor) for key, tensor in before.items())


@needs_kernels
@pytest.mark.parametrize("kernel", ["grad_rewiring_step", "deep_rewiring_step"])
def test_a_kernel_takes_the_gradient_that_it_is_given(kernel):
    """Another one, the same one with other numbers, or elsewhere: not that of the step before."""

    def steps(again):
        tensors, _ = arguments_of(kernel)
        grad = tensors.pop("grad")
        memory = spiking_kernels.Memory(**tensors)
        for change in (lambda x: x, lambda x: x + 1, lambda x: x.mul_(2), lambda x: moved(x, lambda y: y - 1)):
            grad = change(grad)
            update(kernel, memory if again else spiking_kernels.Memory(**tensors), grad)
        return tensors

    kept, new = steps(True), steps(False)
    assert kept["step"] == 7
    assert all(torch.equal(kept[key], new[key]) for key in new)


@needs_kernels
@pytest.mark.parametrize("kernel", ["grad_rewiring_step", "deep_rewiring_step"])
def test_an_update_by_a_kernel_is_a_change_to_autograd(kernel):
    """A graph that needs the weights as they were must not go on with the new ones without a word."""
    tensors, call = arguments_of(kernel)
    tensors["param"].requires_grad_()
    output = tensors["param"].square().sum()
    call(tensors)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.backward()


@needs_kernels
@pytest.mark.parametrize(
    ("call", "message"),
    [
        *[
            (
                lambda T=T: spiking_kernels.lif_linear_lif(torch.zeros(2, 3), torch.zeros(4, 3), T),
                r"^T=.*from 1 to 65534$",
            )
            for T in (0, -1, 65535, 2**32 + 1, 2.0, True, None)
        ],
        (lambda: spiking_kernels.lif_linear_lif(torch.zeros(2, 3), torch.zeros(0, 3), 2), "^O=0 .* from 1 to"),
        (lambda: spiking_kernels.lif_linear_lif(torch.zeros(2, 0), torch.zeros(4, 0), 2), "^H=0 .* from 1 to"),
        (lambda: spiking_kernels.deep_rewiring_draws(-1, 0, 0.5), "^n=-1 "),
        (lambda: spiking_kernels.deep_rewiring_draws(5, 2**64, 0.5), "^seed=18446744073709551616 "),
        (lambda: spiking_kernels.deep_rewiring_draws(5, -1, 0.5), "^seed=-1 "),
        (lambda: spiking_kernels.deep_rewiring_draws(5, 0, 0.0), "^probability=0.0 "),
        (lambda: spiking_kernels.deep_rewiring_draws(5, 0, float("nan")), "^probability=nan "),
    ],
)
def test_numbers_that_the_kernels_cannot_take_are_refused_by_name(call, message):
    with pytest.raises(spiking_kernels.Unfit, match=message):
        call()


@needs_kernels
@pytest.mark.parametrize("index", [[5], [-1], [0, 2**40]])
def test_an_index_of_no_image_is_refused(index):
    tensors, call = arguments_of("affine_lookup")
    tensors["matrices"] = tensors["matrices"][:1].repeat(len(index), 1)
    with pytest.raises(spiking_kernels.Unfit, match=r"^index must be of images that are there, from 0 to 4$"):
        call(tensors | {"index": torch.tensor(index)})


@needs_kernels
def test_tensors_in_another_order_of_memory_are_laid_out():
    """Transposed, expanded, and those whose memory holds their negative."""
    tensors, call = arguments_of("lif_linear_lif")
    expected = call(tensors | {"spikes": None})
    negative = [torch.complex(torch.zeros_like(x), -x).conj().imag for x in (tensors["current"], tensors["weight"])]
    assert all(x.is_neg() for x in negative)
    for current, weight in ([x.t().contiguous().t() for x in (tensors["current"], tensors["weight"])], negative):
        assert torch.equal(spiking_kernels.lif_linear_lif(current, weight, 8), expected)
    one = tensors["current"][:1]
    repeated = spiking_kernels.lif_linear_lif(one.expand(3, 6), tensors["weight"], 8)
    assert torch.equal(repeated, expected[:1].expand(3, 3))


@needs_kernels
@pytest.mark.parametrize("kind", ["float64", "bfloat16", "float16", "meta", "cpu"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_kernels_do_not_depend_on_torchs_defaults(kernel, kind):
    """Nor does a pass backward; with other defaults the same numbers, and nothing beside what is theirs is written."""

    def results():
        tensors, call = made
        learns = ("current", "weight") if kernel == "lif_linear_lif" else ()
        given = {key: tensor.clone().requires_grad_(key in learns) for key, tensor in tensors.items()}
        out = call(given)
        if kernel == "lif_linear_lif_learn":
            return [*out]
        if kernel == "lif_linear_lif":
            out.sum().backward()
            return [out.detach(), given["current"].grad, given["weight"].grad, given["spikes"]]
        return [*given.values()] if out is None else [out]

    made = arguments_of(kernel)
    expected, dtype = results(), torch.get_default_dtype()
    try:
        if kind in ("meta", "cpu"):
            torch.set_default_device(kind)
        else:
            torch.set_default_dtype(getattr(torch, kind))
        found = results()
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(dtype)
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@needs_kernels
def test_where_torch_makes_no_plain_tensors_the_kernels_refuse():
    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            made = function(*args, **(kwargs or {}))
            return made.as_subclass(Subclass) if function is torch.ops.aten.empty.memory_format else made

    tensors, call = arguments_of("lif_linear_lif")
    with Mode(), pytest.raises(spiking_kernels.Unfit, match=r"torch\.empty makes a Subclass"):
        call(tensors)
    with pytest.raises(spiking_kernels.Unfit, match=r"^current belongs to a transform of torch\.func"):
        torch.func.vmap(lambda x: spiking_kernels.lif_linear_lif(x, tensors["weight"], 8))(torch.zeros(2, 4, 6))


@needs_kernels
def test_hooks_are_called_once_where_torch_computes_the_gradients():
    found = []
    for factor in (1, 2):
        generator = torch.Generator().manual_seed(0)
        tensors = [torch.randn(*shape, generator=generator).requires_grad_() for shape in ((3, 20), (7, 20))]
        counts = spiking_kernels.lif_linear_lif(*tensors, 5)
        for tensor in tensors if factor > 1 else ():
            tensor.register_hook(lambda g: 2 * g)
        found.append(torch.autograd.grad(counts.square().sum(), tensors, create_graph=True))
    for once, doubled in zip(*found, strict=True):
        assert once.any()
        assert torch.equal(doubled, 2 * once)


@needs_kernels
@pytest.mark.parametrize("T", [3, 40])
def test_gradients_of_gradients_are_those_of_the_layers(T):
    """Exact multiples of 1/64, as above: no spike may differ."""
    weight = (torch.randn(3, 30, generator=torch.Generator().manual_seed(1)) * 32).round() / 64
    results = []
    for fused in (False, True):
        current = currents(5, 30).clamp(-10, 10).requires_grad_()
        if fused:
            w = weight.clone().requires_grad_()
            counts = spiking_kernels.lif_linear_lif(current, w, T)
        else:
            counts, _, w = reference(current, weight, T)
        gradients = torch.autograd.grad(counts.square().sum(), (current, w), create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in gradients), (current, w))
        results.append([counts, *gradients, *second])
    for a, b in zip(*results, strict=True):
        assert b.abs().sum() > 0
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5 * float(a.detach().abs().max()))


@needs_kernels
def test_gradients_of_every_kind_reach_the_layers():
    """Expanded, negative in memory, of another dtype, and with what was saved turned into other tensors."""
    tensors, _ = arguments_of("lif_linear_lif")

    def gradients(grad, hooks=(lambda x: x, lambda x: x)):
        current, weight = (tensors[key].clone().requires_grad_() for key in ("current", "weight"))
        with torch.autograd.graph.saved_tensors_hooks(*hooks):
            counts = spiking_kernels.lif_linear_lif(current, weight, 8)
        counts.backward(grad)
        return current.grad, weight.grad

    ones = torch.ones(4, 3)
    expected = gradients(ones)
    negative = torch.complex(ones, -ones).conj().imag
    assert negative.is_neg()
    for grad in (torch.ones(()).expand(4, 3), negative, ones.double(), torch.ones(3, 4).t()):
        assert all(torch.equal(a, b) for a, b in zip(gradients(grad), expected, strict=True))
    for back in (lambda x: x.as_subclass(Subclass), lambda x: x.t().contiguous().t() if x.dim() == 2 else x):
        for a, b in zip(gradients(ones, (lambda x: x, back)), expected, strict=True):
            torch.testing.assert_close(a.as_subclass(torch.Tensor), b, rtol=1e-4, atol=1e-6)


@needs_kernels
def test_what_is_not_finite_is_as_in_the_layers():
    """After an infinite potential a reset gives NaN: one spike, and no more."""
    infinite = torch.tensor([[torch.inf, -torch.inf, torch.nan, 1.5, 3e38]])
    for current, weight in ((infinite, torch.eye(5) * 3), (torch.full((1, 2), 1.5), torch.tensor([[3e38, 3e38]]))):
        ours, theirs = current.clone().requires_grad_(), current.clone().requires_grad_()
        first = torch.zeros(current.shape[1], dtype=torch.int64)
        counts, (expected, spikes, _) = (
            spiking_kernels.lif_linear_lif(ours, weight, 5, first),
            reference(theirs, weight, 5),
        )
        assert torch.equal(counts, expected)
        assert torch.equal(first, spikes.sum((0, 1)).long())
        counts.sum().backward()
        expected.sum().backward()
        torch.testing.assert_close(ours.grad, theirs.grad, equal_nan=True, rtol=1e-5, atol=0)


def test_without_a_compiler_the_plain_layers_run(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("CC", "no-such-compiler")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for cached in (build.library, build.unavailable):
        cached.cache_clear()
    try:
        options = parse(mnist.EXPERIMENT, ["--dump-dir", str(tmp_path / "runs")])
        assert not options.compile
        out = capsys.readouterr().out
        assert out.splitlines()[-1] == (
            "No fused kernels, there is no C compiler (no-such-compiler): running the plain layers."
        )
        network = spiking_mnist(2, "m")
        network.fused = True
        assert network(torch.randn(3, 1, 28, 28)).shape == (3, 10)
    finally:
        for cached in (build.library, build.unavailable):
            cached.cache_clear()


@needs_kernels
@pytest.mark.parametrize(
    ("mode", "update"),
    [
        (["grad", "-s", "0.95"], "grad_rewiring_step"),
        (["deep", "-s", "0.95"], "deep_rewiring_step"),
        (["deep", "-soft", "-s", "0.95"], "deep_rewiring_step"),
    ],
)
def test_no_compile_runs_none_of_them(tmp_path, mnist_folder, monkeypatch, mode, update):
    used = []
    for name in KERNELS:
        kernel = getattr(spiking_kernels, name)
        monkeypatch.setattr(
            spiking_kernels, name, lambda *a, name=name, kernel=kernel, **k: used.append(name) or kernel(*a, **k)
        )
    argv = ["-m", *mode, "-b", "8", "-N", "1", "--dataset-dir", str(mnist_folder), "--dump-dir"]
    assert mnist.main([*argv, str(tmp_path / "a"), "--no-compile"]) == 0
    assert used == []
    assert mnist.main([*argv, str(tmp_path / "b")]) == 0
    assert set(used) == {"lif_linear_lif", "lif_linear_lif_learn", "affine_lookup", update}
