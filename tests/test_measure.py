"""Connections, spikes and accuracy, on examples worked by hand."""

import pytest
import torch
from spikingjelly.activation_based import neuron
from torch import nn

import measuring
from mnist.model import MnistNet


def test_connected_means_not_zero():
    weight = torch.tensor([0.5, 0.0, -0.0, 1e-8, -1e-8, 1e-45, -2.0, 0.0])
    assert measuring.connected(weight).tolist() == [True, False, False, True, True, True, True, False]


def test_counts_and_shares_by_hand():
    masks = {
        "a": torch.tensor([True, False, False, False]),
        "b": torch.tensor([[True, True], [True, False], [True, True]]),
    }
    layers = measuring.count(masks)
    assert (layers["a"].connected, layers["a"].weights, layers["a"].pruned) == (1, 4, 3)
    assert layers["a"].sparsity == 0.75
    assert layers["a"].connectivity == 0.25
    assert measuring.total(layers).sparsity == 4 / 10
    assert measuring.total(layers).connectivity == 6 / 10
    with_bn = measuring.total(layers, others=10)
    assert with_bn.sparsity == 4 / 20  # the denominator with BatchNorm's parameters


def test_rewired_by_hand():
    before = {"a": torch.tensor([True, True, True, False, False, False, False, True])}
    after = {"a": torch.tensor([True, False, False, False, False, False, True, True])}
    assert measuring.rewired(before, after) == {"a": (2, 1)}


def test_prunable_goes_by_module_type():
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2, 3), nn.BatchNorm1d(3))
    assert list(measuring.prunable(network)) == ["0.weight", "3.weight"]
    assert measuring.prunable(network)["3.weight"] is network[3].weight


def test_loss_by_hand():
    counts = torch.tensor([[8.0, 0.0], [2.0, 4.0]])
    # rates [1, 0] and [0.25, 0.5]; labels 0 and 0: errors 0, 0, 0.75, 0.5
    assert measuring.loss_function(counts, torch.tensor([0, 0]), T=8).item() == (0.75**2 + 0.5**2) / 4


def test_correct_by_hand():
    counts = torch.tensor([[3.0, 1.0, 0.0], [0.0, 2.0, 5.0], [1.0, 1.0, 0.0]])
    assert measuring.correct(counts, torch.tensor([0, 1, 0])) == 2


class ByFirstPixel(nn.Module):
    """Predicts the class that the first pixel names; refuses to be tested in training mode."""

    def forward(self, images):
        assert not self.training
        assert not torch.is_grad_enabled()
        return nn.functional.one_hot(images[:, 0].long(), 10).float()


def test_accuracy_is_over_all_batches_in_eval_mode():
    network = ByFirstPixel().train()
    batches = [
        (torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([1, 2, 4])),
        (torch.tensor([[5.0]]), torch.tensor([5])),
    ]
    assert measuring.accuracy(network, batches) == 3 / 4


def test_evaluation_is_one_pass():
    """Rows are the true classes, columns the predicted ones; the batches can be read only once."""
    batches = iter(
        [
            (torch.tensor([[1.0], [2.0], [3.0], [3.0]]), torch.tensor([1, 2, 4, 4])),
            (torch.tensor([[5.0], [9.0]]), torch.tensor([5, 0])),
        ]
    )
    result = measuring.evaluate(ByFirstPixel().train(), batches)
    expected = torch.zeros(10, 10, dtype=torch.int64)
    expected[1, 1] = expected[2, 2] = expected[5, 5] = expected[0, 9] = 1
    expected[4, 3] = 2
    assert torch.equal(result.confusion, expected)
    assert (result.right, result.images, result.accuracy) == (3, 6, 0.5)


def test_confusion_by_hand():
    counts = torch.tensor([[3.0, 1.0, 0.0], [0.0, 2.0, 5.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    labels = torch.tensor([0, 1, 0, 2, 1])
    matrix = measuring.confusion(counts, labels)  # of equal counts, the first class, as in measuring.correct
    assert matrix.dtype == torch.int64
    assert matrix.tolist() == [[2, 0, 0], [0, 0, 2], [1, 0, 0]]
    assert matrix.trace() == measuring.correct(counts, labels)


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [
        # z² = 3.8416; (p + z²/2n ± z sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n)
        (5, 10, 0.5 - 1.96 * (0.025 + 0.009604) ** 0.5 / 1.38416, 0.5 + 1.96 * (0.025 + 0.009604) ** 0.5 / 1.38416),
        (0, 10, 0.0, 3.8416 / 13.8416),  # z² / (n + z²)
        (10, 10, 10 / 13.8416, 1.0),
        (1, 1, 1 / 4.8416, 1.0),
        (0, 1, 0.0, 3.8416 / 4.8416),
        (81, 263, 0.2553, 0.3662),  # and below: where abs(p - q) = z sqrt(q(1-q)/n), by bisection
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_interval(right, n, low, high):
    interval = measuring.wilson_interval(right, n)
    assert interval == pytest.approx((low, high), abs=5e-5)
    assert (interval[0] == 0.0) == (right == 0)
    assert (interval[1] == 1.0) == (right == n)
    assert interval[0] <= right / n <= interval[1]


def test_wilson_interval_is_wider_for_a_greater_z():
    assert measuring.wilson_interval(5, 10, z=1.0) == pytest.approx((0.5 - 0.5 / 11**0.5, 0.5 + 0.5 / 11**0.5))


@pytest.mark.parametrize(("right", "n"), [(-1, 10), (11, 10), (0, 0)])
def test_wilson_interval_refuses_what_is_no_share(right, n):
    with pytest.raises(ValueError, match=f"right={right}, n={n} is not accepted: must be 0 <= right <= n"):
        measuring.wilson_interval(right, n)


@pytest.mark.parametrize("step_mode", ["s", "m"])
def test_spike_counter_against_a_plain_count(step_mode):
    """Two batches of unequal size; a neuron's rate is its spikes per image and time step."""
    torch.manual_seed(0)
    network = MnistNet(T=4, step_mode=step_mode).eval()
    with torch.no_grad():
        network.fc[1].weight *= 8
    batches = [torch.randn(3, 1, 28, 28), torch.randn(2, 1, 28, 28)]
    expected = torch.zeros(800)
    for images in batches:
        current, v = network.static_fc(images), torch.zeros(1)
        for _ in range(4):
            v = v + (current - v) / 2
            expected += (v >= 1).sum(0)
            v = torch.where(v >= 1, 0.0, v)
    with measuring.SpikeCounter(network) as spikes:
        counts = [network(images) for images in batches]
    network(batches[0])  # not counted any more
    rates = spikes.rates()
    assert list(rates) == ["fc.0", "fc.2"]
    torch.testing.assert_close(rates["fc.0"], expected.detach() / (5 * 4))
    torch.testing.assert_close(rates["fc.2"], torch.cat(counts).detach().sum(0) / (5 * 4))
    assert rates["fc.0"].max() > 0


@pytest.mark.parametrize("node", [neuron.IFNode, neuron.ParametricLIFNode])
def test_spike_counter_counts_neurons_of_every_kind(node):
    network = MnistNet(T=4)
    network.fc[2] = node(step_mode="m")
    with torch.no_grad():
        network.static_fc[1].weight *= 10
        network.fc[1].weight *= 8
    with measuring.SpikeCounter(network) as spikes:
        counts = network(torch.randn(3, 1, 28, 28, generator=torch.Generator().manual_seed(0)))
    assert counts.sum() > 0
    torch.testing.assert_close(spikes.rates()["fc.2"], counts.detach().sum(0) / (3 * 4))
