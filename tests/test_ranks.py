"""Several ranks, each with its share of every batch, train the run of one process."""

import atexit
import contextlib
import json
import os
import shlex
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from run_helpers import assert_same_run, load, results, scalars, the_checkpoint

import spiking_kernels
from c10.data import CLASSES
from spiking import BatchNorm2d, Dropout, StepwiseBatchNorm2d
from spiking_kernels.blocks import lif_block
from spiking_kernels.shapes import Shape
from training import device, ranks
from training.command_line import command
from training.errors import DivergedError, Interrupted, RankLost, Refusal
from training.files import storage

WORKER = Path(__file__).parent / "ranks_worker.py"
# Narrow, with few time steps: rounding decides about a spike of ten million, and after that the runs differ.
SMALL = "mnist --width 100 -T 4 --dataset digits"
DEEP = shlex.split(f"{SMALL} -m deep -s 0.9 -temperature 1e-4 -lr 1e-3 -b 120 -i1 2 -i2 1")
C10 = shlex.split("c10 --width 8 -T 2 -b 4 -m grad -s 0.95 -lr 1e-4 -N 1 -i1 1 -i2 1")
LIMIT = 300  # seconds for the processes of a test: a hang fails


# -- layers, with threads in the place of processes -------------------------------------------------


class Thread:
    """A rank that is a thread of this process."""

    def __init__(self, rank, size, meeting, table):
        self.rank, self.size, self.meeting, self.table = rank, size, meeting, table

    def share(self, n):
        return slice(n * self.rank // self.size, n * (self.rank + 1) // self.size)

    def sum(self, tensor):
        self.table[self.rank] = tensor.clone()
        self.meeting.wait()
        tensor.copy_(sum(self.table))
        self.meeting.wait()
        return tensor

    def pooled(self, mean, variance):
        from training.ranks import Ranks

        return Ranks.pooled(self, mean, variance)


def with_threads(size, work):
    """The results of work(rank) on so many ranks."""
    meeting, table = threading.Barrier(size, timeout=30), [None] * size
    ranks = [Thread(rank, size, meeting, table) for rank in range(size)]
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(work, ranks))


def plain_norm(x, norm, ranks):
    norm.ranks = ranks
    return norm(x)


def stepwise(x, norm, ranks):
    norm.ranks = ranks
    return torch.stack([norm(x_t) for x_t in x])


def block(x, norm, ranks):
    return lif_block(x.flatten(0, 1), Shape(len(x)), norm, ranks=ranks).unflatten(0, x.shape[:2])


needs_kernels = pytest.mark.skipif(spiking_kernels.unavailable() is not None, reason="needs a C compiler")


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize(
    ("made", "run"),
    [
        (lambda: StepwiseBatchNorm2d(5, "m"), plain_norm),
        (lambda: StepwiseBatchNorm2d(5, "s"), stepwise),
        (lambda: BatchNorm2d(5), stepwise),
        pytest.param(lambda: StepwiseBatchNorm2d(5, "m"), block, marks=needs_kernels),
    ],
    ids=["m", "s", "static", "kernels"],
)
def test_batch_statistics_are_those_of_the_whole_batch(made, run, size):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 6, 5, 4, 4, generator=generator, dtype=torch.float32)  # [T, N, C, H, W]
    x = x * torch.arange(1, 4).view(3, 1, 1, 1, 1) + torch.arange(6).view(1, 6, 1, 1, 1) / 3  # shares differ
    grad = torch.randn(x.shape, generator=generator, dtype=torch.float32)

    def work(ranks, share):
        norm, mine = made().float(), x[:, share].clone().requires_grad_()
        with torch.no_grad():
            norm.weight += torch.arange(5) / 5
            norm.bias += 0.3
        out = run(mine, norm, ranks)
        out.backward(grad[:, share])
        return out.detach(), mine.grad, norm.weight.grad, norm.bias.grad, *norm.buffers()

    def together(runs):
        out, mine, *grads, mean, variance, steps = zip(*runs, strict=True)
        for values in (mean, variance, steps):
            assert all(torch.equal(value, values[0]) for value in values)  # bitwise, on all ranks
        return [torch.cat(out, 1), torch.cat(mine, 1), *map(sum, grads), mean[0], variance[0], steps[0]]

    def differences(found):
        return [float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, whole, strict=True)]

    whole = [*work(None, slice(None))]
    shared = differences(together(with_threads(size, lambda ranks: work(ranks, ranks.share(6)))))
    # float32 over at most 96 numbers of a channel; a spike decides by it only where the potential is at the threshold
    assert max(shared) < 1e-4
    shares = [slice(6 * rank // size, 6 * (rank + 1) // size) for rank in range(size)]
    out, mine, *_ = zip(*(work(None, share) for share in shares), strict=True)
    assert min(differences([torch.cat(out, 1), torch.cat(mine, 1), *whole[2:]])[:2]) > 0.05  # each by its own


def test_dropout_is_that_of_the_whole_batch():
    x = torch.ones(4, 6, 7)  # [T, N, features]

    def work(ranks):
        dropout = Dropout(0.5)
        dropout.step_mode, dropout.ranks = "m", ranks
        return dropout(x if ranks is None else x[:, ranks.share(6)])

    torch.manual_seed(3)
    whole, state = work(None), torch.get_rng_state()
    parts = []
    for rank in range(3):
        torch.manual_seed(3)
        parts.append(work(Thread(rank, 3, None, None)))
        assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(torch.cat(parts, 1), whole)
    assert 0 < int((whole == 0).sum()) < whole.numel()


# -- processes ---------------------------------------------------------------------------------------


class Processes:
    """The ranks of a run, as torchrun starts them; each is killed if it takes too long."""

    def __init__(self, size, argv, folder, changes=None, launcher=()):
        settings = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        settings["RANKS_TEST"] = json.dumps(changes or {})
        if sys.platform == "linux":  # sockets on this machine alone, whatever its name stands for
            settings["GLOO_SOCKET_IFNAME"] = "lo"
        several = size > 1 and not launcher
        if several:
            from torch.distributed import TCPStore

            # The ranks meet at a store of this process, as at that of torchrun. It asks the system for a port and keeps
            # it: a free one that rank 0 opened later could be another test's by then, whose ranks would join the run.
            self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            settings |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self.store.port)}
            settings |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
        command = [*launcher, WORKER, *argv, "--dump-dir", folder]
        self.processes = []
        for rank in range(size if several else 1):
            own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size} if several else {}
            environment = os.environ | settings | {key: str(value) for key, value in own.items()}
            self.processes.append(forked.start(command, env=environment))

    def end(self, limit=LIMIT):
        """Waits for all; their statuses, and what they printed on the two channels."""
        deadline, outputs = time.monotonic() + limit, []
        try:
            for process in self.processes:
                outputs.append(process.communicate(timeout=max(0.1, deadline - time.monotonic())))
        finally:
            for process in self.processes:
                process.kill()
        out, err = zip(*outputs, strict=True)
        return [process.returncode for process in self.processes], out, err


def train(size, argv, folder, **changes):
    statuses, out, err = Processes(size, argv, folder, changes).end()
    assert statuses == [0] * size, err
    assert out[1:] == ("",) * (size - 1)
    return out[0]


def relative(a, b):
    return abs(a - b) / abs(b)


def assert_near(one, other, steps):
    """Two runs are the same within rounding, which grows with the steps."""
    losses, others = (dict(scalars(folder)[0]["train/loss"]) for folder in (one, other))
    assert losses.keys() == others.keys()
    assert len(losses) > steps
    assert max(relative(others[step], losses[step]) for step in range(steps)) < 1e-5
    for line, same_line in zip(results(one), results(other), strict=True):
        assert abs(line["sparsity"] - same_line["sparsity"]) < 1e-3
        assert abs(line["train_accuracy"] - same_line["train_accuracy"]) < 0.02  # counts, summed over the ranks
    rates, same_rates = (
        {tag: values[0][1] for tag, values in scalars(folder)[0].items() if tag.startswith("avg_firing_rate")}
        for folder in (one, other)
    )
    assert rates.keys() == same_rates.keys()
    assert any(rates.values())
    for tag, rate in rates.items():  # of the test images, which the ranks divide
        assert abs(rate - same_rates[tag]) < 0.02 * rate + 1e-4
    a, b = load(one), load(other)
    assert a["arguments"] == b["arguments"]
    assert all(torch.equal(a["random"][key], b["random"][key]) for key in ("torch", "data"))


def test_two_ranks_train_the_run_of_one(tmp_path):
    """With noise, whose numbers are the same on both, in the order and with the augmentation of one process."""
    pytest.importorskip("sklearn")
    for size in (1, 2):
        train(size, [*DEEP, "-N", "2"], tmp_path / str(size))
    assert_near(tmp_path / "1", tmp_path / "2", 20)
    assert abs(results(tmp_path / "1")[1]["test_accuracy"] - results(tmp_path / "2")[1]["test_accuracy"]) < 0.01
    (info,) = (tmp_path / "2").glob("logs/*/run.json")
    assert json.loads(info.read_text())["ranks"] == 2


def test_a_batch_that_the_ranks_do_not_divide_is_refused(tmp_path):
    statuses, out, err = Processes(2, ["mnist", "-b", "15"], tmp_path).end()
    assert statuses == [2, 2]
    assert (
        err[0]
        .splitlines()[-1]
        .endswith("error: argument -b/--batch-size: must be a multiple of 2, the number of ranks, not 15")
    )
    assert (out[1], err[1]) == ("", "")
    assert not list(tmp_path.glob("*/*"))


def test_the_first_rank_helps(tmp_path):
    statuses, out, err = Processes(2, ["c10", "--help"], tmp_path).end()
    assert (statuses, out[1], err) == ([0, 0], "", ("", ""))
    assert out[0].startswith("usage: ranks_worker.py")


def test_an_error_after_the_run_is_no_success(monkeypatch):
    """Python sets sys.last_type once it has told an error that nobody caught."""
    statuses = []
    monkeypatch.setattr(os, "_exit", statuses.append)
    monkeypatch.delattr(sys, "last_type", raising=False)
    ranks._end(0)
    monkeypatch.setattr(sys, "last_type", ValueError, raising=False)
    ranks._end(0)
    ranks._end(143)
    assert statuses == [0, 1, 143]


TORCHRUN = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def test_a_rank_ends_with_the_status_of_the_run(monkeypatch):
    """As the command has it, whatever ended the run."""

    def end(error):
        @command
        def main():
            raise error

        return main()

    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    registered = []
    monkeypatch.setattr(dist, "init_process_group", lambda *args, **settings: None)
    monkeypatch.setattr(atexit, "register", lambda *call: registered.append(call))
    monkeypatch.setattr(os, "dup2", lambda *args: None)  # what follows a broken pipe
    errors = [Refusal(""), DivergedError(""), RankLost(""), Interrupted(signal.SIGTERM, "")]
    for error in (*errors, BrokenPipeError(), KeyboardInterrupt(), OSError("no space")):
        with pytest.raises(type(error)), ranks.joined():
            raise error
        assert registered.pop() == (ranks._end, end(error))
        assert end(error) > 0


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"RANK": "first"}, "RANK='first', not a whole number"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE='', not a whole number"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK='-1', not a whole number"),
        ({"MASTER_PORT": None}, "MASTER_PORT='', not a whole number"),
        ({"MASTER_ADDR": None}, "RANK and WORLD_SIZE, but no MASTER_ADDR"),
    ],
)
def test_ranks_that_torchrun_has_not_started_are_refused(run, monkeypatch, changes, line):
    for name, value in {**TORCHRUN, **changes}.items():
        monkeypatch.setenv(name, value) if value is not None else monkeypatch.delenv(name, raising=False)
    result = run("-N", "1")
    assert (result.status, result.out) == (2, "")
    assert result.err.endswith(f"error: the environment has {line}: start the ranks with torchrun\n")
    assert result.err.count("\n") == 1


def test_ranks_with_gpus_and_no_nccl_are_refused_once_they_are_together(monkeypatch):
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    backends = []
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **settings: backends.append(backend))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    monkeypatch.setattr(atexit, "register", lambda *call: None)
    for available, expected in ((True, "cpu:gloo,cuda:nccl"), (False, "gloo")):
        monkeypatch.setattr(dist, "is_nccl_available", lambda available=available: available)
        with ranks.joined():
            assert backends.pop() == expected
        if available:
            assert device._of_rank(None, 1) == 1
    with pytest.raises(Refusal, match=r"no NCCL, which ranks .*: hide the GPUs with CUDA_VISIBLE_DEVICES=-1$"):
        device._of_rank(None, 1)


def test_a_rank_alone_is_one_process(run, monkeypatch, tmp_path):
    """As torchrun with one process starts it; so are those that other launchers start without these variables."""
    for name, value in {**TORCHRUN, "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    assert run("-N", "1", "-T", "1", "-b", "15").status == 0
    (info,) = tmp_path.glob("logs/*/run.json")
    assert json.loads(info.read_text())["ranks"] == 1


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Class folders of noise: 40 images to train with, and 30 to test."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for part, many in (("train", 4), ("test", 3)):
        for name in CLASSES:
            (folder / part / name).mkdir(parents=True)
            for number in range(many):
                pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / part / name / f"{number}.png")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [pytest.param("--compile", marks=needs_kernels), "--no-compile"])
def test_two_ranks_train_the_convolutional_run_of_one(tmp_path, images, compiled):
    """In few time steps on few images: rounding decides about a spike of ten million, which changes what follows."""
    for size in (1, 2):
        out = train(size, [*C10, compiled, "--dataset-dir", str(images)], tmp_path / str(size), scale=8)
        assert "plain layers" not in out
    assert_near(tmp_path / "1", tmp_path / "2", 10 - 1)
    losses = {value for _, value in scalars(tmp_path / "1")[0]["train/loss"]}
    assert len(losses) == 10  # the outputs spike
    one, two = (load(tmp_path / size)["network"] for size in "12")
    statistics = [key for key in one if "running" in key or "batches" in key]
    assert len(statistics) == 18
    for key in statistics:
        assert float((one[key] - two[key]).abs().max()) <= 1e-5 * float(one[key].abs().max())
    accuracy = [results(tmp_path / size)[0] for size in "12"]
    assert accuracy[0]["test_accuracy"] == accuracy[1]["test_accuracy"]


@pytest.mark.slow
def test_a_run_moves_between_numbers_of_ranks(tmp_path):
    """Stopped by a signal to one rank, after the same step on all; goes on with other numbers of ranks."""
    pytest.importorskip("sklearn")
    argv, moved, two = [*DEEP, "-N", "3"], tmp_path / "moved", tmp_path / "two"
    train(1, argv, tmp_path / "one")
    train(2, argv, two)
    for size, (number, rank, step) in ((2, (signal.SIGTERM, 1, 4)), (3, (signal.SIGINT, 2, 9))):
        changes = {"signal": [number, rank, step]}
        statuses, out, err = Processes(size, argv, moved, changes).end()
        assert statuses == [128 + number] * size, err
        assert "saved" in out[0].splitlines()[-1]
        assert set(out[1:]) == {""}
        assert set(err) == {""}
    assert load(moved)["step"] == 13
    train(1, argv, moved)
    assert_near(tmp_path / "one", moved, 20)
    # to the bit, on as many ranks
    changes, stopped = {"signal": [signal.SIGTERM, 0, 15]}, tmp_path / "stopped"
    assert Processes(2, argv, stopped, changes).end()[0] == [143, 143]
    train(2, argv, stopped)
    assert_same_run(two, stopped)


KILLS = int(os.environ.get("RANK_KILLS", "2"))


def written(folder):
    """When the checkpoint was written; None where there is none, as for a moment while the next one takes its place."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        return the_checkpoint(folder).stat().st_mtime_ns


@pytest.mark.slow
def test_a_killed_rank_stops_the_others_and_the_command_goes_on(tmp_path):
    pytest.importorskip("sklearn")
    argv, killed = [*DEEP, "-N", "4", "--checkpoint-minutes", "1e-9"], tmp_path / "killed"
    train(2, argv, tmp_path / "two")
    draw = np.random.default_rng(KILLS)
    longest = 0.0
    for number in range(KILLS):
        run = Processes(2, argv, killed, {"busy": 0.03})
        before = written(killed)
        while written(killed) in (None, before):
            assert all(process.poll() is None for process in run.processes), run.end()
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.6 / KILLS))
        victim = int(draw.integers(2)) if number else 1
        run.processes[victim].kill()
        begun = time.monotonic()
        statuses, _, err = run.end(30)
        longest = max(longest, time.monotonic() - begun)
        if statuses[victim] == 0:
            continue  # it had ended
        assert statuses[victim] == -signal.SIGKILL
        assert statuses[1 - victim] == 1, err
        assert len(err[1 - victim].splitlines()) == 1
        assert "another rank of the run has ended" in err[1 - victim]
    (models,) = killed.glob("models/*")
    state, *_ = storage.newest(models / storage.CHECKPOINT)  # the kill may have come between two renamings
    assert state["epoch"] < 4  # there was something left to do
    train(2, argv, killed)
    assert_same_run(tmp_path / "two", killed)
    print(f"{KILLS} kills; the other rank ended {longest:.1f} s later at most: 0 differences")


@pytest.mark.slow
def test_ranks_that_drift_apart_are_found(tmp_path):
    pytest.importorskip("sklearn")
    argv = [*DEEP, "-N", "2"]
    statuses, _, err = Processes(2, argv, tmp_path, {"drift": [1, 3]}).end()
    assert statuses == [1, 1]
    assert err[0].count("the ranks no longer have the same weights") == 1
    assert err[1] == ""
    assert load(tmp_path)["step"] == 0


@pytest.mark.slow
def test_torchrun_stops_and_saves_a_run(tmp_path):
    """SIGTERM to torchrun; it hands it on to the ranks."""
    pytest.importorskip("sklearn")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    argv = [*DEEP, "-N", "2", "--checkpoint-minutes", "1e-9"]
    train(2, argv, tmp_path / "two")
    run = Processes(2, argv, tmp_path / "run", {"busy": 0.3}, launcher)
    deadline = time.monotonic() + LIMIT
    while not list(tmp_path.glob("run/logs/*/run.json")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(1)
    run.processes[0].send_signal(signal.SIGTERM)
    statuses, out, err = run.end()
    assert statuses != [0]
    assert "Stopped by SIGTERM" in out[0], err
    step = load(tmp_path / "run")["step"]
    assert 0 < step < 22
    run = Processes(2, argv, tmp_path / "run", {}, launcher)
    statuses, out, err = run.end()
    assert statuses == [0], err
    assert_same_run(tmp_path / "two", tmp_path / "run")
