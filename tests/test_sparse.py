"""The event-driven evaluation: the dense network's spikes, at every sparsity; and its benchmark's parts."""

import re

import pytest
import torch
from spikingjelly.activation_based import functional

import measuring
import spiking_kernels
from analysis.sparse import BLOCK, EventDrivenMnist, event_driven
from benchmarks import sparse as bench
from c10.model import Cifar10Net
from mnist.data import MNIST
from mnist.model import MnistNet

CPU = torch.device("cpu")


@torch.no_grad()
def network_of(first, second, T=8, gain=3.0, dtype=torch.float32) -> MnistNet:
    """A MnistNet with each layer pruned at random to a sparsity, whose neurons spike about as often at any."""
    torch.manual_seed(0)
    network, generator = MnistNet(T), torch.Generator().manual_seed(0)
    for weight, sparsity in zip(measuring.prunable(network).values(), (first, second), strict=True):
        weight.copy_(gain * bench.prune(weight, sparsity, generator) if sparsity < 1 else 0 * weight)
    return network.to(dtype).eval()


def images_of(n: int) -> torch.Tensor:
    return torch.randn(n, 1, 28, 28, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("T", [1, 2, 8, 40])
@pytest.mark.parametrize(("first", "second"), [(0.0, 0.0), (0.75, 0.75), (0.95, 0.95), (0.99, 0.5), (0.5, 0.99)])
def test_the_same_spikes_as_the_dense_network(first, second, T, fused):
    network = network_of(first, second, T, gain=3 if T > 2 else 12)
    dense = network(images_of(300))
    assert dense.sum() > 100
    evaluation = event_driven(network)
    assert evaluation.fused == (spiking_kernels.unavailable() is None)
    evaluation.fused &= fused
    found = evaluation(images_of(300))
    assert (found.shape, found.dtype) == (dense.shape, dense.dtype)
    # a sum in another order may move a potential over the threshold: rare, and one spike or its echo
    assert int((found != dense).sum()) <= 2
    assert float((found - dense).abs().max()) <= 1 + T // 8


@torch.no_grad()
def test_spikes_where_arithmetic_is_exact():
    """Whole multiples of 1/64, whose sums do not round: not one spike may differ."""
    network, generator = MnistNet(8), torch.Generator().manual_seed(0)
    for weight, scale in zip(measuring.prunable(network).values(), (64, 8), strict=True):
        kept = torch.rand(weight.shape, generator=generator) < 0.2
        weight.copy_(kept * torch.randint(-8, 9, weight.shape, generator=generator) / scale)
    images = torch.randint(0, 3, (500, 1, 28, 28), generator=generator).float()
    dense = network.eval()(images)
    assert len(dense.unique()) == 9
    evaluation = EventDrivenMnist(network)
    assert torch.equal(evaluation(images), dense)
    evaluation.fused = False
    assert torch.equal(evaluation(images), dense)


@torch.no_grad()
@pytest.mark.parametrize("current", [0.5, 1.0, 1.0039, 1.00393, 1.1, 1.3333333, 1.34, 1.99999, 2.0, 2.1, 50.0])
def test_one_hidden_neuron_by_the_plain_simulation(current):
    """Currents on both sides of those at which the period changes: 2 V / (2 - 1 / 2^(k - 1)) = V / (1 - 1 / 2^k)."""
    network = MnistNet(8).eval()
    for weight in network.parameters():
        weight.zero_()
    network.static_fc[1].weight[3, 0] = current
    network.fc[1].weight[:, 3] = torch.arange(10.0)
    images = torch.zeros(1, 1, 28, 28)
    images[0, 0, 0, 0] = 1
    dense = network(images)
    assert (dense.sum() > 0) == (current > 1.0039)
    evaluation = event_driven(network)
    assert torch.equal(evaluation(images), dense)
    evaluation.fused = False
    assert torch.equal(evaluation(images), dense)


@torch.no_grad()
@pytest.mark.parametrize(("first", "second"), [(1.0, 0.5), (0.5, 1.0), (1.0, 1.0)])
def test_without_connections_there_are_no_spikes(first, second):
    counts = event_driven(network_of(first, second))(images_of(3))
    assert torch.equal(counts, torch.zeros(3, 10))


@torch.no_grad()
@pytest.mark.parametrize("n", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 7])
def test_any_number_of_images(n):
    network = network_of(0.9, 0.5)
    evaluation = event_driven(network)
    evaluation.fused = False
    found = evaluation(images_of(n))
    assert torch.equal(event_driven(network)(images_of(n)), found)
    assert found.shape == (n, 10)
    dense = network(images_of(max(n, 1)))[:n]
    assert int((found != dense).sum()) <= 2


@torch.no_grad()
def test_neurons_as_they_are_set():
    network = network_of(0.9, 0.5, gain=6)
    network.fc[0].tau, network.fc[2].tau = 3.0, 1.5
    network.fc[0].v_threshold, network.fc[2].v_threshold = 0.8, 1.7
    dense = network(images_of(300))
    assert not torch.equal(dense, network_of(0.9, 0.5, gain=6)(images_of(300)))
    evaluation = event_driven(network)
    assert not evaluation.fused
    assert int((evaluation(images_of(300)) != dense).sum()) <= 2


@torch.no_grad()
def test_it_keeps_weights_of_its_own_and_only_what_is_connected():
    network = network_of(0.9, 0.9)
    evaluation = event_driven(network)
    evaluation.fused = False
    before = evaluation(images_of(5))
    leads_on = (network.fc[1].weight != 0).any(0)
    assert evaluation.first.shape == (int(leads_on.sum()), 784)
    assert evaluation.first.nnz == int((network.static_fc[1].weight[leads_on] != 0).sum())
    for weight in network.parameters():
        weight.zero_()
    assert torch.equal(evaluation(images_of(5)), before)


def add_bias(network):
    network.fc[1].bias = torch.nn.Parameter(torch.ones(10))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda n: setattr(n.fc[0], "v_reset", None), "fc.0 has v_reset None, not 0.0"),
        (lambda n: setattr(n.fc[2], "v_reset", -0.1), "fc.2 has v_reset -0.1, not 0.0"),
        (lambda n: setattr(n.fc[0], "decay_input", False), "fc.0 has decay_input False, not True"),
        (lambda n: setattr(n.fc[2].surrogate_function, "spiking", False), "surrogate_function has spiking False"),
        (add_bias, "fc.1 has the parameters weight, bias, not weight"),
        (lambda n: n.fc.append(torch.nn.Hardtanh()), "fc has 4 layers, not 3"),
        (lambda n: n.static_fc.append(torch.nn.ReLU()), "static_fc has 3 layers, not 2"),
        (lambda n: n.fc[1].register_forward_pre_hook(lambda m, i: (2 * i[0],)), "fc.1 has hooks"),
        (lambda n: setattr(n, "readout", lambda counts: counts + 1), "it has a readout of its own"),
        (lambda n: n.double(), "static_fc.1.weight is torch.float64"),
        (lambda n: n.bfloat16(), "static_fc.1.weight is torch.bfloat16"),
        (lambda n: n.fc[1].weight.data.__setitem__((0, 0), torch.nan), "fc.1.weight is not finite"),
        (lambda n: n.static_fc[1].weight.data.__setitem__((0, 0), torch.inf), "static_fc.1.weight is not finite"),
    ],
)
def test_networks_that_are_refused(change, message):
    """Each would be evaluated as another network."""
    network = network_of(0.5, 0.0)
    change(network)
    with pytest.raises(
        ValueError, match=f"^there is no event-driven evaluation of this network: .*{re.escape(message)}"
    ):
        event_driven(network)


def test_other_networks_are_refused():
    with torch.device("meta"):
        network = Cifar10Net()
    with pytest.raises(ValueError, match="Cifar10Net has no event-driven evaluation"):
        event_driven(network)
    network = network_of(0.5, 0.0)
    network.__class__ = type("Mine", (MnistNet,), {})
    with pytest.raises(ValueError, match="Mine has no event-driven evaluation"):
        event_driven(network)


@pytest.mark.parametrize("kind", ["to", "double", "meta", "sparse"])
def test_images_that_are_refused(kind):
    images = images_of(3)
    bad = {"to": images.bfloat16(), "double": images.double(), "meta": images.to("meta"), "sparse": images.to_sparse()}
    with pytest.raises(ValueError, match=r"^images is torch\."):
        event_driven(network_of(0.5, 0.0))(bad[kind])


@torch.no_grad()
@pytest.mark.parametrize(("place", "key"), [(0, "tau"), (2, "tau"), (0, "v_threshold"), (2, "v_threshold")])
def test_the_kernel_runs_the_papers_neurons_only(place, key):
    network = network_of(0.9, 0.5, gain=6)
    plain = network(images_of(300))
    setattr(network.fc[place], key, 1.5)
    dense = network(images_of(300))
    assert int((dense != plain).sum()) > 100
    evaluation = event_driven(network)
    assert not evaluation.fused
    assert int((evaluation(images_of(300)) != dense).sum()) <= 2


@torch.no_grad()
@pytest.mark.skipif(spiking_kernels.unavailable() is not None, reason="no fused kernels")
def test_how_a_network_is_run_changes_no_spike():
    """Step by step, with another surrogate derivative, and with potentials left behind."""
    network = network_of(0.9, 0.5)
    expected = event_driven(network)(images_of(20))
    network.step_mode = "s"
    functional.set_step_mode(network.fc, "s")
    network.fc[0].v = torch.ones(4)
    evaluation = event_driven(network)
    assert evaluation.fused
    assert torch.equal(evaluation(images_of(20)), expected)
    network.fc[2].surrogate_function.alpha = 5.0
    assert int((event_driven(network)(images_of(20)) != expected).sum()) <= 1


@torch.no_grad()
def test_real_images(real_data):
    images = MNIST.normalisation(CPU)(MNIST.load(real_data).test.images[:2000])
    for sparsity in bench.SPARSITIES:
        network = bench.random_network(sparsity)
        dense = network(images)
        assert int((event_driven(network)(images) != dense).sum()) <= 4


# -- the benchmark ---------------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", bench.SPARSITIES)
def test_pruning_is_exact_and_keeps_the_spread(sparsity):
    weight = torch.randn(100, 784, generator=torch.Generator().manual_seed(0))
    pruned = bench.prune(weight, sparsity, torch.Generator().manual_seed(1))
    assert int((pruned == 0).sum()) == round(sparsity * weight.numel())
    assert float(pruned.norm()) == pytest.approx(float(weight.norm()), rel=0.05)
    kept = pruned != 0
    torch.testing.assert_close(pruned[kept] * (1 - sparsity) ** 0.5, weight[kept])


def test_all_executions_of_the_benchmark_compute_the_same():
    network = network_of(0.9, 0.9)
    made = bench.executions(network)
    dense = network(images_of(50))
    assert next(iter(made)) == "dense, layers"
    assert list(made)[-1] == "sparse"
    for name, execution in made.items():
        assert int((execution(images_of(50)) != dense).sum()) <= 2, name
    assert not network.fused


@torch.no_grad()
def test_the_tables_of_the_benchmark():
    networks = {"a": network_of(0.5, 0.5), "b": network_of(0.9, 0.9)}
    speed, latency = bench.bench_networks(networks, images_of(120), rounds=1)
    (products,) = bench.bench_products(images_of(20), rounds=1)
    (convolution,) = bench.bench_convolution(rounds=1)
    for made in (speed, latency, products, convolution):
        assert all(len(row) == len(made["head"]) for row in made["rows"])
    assert [row[:2] for row in speed["rows"]] == [("a", "50.00 %"), ("b", "90.00 %")]
    assert all(row[-1].endswith(" of 1200") for row in speed["rows"])
    assert [row[0] for row in products["rows"]] == [f"{100 * s:.0f} %" for s in bench.SPARSITIES]
