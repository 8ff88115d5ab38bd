"""An evaluation: as many images at a time as there is memory for; the report: every number at its place, and right."""

import json
import re
import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from spikingjelly.activation_based import layer
from test_energy import TinyNet, counted, grid_images, prune

import measuring
from c10.c10 import EXPERIMENT as C10
from measuring import Connections, energy
from measuring.paths import structural
from measuring.report import Report, report_on
from mnist.model import MnistNet
from training.data import TestBatches
from training.data.dataset import Split
from training.evaluation import images_at_a_time, in_memory
from training.metrics import TEST
from training.recording import Recording


def numbers_of(report):
    """What test.json says."""
    record = Recording(TEST)
    report.record(record)
    record("data", "some")
    record("precision", "fp32")
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
        "data": "some",
        "precision": "fp32",
        "epoch": 60,
        "position": 0,
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
    later = report_on(network, iter(batches), epoch=7, position=3)
    assert " after 7 epochs and 3 steps of the next (" in later.lines()[0]
    assert numbers_of(later) == {**numbers_of(report), "position": 3}


def test_a_network_that_never_spikes_has_a_report():
    network = prune(TinyNet(), 1.0, 1)
    lines = report_on(network, [(grid_images(3, 1, 6, 6), torch.tensor([0, 1, 2]))], epoch=1).lines()
    assert lines[0].startswith("test accuracy 33.33 % after 1 epoch (")
    assert any(re.match(r"body\.8\.weight +SynOps +0\.0 +0\.0 +-$", line) for line in lines)
    assert any(re.match(r"total +0\.00 % +0 +-$", line) for line in lines)


class Residual(TinyNet):
    """Has a second path beside its convolutions, so that its layers are no chain."""

    def __init__(self):
        super().__init__()
        self.shortcut = layer.Conv2d(2, 4, 1, stride=2, bias=False, step_mode="m")

    def spiking(self, current):
        spikes = self.body[0](current)
        pooled = self.body[3](self.body[2](self.body[1](spikes)))
        return self.body[5:](self.body[4](pooled) + self.shortcut(self.body[3](spikes)))


def test_what_cannot_be_told_of_a_network_is_left_out_with_the_reason():
    network = prune(Residual(), 0.3, 4)
    report = report_on(network, [(grid_images(5, 1, 6, 6), torch.arange(5))], epoch=1)
    assert report.structural == {}
    assert report.operations.keys() == measuring.prunable(network).keys()
    assert (
        "Connections on a path from input to output are left out: shortcut.weight takes 2 inputs" in report.lines()[-1]
    )
    numbers = numbers_of(report)
    assert numbers["images"] == 5
    assert "structural_connectivity" not in numbers
    assert "energy" in numbers
    network.body[0] = torch.nn.Identity()
    report = report_on(network, [(grid_images(5, 1, 6, 6) / 3, torch.arange(5))], epoch=1)
    assert "Operations per image are left out: body.1 is not the first layer" in report.lines()[-1]
    assert not numbers_of(report).keys() & {"energy", "operations", "structural_connectivity"}
    assert any("true class" in line for line in report.lines())


def test_no_batch_is_refused_in_one_line():
    with pytest.raises(ValueError, match=r"^batches is not accepted: there is none$"):
        measuring.evaluate(TinyNet(), [])


# -- memory ----------------------------------------------------------------------------------------------


def options_on(device, batch_size):
    return SimpleNamespace(device=torch.device(device), batch_size=batch_size)


def test_on_a_gpu_a_test_takes_no_more_images_than_training_does():
    experiment = replace(C10, test_batch_size=50)
    assert images_at_a_time(experiment, options_on("cuda", 16)) == 16
    assert images_at_a_time(experiment, options_on("cuda", 128)) == 50
    assert images_at_a_time(experiment, options_on("cpu", 16)) == 50


def test_batches_for_which_there_is_no_memory_are_halved(capsys):
    images = torch.arange(23.0).view(23, 1, 1, 1)
    batches = TestBatches(Split(images, torch.arange(23)), 20, lambda images: images)

    def evaluate(room):
        def found():
            total = []
            for images, labels in batches:
                if len(images) > room:
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.9 GiB")
                total += labels.tolist()
            return total

        return found

    assert in_memory(evaluate(20), batches) == [*range(23)]
    assert capsys.readouterr().out == ""
    assert in_memory(evaluate(6), batches) == [*range(23)]
    assert batches.batch_size == 5
    lines = [f"No memory for {n} test images at a time: testing {n // 2} at a time." for n in (20, 10)]
    assert capsys.readouterr().out.splitlines() == lines
    assert in_memory(evaluate(6), batches) == [*range(23)]  # the next time there is nothing to say
    assert capsys.readouterr().out == ""
    assert in_memory(evaluate(1), batches) == [*range(23)]
    with pytest.raises(torch.OutOfMemoryError):
        in_memory(evaluate(0), batches)
    assert batches.batch_size == 1


def test_an_error_of_another_kind_is_not_taken_for_a_lack_of_memory():
    batches = TestBatches(Split(torch.zeros(4, 1, 1, 1), torch.arange(4)), 4, lambda images: images)

    def evaluate():
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        in_memory(evaluate, batches)
    assert batches.batch_size == 4


def test_what_was_tried_leaves_no_memory_behind(monkeypatch):
    """Neither the tensors of an attempt, which its traceback holds, nor what the allocator kept of them."""
    batches = TestBatches(Split(torch.zeros(4, 1, 1, 1), torch.arange(4)), 4, lambda images: images)
    held, emptied = [], []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(batches.batch_size))

    def evaluate():
        assert all(one() is None for one in held)
        activation = torch.ones(3)
        held.append(weakref.ref(activation))
        if batches.batch_size > 1:
            raise torch.OutOfMemoryError
        return 1

    assert in_memory(evaluate, batches) == 1
    assert len(held) == 3
    assert emptied == [4, 2, 1]


def test_a_run_records_the_same_with_smaller_test_batches(run, tmp_path, monkeypatch):
    """Spikes are counted once, though some batches were run twice."""
    forward, rooms = MnistNet.forward, []
    recorded = []
    for room in (1000, 6):

        def in_little_memory(self, images, room=room):
            counts = forward(self, images)
            if not self.training and len(images) > room:
                raise torch.OutOfMemoryError
            return counts

        monkeypatch.setattr(MnistNet, "forward", in_little_memory)
        dump = tmp_path / str(room)
        results = [run("-b", "8", "-N", "2", "-i1", "1", *more, dump=dump) for more in ([], ["-test"])]
        assert [result.status for result in results] == [0, 0]
        rooms.append([result.out.count("No memory for") for result in results])
        (folder,) = (dump / "logs").glob("*")
        lines = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
        lines = [{key: value for key, value in line.items() if "seconds" not in key} for line in lines]
        test = json.loads((folder / "test.json").read_text())
        recorded.append((lines, test))
    assert rooms == [[0, 0], [2, 2]]
    assert len(recorded[0][0]) == 2
    assert recorded[0] == recorded[1]
