"""Stop and go on: a run in parts is the run in one, and what cannot be gone on from is refused, and kept."""

import errno
import json
import operator
import os
import shutil
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from run_helpers import assert_same_run, load, results, same, scalars, store, the_checkpoint

import measuring
from gradrewire import GradRewiring
from mnist import mnist
from mnist.data import MNIST
from mnist.model import MnistNet
from training import checkpoint, logs, loop, randomness, run_info
from training.divergence import FiniteCheck
from training.files import json_files, storage
from training.files.locks import Lock
from training.files.storage import damaged_of, previous_of
from training.metrics import EPOCH
from training.options import parse
from training.recording import Recording
from training.schedule import FastSchedule

GRAD = ["-m", "grad", "-s", "0.95", "-lr", "1e-2", "-b", "8"]  # five steps an epoch
MODES = {
    "no_prune": [],
    "grad": ["-m", "grad", "-s", "0.95"],
    "plain gradient": ["-m", "grad", "-s", "0.95", "--plain-gradient"],
    "deep": ["-m", "deep", "-s", "0.5", "-temperature", "1e-3"],
    "soft deep": ["-m", "deep", "-soft", "-s", "0.5", "-temperature", "1e-3"],
}
EVERY_STEP = ["--checkpoint-minutes", "1e-9"]


def die_at(monkeypatch, *steps):
    """The process seems to be killed at these forward passes of training, counted over all runs."""
    calls, forward = [0], MnistNet.forward

    def forward_or_die(self, images):
        if self.training:
            calls[0] += 1
            if calls[0] in steps:
                raise KeyboardInterrupt
        return forward(self, images)

    monkeypatch.setattr(MnistNet, "forward", forward_or_die)
    return calls


@pytest.mark.parametrize("mode", MODES)
def test_a_run_in_parts_is_the_run_in_one(run, tmp_path, mode):
    argv = [*MODES[mode], "-lr", "1e-2", "-b", "8", "-i1", "2", "-i2", "2"]
    run(*argv, "-N", "4", dump=tmp_path / "one")
    for epochs in ("1", "3", "4"):
        result = run(*argv, "-N", epochs, dump=tmp_path / "parts")
    assert "Resuming after epoch 3; 4 epochs in all." in result.out
    assert_same_run(tmp_path / "one", tmp_path / "parts")


@pytest.mark.parametrize("mode", MODES)
def test_a_run_killed_inside_epochs_is_the_run_in_one(run, tmp_path, monkeypatch, mode):
    argv = [*MODES[mode], "-lr", "1e-2", "-b", "8", "-i1", "2", "-i2", "1", "-N", "3", *EVERY_STEP]
    run(*argv, dump=tmp_path / "one")
    steps = die_at(monkeypatch, 3, 8, 9)
    parts = [run(*argv, dump=tmp_path / "parts") for _ in range(4)]
    assert [part.status for part in parts] == [130, 130, 130, 0]
    assert "Resuming" not in parts[0].out
    places = ["in epoch 1, after step 2 of 5", "in epoch 2, after step 1 of 5", "in epoch 2, after step 1 of 5"]
    for part, place in zip(parts[1:], places, strict=True):
        assert f"Resuming {place}; 3 epochs in all." in part.out
    assert steps[0] == 15 + 3  # the steps that were killed, and no other, are taken twice
    assert_same_run(tmp_path / "one", tmp_path / "parts")
    assert [line["epoch"] for line in results(tmp_path / "parts")] == [1, 2, 3]


def test_a_fast_run_killed_inside_a_segment_is_the_run_in_one(run, tmp_path, monkeypatch):
    monkeypatch.setattr(FastSchedule, "SEGMENTS", 4)  # of 4 steps
    argv = ["-m", "grad", "--recipe", "fast", "--connectivity", "0.02", "-lr", "1e-3", "-b", "8", "-N", "3"]
    argv += ["-i1", "2", "-i2", "1", *EVERY_STEP]
    run(*argv, dump=tmp_path / "one")
    die_at(monkeypatch, 3, 5, 11, 14)  # inside two segments, and at the first step of two
    parts = [run(*argv, dump=tmp_path / "parts") for _ in range(5)]
    assert [part.status for part in parts] == [130, 130, 130, 130, 0]
    assert_same_run(tmp_path / "one", tmp_path / "parts")
    assert len({line["penalty"] for line in results(tmp_path / "parts")}) > 1


def test_without_checkpoints_inside_it_an_epoch_is_taken_anew(run, tmp_path, monkeypatch):
    run(*GRAD, "-N", "3", "-i2", "1", dump=tmp_path / "one")
    die_at(monkeypatch, 8)
    assert run(*GRAD, "-N", "3", "-i2", "1", dump=tmp_path / "killed").status == 130
    the_one = storage.newest(the_checkpoint(tmp_path / "killed"))[0]
    assert (the_one["epoch"], the_one["position"]) == (1, 0)
    result = run(*GRAD, "-N", "3", "-i2", "1", dump=tmp_path / "killed")
    assert "Resuming after epoch 1; 3 epochs in all." in result.out
    assert [line.split()[1] for line in result.out.splitlines() if line.startswith("epoch")] == ["2/3", "3/3"]
    assert_same_run(tmp_path / "one", tmp_path / "killed")


def test_a_run_killed_before_its_first_epochs_end_goes_on(run, tmp_path, monkeypatch):
    run(*GRAD, "-N", "1", dump=tmp_path / "one")
    die_at(monkeypatch, 2)
    assert run(*GRAD, "-N", "1", dump=tmp_path / "killed").status == 130
    assert run(*GRAD, "-N", "1", dump=tmp_path / "killed").status == 0
    assert_same_run(tmp_path / "one", tmp_path / "killed")


@pytest.mark.parametrize("what", ["recording.Recorder.__init__", "json_files.write", "recording.Recorder.describe"])
def test_a_run_killed_while_its_logs_are_begun_goes_on(run, tmp_path, monkeypatch, what):
    run(*GRAD, "-N", "1", dump=tmp_path / "one")
    right = operator.attrgetter(what)(loop)

    def do_and_die(*args, **kwargs):
        right(*args, **kwargs)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(f"training.loop.{what}", do_and_die)
        assert run(*GRAD, "-N", "1", dump=tmp_path / "killed").status == 130
    assert list(tmp_path.glob("killed/logs/*/*tfevents*"))
    assert run(*GRAD, "-N", "1", dump=tmp_path / "killed").status == 0
    assert_same_run(tmp_path / "one", tmp_path / "killed")


def test_a_run_killed_between_its_results_and_its_checkpoint_logs_nothing_twice(run, tmp_path, monkeypatch):
    run(*GRAD, "-N", "2", "-i2", "1", dump=tmp_path / "one")
    save, saves = checkpoint.Store.save, []

    def save_or_die(self, state, files):
        self.wait()
        saves.append(state["epoch"])
        if saves.count(2) == 1 and state["epoch"] == 2:  # the results of the last epoch are written by now
            raise KeyboardInterrupt
        save(self, state, files)

    monkeypatch.setattr(checkpoint.Store, "save", save_or_die)
    assert run(*GRAD, "-N", "2", "-i2", "1", dump=tmp_path / "killed").status == 130
    assert [line["epoch"] for line in results(tmp_path / "killed")] == [1, 2]
    assert "Resuming after epoch 1;" in run(*GRAD, "-N", "2", "-i2", "1", dump=tmp_path / "killed").out
    assert_same_run(tmp_path / "one", tmp_path / "killed")


# -- when it saves -----------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch):
    """Stands still, but for a minute at each step of training and two at each test, which is one batch."""
    now, forward = SimpleNamespace(minutes=0.0), MnistNet.forward

    def forward_in_time(self, images):
        now.minutes += 1 if self.training else 2
        return forward(self, images)

    def seconds():
        return 60 * now.minutes

    monkeypatch.setattr(MnistNet, "forward", forward_in_time)
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=seconds, perf_counter=seconds))
    return now


@pytest.fixture
def saves(monkeypatch):
    """The epoch and the position of each checkpoint."""
    save, places = checkpoint.Store.save, []

    def save_and_note(self, state, files):
        places.append((state["epoch"], state["position"]))
        save(self, state, files)

    monkeypatch.setattr(checkpoint.Store, "save", save_and_note)
    return places


@pytest.mark.parametrize(
    ("minutes", "places"),
    [  # an epoch takes 7 minutes
        ("1000", [(0, 0), (1, 0), (6, 0)]),  # the start, the first epoch's end and the run's
        ("21.5", [(0, 0), (1, 0), (4, 0), (6, 0)]),  # and the last end of an epoch in time
        ("20.5", [(0, 0), (1, 0), (3, 0), (5, 0), (6, 0)]),
        ("7.5", [(epoch, 0) for epoch in range(7)]),
        ("2.5", [(0, 0), *(place for epoch in range(6) for place in ((epoch, 3), (epoch + 1, 0)))]),
        ("1e-9", sorted({(epoch, step) for epoch in range(6) for step in range(6)} | {(6, 0)})),
    ],
)
def test_it_saves_in_time_and_at_the_ends_of_epochs_where_it_can(run, tmp_path, clock, saves, minutes, places):
    run(*GRAD, "-N", "6", "--checkpoint-minutes", minutes)
    assert saves == places
    run(*GRAD, "-N", "6", dump=tmp_path / "one")
    assert_same_run(tmp_path / "one", tmp_path)


def test_a_run_killed_epochs_after_its_checkpoint_is_the_run_in_one(run, tmp_path, monkeypatch, saves):
    """Each process saves its first epoch, so that a run that is always killed early goes on all the same."""
    argv = [*GRAD, "-N", "7", "-i1", "2", "-i2", "1", "--checkpoint-minutes", "1000"]
    run(*argv, dump=tmp_path / "one")
    saves.clear()
    die_at(monkeypatch, 18, 18 + 9, 18 + 9 + 16)
    killed = tmp_path / "killed"
    for epochs, lines in ((1, [1, 2, 3]), (2, [1, 2]), (3, [1, 2, 3, 4, 5])):
        assert run(*argv, dump=killed).status == 130
        assert load(killed)["epoch"] == epochs
        assert [line["epoch"] for line in results(killed)] == lines
        assert f"after {epochs} epoch{'s' * (epochs > 1)} (" in run(*argv, "-test", dump=killed).out
    result = run(*argv, dump=killed)
    assert [line.split()[1] for line in result.out.splitlines() if line.startswith("epoch")] == [
        "4/7",
        "5/7",
        "6/7",
        "7/7",
    ]
    assert saves == [(0, 0), (1, 0), (2, 0), (3, 0), (4, 0), (7, 0)]
    assert [line["epoch"] for line in results(killed)] == [1, 2, 3, 4, 5, 6, 7]
    assert_same_run(tmp_path / "one", killed)


def test_a_resumed_epoch_that_ends_is_the_first_of_its_process(run, tmp_path, monkeypatch, saves):
    argv = [*GRAD, "-N", "4", *EVERY_STEP]
    die_at(monkeypatch, 8)
    assert run(*argv).status == 130
    assert saves[-1] == (1, 2)
    saves.clear()
    assert run(*argv[:-1], "1000").status == 0
    assert saves == [(2, 0), (4, 0)]


def test_an_extended_run_saves_its_end(run, tmp_path, saves):
    run(*GRAD, "-N", "2")
    run(*GRAD, "-N", "5")
    assert saves == [(0, 0), (1, 0), (2, 0), (3, 0), (5, 0)]


def test_waiting_for_the_device_is_training_and_waiting_for_the_disk_is_not(run, tmp_path, monkeypatch, clock):
    found, save = FiniteCheck.found, checkpoint.Store.save

    def wait_and_find(self):
        clock.minutes += 10
        return found(self)

    def wait_and_save(self, state, files):
        clock.minutes += 100
        save(self, state, files)

    monkeypatch.setattr(FiniteCheck, "found", wait_and_find)
    monkeypatch.setattr(checkpoint.Store, "save", wait_and_save)
    run(*GRAD, "-N", "3", "-i2", "1000", "--checkpoint-minutes", "1000")
    run(*GRAD, "-N", "4", "-i2", "1000", *EVERY_STEP)
    (path,) = tmp_path.glob("logs/*/results.jsonl")
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    took = [[line[f"{what}_seconds"] / 60 for what in ("train", "test", "checkpoint")] for line in lines]
    # five steps and the end's wait, and the wait of step 0, which is recorded; in the last, each step saves
    assert took == [[5 + 10 + 10, 2, 100], [5 + 10, 2, 100], [5 + 10, 2, 0], [5 + 5 * 10 + 10, 2, 5 * 100]]


def test_a_test_says_that_its_checkpoint_is_from_within_an_epoch(run, tmp_path, monkeypatch):
    die_at(monkeypatch, 9)
    assert run(*GRAD, "-N", "3", *EVERY_STEP).status == 130
    monkeypatch.undo()
    assert "The checkpoint was saved in epoch 2, after step 3 of 5.\n" in run(*GRAD, "-test").out
    assert run(*GRAD, "-N", "3").status == 0
    assert "The checkpoint was saved" not in run(*GRAD, "-test").out


def test_everything_that_draws_random_numbers_goes_on(run, tmp_path):
    import random

    import numpy as np

    run(*GRAD, "-N", "1")
    state = load(tmp_path)
    expected = [random.random(), np.random.rand(), torch.rand(1), torch.empty(0)]  # noqa: NPY002
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    generator = torch.Generator()
    randomness.check_states(state["random"])
    randomness.set_states(state["random"], torch.device("cpu"), generator)
    assert [random.random(), np.random.rand(), torch.rand(1)] == expected[:3]  # noqa: NPY002
    assert torch.equal(generator.get_state(), state["random"]["data"])


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
    assert "Resuming after epoch 1" in run(*GRAD, "-N", "2", "--no-compile").out
    assert set(seen) == {False}
    seen.clear()
    run(*GRAD, "-N", "3")
    assert set(seen) == {saved["fused"]}
    # a checkpoint of a GPU, too
    state = load(tmp_path)
    state["optimizers"][0]["param_groups"][0] |= {"fused": True, "capturable": True}
    state["random"]["cuda"] = torch.zeros(16, dtype=torch.uint8)
    store(tmp_path, state)
    assert run(*GRAD, "-N", "4", "--no-compile").status == 0
    assert not load(tmp_path)["optimizers"][0]["param_groups"][0]["capturable"]


@pytest.mark.gpu
def test_a_run_changes_between_gpu_and_cpu(run, tmp_path, monkeypatch):
    argv = [*GRAD, "--precision", "fp32"]
    for epochs, there in (("1", True), ("2", False), ("3", True)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert run(*argv, "-N", epochs).status == 0
    assert [line["epoch"] for line in results(tmp_path)] == [1, 2, 3]


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
def test_a_run_killed_on_a_gpu_is_the_run_in_one(run, tmp_path, monkeypatch, mode):
    argv = [*MODES[mode], "-lr", "1e-2", "-b", "8", "-i2", "1", "-N", "3", "--deterministic", *EVERY_STEP]
    assert run(*argv, dump=tmp_path / "one").status == 0
    die_at(monkeypatch, 3)
    assert run(*argv, dump=tmp_path / "parts").status == 130
    assert run(*argv, dump=tmp_path / "parts").status == 0
    assert_same_run(tmp_path / "one", tmp_path / "parts")


def test_a_finished_run_says_so_and_does_nothing(run, tmp_path):
    run(*GRAD, "-N", "2")
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in tmp_path.rglob("*") if p.is_file()}
    result = run(*GRAD, "-N", "2")
    assert result.status == 0
    assert "finished its 2 epochs" in result.out
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in tmp_path.rglob("*") if p.is_file()} == before
    run(*GRAD, "-N", "1", dump=tmp_path / "short")
    assert "finished its 1 epoch." in run(*GRAD, "-N", "1", dump=tmp_path / "short").out


def test_fewer_epochs_than_done_are_refused(run, tmp_path):
    run(*GRAD, "-N", "2")
    result = run(*GRAD, "-N", "1")
    assert result.status == 2
    assert "-N/--epoch" in result.err
    assert "must be at least 2, not 1" in result.err


def test_what_a_killed_process_left_is_cleaned_up(run, tmp_path):
    run(*GRAD, "-N", "1")
    temporary = storage.temporary_of(the_checkpoint(tmp_path))
    temporary.write_bytes(b"half of a checkpoint")
    assert run(*GRAD, "-N", "2").status == 0
    assert not temporary.exists()


def test_a_second_process_is_refused_and_a_test_is_not(run, tmp_path):
    run(*GRAD, "-N", "1")
    lock = Lock(the_checkpoint(tmp_path).parent)
    assert lock.acquire()
    result = run(*GRAD, "-N", "2")
    assert result.status == 2
    assert result.err.count("\n") == 1
    assert "--dump-dir: another process is training in " in result.err
    assert run(*GRAD, "-test").status == 0
    lock.release()
    assert run(*GRAD, "-N", "2").status == 0


def test_no_run_starts_over_results_without_a_checkpoint(run, tmp_path):
    run(*GRAD, "-N", "2")
    for path in (the_checkpoint(tmp_path), previous_of(the_checkpoint(tmp_path))):
        path.unlink()
    before = results(tmp_path)
    result = run(*GRAD, "-N", "2")
    assert result.status == 2
    assert "holds results, but" in result.err
    assert results(tmp_path) == before


def test_lost_results_are_said_and_the_run_goes_on(run, tmp_path):
    run(*GRAD, "-N", "2")
    (path,) = tmp_path.glob("logs/*/results.jsonl")
    path.unlink()
    result = run(*GRAD, "-N", "3")
    assert result.status == 0
    assert "results.jsonl has lost its end" in result.out
    assert [line["epoch"] for line in results(tmp_path)] == [3]


def test_a_run_tells_where_it_has_been_before(run, tmp_path, monkeypatch):
    def info():
        (path,) = tmp_path.glob("logs/*/run.json")
        found = json.loads(path.read_text("utf-8"))
        assert run_info.everywhere(found, "cpu") == ", then ".join(place["cpu"] for place in (*found["before"], found))
        return found

    for number, cpu in enumerate(("one", "one", "another", "a third"), 1):
        monkeypatch.setattr(run_info, "processor", lambda cpu=cpu: cpu)
        run(*GRAD, "-N", str(number))
        if number == 2:
            assert info()["before"] == []
    found = info()
    assert [place["cpu"] for place in found["before"]] == ["one", "another"]
    assert {key: found["before"][0][key] for key in ("precision", "device")} == {
        "precision": "fp32",
        "device": found["device"],
    }


def test_a_run_that_another_torch_goes_on_with_names_both(run, tmp_path, monkeypatch):
    run(*GRAD, "-N", "1")
    (path,) = tmp_path.glob("logs/*/run.json")
    first = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps({**first, "versions": {**first["versions"], "torch": "1.0", "cuda": "9"}}))
    run(*GRAD, "-N", "2")
    found = json.loads(path.read_text("utf-8"))
    (before,) = found["before"]
    assert (before["versions"]["torch"], before["ranks"]) == ("1.0", 1)
    expected = {**first["versions"], "torch": f"1.0, then {version('torch')}", "cuda": "9"}
    assert run_info.everywhere(found, "versions") == expected
    assert run_info.everywhere(found, "ranks") == 1


@pytest.mark.parametrize("content", [b"", b"[]", b'{"before": 3}', b'{"before": [3, {}, {"cpu": []}]}'])
def test_what_run_json_says_wrongly_is_no_place(run, tmp_path, content):
    run(*GRAD, "-N", "1")
    (path,) = tmp_path.glob("logs/*/run.json")
    path.write_bytes(content)
    assert run(*GRAD, "-N", "2").status == 0
    assert [place for place in json.loads(path.read_text("utf-8"))["before"] if place.get("cpu") != []] == []


def test_a_line_that_has_lost_its_end_takes_no_other_with_it(run, tmp_path):
    run(*GRAD, "-N", "2")
    (path,) = tmp_path.glob("logs/*/results.jsonl")
    path.write_bytes(path.read_bytes()[:-20])
    assert run(*GRAD, "-N", "3").status == 0
    first, lost, third = path.read_text("utf-8").splitlines()
    assert [json.loads(line)["epoch"] for line in (first, third)] == [1, 3]
    with pytest.raises(json.JSONDecodeError):
        json.loads(lost)


@pytest.mark.parametrize("option", [[], ["-test"]])
def test_the_logs_of_another_run_are_refused_and_kept(run, tmp_path, monkeypatch, option):
    run(*GRAD, "-N", "2", "-i1", "1")
    run(*GRAD, "-N", "2", "--seed", "3", dump=tmp_path / "other")
    (own,), (others,) = tmp_path.glob("logs/*"), tmp_path.glob("other/logs/*")
    shutil.rmtree(own)
    shutil.copytree(others, own)
    before = {path: path.read_bytes() for path in own.iterdir()}
    result = run(*GRAD, "-N", "3", *option)
    assert result.status == 2
    assert result.err.count("\n") == 1
    assert f"{own} has the logs of another run, with --seed 3, not 2020" in result.err
    assert {path: path.read_bytes() for path in own.iterdir()} == before
    (own / "run.json").write_text("[]")  # whose they are cannot be told
    assert run(*GRAD, "-N", "3", *option).status == 0
    monkeypatch.setattr(Path, "read_bytes", lambda path: pytest.fail(f"{path} was read as a whole"))
    with open(own / "run.json", "wb") as file:
        file.truncate(json_files.LARGEST + 1)
    assert logs.info(own) == {}


# -- what cannot be gone on from --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("seed", 3, "--seed: .* made with 3, not 2020"),
        ("learning_rate", 1.0, "-lr/--learning-rate: .* made with 1.0, not 0.01"),
        ("T", 4, "-T: .* made with 4, not 8"),
        ("experiment", "c10", "experiment: .* made with c10, not mnist"),
    ],
)
def test_a_checkpoint_made_with_other_arguments_is_refused(run, tmp_path, key, value, message):
    run(*GRAD, "-N", "1")
    state = load(tmp_path)
    state["arguments"][key] = value
    assert_refused_and_kept(run, tmp_path, state, message)


def assert_refused_and_kept(run, folder, state, message, commands=(["-N", "2"], ["-test"])):
    import re

    path = store(folder, state)
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    for argv in commands:
        result = run(*GRAD, *argv)
        assert result.status == 2
        assert result.err.count("\n") == 1
        assert re.search(message, result.err), result.err
        assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before, path


def test_a_checkpoint_of_other_data_is_refused(run, tmp_path, mnist_folder):
    run(*GRAD, "-N", "1")
    other = tmp_path / "other data"
    shutil.copytree(mnist_folder, other)
    images = other / "MNIST" / "raw" / "train-images-idx3-ubyte"
    images.write_bytes(images.read_bytes()[:-1] + b"\x07")
    result = run(*GRAD, "-N", "2", data=other)
    assert result.status == 2
    assert "--dataset-dir: the run was made with other data" in result.err


def test_a_test_on_other_data_says_so(run, tmp_path, mnist_folder):
    """On a validation set, say: the console and the file tell it from a test on the run's own data."""
    run(*GRAD, "-N", "1")
    other = tmp_path / "other data"
    shutil.copytree(mnist_folder, other)
    labels = other / "MNIST" / "raw" / "t10k-labels-idx1-ubyte"
    content = labels.read_bytes()
    labels.write_bytes(content[:-1] + bytes([(content[-1] + 1) % 10]))
    tested = {}
    for folder in (mnist_folder, other):
        found = MNIST.load(folder).fingerprint()
        result = run(*GRAD, "-test", data=folder)
        assert result.status == 0
        (path,) = tmp_path.glob("logs/*/test.json")
        tested[found] = json.loads(path.read_text("utf-8"))
        assert (tested[found]["data"], tested[found]["precision"]) == (found, "fp32")
        line = f"Testing with other data ({found}) than the run was made with ({next(iter(tested))}).\n"
        assert (line in result.out) == (folder is other)
    assert len(tested) == 2


@pytest.mark.parametrize("damage", ["empty", "truncated", "text", "list"])
def test_a_run_goes_back_behind_a_damaged_checkpoint(run, tmp_path, damage):
    run(*GRAD, "-N", "3", "-i2", "1", dump=tmp_path / "one")
    folder = tmp_path / "damaged"
    run(*GRAD, "-N", "2", "-i2", "1", dump=folder)
    path = the_checkpoint(folder)
    good = path.read_bytes()
    path.write_bytes({"empty": b"", "truncated": good[:-100], "text": b"hello", "list": good[:4] + good[5:]}[damage])
    tested = run(*GRAD, "-i2", "1", "-test", dump=folder)
    assert "after 1 epoch (" in tested.out
    assert path.exists()  # a test changes nothing
    content = path.read_bytes()
    result = run(*GRAD, "-N", "3", "-i2", "1", dump=folder)
    lines = result.out.splitlines()
    assert [
        line for line in lines if str(path) in line and "damaged" in line and "using the previous checkpoint" in line
    ]
    assert "Resuming after epoch 1; 3 epochs in all." in lines
    assert damaged_of(path).read_bytes() == content
    damaged_of(path).unlink()
    assert_same_run(tmp_path / "one", folder)


def test_the_good_checkpoint_stays_until_another_takes_its_place(run, tmp_path, monkeypatch):
    """Not the damaged one takes it, in whose place the next is written."""
    run(*GRAD, "-N", "2")
    path = the_checkpoint(tmp_path)
    good = previous_of(path).read_bytes()
    path.write_bytes(b"damaged")
    with monkeypatch.context() as patched:
        patched.setattr(storage, "write", lambda *args: None)  # it is killed before anything is written
        run(*GRAD, "-N", "2")
    assert path.read_bytes() == b"damaged"
    assert previous_of(path).read_bytes() == good
    assert "Resuming after epoch 1; 2 epochs in all." in run(*GRAD, "-N", "2").out
    assert previous_of(path).read_bytes() == good
    assert damaged_of(path).read_bytes() == b"damaged"
    assert storage.read(path)["epoch"] == 2


def test_a_refusal_names_the_file_that_it_is_about(run, tmp_path):
    run(*GRAD, "-N", "2")
    path = the_checkpoint(tmp_path)
    state = storage.read(path)
    storage.write(path, {**state, "format": 1})
    storage.write(path, state)
    path.write_bytes(b"damaged")
    result = run(*GRAD, "-N", "3")
    assert result.status == 2
    assert f"error: {previous_of(path)} is of format 1" in result.err
    storage.write(path, {**state, "step": -1})
    storage.write(path, state)
    path.write_bytes(b"damaged")
    assert f"error: {previous_of(path)} does not fit: step is -1" in run(*GRAD, "-N", "3").err
    network = {**state["network"], "fc.1.weight": state["network"]["fc.1.weight"][1:].clone()}
    storage.write(path, {**state, "network": network})
    storage.write(path, state)
    path.write_bytes(b"damaged")
    assert f"error: {previous_of(path)} does not fit: fc.1.weight" in run(*GRAD, "-N", "3").err
    assert path.read_bytes() == b"damaged"


def test_a_run_without_a_good_checkpoint_stops_and_keeps_all(run, tmp_path):
    run(*GRAD, "-N", "2")
    path = the_checkpoint(tmp_path)
    for file in (path, previous_of(path)):
        file.write_bytes(file.read_bytes()[:-1])
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    for argv in (["-N", "3"], ["-test"]):
        result = run(*GRAD, *argv)
        assert result.status == 2
        assert result.err.count("\n") == 1
        assert str(path) in result.err
        assert "no intact checkpoint" in result.err
        assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("where", ["checkpoint", "results"])
def test_a_full_disk_stops_the_run_and_the_same_command_goes_on(run, tmp_path, monkeypatch, where):
    run(*GRAD, "-N", "3", dump=tmp_path / "one")
    folder = tmp_path / "full"
    run(*GRAD, "-N", "1", dump=folder)
    before = load(folder)
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def no_space(*args):
        raise full

    if where == "checkpoint":
        monkeypatch.setattr(storage._HashingFile, "write", no_space)
    else:
        monkeypatch.setattr("training.recording.Recorder.results", no_space)
    result = run(*GRAD, "-N", "3", dump=folder)
    assert result.status == 1
    assert result.err.count("\n") == 1
    assert "No space left on device" in result.err
    assert same(load(folder), before)
    monkeypatch.undo()
    assert run(*GRAD, "-N", "3", dump=folder).status == 0
    assert_same_run(tmp_path / "one", folder)


# -- what is in the results --------------------------------------------------------------------------


def test_results_agree_with_tensorboard_and_the_checkpoint(run, tmp_path):
    run(*GRAD, "-N", "3", "-i1", "2", "-i2", "1")
    lines, (events, histograms), state = results(tmp_path), scalars(tmp_path), load(tmp_path)
    for tag, key in (("test_acc", "test_accuracy"), ("sparsity", "sparsity")):
        assert [value for _, value in events[tag]] == pytest.approx([line[key] for line in lines], rel=1e-6)
    for kind in ("loss", "acc"):  # the means of the epoch's batches
        values = torch.tensor([value for _, value in events[f"train/{kind}"]], dtype=torch.float64).view(3, 5)
        key = {"loss": "train_loss", "acc": "train_accuracy"}[kind]
        assert values.mean(1).tolist() == pytest.approx([line[key] for line in lines], rel=1e-6)
    for name in ("static_fc.1.weight", "fc.1.weight"):
        layers = [line["layers"][name] for line in lines]
        for tag, key in (("layer sparsity", "sparsity"), ("prune_cnt", "pruned"), ("regrow_cnt", "regrown")):
            assert [value for _, value in events[f"{tag}/{name}"]] == pytest.approx([layer[key] for layer in layers])
        assert layers[-1]["connected"] == int((state["network"][name] != 0).sum())
        assert layers[-1]["weights"] == state["network"][name].numel()
        assert layers[-1]["connectivity"] == pytest.approx(1 - layers[-1]["sparsity"])
    for line in lines:
        assert line["pruned"] == sum(layer["pruned"] for layer in line["layers"].values()) > 0
        assert line["regrown"] == sum(layer["regrown"] for layer in line["layers"].values())
        assert line["sparsity_with_bn"] == line["sparsity"] == pytest.approx(1 - line["connectivity"])
        assert (line["learning_rate"], line["penalty"]) == (1e-2, 1e-3)
    assert sum(line["regrown"] for line in lines) > 0
    assert [line["step"] for line in lines] == [5, 10, 15]
    assert lines[-1]["best_accuracy"] == state["best_accuracy"] == max(line["test_accuracy"] for line in lines)
    full = [line for line in lines if "neurons" in line]
    assert [line["epoch"] for line in full] == [1, 2]
    for line in full:
        index = [step for step, _ in events["avg_firing_rate/fc.0"]].index(line["epoch"])
        for lif, neurons in line["neurons"].items():
            assert neurons["firing_rate"] == pytest.approx(events[f"avg_firing_rate/{lif}"][index][1])
            assert neurons["silent"] == pytest.approx(events[f"nonfire_prop/{lif}"][index][1])
        for name, kinds in line["distributions"].items():
            assert set(kinds) == {"w", "theta"}
            for kind, histogram in kinds.items():
                assert len(histogram["edges"]) == len(histogram["counts"]) + 1
                assert sum(histogram["counts"]) == line["layers"][name]["weights"]
                assert line["epoch"] in histograms[f"{name}-{kind}"]


def test_the_clock_is_in_the_results(run, tmp_path):
    run(*GRAD, "-N", "2")
    (path,) = tmp_path.glob("logs/*/results.jsonl")
    for line in map(json.loads, path.read_text("utf-8").splitlines()):
        assert all(0 < line[f"{what}_seconds"] < 60 for what in ("train", "test", "checkpoint"))


def test_batch_norm_counts_in_one_of_two_sparsities_of_the_results():
    record = Recording(EPOCH)
    measuring.record_connections(record, {"a": measuring.Connections(4, 6)}, others=4)
    measuring.record_rewired(record, {"a": (3, 1)})
    line = {metric.key: values[None] for metric, values in record.values.items() if None in values}
    assert line["sparsity"] == pytest.approx(2 / 6)
    assert line["sparsity_with_bn"] == pytest.approx(2 / 10)
    assert line["connectivity_with_bn"] == pytest.approx(8 / 10)
    assert (line["pruned"], line["regrown"]) == (3, 1)


def test_a_distribution_by_hand():
    from measuring.distributions import BINS, distribution

    histogram = distribution(torch.tensor([-1.0, 0.0, 0.0, 0.999, 1.0]))
    assert histogram["edges"] == pytest.approx([-1 + 2 * i / BINS for i in range(BINS + 1)])
    counts = {i: n for i, n in enumerate(histogram["counts"]) if n}
    assert counts == {0: 1, BINS // 2: 2, BINS - 1: 2}
    assert distribution(torch.zeros(3)) == {"edges": [0.0, 0.0], "counts": [3]}
    for dtype in (torch.float16, torch.bfloat16):  # in which many bins would have the same edges, or overflow
        values = (60_000 * torch.linspace(-1, 1, 1000)).to(dtype)
        assert distribution(values) == distribution(values.double())
    for bad in (torch.nan, torch.inf):
        with pytest.raises(ValueError, match="must be finite"):
            distribution(torch.tensor([0.0, bad]))
    with pytest.raises(ValueError, match="empty"):
        distribution(torch.zeros(0, 3))


def test_run_json_says_what_ran(run, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["mnist.py", "-m", "grad", "with space"])
    run(*GRAD, "-N", "1")
    (path,) = tmp_path.glob("logs/*/run.json")
    said = json.loads(path.read_text("utf-8"))
    assert said["command"] == "python mnist.py -m grad 'with space'"
    assert said["arguments"] == load(tmp_path)["arguments"]
    assert said["name"] == path.parent.name
    assert said["parameters"]["prunable"] == 635200
    assert said["parameters"]["layers"] == {"static_fc.1.weight": [800, 784], "fc.1.weight": [10, 800]}
    assert said["versions"]["torch"] == torch.__version__.split("+")[0]
    assert mnist.EXPERIMENT.name == said["experiment"]


def test_run_json_says_how_a_gpu_computes(run, tmp_path, bf16_anywhere, monkeypatch):
    run(*GRAD, "-N", "1", "--precision", "bf16")
    (path,) = tmp_path.glob("logs/*/run.json")
    said = json.loads(path.read_text("utf-8"))
    assert (said["precision"], said["compute_capability"]) == ("bf16", None)
    assert not said["versions"].keys() & {"cuda", "cudnn"}
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91002)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"card {device.index}")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, device.index))
    options = parse(mnist.EXPERIMENT, [*GRAD, "--dump-dir", str(tmp_path)])
    options.device, options.precision_used = torch.device("cuda", 1), "tf32"
    said = json.loads(json.dumps(run_info.describe(options, MnistNet(), {"torch": "3"})))
    assert (said["device"], said["compute_capability"], said["precision"]) == ("card 1", "9.1", "tf32")
    assert said["versions"] == {"python": said["versions"]["python"], "torch": "3", "cuda": "13.0", "cudnn": "91002"}


def test_every_number_is_defined(run, tmp_path):
    """docs/metrics.md names every key of the results and of a test, and every tag of TensorBoard."""
    from pathlib import Path

    run(*GRAD, "-N", "1")
    run(*GRAD, "-test")
    text = (Path(__file__).parent.parent / "docs" / "metrics.md").read_text("utf-8")
    (log,) = tmp_path.glob("logs/*")
    keys = set(json.loads((log / "results.jsonl").read_text("utf-8")))
    keys |= set(json.loads((log / "test.json").read_text("utf-8")))
    keys -= {"layers", "neurons", "layer_sparsity"}  # the same by layer
    assert [key for key in sorted(keys) if key.removesuffix("s") not in text] == []
    events, histograms = scalars(tmp_path)
    tags = {tag.split("/")[0] for tag in events} | {tag.rsplit("-", 1)[1] for tag in histograms}
    assert [tag for tag in sorted(tags) if tag not in text] == []


# -- options that came later -----------------------------------------------------------------------------


def test_a_checkpoint_from_before_an_option_goes_on_as_its_default(run, tmp_path):
    run(*GRAD, "-N", "2", dump=tmp_path / "one")
    run(*GRAD, "-N", "1", dump=tmp_path / "parts")
    path = the_checkpoint(tmp_path / "parts")
    state = storage.newest(path)[0]
    for option in ("plain_gradient", "recipe", "connectivity", "width"):
        del state["arguments"][option]
    del state["optimizers"][0]["param_groups"][0]["plain_gradient"]
    del state["optimizers"][0]["param_groups"][0]["prune"]
    del state["schedule"]
    storage.write(path, state)
    result = run(*GRAD, "-N", "2", dump=tmp_path / "parts")
    assert "Resuming after epoch 1; 2 epochs in all." in result.out
    assert_same_run(tmp_path / "one", tmp_path / "parts")


def test_a_checkpoint_of_the_plain_gradient_does_not_go_on_without(run, tmp_path):
    argv = [*GRAD, "-N", "1", "--plain-gradient"]
    run(*argv, dump=tmp_path)
    plain = the_checkpoint(tmp_path).parent
    plain.rename(plain.with_name(plain.name.replace("-plain-gradient", "")))
    result = run(*GRAD, "-N", "2", dump=tmp_path)
    assert result.status == 2
    assert "argument --plain-gradient: the run in" in result.err
    assert "was made with True, not False" in result.err


def test_a_long_value_in_a_checkpoint_is_shortened_in_the_message(run, tmp_path):
    run(*GRAD, "-N", "1")
    state = load(tmp_path)
    state["arguments"]["width"] = "9" * 1000
    store(tmp_path, state)
    result = run(*GRAD, "-N", "2")
    assert result.status == 2
    assert "argument --width: the run in " in result.err
    assert "9" * 40 in result.err
    assert "9" * 61 not in result.err
