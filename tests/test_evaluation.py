"""The report of a test: every number at its place, and the same as where it is defined."""

import json
import re

import pytest
import torch
from test_energy import TinyNet, counted, grid_images, prune

import measuring
from measuring import Connections, energy
from measuring.paths import structural
from measuring.report import Report, report_on
from training.metrics import TEST
from training.recording import Recording


def numbers_of(report):
    """What test.json says."""
    record = Recording(TEST)
    report.record(record)
    return record.content()


@pytest.fixture
def example():
    """A report of two layers with numbers that can be followed by hand."""
    confusion = torch.tensor([[40, 2, 0], [0, 55, 0], [0, 0, 0]])
    return Report(
        epoch=60,
        evaluation=measuring.Evaluation(confusion),
        connected={"static_fc.1.weight": Connections(3000, 12000), "fc.1.weight": Connections(300, 600)},
        structural={"static_fc.1.weight": Connections(1500, 12000), "fc.1.weight": Connections(300, 600)},
        rates={"fc.0": torch.tensor([0.5, 0.0, 0.25, 0.25]), "fc.2": torch.zeros(3)},
        operations={
            "static_fc.1.weight": energy.Operations(97, 97 * 3000, 97 * 12000, "MAC"),
            "fc.1.weight": energy.Operations(97, 97 * 50, 97 * 200, "SynOp"),
        },
    )


def test_the_lines_by_hand(example):
    expected = """\
test accuracy 97.94 % after 60 epochs (95 % interval 92.79 % to 99.43 %, 95 of 97 images)
static_fc.1.weight  sparsity  75.00 %  connectivity  25.00 %  3000 of 12000 connections
fc.1.weight         sparsity  50.00 %  connectivity  50.00 %  300 of 600 connections
total               sparsity  73.81 %  connectivity  26.19 %  3300 of 12600 connections
fc.0                firing rate 0.2500  silent neurons  25.00 %  4 neurons
fc.2                firing rate 0.0000  silent neurons 100.00 %  3 neurons

on a path from input to output  connectivity  connections  of the connected
static_fc.1.weight                   12.50 %        1,500           50.00 %
fc.1.weight                          50.00 %          300          100.00 %
total                                14.29 %        1,800           54.55 %

true class / predicted   0   1  2     right
0                       40   2  .   95.24 %
1                        .  55  .  100.00 %
2                        .   .  0         -

operations per image    kind  all connected   pruned   of all
static_fc.1.weight      MACs       12,000.0  3,000.0  25.00 %
fc.1.weight           SynOps          200.0     50.0  25.00 %
energy per image          nJ         55.380   13.845  25.00 %
4.6 pJ per MAC, 0.9 pJ per SynOp: arithmetic alone, 32-bit float, 45 nm (Horowitz, ISSCC 2014)"""
    assert example.lines() == expected.splitlines()


def test_the_numbers_by_hand(example):
    numbers = json.loads(json.dumps(numbers_of(example), allow_nan=False))
    low, high = numbers.pop("accuracy_interval")
    assert (low, high) == measuring.wilson_interval(95, 97)
    cost = numbers.pop("energy")
    assert cost == pytest.approx({"pruned": 3000 * 4.6 + 50 * 0.9, "dense": 12000 * 4.6 + 200 * 0.9})  # pJ
    assert numbers == {
        "epoch": 60,
        "accuracy": 95 / 97,
        "right": 95,
        "images": 97,
        "confusion": [[40, 2, 0], [0, 55, 0], [0, 0, 0]],
        "sparsity": 9300 / 12600,
        "connectivity": 3300 / 12600,
        "structural_connectivity": 1800 / 12600,
        "layer_sparsity": {"static_fc.1.weight": 0.75, "fc.1.weight": 0.5},
        "layers": {
            "static_fc.1.weight": {
                "connected": 3000,
                "structural": 1500,
                "weights": 12000,
                "sparsity": 0.75,
                "connectivity": 0.25,
                "structural_connectivity": 0.125,
            },
            "fc.1.weight": {
                "connected": 300,
                "structural": 300,
                "weights": 600,
                "sparsity": 0.5,
                "connectivity": 0.5,
                "structural_connectivity": 0.5,
            },
        },
        "neurons": {
            "fc.0": {"firing_rate": 0.25, "silent": 0.25},
            "fc.2": {"firing_rate": 0.0, "silent": 1.0},
        },
        "operations": {
            "static_fc.1.weight": {"kind": "MAC", "pruned": 3000.0, "dense": 12000.0},
            "fc.1.weight": {"kind": "SynOp", "pruned": 50.0, "dense": 200.0},
        },
    }


def test_large_networks_keep_the_width():
    """CIFAR-10's sizes: 36.7 M weights, 10 000 images, hundreds of millions of operations."""
    names = ["static_conv.0.weight", *(f"conv.{i}.weight" for i in (1, 4, 8, 11, 14)), "fc.2.weight", "fc.4.weight"]
    layers = {name: Connections(33_554_432, 33_554_432) for name in names}
    report = Report(
        epoch=2048,
        evaluation=measuring.Evaluation(torch.full((10, 10), 1000)),
        connected=layers,
        structural=layers,
        rates={"conv.10": torch.zeros(256, 32, 32)},
        operations={name: energy.Operations(10_000, 10**13, 10**13, "SynOp") for name in names},
    )
    lines = report.lines()
    assert max(map(len, lines)) <= 100
    assert re.search(r"^energy per image +µJ +7,200.000 +7,200.000 +100.00 %$", "\n".join(lines), re.MULTILINE)


def test_a_report_is_of_one_pass_and_of_what_the_network_is():
    network = prune(TinyNet(), 0.75, 3).train()
    with torch.no_grad():
        network.static_conv.weight[1] = 0
    images, labels = grid_images(6, 1, 6, 6), torch.tensor([0, 1, 2, 3, 4, 0])
    batches = [(images[:4], labels[:4]), (images[4:], labels[4:])]
    report = report_on(network, iter(batches), epoch=7)
    assert not network.training
    assert report.epoch == 7
    assert report.evaluation.accuracy == measuring.accuracy(network, batches)
    masks = {name: measuring.connected(weight) for name, weight in measuring.prunable(network).items()}
    assert report.connected == measuring.count(masks)
    assert report.structural == measuring.count(structural(masks))
    assert report.structural != report.connected
    counter = counted(network, [images])
    assert report.operations == counter.operations()
    assert list(report.rates) == list(counter.rates()) == ["body.0", "body.2", "body.5", "body.9"]
    for name, rate in counter.rates().items():
        assert torch.equal(report.rates[name], rate)
    assert report.lines()
    json.dumps(numbers_of(report), allow_nan=False)


def test_a_network_that_never_spikes_has_a_report():
    network = prune(TinyNet(), 1.0, 1)
    lines = report_on(network, [(grid_images(3, 1, 6, 6), torch.tensor([0, 1, 2]))], epoch=1).lines()
    assert lines[0].startswith("test accuracy 33.33 % after 1 epochs")
    assert any(re.match(r"body\.8\.weight +SynOps +0\.0 +0\.0 +-$", line) for line in lines)
    assert any(re.match(r"total +0\.00 % +0 +-$", line) for line in lines)
