"""A dump folder that is removed, or can be written no more, ends a run in one line that names it; so does a -test."""

import builtins
import errno
import io
import os
import shutil
import threading

import pytest
from run_helpers import assert_same_run, load

from mnist.model import MnistNet
from training import checkpoint
from training.files import writing
from training.recording import Recorder

GRAD = ["-m", "grad", "-s", "0.95", "-lr", "1e-2", "-b", "8"]  # five steps an epoch
NAME = "lr-1e-2-b-8-T-8-penalty-1e-3-s-0.95-grad"
EVERY_STEP = ["--checkpoint-minutes", "1e-9"]


def at_forward(monkeypatch, number, action):
    """Does something before the forward pass of a number, counted from 1, with no checkpoint being written."""
    passes, forward = [], MnistNet.forward

    def forward_and_act(self, images):
        passes.append(1)
        if len(passes) == number:
            for thread in threading.enumerate():
                if thread.name == "checkpoint writer":
                    thread.join()
            action()
        return forward(self, images)

    monkeypatch.setattr(MnistNet, "forward", forward_and_act)


def remove(folder):
    """Removes a folder; once more where TensorBoard's thread has made its file anew in it meanwhile."""
    while folder.exists():
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def no_thread_complains(monkeypatch):
    """Nothing is left to Python's hook for the failures of threads, which prints a traceback."""
    complaints = []
    monkeypatch.setattr(threading, "excepthook", complaints.append)
    yield
    assert complaints == []


def assert_one_line(result, *texts):
    assert result.status == 1
    assert result.err.count("\n") == 1, result.err
    assert "Traceback" not in result.err
    for text in texts:
        assert text in result.err


@pytest.mark.parametrize(
    ("number", "recording"), [(3, ["-i2", "1"]), (8, ["-i2", "1000"]), (8, ["-i2", "1000", *EVERY_STEP])]
)
@pytest.mark.parametrize("what", ["", "logs", "models"])
def test_a_folder_that_is_removed_under_a_run(run, tmp_path, monkeypatch, no_thread_complains, what, recording, number):
    dump = tmp_path / "dump"
    at_forward(monkeypatch, number, lambda: remove(dump / what))
    result = run(*GRAD, "-N", "3", *recording, dump=dump)
    assert_one_line(result, "folder was removed during the run", str(dump / what), NAME)
    assert "existing files are unchanged" not in result.err


@pytest.mark.parametrize("number", [3, 8])  # in the first epoch, and in the second, which is not saved
def test_a_folder_that_another_run_has_made_anew_is_left_to_it(run, tmp_path, monkeypatch, number):
    """The lock is that of a folder that is gone: who holds it would write among the other's files."""
    dump, others = tmp_path / "dump", []

    def begin_anew():
        remove(dump)
        others.append(checkpoint.Lock(dump / "models" / NAME))
        assert others[0].acquire()
        (dump / "logs" / NAME).mkdir(parents=True)

    at_forward(monkeypatch, number, begin_anew)
    assert_one_line(run(*GRAD, "-N", "3", dump=dump), "its folder was removed during the run")
    assert [path.name for path in (dump / "models" / NAME).iterdir()] == ["lock"]
    assert not (dump / "logs" / NAME / "results.jsonl").exists()
    others[0].release()


def forbid_writing(monkeypatch, folder, code):
    """From now on, files below a folder are opened for reading only."""
    real_open, real_os_open = builtins.open, os.open
    folder = os.fsencode(folder)

    def refuse(path):
        if not isinstance(path, int) and os.path.abspath(os.fsencode(path)).startswith(folder):
            raise OSError(code, os.strerror(code), path)

    def open_(path, mode="r", *args, **settings):
        if set(mode) & set("wax+"):
            refuse(path)
        return real_open(path, mode, *args, **settings)

    def os_open(path, flags, *args, **settings):
        if flags & (os.O_WRONLY | os.O_RDWR):
            refuse(path)
        return real_os_open(path, flags, *args, **settings)

    monkeypatch.setattr(builtins, "open", open_)
    monkeypatch.setattr(io, "open", open_)
    monkeypatch.setattr(os, "open", os_open)


@pytest.mark.parametrize(
    ("what", "number", "code"),
    [("", 3, errno.EACCES), ("", 8, errno.ENOSPC), ("logs", 8, errno.ENOSPC), ("models", 8, errno.EROFS)],
)
def test_a_folder_that_can_be_written_no_more(run, tmp_path, monkeypatch, no_thread_complains, what, number, code):
    run(*GRAD, "-N", "3", "-i2", "1", dump=tmp_path / "one")
    dump = tmp_path / "dump"
    with monkeypatch.context() as patch:
        at_forward(patch, number, lambda: forbid_writing(patch, dump / what, code))
        result = run(*GRAD, "-N", "3", "-i2", "1", dump=dump)
    assert_one_line(result, os.strerror(code), str(dump / what), "; existing files are unchanged")
    assert load(dump)["epoch"] == (1 if number == 8 else 0)
    assert run(*GRAD, "-N", "3", "-i2", "1", dump=dump).status == 0
    assert_same_run(tmp_path / "one", dump)


def test_the_last_events_are_not_lost_in_silence(run, tmp_path, monkeypatch, no_thread_complains):
    """What TensorBoard's thread could not write is told at the end, if nothing is logged after it."""
    from tensorboard.compat.proto.event_pb2 import Event

    recorder = Recorder(tmp_path / "logs", {})
    with monkeypatch.context() as patch:
        forbid_writing(patch, tmp_path / "logs", errno.ENOSPC)
        recorder.writer.file_writer.event_writer.add_event(Event(step=1))
        with pytest.raises(OSError, match=rf"No space left on device: '{tmp_path / 'logs'}'"), recorder:
            pass


def test_results_are_whole_lines_where_a_write_takes_a_part(tmp_path, monkeypatch):
    write = io.FileIO.write

    class Disk(io.FileIO):
        def write(self, data):
            return write(self, data[:7])

    with Recorder(tmp_path, {}) as recorder:
        monkeypatch.setattr(builtins, "open", lambda path, mode, buffering: Disk(path, mode))
        recorder.results({"epoch": 1, "text": "long enough"})
        recorder.results({"epoch": 2})
        monkeypatch.undo()
    assert (tmp_path / "results.jsonl").read_text() == '{"epoch": 1, "text": "long enough"}\n{"epoch": 2}\n'


def test_a_test_that_cannot_be_stored_is_printed_all_the_same(run, tmp_path, monkeypatch):
    run(*GRAD, "-N", "1")
    with monkeypatch.context() as patch:
        forbid_writing(patch, tmp_path / "logs", errno.EROFS)
        result = run(*GRAD, "-test")
    assert "test accuracy" in result.out
    assert_one_line(result, "Read-only file system", "/rate-fc.0-epoch-1.npy")
    assert not list(tmp_path.glob("logs/*/*.npy"))


# -- before a run ----------------------------------------------------------------------------------------


def refused(result, text):
    assert result.status == 2
    assert result.err.count("\n") == 1
    assert text in result.err


def test_a_file_in_the_place_of_a_run(run, tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / NAME).write_text("a file")
    refused(run(*GRAD, "-N", "1"), f"argument --dump-dir: cannot write {tmp_path / 'models' / NAME}: File exists")


def test_a_dump_folder_below_a_file_or_of_nobody(run, tmp_path):
    (tmp_path / "file").touch()
    refused(run(*GRAD, "-N", "1", dump=tmp_path / "file" / "x"), "argument --dump-dir: cannot write")
    refused(run(*GRAD, "-N", "1", dump=tmp_path / ("x" * 300)), os.strerror(errno.ENAMETOOLONG))
    refused(run(*GRAD, "-N", "1", dump="~nobody-of-this-name/x"), "argument --dump-dir: ~nobody-of-this-name/x")


def test_a_file_system_without_locks_and_syncs_is_trained_on(run, tmp_path, monkeypatch):
    import filelock

    def no(code):
        def fail(*args, **settings):
            raise OSError(code, os.strerror(code))

        return fail

    run(*GRAD, "-N", "2", dump=tmp_path / "one")
    monkeypatch.setattr(writing, "_told", set())
    monkeypatch.setattr(filelock, "lock_descriptor", no(errno.ENOLCK))
    monkeypatch.setattr(os, "fsync", no(errno.EINVAL))
    result = run(*GRAD, "-N", "2", *EVERY_STEP, dump=tmp_path / "other")
    assert result.status == 0
    locks, syncs = result.err.splitlines()
    assert locks.startswith(f"warning: {tmp_path / 'other' / 'models' / NAME} cannot be locked (No locks available)")
    assert syncs.startswith(f"warning: {tmp_path / 'other'}")
    assert_same_run(tmp_path / "one", tmp_path / "other")
