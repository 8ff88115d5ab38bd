"""States that survive: faults at every system call, damage of every kind, and writing in the background."""

import errno
import os
import random
import threading
from pathlib import Path

import pytest
import torch

from training.files import storage, writing

ROOT = Path(__file__).resolve().parent.parent


def state(n):
    return {"n": n, "weights": torch.full((300,), float(n)), "sign": torch.ones(50, dtype=torch.int8)}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "checkpoint.pt"


def test_what_is_written_is_read(path):
    storage.write(path, state(1))
    for read in (storage.read(path), storage.newest(path)[0], torch.load(path, weights_only=True)):
        assert read["n"] == 1
        assert torch.equal(read["weights"], state(1)["weights"])
        assert read["sign"].dtype == torch.int8
    assert [p.name for p in path.parent.iterdir()] == ["checkpoint.pt"]
    storage.write(path, state(2))
    assert storage.read(path)["n"] == 2
    assert storage.read(storage.previous_of(path))["n"] == 1
    assert sorted(p.name for p in path.parent.iterdir()) == ["checkpoint-previous.pt", "checkpoint.pt"]


def test_a_quick_look_checks_the_length_and_reads_the_same(path):
    storage.write(path, state(1))
    look = storage.read(path, verify=False)
    assert look["n"] == 1
    assert torch.equal(look["weights"], state(1)["weights"])
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(storage.DamagedError):
        storage.read(path, verify=False)


def test_nothing_stored_is_nothing_read(path):
    assert storage.newest(path) == (None, [], path)


# -- faults ------------------------------------------------------------------------------------------


class Killed(BaseException):
    """The process ends here: nothing of it runs any more."""


class FaultyOS:
    """The module os, in which the system call number ``at`` fails, before or after it has its effect."""

    CALLS = ("open", "write", "fsync", "close", "replace")

    def __init__(self, at=None, when="before", error=None):
        self.at, self.when, self.error, self.log = at, when, error, []

    def take_the_place_of_os(self, monkeypatch):
        for module in (storage, writing):
            monkeypatch.setattr(module, "os", self)

    def __getattr__(self, name):
        real = getattr(os, name)
        if name not in self.CALLS:
            return real

        def call(*args, **settings):
            self.log.append((name, *args))
            here = len(self.log) == self.at
            if isinstance(self.error, Killed) and self.at is not None and len(self.log) > self.at:
                raise self.error  # a dead process makes no more calls
            if here and self.when == "before":
                raise self.error
            result = real(*args, **settings)
            if here:
                raise self.error
            return result

        return call


@pytest.mark.parametrize("error", [Killed(), OSError(errno.ENOSPC, "No space left on device")], ids=["killed", "full"])
def test_a_fault_at_any_system_call_leaves_the_newest_complete_state(path, monkeypatch, error):
    counting = FaultyOS()
    storage.write(path, state(0))
    counting.take_the_place_of_os(monkeypatch)
    storage.write(path, state(1))
    names = [name for name, *_ in counting.log]
    assert set(names) == set(FaultyOS.CALLS)
    published = max(i for i, call in enumerate(counting.log, 1) if call[0] == "replace")  # tmp gets its name
    faults = 0
    for at in range(1, len(names) + 1):
        for when in ("before", "after"):
            monkeypatch.undo()
            for file in path.parent.iterdir():
                file.unlink()
            storage.write(path, state(1))
            storage.write(path, state(2))
            FaultyOS(at, when, error).take_the_place_of_os(monkeypatch)
            with pytest.raises(type(error)):
                storage.write(path, state(3))
            faults += 1
            monkeypatch.undo()
            read, complaints, _ = storage.newest(path)
            complete = at > published or (at == published and when == "after")
            assert read["n"] == (3 if complete else 2), (at, when, names[at - 1])
            assert torch.equal(read["weights"], state(read["n"])["weights"])
            assert complaints == []
            if isinstance(error, OSError):  # who lives cleans up
                assert not storage.temporary_of(path).exists()
            storage.write(path, state(4))  # and the next one is as ever
            assert storage.newest(path)[0]["n"] == 4
    print(f"{faults} faults at {len(names)} system calls: the newest complete state was found each time")


@pytest.mark.parametrize("error", [Killed(), OSError(errno.ENOSPC, "No space left on device")], ids=["killed", "full"])
def test_a_fault_behind_a_damaged_file_leaves_the_state_before_it(path, monkeypatch, error):
    """Of which there is no other."""
    calls = 0
    while True:
        for file in path.parent.iterdir():
            file.unlink()
        storage.write(path, state(1))
        storage.write(path, state(2))
        path.write_bytes(b"damaged")
        faulty = FaultyOS(calls + 1, "before", error)
        faulty.take_the_place_of_os(monkeypatch)
        try:
            storage.write(path, state(3), damaged=True)
        except type(error):
            monkeypatch.undo()
            assert storage.newest(path)[0]["n"] == (3 if path.exists() and path.stat().st_size > 9 else 1)
            assert storage.read(storage.previous_of(path))["n"] == 1
            calls += 1
        else:
            monkeypatch.undo()
            break
    assert calls == len(faulty.log) >= 7
    assert storage.newest(path)[0]["n"] == 3
    assert storage.read(storage.previous_of(path))["n"] == 1
    assert storage.damaged_of(path).read_bytes() == b"damaged"


def test_a_writer_sets_what_is_damaged_aside_once(path):
    storage.write(path, state(1))
    storage.write(path, state(2))
    path.write_bytes(b"damaged")
    writer = storage.Writer(path)
    writer.damaged = True
    for n, before in ((3, 1), (4, 3)):
        writer.submit(state(n))
        writer.wait()
        assert storage.read(path)["n"] == n
        assert storage.read(storage.previous_of(path))["n"] == before
    assert storage.damaged_of(path).read_bytes() == b"damaged"


@pytest.mark.parametrize(
    "error", [MemoryError(), OSError(errno.EIO, "I/O error"), RuntimeError("can't allocate memory: 9 bytes")]
)
def test_what_cannot_be_read_now_is_not_damaged(path, monkeypatch, error):
    """Or a run would go back to the state before, and lose a good one."""
    storage.write(path, state(1))
    storage.write(path, state(2))

    def fail(*args, **settings):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", fail)
        for read in (storage.read, storage.newest):
            with pytest.raises(type(error)):
                read(path)
    assert storage.newest(path)[0]["n"] == 2


def test_a_failure_names_the_file_and_its_reason(path, monkeypatch):
    storage.write(path, state(1))
    FaultyOS(3, "before", OSError(errno.ENOSPC, "No space left on device")).take_the_place_of_os(monkeypatch)
    with pytest.raises(OSError, match=r"No space left on device: '.*checkpoint.pt'") as failure:
        storage.write(path, state(2))
    assert failure.value.errno == errno.ENOSPC


def test_the_bytes_are_on_the_disk_before_they_get_their_name(path, monkeypatch):
    log = FaultyOS()
    log.take_the_place_of_os(monkeypatch)
    storage.write(path, state(1))
    names = [name for name, *_ in log.log]
    assert "write" not in names[names.index("fsync") :]
    assert names.index("fsync") < names.index("replace")
    assert names[names.index("replace") + 1 :] == ["open", "fsync", "close"]  # the folder
    assert log.log[-3][1] == path.parent


# -- damage ------------------------------------------------------------------------------------------


def test_every_truncation_and_bit_flip_is_detected(path):
    storage.write(path, state(1))
    good = path.read_bytes()
    draw = random.Random(0)
    cases = [("truncated", draw.randrange(len(good))) for _ in range(100)]
    cases += [("flipped", draw.randrange(8 * len(good))) for _ in range(100)]
    cases += [("truncated", len(good) - n) for n in (1, storage.FOOTER_LENGTH, storage.FOOTER_LENGTH + 1)]
    cases += [("flipped", 8 * len(good) - n) for n in range(1, 8 * storage.FOOTER_LENGTH, 13)]
    for kind, place in cases:
        damaged = bytearray(good[:place] if kind == "truncated" else good)
        if kind == "flipped":
            damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        with pytest.raises(storage.DamagedError):
            storage.read(path)
        with pytest.raises(storage.DamagedError, match=str(path)):
            storage.newest(path)
    print(f"{len(cases)} damaged files: all detected, none loaded")
    path.write_bytes(good)
    assert storage.read(path)["n"] == 1


def test_longer_and_foreign_files_are_detected(path):
    storage.write(path, state(1))
    good = path.read_bytes()
    torch.save(state(1), path)
    without_footer = path.read_bytes()
    footer = good[-storage.FOOTER_LENGTH :]
    for content in (b"", b"hello", good + b"x", b"x" + good, good + footer, without_footer, footer):
        path.write_bytes(content)
        with pytest.raises(storage.DamagedError):
            storage.read(path)


def test_the_state_before_is_found_behind_a_damaged_file(path):
    storage.write(path, state(1))
    storage.write(path, state(2))
    path.write_bytes(path.read_bytes()[:-200])
    read, (complaint,), source = storage.newest(path)
    assert (read["n"], source) == (1, storage.previous_of(path))
    assert str(path) in complaint
    storage.previous_of(path).write_bytes(b"")
    with pytest.raises(storage.DamagedError, match=r"checkpoint\.pt .*; .*checkpoint-previous\.pt"):
        storage.newest(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes on this system")
def test_a_pipe_in_the_place_of_a_state_is_not_waited_for(path):
    storage.write(path, state(1))
    storage.write(path, state(2))
    path.unlink()
    os.mkfifo(path)
    read, (complaint,), source = storage.newest(path)
    assert (read["n"], source) == (1, storage.previous_of(path))
    assert f"{path} is damaged" in complaint
    assert "no regular file" in complaint
    storage.write(path, state(3))
    assert storage.read(path)["n"] == 3


class Payload:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch '{self.marker}'",)


def test_code_in_a_file_does_not_run(path, tmp_path):
    marker = tmp_path / "executed"
    storage.write(path, {"n": 1, "payload": Payload(marker)})  # with a digest that fits
    with pytest.raises(storage.DamagedError, match="not accepted"):
        storage.read(path)
    assert not marker.exists()
    torch.load(path, weights_only=False)  # it would have
    assert marker.exists()


# -- in the background -------------------------------------------------------------------------------


def test_the_writer_stores_the_state_as_it_was(path, monkeypatch):
    free, threads = threading.Event(), []
    write = storage.write

    def slow(*args):
        threads.append(threading.current_thread())
        free.wait()
        write(*args)

    monkeypatch.setattr(storage, "write", slow)
    writer = storage.Writer(path)
    for n in (1, 2):  # the second copies into the first one's place
        live = {**state(n), "nested": [{"step": torch.tensor(float(n))}, (n, "text")]}
        free.clear()
        writer.submit(live)
        live["weights"].fill_(-1)
        live["nested"][0]["step"].fill_(-1)
        assert not path.exists() or storage.read(path)["n"] == n - 1  # the caller goes on meanwhile
        free.set()
        writer.wait()
        read = storage.read(path)
        assert read["n"] == n
        assert torch.equal(read["weights"], state(n)["weights"])
        assert read["nested"] == [{"step": torch.tensor(float(n))}, (n, "text")]
    assert threading.main_thread() not in threads


def test_the_writer_follows_a_state_that_changes_its_shape(path):
    writer = storage.Writer(path)
    for live in ({"a": torch.ones(2), "b": [1]}, {"a": torch.ones(3)}, {"a": torch.ones(3, dtype=torch.int8), "c": ()}):
        writer.submit(live)
        writer.wait()
        read = storage.read(path)
        assert read.keys() == live.keys()
        assert torch.equal(read["a"], live["a"])
        assert read["a"].dtype == live["a"].dtype


def test_the_writer_tells_of_a_failure_once(path, monkeypatch):
    writer = storage.Writer(path)
    writer.submit(state(1))
    writer.wait()
    FaultyOS(2, "before", OSError(errno.ENOSPC, "full")).take_the_place_of_os(monkeypatch)
    writer.submit(state(2))
    with pytest.raises(OSError, match="full"):
        writer.submit(state(3))
    monkeypatch.undo()
    writer.wait()
    assert storage.newest(path)[0]["n"] == 1
    writer.submit(state(4))
    writer.wait()
    assert storage.newest(path)[0]["n"] == 4


def test_the_files_that_a_state_counts_on_are_on_the_disk_before_it(path, tmp_path, monkeypatch):
    log = FaultyOS()
    log.take_the_place_of_os(monkeypatch)
    results = tmp_path / "results.jsonl"
    results.write_text("{}\n")
    writer = storage.Writer(path)
    writer.submit(state(1), [results])
    writer.wait()
    assert [call[0] for call in log.log[:3]] == ["open", "fsync", "close"]
    assert log.log[0][1] == results


class OnGpu(torch.Tensor):
    """A tensor that says it is on the second GPU."""

    is_cuda, device = True, torch.device("cuda", 1)


def test_the_writer_waits_for_the_gpu_that_a_state_is_on(path, monkeypatch):
    """Copies to pinned memory do not wait; the current device may be another one."""
    waited = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: waited.append(device))
    monkeypatch.setattr(storage, "_copy", lambda value, into: waited.append("copied"))
    weights = torch.ones(3).as_subclass(OnGpu)
    for live, expected in (
        ({"network": {"a": torch.ones(2)}, "optimizers": [{"state": {0: (weights, 1)}}]}, [OnGpu.device]),
        (state(1), []),
    ):
        writer = storage.Writer(path)
        writer.submit(live)
        writer.wait()
        assert waited == ["copied", *expected]
        waited.clear()


@pytest.mark.gpu
def test_the_writer_copies_from_a_gpu(path):
    live = {"weights": torch.arange(1000.0, device="cuda")}
    writer = storage.Writer(path)
    for n in range(3):
        live["weights"] += 1
        expected = live["weights"].cpu()
        writer.submit(live)
        live["weights"] += 0.0
        writer.wait()
        assert torch.equal(storage.read(path)["weights"], expected), n
