"""The benchmark's parts, on data so small that only their working is tested."""

import json

import pytest
import torch

from benchmarks import bench
from mnist.mnist import EXPERIMENT
from mnist.model import MnistNet
from training import data

CPU = torch.device("cpu")


def tiny(n=30):
    images = torch.randint(0, 256, (n, 1, 28, 28), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    split = data.Split(images, torch.arange(n) % 10)
    return data.Dataset(split, split)


def test_functions_take_turns():
    order = []
    seconds = bench.in_turns({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 2, CPU, warmup=1)
    assert order == ["a", "b"] * 3
    assert {name: len(s) for name, s in seconds.items()} == {"a": 2, "b": 2}


@pytest.mark.parametrize("fused", [False, True])
def test_an_execution_trains_the_steps_it_is_asked_for(fused):
    execution = bench.Execution(MnistNet(2), EXPERIMENT, tiny(), CPU, 8, fused)
    before = execution.network.fc[1].weight.detach().clone()
    execution.train(5)  # beyond an epoch of three
    (state,) = {float(s["step"]) for s in execution.step.optimizers[0].state.values()}
    assert state == 5
    assert not torch.equal(execution.network.fc[1].weight, before)
    assert 0 <= execution.test() <= 1


def test_the_profile_names_every_part():
    (made,) = bench.bench_profile(tiny(n=260), CPU)
    assert made["rows"][0][0].startswith("batch")
    assert len(made["rows"]) == 7
    shares = [float(row[2].split()[0]) for row in made["rows"]]
    assert sum(shares) == pytest.approx(100, abs=4)


def test_the_plain_way_gives_batches_of_the_same_form():
    images, labels = next(iter(bench.torchvision_loader(tiny(), 8)))
    assert (images.shape, images.dtype, labels.shape) == ((8, 1, 28, 28), torch.float32, (8,))


def test_tables_are_markdown_and_machine_readable(capsys):
    made = bench.table("title", ("a", "b"), [("1", "2")])
    assert capsys.readouterr().out == "\n### title\n\n| a | b |\n| --- | --- |\n| 1 | 2 |\n"
    assert json.loads(json.dumps(made)) == {"title": "title", "head": ["a", "b"], "rows": [["1", "2"]]}
