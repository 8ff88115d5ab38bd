"""A run from its start to its end, in this process: what it records, saves, continues and refuses."""

import json
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from run_helpers import assert_same_run, load, results, same, scalars, the_checkpoint
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from torch import nn
from torch.optim import Adam

import measuring
from deeprewire import DeepRewiring
from gradrewire import GradRewiring
from measuring.report import percent
from mnist import mnist
from mnist.data import MNIST
from mnist.model import MnistNet
from training import loop
from training.methods import METHODS
from training.metrics import EPOCH, FULL
from training.options import parse
from training.recording import Recorder, record_distributions

GRAD = ["-m", "grad", "-s", "0.95", "-lr", "1e-2", "-b", "8"]


# -- optimizers --------------------------------------------------------------------------------------


def build(network, given):
    return METHODS[given.mode].build(network, given)


def options(**settings):
    defaults = dict(learning_rate=0.02, penalty=0.3, sparsity=0.7, temperature=0.1, soft=False)
    defaults |= dict(plain_gradient=False, recipe="paper", connectivity=None)
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
        assert re.search(r"  \d+\.\d s  \d+ seconds? left$", line)
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
    expected |= {"test_acc": every_epoch, "sparsity": every_epoch, "connectivity": every_epoch}
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
    layers = measuring.count({k: measuring.connected(w) for k, w in measuring.prunable(network).items()})
    for name, layer in layers.items():
        assert events[f"layer sparsity/{name}"][-1][1] == pytest.approx(layer.sparsity, rel=1e-6)
        pruned, regrown, net = (
            [value for _, value in events[f"{tag}/{name}"]] for tag in ("prune_cnt", "regrow_cnt", "prune-regrow")
        )
        assert sum(pruned) > 0
        assert sum(regrown) > 0
        assert np.array_equal(np.array(pruned) - np.array(regrown), net)
        assert sum(net) == layer.pruned  # from the dense start to the end
    assert events["sparsity"][-1][1] == pytest.approx(measuring.total(layers).sparsity, rel=1e-6)
    assert max(accuracy for _, accuracy in events["test_acc"]) == pytest.approx(state["best_accuracy"])
    # the first loss is that of the initial network on the first batch
    torch.manual_seed(2020)
    network = MnistNet()
    dataset = MNIST.load(mnist_folder)
    run_ = loop.Trainer(mnist.EXPERIMENT, make_options(tmp_path), network, [], dataset, SimpleNamespace(saved=None))
    images, labels = next(iter(run_.training))
    counts = network(images)
    assert events["train/loss"][0] == (0, pytest.approx(measuring.loss_function(counts, labels, 8).item()))
    assert events["train/acc"][0] == (0, float(measuring.correct(counts, labels)) / 8)


def make_options(folder):
    return parse(mnist.EXPERIMENT, [*GRAD, "--dump-dir", str(folder)])


def test_batch_norm_counts_in_one_of_two_sparsities(tmp_path, monkeypatch):
    """CIFAR-10's tags, by hand: 2 of 6 weights pruned, and 4 parameters of BatchNorm."""
    recorder = Recorder(tmp_path / "logs" / "x", {}, batch_norm=True)
    record = recorder.recording(1, EPOCH)
    measuring.record_connections(record, {"a": measuring.Connections(4, 6)}, others=4)
    measuring.record_rewired(record, {"a": (3, 1)})
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
        "connectivity": pytest.approx(4 / 6),
    }


def test_histograms_of_chosen_layers_only(tmp_path):
    recorder = Recorder(tmp_path / "logs" / "x", {})
    record_distributions(recorder.recording(1, FULL), MnistNet(), [], ("fc.1.weight",))
    recorder.close()
    assert scalars(tmp_path)[1] == {"fc.1.weight-w": [1]}


def test_firing_rates_and_silent_neurons_by_hand(tmp_path):
    recorder = Recorder(tmp_path / "logs" / "x", {})
    measuring.record_neurons(recorder.recording(3, FULL), {"fc.0": torch.tensor([0.0, 0.5, 0.0, 0.25])})
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
        ("", "--recipe fast"),
        ("--recipe fast", "--recipe fast -N 3"),
        ("-m grad -s 0.95 --recipe fast -lr 1e-3", "-m grad -s 0.95 --recipe fast -lr 1e-3 --connectivity 0.02"),
        (
            "-m grad -s 0.95 --recipe fast -lr 1e-3 --connectivity 0.01",
            "-m grad -s 0.95 --recipe fast -lr 1e-3 --connectivity 0.02",
        ),
    ],
)
def test_every_option_of_the_outcome_changes_it(run, tmp_path, bf16_anywhere, one, other):
    ends = []
    for argv in (one.split(), other.split()):
        folder = tmp_path / str(len(ends))
        for option, value in {"-lr": "1e-2", "-b": "8", "-N": "2"}.items():
            argv += [] if option in argv else [option, value]
        assert run(*argv, dump=folder).status == 0
        ends.append(load(folder)["network"])
    assert not same(*ends)


def test_the_same_command_gives_the_same_run(run, tmp_path):
    argv = ["-m", "deep", "-s", "0.5", "-temperature", "1e-3", "-lr", "1e-2", "-b", "8", "-N", "2"]
    for folder in ("a", "b"):
        run(*argv, dump=tmp_path / folder)
    assert_same_run(tmp_path / "a", tmp_path / "b")


def test_digits_need_no_files(run, tmp_path):
    result = run("--dataset", "digits", "-b", "512", "-N", "1", data=tmp_path / "nothing")
    assert result.status == 0
    assert load(tmp_path)["data"].startswith("1498+299 images")


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


def test_tensorboard_compares_runs(run, tmp_path):
    """The command in the text tab, and in the hparams tab the arguments with the metrics that they are set beside."""
    from tensorboard.plugins.hparams import plugin_data_pb2

    run(*GRAD, "-N", "2")
    run(*GRAD, "-N", "3")  # not once more
    found = {}
    for path in sorted(tmp_path.glob("logs/*/*tfevents*")):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                found.setdefault(value.tag, []).append(value)
    (command,) = found["command/text_summary"]
    assert command.tensor.string_val[0].decode().startswith("python ")
    (start,) = found["_hparams_/session_start_info"]
    data = plugin_data_pb2.HParamsPluginData.FromString(start.metadata.plugin_data.content)
    settings = data.session_start_info.hparams
    assert settings["mode"].string_value == "grad"
    assert settings["sparsity"].number_value == 0.95
    assert settings["learning_rate"].number_value == 1e-2
    (experiment,) = found["_hparams_/experiment"]
    data = plugin_data_pb2.HParamsPluginData.FromString(experiment.metadata.plugin_data.content)
    assert {info.name.tag for info in data.experiment.metric_infos} == {"test_acc", "connectivity"}
    assert {"test_acc", "connectivity"} <= found.keys()


def test_numbers_agree_everywhere(run, tmp_path):
    """Console, results.jsonl, TensorBoard, -test and the report say the same of the same epoch."""
    from analysis import report, runs

    told = run(*GRAD, "-N", "3", "-i1", "1").out
    tested = run(*GRAD, "-i1", "1", "-test").out
    lines, (events, _) = results(tmp_path), scalars(tmp_path)
    (log,) = tmp_path.glob("logs/*")
    stored = json.loads((log / "test.json").read_text())
    row = report.row(runs.find([tmp_path])[0])
    last = lines[-1]
    assert last["epoch"] == stored["epoch"] == 3
    console = [line for line in told.splitlines() if line.startswith("epoch")]
    for line, text in zip(lines, console, strict=True):
        for words, key in (("test accuracy", "test_accuracy"), ("best", "best_accuracy"), ("sparsity", "sparsity")):
            assert f"{words} {percent(line[key])}" in text
        assert f"connectivity {percent(line['connectivity'])}" in text
    # exactly the same numbers, but for TensorBoard's float32
    assert (stored["accuracy"], stored["sparsity"], stored["connectivity"]) == (
        last["test_accuracy"],
        last["sparsity"],
        last["connectivity"],
    )
    assert stored["neurons"] == last["neurons"]
    for name, layer in last["layers"].items():
        assert {key: stored["layers"][name][key] for key in ("connected", "weights", "sparsity", "connectivity")} == {
            key: layer[key] for key in ("connected", "weights", "sparsity", "connectivity")
        }
        assert re.search(rf"{re.escape(name)} +sparsity +{re.escape(percent(layer['sparsity']))}", tested)
        assert events[f"layer sparsity/{name}"][-1] == (3, pytest.approx(layer["sparsity"], rel=1e-6))
    for tag, key in (("test_acc", "test_accuracy"), ("sparsity", "sparsity"), ("connectivity", "connectivity")):
        assert events[tag] == [(line["epoch"], pytest.approx(line[key], rel=1e-6)) for line in lines]
    (line,) = [line for line in tested.splitlines() if line.startswith("test accuracy")]
    assert line.startswith(f"test accuracy {percent(last['test_accuracy'])} after 3 epochs")
    assert (row["test accuracy"], row["best"], row["connectivity"]) == (
        percent(last["test_accuracy"]),
        percent(last["best_accuracy"]),
        percent(last["connectivity"]),
    )
    assert row["connections"] == f"{sum(layer['connected'] for layer in last['layers'].values()):,} of 635,200"


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
    assert "test:" in err
    assert "test:" in run(*GRAD, "-test").err


@pytest.mark.parametrize("seed", [2020, 1])
def test_the_seed_is_that_of_the_order_of_the_images(seed, tmp_path, mnist_folder):
    """And so of their augmentation, which is drawn behind it."""
    argv = ["-m", "no_prune", "-b", "8", "--seed", str(seed), "--dump-dir", str(tmp_path)]
    options, nothing = parse(mnist.EXPERIMENT, argv), SimpleNamespace(saved=None)
    trainer = loop.Trainer(mnist.EXPERIMENT, options, MnistNet(), [], MNIST.load(mnist_folder), nothing)
    index, _ = next(trainer.training.parts())
    order = torch.randperm(40, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(trainer.training.order, order)
    assert torch.equal(index, order[:8])
