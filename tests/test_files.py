"""Files on any file system: what it cannot do is said once, what is no regular file stays what it is."""

import errno
import os
import stat
import threading
from pathlib import Path

import pytest
import torch

from training.command_line import file_path, folder_path, output_file
from training.errors import Refusal
from training.files import storage, writing


@pytest.fixture(autouse=True)
def nothing_told(monkeypatch):
    monkeypatch.setattr(writing, "_told", set())


# -- a file system that cannot sync -------------------------------------------------------------------


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.EPERM, errno.EACCES, errno.ENOSYS])
@pytest.mark.parametrize("what", ["files", "folders", "opening folders"])
def test_what_cannot_be_synced_is_a_warning_once(tmp_path, monkeypatch, capsys, what, code):
    real_open, real_sync = os.open, os.fsync

    def refuse():
        raise OSError(code, os.strerror(code))

    def fsync(descriptor):
        folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        return refuse() if folder == (what == "folders") else real_sync(descriptor)

    def open_(path, *args, **settings):
        return refuse() if os.path.isdir(path) else real_open(path, *args, **settings)

    monkeypatch.setattr(os, "fsync", fsync if what != "opening folders" else real_sync)
    monkeypatch.setattr(os, "open", open_ if what == "opening folders" else real_open)
    path, log = tmp_path / "checkpoint.pt", tmp_path / "results.jsonl"
    log.write_text("{}\n")
    writer = storage.Writer(path)
    for n in range(3):
        writer.submit({"n": n, "weights": torch.ones(3)}, [log])
        writer.wait()
        writing.write_whole(tmp_path / "run.json", str(n))
        assert storage.read(path)["n"] == n
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith(f"warning: {tmp_path}")
    assert f"cannot be synced ({os.strerror(code)})" in err
    assert "a folder on a local disk keeps them" in err


def test_a_disk_that_fails_is_no_warning(tmp_path, monkeypatch):
    def fail(descriptor):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match=r"Input/output error: '.*checkpoint\.pt'"):
        storage.write(tmp_path / "checkpoint.pt", {"n": 1})


# -- writing over what is there -----------------------------------------------------------------------


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "run.json"
    writing.write_whole(path, "one")
    for failing in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            patch.setattr(os, failing, lambda *_, full=full: (_ for _ in ()).throw(full))
            with pytest.raises(OSError, match=rf"No space left on device: '{path}'"):
                writing.write_whole(path, "two")
        assert path.read_text() == "one"
        assert [p.name for p in path.parent.iterdir()] == ["run.json"]
    with pytest.raises(ValueError, match="inside"), writing.replacing(path) as temporary:  # noqa: PT012
        temporary.write_text("three")
        raise ValueError("inside")
    assert path.read_text() == "one"
    assert [p.name for p in path.parent.iterdir()] == ["run.json"]


def write(path, content):
    with writing.replacing(path) as temporary:
        temporary.write_bytes(content if isinstance(content, bytes) else content.encode())


def test_a_device_stays_a_device(tmp_path):
    device = tmp_path / "null"
    try:
        os.mknod(device, 0o666 | stat.S_IFCHR, os.stat("/dev/null").st_rdev)
        device.write_bytes(b"")
    except (OSError, AttributeError):  # only root makes devices, and not on every file system
        device = Path("/dev/null")
    write(device, "text")
    assert stat.S_ISCHR(os.lstat(device).st_mode)


def test_a_pipe_gets_the_content_and_stays_a_pipe(tmp_path):
    pipe, got = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()), daemon=True)
    reader.start()
    write(pipe, b"x" * 200_000)  # more than a pipe holds
    reader.join(10)
    assert got == [b"x" * 200_000]
    assert stat.S_ISFIFO(os.lstat(pipe).st_mode)
    assert [p.name for p in tmp_path.iterdir()] == ["pipe"]


@pytest.mark.parametrize("there", [True, False])
def test_a_link_stays_a_link(tmp_path, there):
    target, link = tmp_path / "elsewhere" / "target", tmp_path / "link"
    target.parent.mkdir()
    if there:
        target.write_text("old")
    link.symlink_to(Path("elsewhere") / "target")
    write(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["elsewhere", "link", "target"]


def test_in_a_folder_of_ours_nothing_leads_elsewhere(tmp_path):
    """A run's folder may come from a stranger, with links in it to files of mine."""
    mine, run = tmp_path / "mine", tmp_path / "run"
    mine.write_text("mine")
    run.mkdir()
    for name in ("run.json", "run.json.tmp"):
        (run / name).symlink_to(mine)
    os.mkfifo(run / "test.json")
    for name in ("run.json", "test.json"):
        writing.write_whole(run / name, "text")
        assert stat.S_ISREG(os.lstat(run / name).st_mode)
        assert (run / name).read_text() == "text"
    assert mine.read_text() == "mine"
    assert sorted(p.name for p in run.iterdir()) == ["run.json", "test.json"]


def test_permissions_of_a_file_stay(tmp_path):
    path = tmp_path / "private"
    path.touch(0o600)
    write(path, "text")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_the_longest_name_is_a_name(tmp_path):
    path = tmp_path / ("ä" * 127)
    write(path, "text")
    assert path.read_text() == "text"


def test_two_long_names_are_written_side_by_side(tmp_path):
    """As the records of rows that differ in their seed."""
    paths = [tmp_path / ("a" * 60 + end) for end in "12"]
    with writing.replacing(paths[0], ours=True) as first, writing.replacing(paths[1], ours=True) as second:
        first.write_text("first")
        second.write_text("second")
    assert [path.read_text() for path in paths] == ["first", "second"]


def linked_to_itself(folder):
    (folder / "link").symlink_to("link")
    return folder / "link"


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        (lambda folder: folder, "it is a folder"),
        (lambda folder: folder / ("x" * 256), os.strerror(errno.ENAMETOOLONG)),
        (linked_to_itself, os.strerror(errno.ELOOP)),
        (lambda folder: Path("/dev/null/file"), "Not a directory"),
        (lambda folder: folder / "none" / "file", "No such file or directory"),
    ],
)
def test_what_cannot_be_written_is_refused_by_name(tmp_path, place, reason):
    path = place(tmp_path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(OSError, match=rf"{reason}: '{path}'"):
        write(path, "text")
    with pytest.raises(Refusal, match=rf"argument -o: cannot write {path}: {reason}"), output_file("-o", path):
        pass
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_device_is_named():
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        write(Path("/dev/full"), "text")


def test_windows_waits_for_readers(tmp_path, monkeypatch):
    """There, a file that another process has open cannot be replaced."""
    source, target, calls = tmp_path / "source", tmp_path / "target", []
    replace = os.replace

    def busy(*paths):
        calls.append(paths)
        if len(calls) < 3:
            raise PermissionError(errno.EACCES, "used by another process")
        replace(*paths)

    monkeypatch.setattr(os, "replace", busy)
    source.write_text("new")
    with pytest.raises(PermissionError):
        writing.replace(source, target)
    monkeypatch.setattr(writing, "WINDOWS", True)
    writing.replace(source, target)
    assert target.read_text() == "new"
    assert len(calls) == 3
    monkeypatch.setattr(writing, "PATIENCE", 0.0)
    calls.clear()
    with pytest.raises(PermissionError):
        writing.replace(target, source)


# -- paths ---------------------------------------------------------------------------------------------


def test_home_is_expanded(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert writing.expanded("~/x") == tmp_path / "x"
    assert writing.expanded("a/~") == Path("a/~")
    assert folder_path("~/x") == file_path("~/x") == tmp_path / "x"


@pytest.mark.parametrize("text", ["", "  ", "a\0b", "a\udcff", "~nobody-of-this-name/x"])
@pytest.mark.parametrize("kind", [folder_path, file_path])
def test_what_is_no_path_is_refused(kind, text):
    import argparse

    with pytest.raises(argparse.ArgumentTypeError):
        kind(text)
