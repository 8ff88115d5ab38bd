"""The lock of a folder: one holder, until it or its process ends, on file systems without locks too."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import filelock
import pytest

from training.files import writing
from training.files.locks import Lock

ROOT = Path(__file__).resolve().parent.parent


def test_a_folder_is_locked_once(tmp_path):
    one, other = Lock(tmp_path / "new"), Lock(tmp_path / "new")
    assert one.acquire()
    assert not one.acquire()
    assert not other.acquire()
    one.release()
    assert other.acquire()
    assert not one.acquire()
    other.release()


def test_a_lock_dies_with_its_process(tmp_path):
    code = (
        "import sys, time, pathlib; from training.files.locks import Lock; "
        "print(Lock(pathlib.Path(sys.argv[1])).acquire() or 'no', flush=True); time.sleep(100)"
    )
    # the Lock object is gone at once, the lock is not
    command = [sys.executable, "-c", code, str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "True\n"
        assert not Lock(tmp_path).acquire()
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    lock = Lock(tmp_path)
    assert lock.acquire()
    lock.release()


def test_a_child_process_does_not_keep_the_lock(tmp_path):
    lock = Lock(tmp_path)
    assert lock.acquire()
    command = [sys.executable, "-c", "print('here', flush=True); input()"]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, close_fds=False)
    try:
        assert child.stdout.readline() == b"here\n"
        lock.release()
        other = Lock(tmp_path)
        assert other.acquire()
        other.release()
    finally:
        child.communicate(b"\n")


@pytest.fixture
def without_locks(monkeypatch, tmp_path):
    """Lets locks fail in the folders of ``tmp_path``, and, if asked, in the temporary folder too."""
    monkeypatch.setattr(writing, "_told", set())
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "local"))
    (tmp_path / "local").mkdir()
    real = filelock.lock_descriptor

    def arrange(code, everywhere=False):
        def lock_descriptor(descriptor, **settings):
            file = os.fstat(descriptor)
            local = any(os.path.samestat(file, path.stat()) for path in (tmp_path / "local").iterdir())
            if everywhere or not local:
                raise OSError(code, os.strerror(code))
            return real(descriptor, **settings)

        monkeypatch.setattr(filelock, "lock_descriptor", lock_descriptor)

    return arrange


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL])
def test_without_locks_this_machine_is_locked_and_a_warning_says_so(tmp_path, without_locks, capsys, code):
    without_locks(code)
    one, other = Lock(tmp_path / "run"), Lock(tmp_path / "run")
    assert one.acquire()
    assert not other.acquire()
    one.check()
    another = Lock(tmp_path / "other")
    assert another.acquire()
    one.release()
    assert other.acquire()
    other.release()
    another.release()
    assert capsys.readouterr().err == (
        f"warning: {tmp_path / 'run'} cannot be locked against processes on other machines ({os.strerror(code)}): "
        "do not run its command twice at the same time, or use a --dump-dir on a file system with locks\n"
    )


def test_where_nothing_can_be_locked_a_warning_says_so(tmp_path, without_locks, capsys):
    without_locks(errno.ENOLCK, everywhere=True)
    lock = Lock(tmp_path / "run")
    assert lock.acquire()
    lock.check()
    lock.release()
    assert f"{tmp_path / 'run'} cannot be locked (No locks available): do not run" in capsys.readouterr().err


def test_a_disk_that_fails_is_no_file_system_without_locks(tmp_path, without_locks):
    without_locks(errno.EIO)
    with pytest.raises(OSError, match="Input/output error"):
        Lock(tmp_path / "run").acquire()


@pytest.mark.parametrize("again", [False, True])
def test_a_folder_that_is_removed_is_locked_no_more(tmp_path, again):
    lock = Lock(tmp_path / "run")
    assert lock.acquire()
    lock.check()
    shutil.rmtree(tmp_path / "run")
    other = Lock(tmp_path / "run")
    if again:
        assert other.acquire()
        other.check()
    with pytest.raises(FileNotFoundError, match=rf"removed during the run: '{tmp_path / 'run'}'"):
        lock.check()
    lock.release()
    other.release()
