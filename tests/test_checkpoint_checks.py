"""Does a checkpoint fit: each field of it is edited in turn, and refused in one line that names file and field."""

import math
import os
import random
import re

import numpy as np
import pytest
import torch
from run_helpers import load, results, same
from torch import nn

from c10.model import Cifar10Net
from gradrewire import GradRewiring
from mnist.model import MnistNet
from training import checkpoint, checkpoint_checks
from training.files import storage

GRAD = ["-m", "grad", "-s", "0.95", "-lr", "1e-2", "-b", "8"]  # five steps an epoch
DEEP = ["-m", "deep", "-s", "0.5", "-temperature", "1e-3", "-lr", "1e-2", "-b", "8"]
FAST = ["-m", "grad", "--recipe", "fast", "--connectivity", "0.1", "-lr", "1e-3", "-b", "8", "-N", "2"]
DENSE = ["-lr", "1e-2", "-b", "8"]

# -- edits -------------------------------------------------------------------------------------------------


def changed(state, *keys, to):
    """The state with one item replaced (``to`` a value or a function of the old one), or taken away (None)."""
    *outer, last = keys
    container = state
    for key in outer:
        container = container[key]
    if to is None:
        del container[last]
    else:
        container[last] = to(container[last]) if callable(to) else to
    return state


def containers(state):
    """The state with containers of its own, and the same tensors: no edit changes one."""
    if isinstance(state, dict):
        return {key: containers(value) for key, value in state.items()}
    return [*map(containers, state)] if isinstance(state, list) else state


def cell(value, place=0):
    """An edit of a tensor: one element."""

    def edit(tensor):
        tensor = tensor.clone()
        tensor.view(-1)[place] = value(tensor.view(-1)[place]) if callable(value) else value
        return tensor

    return edit


def item(index, value):
    """An edit of a tuple: one item."""
    return lambda old: (*old[:index], value, *old[index + 1 :])


def added(key, value):
    return lambda old: {**old, key: value}


STATE = ("optimizers", 0, "state", 0)
GROUP = ("optimizers", 0, "param_groups", 0)
WEIGHT = ("network", "fc.1.weight")
FIELDS = [  # of what has to fit whatever is done with it
    (("format",), 1, "is of format 1, not 2"),
    (("format",), 2.0, "is of format 2.0, not 2"),
    (("format",), torch.ones(2), "is of format tensor"),
    (("seconds",), None, "it lacks seconds"),
    (("surplus",), 1, "it has the unknown surplus"),
    *(
        ((name,), b"", f"{name} is bytes, not {kind.__name__}")
        for name, kind in [*checkpoint_checks.CONTENT.items()][1:]
    ),
    (("data",), "40 images", "data is '40 images', not a fingerprint"),
    (("data",), "7+20 images, crc32 00000000", "not a fingerprint of at least 8 training images"),
    (("epoch",), 1.0, "epoch is float, not int"),
    (("epoch",), True, "epoch is bool, not int"),
    (("epoch",), -1, "epoch is -1, not"),
    (("epoch",), 2, "epoch is 2, not a whole number from 0 to 1"),
    (("step",), 7, "step is 7 after 1 epochs of 5 and 0 batches"),
    (("position",), 6, "position is 6, not"),
    (("position",), -1, "position is -1, not"),
    (("best_accuracy",), 1.5, "best_accuracy is 1.5, not"),
    (("best_accuracy",), -0.1, "best_accuracy is -0.1, not"),
    (("best_accuracy",), math.nan, "best_accuracy is nan, not"),
    (("epoch_loss",), 0.5, "epoch_loss is 0.5, not"),
    (("epoch_loss",), math.inf, "epoch_loss is inf, not"),
    (("epoch_right",), 1, "epoch_right is 1, not"),
    (("epoch_right",), -1, "epoch_right is -1, not"),
    (("seconds", "train"), None, "seconds lacks train"),
    (("seconds", "train"), -1.0, "seconds of train is -1.0"),
    (("seconds", "test"), math.nan, "test of seconds is nan"),
    (("seconds", "test"), "1", "seconds of test is '1'"),
    (("versions", "torch"), None, "versions are of spikingjelly, not of torch and spikingjelly"),
    (("versions", "torch"), 2, "the version of torch is 2"),
    (("versions", "torch"), "2\n3", r"torch of versions is '2\\n3'"),
    (("arguments", "T"), None, "T of arguments is None"),
    (("arguments", "T"), 8.0, "T of arguments is 8.0"),
    (("arguments", "epoch"), "1", "epoch of arguments is '1'"),
    (("arguments", "batch_size"), 0, "batch_size of arguments is 0"),
    (("arguments", "interval_test"), 0, "interval_test of arguments is 0"),
    (("arguments", "interval_train"), True, "interval_train of arguments is True"),
    (("arguments", "seed"), [2020], "seed of arguments is list"),
    (("arguments", "seed"), 2020.0, "argument --seed: .* made with 2020.0, not 2020"),
    (("arguments", "seed"), torch.tensor(2020), r"argument --seed: .* made with tensor\(2020\), not 2020"),
    (("arguments", "interval_test"), torch.tensor(1), r"interval_test of arguments is tensor\(1\)"),
    (("arguments", "learning_rate"), math.nan, "learning_rate of arguments is nan"),
    (("arguments", 7), 1, "a key of arguments is 7"),
    (("schedule", "penalty"), [1.0], "penalty of schedule is list"),
    (("files", "results.jsonl"), -1, "the length of results.jsonl is -1"),
    (("files", "results.jsonl"), 1.0, "the length of results.jsonl is 1.0"),
    (("files",), added("../results.jsonl", 1), "files has '../results.jsonl', which is not the name of a log file"),
    (("files",), added("/etc/tfevents", 1), "files has '/etc/tfevents'"),
    (("files",), added("..\\tfevents", 1), r"files has '..\\\\tfevents'"),
    (("files",), added("C:tfevents", 1), "files has 'C:tfevents'"),
    (("files",), added("run.json", 1), "files has 'run.json'"),
    (("files",), added("a\0tfevents", 1), "a key of files is "),
]
NETWORK = [
    (WEIGHT, None, r"the network lacks fc\.1\.weight"),
    (("network", "fc.9.weight"), torch.ones(1), r"the network has the unknown fc\.9\.weight"),
    (WEIGHT, lambda w: w[:, :400].clone(), r"fc\.1\.weight is float32 \[10, 400\], not float32 \[10, 800\]"),
    (WEIGHT, lambda w: w.double(), r"fc\.1\.weight is float64 \[10, 800\], not float32 \[10, 800\]"),
    (WEIGHT, "weight", r"fc\.1\.weight is of type str, not a tensor"),
    (WEIGHT, cell(math.nan), r"fc\.1\.weight has values that are not finite"),
    (WEIGHT, lambda w: w.t().contiguous().t(), r"fc\.1\.weight is a view"),
    (WEIGHT, lambda w: w.to_sparse(), r"fc\.1\.weight is torch.sparse_coo"),
]
TRAINING = [
    (("optimizers",), lambda o: o * 2, "it has 2 optimizers, not 1"),
    (("optimizers", 0), [], "GradRewiring is list, not dict"),
    (("optimizers", 0, "surplus"), 1, "GradRewiring has the unknown surplus"),
    (("optimizers", 0, "param_groups"), [], "GradRewiring has not 1 parameter groups"),
    (("optimizers", 0, "param_groups"), {}, "GradRewiring has not 1 parameter groups"),
    (GROUP, 1, "a parameter group of GradRewiring is int"),
    ((*GROUP, "alpha"), 7.0, "GradRewiring's alpha is 7.0, not 0.001"),
    ((*GROUP, "lr"), torch.tensor(0.01), "GradRewiring's lr is Tensor, not 0.01"),
    ((*GROUP, "lr"), 0.02, "GradRewiring's lr is 0.02, not 0.01"),
    ((*GROUP, "weight_decay"), False, "GradRewiring's weight_decay is False, not 0"),
    ((*GROUP, "betas"), [0.9, 0.999], r"GradRewiring's betas is \[0.9, 0.999\], not \(0.9, 0.999\)"),
    ((*GROUP, "betas"), (0.9, 1), r"GradRewiring's betas is \(0.9, 1\)"),
    ((*GROUP, "params"), [0], r"GradRewiring's params is \[0\], not \[0, 1\]"),
    ((*GROUP, "fused"), 1, "GradRewiring's fused is 1, not True, False or None"),
    ((*GROUP, "eps"), None, "GradRewiring lacks eps"),
    (("optimizers", 0, "state"), [], "GradRewiring's state is list, not dict"),
    (("optimizers", 0, "state", 1), None, "GradRewiring's state lacks 1"),
    (("optimizers", 0, "state", "0"), {}, "GradRewiring's state has the unknown 0"),
    (STATE, "text", r"GradRewiring's state of static_fc\.1\.weight is str, not dict"),
    ((*STATE, "sign"), None, r"GradRewiring's state of static_fc\.1\.weight lacks sign"),
    ((*STATE, "surplus"), 1, r"static_fc\.1\.weight has the unknown surplus"),
    ((*STATE, "sign"), lambda s: s.float(), r"sign of static_fc\.1\.weight is float32 \[800, 784\], not int8"),
    ((*STATE, "sign"), cell(2), r"sign of static_fc\.1\.weight has values from -1 to 2, not from -1 to 1"),
    ((*STATE, "sign"), torch.neg, r"theta and sign of static_fc\.1\.weight are not those of its weights"),
    ((*STATE, "theta"), lambda t: t[:1].clone(), r"theta of static_fc\.1\.weight is float32 \[1, 784\]"),
    ((*STATE, "theta"), cell(lambda t: t.abs() + 1), r"theta and sign of static_fc\.1\.weight are not those"),
    ((*STATE, "theta"), cell(math.inf), r"theta of static_fc\.1\.weight has values that are not finite"),
    ((*STATE, "step"), 5.0, r"step of static_fc\.1\.weight is of type float, not a tensor"),
    ((*STATE, "step"), torch.tensor(4.0), r"step of static_fc\.1\.weight is 4.0 after 5 steps"),
    ((*STATE, "step"), torch.tensor(-5.0), r"step of static_fc\.1\.weight is -5.0 after 5 steps"),
    ((*STATE, "exp_avg"), cell(-math.inf), r"exp_avg of static_fc\.1\.weight has values that are not finite"),
    ((*STATE, "exp_avg_sq"), cell(-1e-9), r"exp_avg_sq of static_fc\.1\.weight has values from -"),
    (("masks", "fc.1.weight"), None, r"masks lacks fc\.1\.weight"),
    (("masks", "fc.1.weight"), lambda m: m[:-1].clone(), r"fc\.1\.weight is uint8 \[999\], not uint8 \[1000\]"),
    (("masks", "fc.1.weight"), lambda m: m.view(10, 100), r"fc\.1\.weight is uint8 \[10, 100\]"),
    (("masks", "fc.1.weight"), lambda m: m.bool(), r"fc\.1\.weight is bool"),
    (("masks", "fc.1.weight"), cell(0), r"the mask of fc\.1\.weight is not that of its weights"),
    (("schedule", "penalty"), 1.0, "a schedule, where this run has none"),
    (("random", "torch"), None, "random lacks torch"),
    (("random", "other"), 1, "random has the unknown other"),
    (("random", "torch"), "state", "the random state of torch is of type str, not a tensor"),
    (("random", "torch"), lambda s: s[:-1].clone(), "the random state of torch is uint8"),
    (("random", "torch"), lambda s: s.flip(0), "the random state of torch is not"),
    (("random", "data"), torch.zeros_like, "the random state of data is not"),
    (("random", "cuda"), torch.zeros(3, dtype=torch.uint8), "the random state of cuda is uint8"),
    (("random", "python"), (3, 4), "the random state of python is not a state"),
    (("random", "python"), item(0, 2), "the random state of python is not a state"),
    (("random", "python"), item(2, "text"), "the random state of python is not a state"),
    (("random", "python"), item(2, math.nan), "the normal number of the random state of python is nan"),
    (("random", "python"), item(1, (1, 2)), "the random state of python has 1 words, not 624"),
    (("random", "python"), item(1, ()), "the random state of python has 0 words, not 624"),
    (("random", "python"), item(1, (-1, *range(623), 5)), "a word of the random state of python is -1"),
    (("random", "python"), item(1, (*range(624), 700)), "the index of the random state of python is 700"),
    (("random", "python"), item(1, (*[0] * 624, 5)), "the random state of python has words of 0 only"),
    (("random", "numpy"), item(0, "PCG64"), "the random state of numpy is not a state of MT19937"),
    (("random", "numpy"), item(1, [0.5] * 624), "a word of the random state of numpy is 0.5"),
    (("random", "numpy"), item(2, 10**6), "the index of the random state of numpy is 1000000"),
    (("random", "numpy"), item(3, 7), "the random state of numpy is not a state of MT19937"),
    (("random", "numpy"), item(4, math.inf), "the normal number of the random state of numpy is inf"),
]


# -- the command -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def states():
    """The checkpoint that each command line left, once it was run."""
    return {}


@pytest.fixture
def refused(run, tmp_path, monkeypatch, states):
    """Runs a command over the checkpoint that it left after an epoch, edited; returns the one line that refuses it."""

    def call(argv, more, keys, to):
        argv = [*argv] if "-N" in argv else [*argv, "-N", "1"]
        if tuple(argv) not in states:
            run(*argv)
            states[tuple(argv)] = load(tmp_path)
        state = changed(containers(states[tuple(argv)]), *keys, to=to)
        monkeypatch.setattr(storage, "newest", lambda path: (state, [], path))
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.name != "lock"}
        result = run(*(argv[:-2] if more == ["-N", "2"] else argv), *more)
        after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.name != "lock"}
        assert {path for path in after if path.is_file()} == {path for path in before if path.is_file()}
        assert result.status == 2, result
        assert result.err.count("\n") == 1, result.err
        return result.err

    return call


@pytest.mark.parametrize("edit", [*FIELDS, *NETWORK, *TRAINING], ids=lambda edit: f"{edit[0]} {edit[2]}"[:60])
def test_every_field_is_checked_before_training_goes_on(refused, edit):
    keys, to, message = edit
    line = refused(GRAD, ["-N", "2"], keys, to)
    assert re.search(message, line), line
    assert "checkpoint.pt" in line or "argument" in line


@pytest.mark.parametrize("edit", [*FIELDS[::4], *NETWORK[::3]], ids=lambda edit: f"{edit[0]} {edit[2]}"[:60])
def test_what_a_test_takes_is_checked_before_it(refused, edit):
    keys, to, message = edit
    line = refused(GRAD, ["-test"], keys, to)
    assert re.search(message, line), line


@pytest.mark.parametrize(
    ("argv", "keys", "to", "message"),
    [
        (DEEP, (*STATE, "sign"), torch.neg, r"sign of static_fc\.1\.weight is not that of its weights"),
        (DEEP, (*STATE, "theta"), torch.zeros(800, 784), r"static_fc\.1\.weight has the unknown theta"),
        (DENSE, (*STATE, "exp_avg_sq"), cell(-1.0), r"exp_avg_sq of static_fc\.1\.weight has values from -1\.0"),
        (FAST, ("schedule", "penalty"), None, r"a schedule of \[\], not of \['penalty'\]"),
        (FAST, ("schedule", "penalty"), -1.0, "a schedule's penalty of -1.0"),
        (FAST, ("schedule", "penalty"), 0.125, "GradRewiring's alpha is .*, not 0.125"),
        (FAST, (*GROUP, "initial_lr"), 1.0, "GradRewiring's initial_lr is 1.0, not 0.001"),
    ],
)
def test_what_other_modes_add_is_checked(refused, argv, keys, to, message):
    line = refused(argv, [] if argv is FAST else ["-N", "2"], keys, to)
    assert re.search(message, line), line


def test_a_checkpoint_of_another_network_is_refused(refused):
    """Of the other experiment, were its arguments the same."""
    other = {name: torch.zeros(1) for name in Cifar10Net(1).state_dict()}
    for more in (["-N", "2"], ["-test"]):
        assert re.search(r"the network lacks fc\.1\.weight", refused(GRAD, more, ("network",), other))


def test_a_test_needs_the_network_alone(run, tmp_path):
    """What only training goes on from may be gone: the network can still be measured."""
    run(*GRAD, "-N", "1")
    expected = run(*GRAD, "-test").out
    state = load(tmp_path)
    for name, value in {"optimizers": [], "random": {}, "masks": {}, "schedule": {}}.items():
        state[name] = value
    storage.write(next(tmp_path.glob("models/*/checkpoint.pt")), state)
    assert run(*GRAD, "-test").out == expected
    assert run(*GRAD, "-N", "2").status == 2


# -- single checks -----------------------------------------------------------------------------------------


def test_nothing_is_applied_of_a_checkpoint_that_does_not_fit(run, tmp_path):
    run(*GRAD, "-N", "1")
    state = changed(load(tmp_path), *STATE, "sign", to=None)
    network = MnistNet()
    optimizers = [GradRewiring(network.parameters(), lr=1e-2, alpha=1e-3, s=0.95)]
    before = [parameter.clone() for parameter in network.parameters()]
    generators = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002
    with pytest.raises(ValueError, match="lacks sign"):
        checkpoint_checks.check_training(state, network, optimizers)
    assert all(map(torch.equal, before, network.parameters()))
    assert len(optimizers[0].state) == 0
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002
    assert after == generators


def test_batch_norm_has_a_variance_and_a_count():
    network = nn.Sequential(nn.BatchNorm1d(2))

    def saved(**changes):
        state = {**network.state_dict(), **changes}
        return {"network": state, "step": 3, "arguments": {"T": 4}}

    checkpoint_checks.check_network(saved(), network)
    checkpoint_checks.check_network(saved(**{"0.num_batches_tracked": torch.tensor(12)}), network)
    for name, value, message in (
        ("0.running_var", torch.tensor([1.0, -1.0]), "0.running_var has values from -1.0 to 1.0"),
        ("0.num_batches_tracked", torch.tensor(13), "0.num_batches_tracked has values from 13 to 13"),
        ("0.num_batches_tracked", torch.tensor(-1), "0.num_batches_tracked has values from -1"),
        ("0.running_mean", torch.tensor([math.nan, 0]), "0.running_mean has values that are not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            checkpoint_checks.check_network(saved(**{name: value}), network)


def test_batch_norm_without_running_statistics_has_none_to_check():
    network = nn.Sequential(nn.BatchNorm1d(2, track_running_stats=False))
    checkpoint_checks.check_network({"network": network.state_dict(), "step": 3, "arguments": {"T": 4}}, network)


def test_bits_behind_the_last_connection_are_none():
    network = nn.Sequential(nn.Linear(3, 3, bias=False))  # 9 connections, 16 bits
    optimizer = torch.optim.Adam(network.parameters())
    mask = torch.tensor([255, 129], dtype=torch.uint8)
    saved = {"optimizers": [optimizer.state_dict()], "network": network.state_dict(), "step": 0, "position": 1}
    with pytest.raises(ValueError, match=r"the mask of 0\.weight has bits behind its last connection"):
        checkpoint_checks.check_training({**saved, "masks": {"0.weight": mask}}, network, [optimizer])


def test_a_log_that_leads_elsewhere_is_not_cut(run, tmp_path):
    """Names in a checkpoint are names: no path, and no file that it does not name is touched."""
    run(*GRAD, "-N", "1")
    (logs,) = tmp_path.glob("logs/*")
    outside = tmp_path / "tfevents"
    outside.write_text("outside")
    folder = logs / "a folder of tfevents"
    folder.mkdir()
    assert run(*GRAD, "-N", "2").status == 0
    assert outside.read_text() == "outside"
    assert folder.is_dir()


@pytest.mark.parametrize("name", ["results.jsonl", "a.tfevents"])
@pytest.mark.parametrize(
    "make", [lambda path, outside: path.symlink_to(outside), lambda path, outside: os.mkfifo(path)]
)
def test_a_log_that_is_a_link_or_a_pipe_is_refused(run, tmp_path, name, make):
    run(*GRAD, "-N", "1")
    (logs,) = tmp_path.glob("logs/*")
    outside = tmp_path / "outside"
    outside.write_text("outside")
    (logs / name).unlink(missing_ok=True)
    make(logs / name, outside)
    result = run(*GRAD, "-N", "2")
    assert result.status == 1
    assert result.err.count("\n") == 1
    assert f"it is a link or not a regular file; move it away: '{logs / name}'" in result.err
    assert outside.read_text() == "outside"


# -- what need not be the same -----------------------------------------------------------------------------


def test_recording_intervals_may_change(run, tmp_path):
    """-i1 and -i2 change what is recorded, nothing that is computed."""
    run(*GRAD, "-N", "2", "-i1", "1", "-i2", "1", dump=tmp_path / "one")
    dump = tmp_path / "parts"
    assert run(*GRAD, "-N", "1", "-i1", "7", "-i2", "3", dump=dump).status == 0
    assert run(*GRAD, "-test", dump=dump).status == 0
    assert run(*GRAD, "-N", "2", "-i1", "1", "-i2", "1", dump=dump).status == 0
    one, parts = load(tmp_path / "one"), load(dump)
    assert one["arguments"] == parts["arguments"]  # those of the last start
    for name in ("network", "optimizers", "random", "masks", "best_accuracy"):
        assert same(one[name], parts[name]), name


def test_intervals_of_a_start_are_recorded_from_there_on(run, tmp_path):
    run(*GRAD, "-N", "2", "-i1", "1")
    run(*GRAD, "-N", "5", "-i1", "4")
    assert [line["epoch"] for line in results(tmp_path) if "neurons" in line] == [1, 2, 4]


def test_all_that_names_a_run_has_to_be_the_same(refused):
    assert (
        refused(GRAD, ["-test"], ("arguments", "seed"), 3)
        .rstrip()
        .endswith("use the same value, or another --dump-dir")
    )
    assert {"interval_test", "interval_train"} == checkpoint.RECORDING_OPTIONS
