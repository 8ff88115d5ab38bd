"""What is added is one file and one entry: a method, a data set, an experiment; the files are in examples/."""

import json
import os
import signal
from dataclasses import replace

import pytest
import torch
from examples import magnitude, shallow
from examples.stripes import STRIPES
from run_helpers import assert_same_run, load, results, store
from torch import Tensor

import measuring
from analysis import report
from analysis.experiments import EXPERIMENTS
from analysis.export import export, load_pruned
from analysis.snapshot import from_checkpoint
from mnist import mnist
from mnist.model import MnistNet
from reproduce import entries, grid, outcome, records
from training.errors import Refusal
from training.methods import METHODS
from training.methods.method import Option
from training.naming import run_name
from training.options import read

KEEP = ["-m", "magnitude", "--keep", "0.1", "-lr", "1e-2", "-b", "8"]


@pytest.fixture
def added(monkeypatch):
    """The entry in the table of methods."""
    monkeypatch.setitem(METHODS, "magnitude", magnitude.Magnitude())


def the_page(tmp_path, capsys, monkeypatch, *folders):
    """The text of the HTML report, and the table on the console."""
    pytest.importorskip("jinja2")
    assert report.main([*map(str, folders), "-o", str(tmp_path / "report.html")]) == 0
    return (tmp_path / "report.html").read_text(encoding="utf-8"), capsys.readouterr().out


# -- a method ----------------------------------------------------------------------------------------


def test_a_method_is_trained_stopped_resumed_and_tested(run, added, tmp_path, monkeypatch):
    one, stopped = tmp_path / "one", tmp_path / "stopped"
    result = run(*KEEP, "-N", "3", dump=one)
    assert result.status == 0
    assert "\nmagnitude on mnist: keep 1e-1, learning rate 1e-2, batches of 8, " in result.out  # a line begins so
    forward, passes = MnistNet.forward, []

    def forward_and_stop(self, images):
        passes.append(self.training)
        if passes.count(True) == 8:
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(self, images)

    with monkeypatch.context() as patched:
        patched.setattr(MnistNet, "forward", forward_and_stop)
        assert run(*KEEP, "-N", "3", dump=stopped).status == 128 + signal.SIGTERM
    state = load(stopped)
    assert state["step"] == 8
    # the optimizer's own tensors are among the state, and keep their type
    (first, _) = state["optimizers"][0]["state"].values()
    assert first["age"].dtype == torch.int16
    assert first["age"].max() > 1
    assert run(*KEEP, "-N", "3", dump=stopped).status == 0
    assert_same_run(one, stopped)
    # the result is what the method is for
    last = results(one)[-1]
    assert last["connectivity"] == pytest.approx(0.1, abs=1e-4)
    assert last["penalty"] is None
    result = run(*KEEP, "-test", dump=one)
    assert result.status == 0
    (tested,) = one.glob("logs/*/test.json")
    assert tested.parent.name == "lr-1e-2-b-8-T-8-keep-1e-1-magnitude"
    assert json.loads(tested.read_text("utf-8"))["connectivity"] == last["connectivity"]


def test_a_method_whose_optimizer_needs_several_gradients_in_a_step_is_refused(run, added, tmp_path, monkeypatch):
    monkeypatch.setattr(
        magnitude.Magnitude, "optimizer", lambda self, weights, options: torch.optim.LBFGS(weights, lr=0.1)
    )
    result = run(*KEEP, "-N", "1")
    assert result.status == 2
    assert "a method with LBFGS cannot train" in result.err
    assert result.err.count("\n") == 1
    assert not list(tmp_path.glob("models/*/*.pt"))  # nothing that a later run would resume


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("age", torch.full((800, 784), float("nan"))),
        ("momentum_buffer", [1.0]),
        ("momentum_buffer", torch.full((800, 784), float("inf"))),
        ("a\nkey", torch.zeros(1)),
    ],
)
def test_the_state_of_any_optimizer_is_checked(run, added, tmp_path, key, value):
    run(*KEEP, "-N", "1")
    state = load(tmp_path)
    state["optimizers"][0]["state"][0][key] = value
    store(tmp_path, state)
    result = run(*KEEP, "-N", "2")
    assert result.status == 2
    assert "does not fit" in result.err
    assert result.err.count("\n") == 1


def test_a_state_of_a_parameter_that_is_not_there_is_refused(run, added, tmp_path):
    run(*KEEP, "-N", "1")
    state = load(tmp_path)
    state["optimizers"][0]["state"][2] = {}
    store(tmp_path, state)
    assert "MagnitudeSGD's state is of parameter 2, of 2" in run(*KEEP, "-N", "2").err


def test_the_options_of_a_method_are_its_own(run, added, capsys):
    assert "argument --keep: needs -m magnitude" in run("--keep", "0.1").err
    assert "argument --keep: required with -m magnitude" in run("-m", "magnitude").err
    assert "argument -s/--sparsity: needs -m grad or -m deep" in run(*KEEP, "-s", "0.9").err
    with pytest.raises(SystemExit):
        mnist.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "magnitude (SGD that keeps the largest weights)" in text
    assert "with -m magnitude: share of the weights of each layer to keep (default: none; required)" in text


class AgeAdam(torch.optim.Adam):
    """Has a state of its own, as the example has on SGD."""

    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for weight in group["params"]:
                self.state[weight].setdefault("age", torch.zeros(())).add_(1)


def test_a_subclass_of_adam_may_have_more_in_its_state(run, added, tmp_path, monkeypatch):
    optimizer = lambda self, weights, options: AgeAdam(weights, lr=options.learning_rate)  # noqa: E731
    monkeypatch.setattr(magnitude.Magnitude, "optimizer", optimizer)
    run(*KEEP, "-N", "3", dump=tmp_path / "one")
    assert run(*KEEP, "-N", "1", dump=tmp_path / "parts").status == 0
    assert run(*KEEP, "-N", "3", dump=tmp_path / "parts").status == 0
    assert_same_run(tmp_path / "one", tmp_path / "parts")


def test_an_option_of_a_method_has_a_name_of_its_own(run, monkeypatch):
    class Named(magnitude.Magnitude):
        options = {magnitude.KEEP: "", Option("--criterion", str, "C"): ""}  # noqa: RUF012

    monkeypatch.setitem(METHODS, "magnitude", Named())
    options = read(mnist.EXPERIMENT, ["-m", "magnitude", "--keep", "0.5", "--criterion", "size"])
    assert "criterion-size" in run_name(options)
    options.criterion = "../size"
    with pytest.raises(Refusal, match=r"^argument --criterion: must be without spaces, / .*, not '\.\./size'$"):
        run_name(options)
    for taken in ("--ranks", "--T"):
        Named.options = {magnitude.KEEP: "", Option(taken, str, "R"): ""}
        with pytest.raises(ValueError, match=f"^option {taken} of -m magnitude needs another name$"):
            read(mnist.EXPERIMENT, ["-m", "magnitude"])


def test_a_method_is_in_the_report_and_in_a_grid(run, added, tmp_path, capsys, monkeypatch):
    run(*KEEP, "-N", "1", dump=tmp_path / "runs")
    run("-lr", "1e-2", "-b", "8", "-N", "1", dump=tmp_path / "runs")
    html, table = the_page(tmp_path, capsys, monkeypatch, tmp_path / "runs")
    assert [line.split()[0] for line in table.splitlines() if line.endswith("-magnitude")] == ["magnitude"]
    assert ">magnitude<" in html
    # a grid of the two
    (tmp_path / "mnist.toml").write_text(
        'options = "-lr 1e-2 -b 8"\nepochs = 1\nseeds = [2020]\n'
        '[[group]]\ntitle = "dense"\nvariants = [""]\n'
        '[[group]]\ntitle = "magnitude"\nmethod = "-m magnitude"\nvariants = ["--keep 0.1"]\n'
    )
    rows = grid.load("mnist", tmp_path)
    assert [row.name for row in rows] == ["lr-1e-2-b-8-T-8-no_prune", "lr-1e-2-b-8-T-8-keep-1e-1-magnitude"]
    (tmp_path / "runs" / "rows").mkdir()
    for row in rows:
        records.write(tmp_path / "runs", row)
    (dense, kept) = entries.collect(tmp_path / "runs", rows, tmp_path / "outcome")
    assert (dense.row.variant, kept.row.variant) == ("-lr 1e-2", "--keep 1e-1 -lr 1e-2")
    assert kept.numbers["connectivity"] == pytest.approx(0.1, abs=1e-4)
    (tmp_path / "outcome").mkdir()
    files = outcome.write(tmp_path / "runs", rows, tmp_path / "outcome")
    assert "| magnitude | `--keep 1e-1 -lr 1e-2` | 1 | 1 |" in (tmp_path / "outcome" / "table.md").read_text("utf-8")
    assert {path.name for path in files} >= {"plane.png", "rows.csv", "rewiring.png"}


# -- a data set --------------------------------------------------------------------------------------


def test_a_data_set_is_trained_on_and_tested(run, tmp_path, monkeypatch):
    experiment = replace(mnist.EXPERIMENT, datasets=(*mnist.EXPERIMENT.datasets, STRIPES))  # the entry
    monkeypatch.setattr(mnist, "EXPERIMENT", experiment)
    monkeypatch.setitem(EXPERIMENTS, "mnist", experiment)
    argv = ["--dataset", "stripes", "-b", "8", "-lr", "1e-2", "-N", "1"]
    assert run(*argv).status == 0
    assert run(*argv, "-test").status == 0
    (folder,) = tmp_path.glob("models/*")
    assert folder.name == "lr-1e-2-b-8-T-8-no_prune-stripes"
    # it has its own mean and std, not those of the experiment's first data set
    snapshot = from_checkpoint(folder / "checkpoint.pt")
    export(snapshot, "npz", tmp_path / "network.npz")
    dataset = STRIPES.read(tmp_path)
    normalised = STRIPES.normalisation(torch.device("cpu"))(dataset.test.images)
    assert sorted(normalised.unique().tolist()) == [-1.0, 1.0]
    (tested,) = tmp_path.glob("logs/*/test.json")
    network = load_pruned(tmp_path / "network.npz")
    assert (
        int((network(normalised).argmax(1) == dataset.test.labels).sum())
        == json.loads(tested.read_text("utf-8"))["right"]
    )
    assert snapshot.source is STRIPES


@pytest.mark.parametrize("change", [dict(shape=(1, 28, 29)), dict(shape=(3, 28, 28)), dict(classes=9)])
def test_a_data_set_that_is_not_as_its_entry_says_is_refused(tmp_path, change):
    with pytest.raises(Refusal, match=r"^argument --dataset-dir: stripes in .* has (images 1x28x28|labels outside)"):
        replace(STRIPES, **change).load(tmp_path)


@pytest.mark.parametrize("change", [Tensor.byte, Tensor.float, lambda labels: labels.unsqueeze(1)])
def test_labels_of_another_type_are_refused(tmp_path, change):
    def read(folder):
        data = STRIPES.read(folder)
        return replace(data, test=replace(data.test, labels=change(data.test.labels)))

    with pytest.raises(Refusal, match=r"^argument --dataset-dir: stripes in .* has labels .*, not \[N\] int64$"):
        replace(STRIPES, read=read).load(tmp_path)


# -- a network ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [None, 3])
def test_an_experiment_is_trained_resumed_tested_exported_and_reported(tmp_path, capsys, monkeypatch, width):
    monkeypatch.setitem(EXPERIMENTS, "shallow", shallow.EXPERIMENT)  # the entry
    argv = ["-m", "grad", "-s", "0.9", "-penalty", "1", *(["--width", str(width)] if width else [])]
    one, parts = (["--dump-dir", str(tmp_path / name)] for name in ("one", "parts"))
    assert shallow.main([*argv, *one]) == 0
    assert shallow.main([*argv, *parts, "-N", "1"]) == 0
    assert shallow.main([*argv, *parts]) == 0
    assert_same_run(tmp_path / "one", tmp_path / "parts")
    assert shallow.main([*argv, *one, "-test"]) == 0
    (folder,) = (tmp_path / "one").glob("models/*")
    assert folder.name.endswith(f"-grad-width-{width}" if width else "-grad")
    other = [word for word in argv if word not in ("--width", "3")] if width else [*argv, "--width", "3"]
    assert shallow.main([*other, *one, "-test"]) == 2  # it is another run
    network = load_pruned(folder)
    assert type(network) is shallow.ShallowNet
    assert network.static_fc[1].out_features == 10 * (width or 4)
    export(from_checkpoint(folder / "checkpoint.pt"), "npz", tmp_path / "network.npz")
    for name, weight in measuring.prunable(load_pruned(tmp_path / "network.npz")).items():
        assert torch.equal(weight, measuring.prunable(network)[name])
    capsys.readouterr()
    html, _ = the_page(tmp_path, capsys, monkeypatch, tmp_path / "one")
    assert "shallow network on stripes" in html


def test_a_network_with_a_buffer_that_no_file_holds_is_not_loaded(tmp_path, monkeypatch):
    class Masked(shallow.ShallowNet):
        def __init__(self, T=8, step_mode="m", width=4):
            super().__init__(T, step_mode, width)
            self.register_buffer("mask", torch.ones(10 * width), persistent=False)

    experiment = replace(shallow.EXPERIMENT, network=Masked)
    monkeypatch.setattr(shallow, "EXPERIMENT", experiment)
    monkeypatch.setitem(EXPERIMENTS, "shallow", experiment)
    assert shallow.main(["-N", "1", "--dump-dir", str(tmp_path)]) == 0
    with pytest.raises(ValueError, match="mask is a buffer that no file holds: make it persistent"):
        load_pruned(next(tmp_path.glob("models/*")))
