"""Compiled libraries on disk: kept for later processes, verified, loaded from a private copy.

A kept library is trusted by its content alone: its file begins with the SHA-256 of what follows, and belongs to this
user. It is read once, and what was verified is loaded, so that later changes to the file do not matter
(cutting it short would kill every process that has it mapped).
"""

import contextlib
import ctypes
import hashlib
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

PREFIX = "gradrewire-build-"  # of what exists only while a library is built or loaded
ABANDONED = 3600  # seconds after which such a thing belongs to a process that was killed
LARGEST = 1 << 25  # bytes of a library


def folder() -> Path | None:
    """Where libraries are kept; None where there is no home folder. It need not exist."""
    named = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        return (named if named.is_absolute() else Path.home() / ".cache") / "gradrewire"
    except RuntimeError:
        return None


def read(path: Path) -> bytes | None:
    """The library in a file; None if the file is not, to the last byte, as this user wrote it."""
    flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)  # a pipe would wait for a writer
    try:
        with open(os.open(path, flags), "rb") as file:
            status = os.fstat(file.fileno())
            if hasattr(os, "geteuid") and (status.st_uid != os.geteuid() or status.st_mode & 0o022):
                return None
            if not stat.S_ISREG(status.st_mode) or status.st_size > LARGEST:
                return None
            digest, content = file.read(32), file.read(LARGEST)
    except OSError:
        return None
    return content if hashlib.sha256(content).digest() == digest else None


def write(content: bytes, path: Path) -> None:
    """Keeps a library, for this user alone; several processes may do so at once.

    Raises:
        OSError: it cannot be kept there.
    """
    descriptor, name = tempfile.mkstemp(prefix=PREFIX, dir=path.parent)
    try:
        with open(descriptor, "wb") as file:
            file.write(hashlib.sha256(content).digest() + content)
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


@contextlib.contextmanager
def workspace() -> Iterator[Path]:
    """An empty folder, removed afterwards; what killed processes left beside it is removed first.

    Raises:
        OSError: there is no place for one.
    """
    created = None
    for parent in _places():
        with contextlib.suppress(OSError):
            parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            created = tempfile.TemporaryDirectory(prefix=PREFIX, dir=parent, ignore_cleanup_errors=True)
            break
    if created is None:
        raise OSError("no folder for temporary files that others cannot write to: TMPDIR names one")
    with created:
        for path in parent.glob(f"{PREFIX}*"):
            with contextlib.suppress(OSError):
                if time.time() - path.lstat().st_mtime > ABANDONED:
                    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        yield Path(created.name)


def load(content: bytes) -> ctypes.CDLL:
    """Loads a library from memory, or from a file that is removed at once.

    Raises:
        OSError: it is not for this system, or the system loads no library from where this process can write.
    """
    try:
        return _load_from_memory(content)
    except (OSError, AttributeError) as error:  # not Linux, no /proc, forbidden; or no library at all
        reason: Exception = error
    for parent in _places():
        try:
            with tempfile.NamedTemporaryFile(prefix=PREFIX, suffix=".so", dir=parent) as file:
                file.write(content)
                file.flush()
                return _dlopen(file.name)
        except OSError as error:
            reason = error
    raise OSError(str(reason))


def _load_from_memory(content: bytes) -> ctypes.CDLL:
    descriptor = os.memfd_create("gradrewire")
    try:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(content)
        # stays open: the loader knows a library by its path, so the number must not come again
        return _dlopen(f"/proc/self/fd/{descriptor}")
    except OSError:
        os.close(descriptor)
        raise


def _dlopen(path: str) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(path)
    except OSError as error:
        raise OSError(str(error).removeprefix(f"{path}: ")) from None


def _places() -> list[Path]:
    """Folders for temporary files; the cache comes first, as other users have the least access to it."""
    places = [folder()]
    with contextlib.suppress(OSError):
        places.append(Path(tempfile.gettempdir()))
    return [place for place in places if place and _ours(place)]


def _ours(folder: Path) -> bool:
    """Whether nobody else can put something in the place of what is in a folder, by its own mode. It need not exist."""
    try:
        status = folder.stat()
    except OSError:
        return True
    if not hasattr(os, "geteuid"):
        return True
    shared = status.st_mode & 0o022 and not status.st_mode & stat.S_ISVTX
    return status.st_uid in (0, os.geteuid()) and not shared
