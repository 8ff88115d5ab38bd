"""A run from its start to its end, in this process: what it records, saves, continues and refuses."""

import json
import os
import re
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.optim import Adam

from deeprewire import DeepRewiring
from gradrewire import GradRewiring
from mnist import mnist
from mnist.model import MnistNet
from training import checkpoint, loop, measure
from training.optimizers import build

GRAD = ["-m", "grad", "-s", "0.95", "-lr", "1e-2", "-b", "8"]


@pytest.fixture
def run(mnist_folder, tmp_path, capsys):
    """Runs mnist.py's main on the tiny data; returns its status, and what it printed on the two channels."""

    def call(*argv, dump=tmp_path, data=mnist_folder):
        status = mnist.main([*argv, "--dataset-dir", str(data), "--dump-dir", str(dump)])
        return SimpleNamespace(status=status, **capsys.readouterr()._asdict())

    return call


def the_checkpoint(folder):
    (path,) = folder.glob("models/*/checkpoint.pt")
    return path


def load(folder):
    return torch.load(the_checkpoint(folder), weights_only=True)


def scalars(folder):
    """Everything that TensorBoard shows: {tag: [(step, value), ...]}, and the tags of the histograms."""
    (log,) = folder.glob("logs/*")
    accumulator = EventAccumulator(str(log), size_guidance={"scalars": 0, "histograms": 0})
    accumulator.Reload()
    tags = accumulator.Tags()
    events = {tag: [(e.step, e.value) for e in accumulator.Scalars(tag)] for tag in tags["scalars"]}
    return events, {tag: [e.step for e in accumulator.Histograms(tag)] for tag in tags["histograms"]}


def same(a, b):
    """Whether two nested checkpoints are bitwise the same."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b) and a.dtype == b.dtype
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


# -- optimizers --------------------------------------------------------------------------------------


def options(**settings):
    defaults = dict(learning_rate=0.02, penalty=0.3, sparsity=0.7, temperature=0.1, soft=False)
    defaults |= dict(compile=False, device=torch.device("cpu"))
    return SimpleNamespace(**{**defaults, **settings})


def test_each_mode_has_its_optimizers():
    network = nn.Sequential(nn.Conv2d(1, 2, 3, bias=False), nn.BatchNorm2d(2), nn.Linear(2, 3, bias=False))
    weights, others = [network[0].weight, network[2].weight], [network[1].weight, network[1].bias]
    (adam,) = build(network, options(mode="no_prune"))
    assert type(adam) is Adam
    assert adam.param_groups[0]["lr"] == 0.02
    assert [id(p) for p in adam.param_groups[0]["params"]] == [id(p) for p in network.parameters()]
    for mode, soft, cls, expected in [
        ("grad", False, GradRewiring, dict(lr=0.02, alpha=0.3, s=0.7)),
        ("deep", False, DeepRewiring, dict(lr=0.02, l1=0.3, max_s=0.7, T=0.1, soft=False)),
        ("deep", True, DeepRewiring, dict(lr=0.02, l1=0.3, max_s=0.7, T=0.1, soft=True)),
    ]:
        pruning, adam = build(network, options(mode=mode, soft=soft))
        (group,) = pruning.param_groups
        assert type(pruning) is cls
        assert type(adam) is Adam
        assert {key: group[key] for key in expected} == expected
        assert [id(p) for p in group["params"]] == [id(p) for p in weights]
        assert [id(p) for p in adam.param_groups[0]["params"]] == [id(p) for p in others]
        assert adam.param_groups[0]["lr"] == 0.02
    # no optimizer without parameters
    assert [type(o) for o in build(MnistNet(), options(mode="grad"))] == [GradRewiring]


# -- training ----------------------------------------------------------------------------------------


def test_a_run_tells_each_epoch_and_where_its_files_are(run, tmp_path):
    result = run(*GRAD, "-N", "3")
    assert result.status == 0
    lines = result.out.splitlines()
    epochs = [line for line in lines if line.startswith("epoch")]
    assert [line.split()[1] for line in epochs] == ["1/3", "2/3", "3/3"]
    events, _ = scalars(tmp_path)
    best = 0.0
    for (_, accuracy), (_, sparsity), line in zip(events["test_acc"], events["sparsity"], epochs, strict=True):
        best = max(best, accuracy)
        assert f"test accuracy {100 * accuracy:.2f} %" in line
        assert f"best {100 * best:.2f} %" in line
        assert f"sparsity {100 * sparsity:.2f} %" in line
        assert f"connectivity {100 - 100 * sparsity:.2f} %" in line
        assert line.endswith(" s")
    name = "lr-1e-2-b-8-T-8-penalty-1e-3-s-0.95-grad"
    assert str(tmp_path / "logs" / name) in lines[-1]
    assert (tmp_path / "models" / name / "checkpoint.pt").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["logs", "models"]


def test_exactly_n_epochs_of_all_whole_batches(run, tmp_path):
    run(*GRAD, "-N", "2")
    state = load(tmp_path)
    assert (state["epoch"], state["step"]) == (2, 2 * (40 // 8))
    assert state["optimizers"][0]["state"][0]["step"] == 10


def test_training_learns_and_prunes(run, tmp_path):
    run("--dataset", "digits", *["-m", "grad", "-s", "0.95", "-lr", "2e-3", "-b", "32", "-N", "4", "-i2", "1"])
    events, _ = scalars(tmp_path)
    loss = [value for _, value in events["train/loss"]]
    assert np.mean(loss[-20:]) < 0.6 * np.mean(loss[:5])
    assert events["test_acc"][-1][1] > 0.7
    assert events["sparsity"][-1][1] > events["sparsity"][0][1] > 0


def test_tensorboard_tags_and_steps(run, tmp_path):
    run(*GRAD, "-N", "5", "-i1", "2", "-i2", "3")
    events, histograms = scalars(tmp_path)
    every_epoch = [1, 2, 3, 4, 5]
    full = [1, 2, 4]  # the first epoch, and every second
    expected = {"train/acc": list(range(0, 25, 3)), "train/loss": list(range(0, 25, 3))}
    expected |= {"test_acc": every_epoch, "sparsity": every_epoch}
    expected |= {f"{tag}/{lif}": full for tag in ("avg_firing_rate", "nonfire_prop") for lif in ("fc.0", "fc.2")}
    weights = ("static_fc.1.weight", "fc.1.weight")
    expected |= {
        f"{tag}/{weight}": every_epoch
        for tag in ("layer sparsity", "prune_cnt", "regrow_cnt", "prune-regrow")
        for weight in weights
    }
    assert {tag: [step for step, _ in values] for tag, values in events.items()} == expected
    assert histograms == {f"{weight}-{kind}": full for weight in weights for kind in ("w", "theta")}


def test_recorded_values_are_those_of_the_network(run, tmp_path, mnist_folder):
    run(*GRAD, "-N", "4", "-i1", "1", "-i2", "1")
    events, _ = scalars(tmp_path)
    state = load(tmp_path)
    network = MnistNet()
    network.load_state_dict(state["network"])
    layers = measure.count({k: measure.connected(w) for k, w in measure.prunable(network).items()})
    for name, layer in layers.items():
        assert events[f"layer sparsity/{name}"][-1][1] == pytest.approx(layer.sparsity, rel=1e-6)
        pruned, regrown, net = (
            [value for _, value in events[f"{tag}/{name}"]] for tag in ("prune_cnt", "regrow_cnt", "prune-regrow")
        )
        assert sum(pruned) > 0
        assert sum(regrown) > 0
        assert np.array_equal(np.array(pruned) - np.array(regrown), net)
        assert sum(net) == layer.pruned  # from the dense start to the end
    assert events["sparsity"][-1][1] == pytest.approx(measure.total(layers).sparsity, rel=1e-6)
    assert max(accuracy for _, accuracy in events["test_acc"]) == pytest.approx(state["best_accuracy"])
    # the first loss is that of the initial network on the first batch
    torch.manual_seed(2020)
    network = MnistNet()
    dataset = mnist.load("mnist", mnist_folder)
    run_ = loop.Run(mnist.RECIPE, make_options(tmp_path), network, [], dataset, None)
    images, labels = next(iter(run_.training))
    counts = network(images)
    assert events["train/loss"][0] == (0, pytest.approx(measure.loss_function(counts, labels, 8).item()))
    assert events["train/acc"][0] == (0, float(measure.correct(counts, labels)) / 8)


def make_options(folder):
    return mnist.parse(mnist.RECIPE, [*GRAD, "--dump-dir", str(folder)])


def test_batch_norm_counts_in_one_of_two_sparsities(tmp_path, monkeypatch):
    """CIFAR-10's tags, by hand: 2 of 6 weights pruned, and 4 parameters of BatchNorm."""
    from training.record import Recorder

    recorder = Recorder(tmp_path / "logs" / "x", 0)
    recorder.connections(1, {"a": measure.Connections(4, 6)}, {"a": (3, 1)}, others=4)
    recorder.close()
    events, _ = scalars(tmp_path)
    values = {tag: value for tag, [(_, value)] in events.items()}
    assert values == {
        "layer sparsity/a": pytest.approx(2 / 6),
        "prune_cnt/a": 3,
        "regrow_cnt/a": 1,
        "prune-regrow/a": 2,
        "sparsity/with bn": pytest.approx(2 / 10),
        "sparsity/without bn": pytest.approx(2 / 6),
    }


def test_histograms_of_chosen_layers_only(tmp_path):
    from training.record import Recorder

    network = MnistNet()
    recorder = Recorder(tmp_path / "logs" / "x", 0)
    recorder.weights(1, network, [], ("fc.1.weight",))
    recorder.close()
    assert scalars(tmp_path)[1] == {"fc.1.weight-w": [1]}


def test_firing_rates_and_silent_neurons_by_hand(tmp_path):
    from training.record import Recorder

    recorder = Recorder(tmp_path / "logs" / "x", 0)
    recorder.neurons(3, {"fc.0": torch.tensor([0.0, 0.5, 0.0, 0.25])})
    recorder.close()
    assert scalars(tmp_path)[0] == {"avg_firing_rate/fc.0": [(3, 0.1875)], "nonfire_prop/fc.0": [(3, 0.5)]}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("", "--seed 7"),
        ("", "-lr 2e-2"),
        ("", "-T 3"),
        ("", "-b 5"),
        ("", "--precision bf16"),
        ("-m grad -s 0.95", "-m grad -s 0.5 -penalty 100"),
        ("-m grad -s 0.95", "-m grad -s 0.95 -penalty 1e-1"),
        ("-m deep -s 0", "-m deep -s 0 -soft"),
        ("-m deep -s 0.9", "-m deep -s 0"),
        ("-m deep -s 0.9", "-m deep -s 0.9 -temperature 1e-2"),
        ("", "-m grad -s 0.95"),
    ],
)
def test_every_option_of_the_outcome_changes_it(run, tmp_path, one, other):
    ends = []
    for argv in (one, other):
        folder = tmp_path / str(len(ends))
        assert run(*("-lr 1e-2 -b 8 -N 2 " + argv).split(), dump=folder).status == 0
        ends.append(load(folder)["network"])
    assert not same(*ends)


def test_the_same_command_gives_the_same_run(run, tmp_path):
    argv = ["-m", "deep", "-s", "0.5", "-temperature", "1e-3", "-lr", "1e-2", "-b", "8", "-N", "2"]
    for folder in ("a", "b"):
        run(*argv, dump=tmp_path / folder)
    assert same(load(tmp_path / "a"), load(tmp_path / "b"))


def test_digits_need_no_files(run, tmp_path):
    result = run("--dataset", "digits", "-b", "512", "-N", "1", data=tmp_path / "nothing")
    assert result.status == 0
    assert load(tmp_path)["data"].startswith("1498+299 images")


# -- stop and go on ----------------------------------------------------------------------------------

MODES = {
    "no_prune": [],
    "grad": ["-m", "grad", "-s", "0.95"],
    "deep": ["-m", "deep", "-s", "0.5", "-temperature", "1e-3"],
    "soft deep": ["-m", "deep", "-soft", "-s", "0.5", "-temperature", "1e-3"],
}


@pytest.mark.parametrize("mode", MODES)
def test_a_run_in_parts_is_the_run_in_one(run, tmp_path, mode):
    argv = [*MODES[mode], "-lr", "1e-2", "-b", "8", "-i1", "2", "-i2", "2"]
    run(*argv, "-N", "4", dump=tmp_path / "one")
    for epochs in ("1", "3", "4"):
        result = run(*argv, "-N", epochs, dump=tmp_path / "parts")
    assert "Going on after epoch 3 of 4." in result.out
    assert same(load(tmp_path / "one"), load(tmp_path / "parts"))
    assert scalars(tmp_path / "one") == scalars(tmp_path / "parts")


def test_a_run_stopped_inside_an_epoch_goes_on_after_the_last_finished_one(run, tmp_path, monkeypatch):
    run(*GRAD, "-N", "3", "-i2", "1", dump=tmp_path / "one")
    steps, step = [], GradRewiring.step

    def step_or_die(self, closure=None):
        steps.append(1)
        if len(steps) == 8:  # of five in an epoch
            raise KeyboardInterrupt
        return step(self, closure)

    monkeypatch.setattr(GradRewiring, "step", step_or_die)
    assert run(*GRAD, "-N", "3", "-i2", "1", dump=tmp_path / "killed").status == 130
    assert load(tmp_path / "killed")["epoch"] == 1
    result = run(*GRAD, "-N", "3", "-i2", "1", dump=tmp_path / "killed")
    assert [line.split()[1] for line in result.out.splitlines() if line.startswith("epoch")] == ["2/3", "3/3"]
    assert same(load(tmp_path / "one"), load(tmp_path / "killed"))
    # the log shows no step twice
    assert scalars(tmp_path / "one") == scalars(tmp_path / "killed")


def test_a_run_goes_on_in_another_execution(run, tmp_path, monkeypatch):
    """How a step is executed is not part of the checkpoint: it stays what the machine and --compile say."""
    run(*GRAD, "-N", "1")
    saved = load(tmp_path)["optimizers"][0]["param_groups"][0]
    seen = []
    step = GradRewiring.step
    monkeypatch.setattr(
        GradRewiring,
        "step",
        lambda self, closure=None: seen.append(self.param_groups[0]["fused"]) or step(self, closure),
    )
    assert "Going on after epoch 1" in run(*GRAD, "-N", "2", "--no-compile").out
    assert set(seen) == {False}
    seen.clear()
    run(*GRAD, "-N", "3")
    assert set(seen) == {saved["fused"]}
    # a checkpoint of a GPU, too
    state = load(tmp_path)
    state["optimizers"][0]["param_groups"][0] |= {"fused": True, "capturable": True}
    torch.save(state, the_checkpoint(tmp_path))
    assert run(*GRAD, "-N", "4", "--no-compile").status == 0
    assert not load(tmp_path)["optimizers"][0]["param_groups"][0]["capturable"]


def test_a_finished_run_says_so_and_does_nothing(run, tmp_path):
    run(*GRAD, "-N", "2")
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in tmp_path.rglob("*") if p.is_file()}
    result = run(*GRAD, "-N", "2")
    assert result.status == 0
    assert "finished its 2 epochs" in result.out
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in tmp_path.rglob("*") if p.is_file()} == before


def test_fewer_epochs_than_done_are_refused(run, tmp_path):
    run(*GRAD, "-N", "2")
    result = run(*GRAD, "-N", "1")
    assert result.status == 2
    assert "-N/--epoch" in result.err
    assert "has done 2 epochs" in result.err


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("interval_test", 5, "-i1/--interval-test: .* made with 5, not 32"),
        ("seed", 3, "--seed: .* made with 3, not 2020"),
        ("learning_rate", 1.0, "-lr/--learning-rate: .* made with 1.0, not 0.01"),
        ("experiment", "c10", "experiment: .* made with c10, not mnist"),
    ],
)
def test_a_checkpoint_made_with_other_arguments_is_refused(run, tmp_path, key, value, message):
    run(*GRAD, "-N", "1")
    path, state = the_checkpoint(tmp_path), load(tmp_path)
    state["arguments"][key] = value
    torch.save(state, path)
    before = path.read_bytes()
    for argv in (["-N", "2"], ["-test"]):
        result = run(*GRAD, *argv)
        assert result.status == 2
        assert re.search(message, result.err)
        assert path.read_bytes() == before


def test_a_checkpoint_of_other_data_is_refused(run, tmp_path, mnist_folder):
    run(*GRAD, "-N", "1")
    other = tmp_path / "other data"
    shutil.copytree(mnist_folder, other)
    labels = other / "MNIST" / "raw" / "train-labels-idx1-ubyte"
    labels.write_bytes(labels.read_bytes()[:-1] + b"\x00")
    images = other / "MNIST" / "raw" / "train-images-idx3-ubyte"
    images.write_bytes(images.read_bytes()[:-1] + b"\x07")
    result = run(*GRAD, "-N", "2", data=other)
    assert result.status == 2
    assert "--dataset-dir: the run was made with other data" in result.err


class Payload:
    def __reduce__(self):
        return os.system, ("touch executed",)


@pytest.mark.parametrize("damage", ["empty", "truncated", "text", "code", "no arguments", "other format"])
def test_a_damaged_or_foreign_checkpoint_is_refused_and_kept(run, tmp_path, damage, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(*GRAD, "-N", "1")
    path, state = the_checkpoint(tmp_path), load(tmp_path)
    if damage == "code":
        torch.save({**state, "epoch": Payload()}, path)
    elif damage == "no arguments":
        torch.save({"format": checkpoint.FORMAT}, path)
    elif damage == "other format":
        torch.save({**state, "format": 0}, path)
    else:
        path.write_bytes({"empty": b"", "truncated": path.read_bytes()[:-100], "text": b"hello"}[damage])
    before = path.read_bytes()
    for argv in (["-N", "2"], ["-test"]):
        result = run(*GRAD, *argv)
        assert result.status == 2
        assert result.err.count("\n") == 1
        assert "damaged or not a checkpoint" in result.err
        assert path.read_bytes() == before
    assert not (tmp_path / "executed").exists()


def test_a_save_that_fails_leaves_the_previous_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "models" / "checkpoint.pt"
    checkpoint.save(path, {"epoch": 1})

    def torn(state, file):
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", torn)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(path, {"epoch": 2})
    assert torch.load(path, weights_only=True) == {"epoch": 1}
    monkeypatch.undo()
    checkpoint.save(path, {"epoch": 2})
    assert torch.load(path, weights_only=True) == {"epoch": 2}
    assert [p.name for p in path.parent.iterdir()] == ["checkpoint.pt"]


# -- -test -------------------------------------------------------------------------------------------


def test_testing_prints_and_stores_what_the_model_is(run, tmp_path):
    run(*GRAD, "-N", "3")
    before = the_checkpoint(tmp_path).read_bytes()
    accuracy = scalars(tmp_path)[0]["test_acc"][-1][1]
    sparsity = scalars(tmp_path)[0]["sparsity"][-1][1]
    result = run(*GRAD, "-test")
    assert result.status == 0
    assert f"test accuracy {100 * accuracy:.2f} % after 3 epochs" in result.out
    assert re.search(rf"total +sparsity +{100 * sparsity:.2f} %", result.out)
    (log,) = tmp_path.glob("logs/*")
    stored = json.loads((log / "test.json").read_text())
    assert stored["epoch"] == 3
    assert stored["accuracy"] == pytest.approx(accuracy)
    assert stored["sparsity"] == pytest.approx(sparsity)
    assert set(stored["layer_sparsity"]) == {"static_fc.1.weight", "fc.1.weight"}
    rates = {p.name: np.load(p) for p in log.glob("rate-*.npy")}
    assert {name: rate.shape for name, rate in rates.items()} == {
        "rate-fc.0-epoch-3.npy": (800,),
        "rate-fc.2-epoch-3.npy": (10,),
    }
    assert 0 < rates["rate-fc.0-epoch-3.npy"].mean() < 1
    assert the_checkpoint(tmp_path).read_bytes() == before


def test_testing_runs_in_eval_mode(run, tmp_path, monkeypatch):
    run(*GRAD, "-N", "1")
    modes = []
    forward = MnistNet.forward
    monkeypatch.setattr(MnistNet, "forward", lambda self, x: modes.append(self.training) or forward(self, x))
    run(*GRAD, "-test")
    assert modes
    assert not any(modes)
    # and training goes back to training mode after each test
    modes.clear()
    run(*GRAD, "-N", "3")
    assert modes == [True] * 5 + [False] + [True] * 5 + [False]


def test_a_terminal_gets_a_progress_bar(run, monkeypatch):
    class Terminal:
        def __init__(self, stream):
            self.stream = stream

        def isatty(self):
            return True

        def __getattr__(self, name):
            return getattr(self.stream, name)

    assert "epoch 1/1:" not in run(*GRAD, "-N", "1").err
    clock = iter(range(10_000))
    monkeypatch.setattr("training.loop.time.perf_counter", lambda: next(clock))  # every step is due
    monkeypatch.setattr(sys, "stderr", Terminal(sys.stderr))
    monkeypatch.setenv("COLUMNS", "120")
    err = run(*GRAD, "-N", "2").err
    assert "epoch 2/2:" in err
