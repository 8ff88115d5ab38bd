"""The benchmark's parts, on data so small that only their working is tested."""

import json
import pickle
from importlib.metadata import version

import pytest
import torch

from analysis.experiments import EXPERIMENTS
from benchmarks import bench, optimizers, tables
from training import data

CPU = torch.device("cpu")


def tiny(n=30):
    images = torch.randint(0, 256, (n, 1, 28, 28), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    split = data.Split(images, torch.arange(n) % 10)
    return data.Dataset(split, split)


def test_functions_take_turns():
    order = []
    functions = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    counts = tables.in_turns(functions, 2, CPU, warmup=1, take=len)
    assert order == ["a", "b"] * 3
    assert counts == {"a": 2, "b": 2}


def test_the_median_of_the_rounds_after_the_warmup(monkeypatch):
    times = iter([0, 100, 0, 1, 0, 7, 0, 3])  # beginnings and ends: the warmup, then three rounds
    monkeypatch.setattr(tables.time, "perf_counter", lambda: next(times))
    assert tables.in_turns({"a": lambda: None}, 3, CPU, warmup=1) == {"a": 3}


@pytest.mark.parametrize("fused", [False, True])
def test_an_execution_trains_the_steps_it_is_asked_for(fused):
    compile = "--compile" if fused else "--no-compile"
    execution = bench.Execution(EXPERIMENTS["mnist"], tiny(), CPU, f"-b 8 -T 2 {compile}")
    before = execution.network.fc[1].weight.detach().clone()
    execution.train(5)  # beyond an epoch of three
    (state,) = {float(s["step"]) for s in execution.step.optimizers[0].state.values()}
    assert state == 5
    assert not torch.equal(execution.network.fc[1].weight, before)
    assert 0 <= execution.test() <= 1


def test_the_plain_way_gives_batches_of_the_same_form():
    loader = bench.torchvision_loader(tiny(), 8)
    images, labels = next(iter(loader))
    assert (images.shape, images.dtype, labels.shape) == ((8, 1, 28, 28), torch.float32, (8,))
    pickle.dumps(loader.collate_fn)  # for workers that are not forked: macOS, Windows, Python 3.14


@pytest.mark.parametrize("has", [("fp32",), ("fp32", "bf16"), ("fp32", "tf32", "bf16")])
def test_only_what_the_device_has_instructions_for_is_measured(monkeypatch, has):
    monkeypatch.setattr(bench, "precisions", lambda device: has)
    monkeypatch.setattr(bench, "in_turns", lambda functions, *args, **settings: dict.fromkeys(functions, 1.0))
    ran = []
    monkeypatch.setattr(bench, "step_rows", lambda e, d, device, executions, *args: ran.extend(executions) or [])
    (products,) = bench.ceiling(CPU)
    assert [row[0] for row in products["rows"]] == [f"2048x2048 product, {p}" for p in has if p != "tf32"]
    training, _ = bench.bench_mnist(tiny(150), CPU, 1)
    names = [row[0] for row in training["rows"] if row[0].startswith("the same")]
    assert names == [f"the same, {p} products" for p in has[1:]]
    list(bench.bench_cifar10(CPU, 1, 2, 8))
    assert [name for name in ran if "fused" in name] == [f"layer by layer, fused, {p}" for p in has]


def test_tables_are_markdown_and_machine_readable(capsys):
    made = tables.table("title", ("a", "b"), [("1", "2")])
    assert capsys.readouterr().out == "\n### title\n\n| a | b |\n| --- | --- |\n| 1 | 2 |\n"
    assert json.loads(json.dumps(made)) == {"title": "title", "head": ["a", "b"], "rows": [["1", "2"]]}


def test_the_report_is_written_beside_what_made_it(tmp_path, capsys):
    parser = tables.parser("bench", "It measures.", rounds=3)
    assert parser.format_usage().startswith("usage: python -m benchmarks.bench ")
    options = parser.parse_args(["--json", str(tmp_path / "new" / "tables.json")])
    assert tables.run(options, CPU, ("torch",), lambda: [tables.table("title", ("a",), [("1",)])]) == 0
    written = json.loads((tmp_path / "new" / "tables.json").read_text())
    assert written["tables"] == [{"title": "title", "head": ["a"], "rows": [["1"]]}]
    assert f"torch {version('torch')}" in written["versions"]
    assert capsys.readouterr().out.startswith(f"{written['date']}, {written['hardware']}, {written['versions']}\n")


def test_every_optimizer_of_the_table_steps_and_is_compared_with_adam():
    (made,) = optimizers.bench_optimizers(CPU, 1, {"few weights": ([(8, 4)], 1)})
    assert [row[0] for row in made["rows"]] == list(optimizers.OPTIMIZERS)
    assert made["rows"][0][2:] == ("1.00", "8")
    pruned = optimizers.made(*optimizers.OPTIMIZERS["Deep R, 90 % dormant, fused"], [(100, 100)], CPU)
    (weight,) = pruned.param_groups[0]["params"]
    assert float((weight == 0).float().mean()) == pytest.approx(0.9, abs=0.02)
