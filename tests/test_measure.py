"""Connections, spikes and accuracy, on examples worked by hand."""

import pytest
import torch
from torch import nn

from mnist.model import MnistNet
from training import measure


def test_connected_means_not_zero():
    weight = torch.tensor([0.5, 0.0, -0.0, 1e-8, -1e-8, 1e-45, -2.0, 0.0])
    assert measure.connected(weight).tolist() == [True, False, False, True, True, True, True, False]


def test_counts_and_shares_by_hand():
    masks = {
        "a": torch.tensor([True, False, False, False]),
        "b": torch.tensor([[True, True], [True, False], [True, True]]),
    }
    layers = measure.count(masks)
    assert (layers["a"].connected, layers["a"].weights, layers["a"].pruned) == (1, 4, 3)
    assert layers["a"].sparsity == 0.75
    assert layers["a"].connectivity == 0.25
    assert measure.total(layers).sparsity == 4 / 10
    assert measure.total(layers).connectivity == 6 / 10
    with_bn = measure.total(layers, others=10)
    assert with_bn.sparsity == 4 / 20  # the denominator with BatchNorm's parameters


def test_rewired_by_hand():
    before = {"a": torch.tensor([True, True, True, False, False, False, False, True])}
    after = {"a": torch.tensor([True, False, False, False, False, False, True, True])}
    assert measure.rewired(before, after) == {"a": (2, 1)}


def test_prunable_goes_by_module_type():
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2, 3), nn.BatchNorm1d(3))
    assert list(measure.prunable(network)) == ["0.weight", "3.weight"]
    assert measure.prunable(network)["3.weight"] is network[3].weight


def test_loss_by_hand():
    counts = torch.tensor([[8.0, 0.0], [2.0, 4.0]])
    # rates [1, 0] and [0.25, 0.5]; labels 0 and 0: errors 0, 0, 0.75, 0.5
    assert measure.loss_function(counts, torch.tensor([0, 0]), T=8).item() == (0.75**2 + 0.5**2) / 4


def test_correct_by_hand():
    counts = torch.tensor([[3.0, 1.0, 0.0], [0.0, 2.0, 5.0], [1.0, 1.0, 0.0]])
    assert measure.correct(counts, torch.tensor([0, 1, 0])) == 2


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
    assert measure.accuracy(network, batches) == 3 / 4


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
    with measure.SpikeCounter(network) as spikes:
        counts = [network(images) for images in batches]
    network(batches[0])  # not counted any more
    rates = spikes.rates()
    assert list(rates) == ["fc.0", "fc.2"]
    torch.testing.assert_close(rates["fc.0"], expected.detach() / (5 * 4))
    torch.testing.assert_close(rates["fc.2"], torch.cat(counts).detach().sum(0) / (5 * 4))
    assert rates["fc.0"].max() > 0
