"""Stores states: written completely or not at all, in the background, and verified when they are read.

A file is an archive of torch.save, followed by a footer of fixed length: the format, the number of bytes before the
footer, and their SHA-256. ``torch.load`` ignores the footer.
"""

import contextlib
import hashlib
import os
import re
import stat
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from training import files
from training.files import archives, checks

CHECKPOINT = "checkpoint.pt"  # the newest state of a run, in the folder of its model
FOOTER = re.compile(rb"\ngradrewire 2 bytes (\d{20}) sha256 ([0-9a-f]{64})\n")
FOOTER_LENGTH = len(b"\ngradrewire 2 bytes  sha256 \n") + 20 + 64


class DamagedError(Exception):
    """A file was changed, or not written by this program; the message says how that shows."""


class _HashingFile:
    """A file for torch.save to write to, which counts and digests the bytes."""

    def __init__(self, descriptor: int):
        self.descriptor, self.bytes, self.digest = descriptor, 0, hashlib.sha256()

    def write(self, data: Any) -> int:
        rest = memoryview(data).cast("B")
        length = len(rest)
        self.digest.update(rest)
        while rest:
            rest = rest[os.write(self.descriptor, rest) :]
        self.bytes += length
        return length

    def flush(self) -> None:
        pass


def previous_of(path: Path) -> Path:
    """Where :func:`write` keeps what a file held before."""
    return path.with_name(f"{path.stem}-previous{path.suffix}")


def damaged_of(path: Path) -> Path:
    """Where :func:`write` moves a damaged file."""
    return path.with_name(f"{path.stem}-damaged{path.suffix}")


def temporary_of(path: Path) -> Path:
    return path.with_name(path.name + ".tmp")


def is_there(path: Path) -> bool:
    """Whether there is a file that :func:`newest` would look at."""
    return path.is_file() or previous_of(path).is_file()


def is_stored(path: Path) -> bool:
    """Whether a file, if there is one, ends as those of :func:`write`: it may be the only copy of a state."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        file.seek(max(file.seek(0, os.SEEK_END) - FOOTER_LENGTH, 0))
        return FOOTER.fullmatch(file.read()) is not None


def write(path: Path, state: Any, damaged: bool = False) -> None:
    """Stores ``state`` in ``path`` and keeps what was there in :func:`previous_of`.

    What is ``damaged`` there goes to :func:`damaged_of`: it does not take the place of the good state before it.

    Whatever fails, and whenever the process is killed, :func:`newest` finds the last state that was
    written completely: the new file takes its name only once all of it is on the disk.

    Raises:
        OSError: the file cannot be written; the last state can still be read.
    """
    temporary = temporary_of(path)
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | files.BINARY, 0o666)
        try:
            file = _HashingFile(descriptor)
            torch.save(state, file)
            footer = f"\ngradrewire 2 bytes {file.bytes:020d} sha256 {file.digest.hexdigest()}\n"
            file.write(footer.encode())
            files.sync(descriptor, path)
        finally:
            os.close(descriptor)
        if path.exists():
            files.replace(path, damaged_of(path) if damaged else previous_of(path))
        files.replace(temporary, path)
        files.sync_folder(path.parent)
    except Exception as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        cause = _system_error(error)
        if cause is None:
            raise
        raise OSError(cause.errno, cause.strerror, str(path)) from error


def _system_error(error: BaseException | None) -> OSError | None:
    """The error of the operating system behind an error of torch.save, if there is one."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def read(path: Path, verify: bool = True) -> Any:
    """Verifies the digest of what :func:`write` stored, and reads it to the CPU.

    No code in the file can run: only plain tensors, numbers, texts and containers of them are read, and only after
    the sizes that they declare were checked (see :mod:`training.files.archives`). Without ``verify``, for a quick look,
    only the file's length is checked, and tensors are read from the disk when they are used.

    Raises:
        DamagedError: the file is cut short, changed, no regular file, or was not written by :func:`write`.
        OSError: the file cannot be read.
        MemoryError, RuntimeError: there is no memory for it.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for ever
        raise DamagedError("it is no regular file")
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - FOOTER_LENGTH, 0))
        footer = FOOTER.fullmatch(file.read())
        if footer is None:
            raise DamagedError("its end is missing or foreign")
        if int(footer[1]) != size - FOOTER_LENGTH:
            raise DamagedError(f"it has {size - FOOTER_LENGTH} of {int(footer[1])} bytes")
        file.seek(0)
        digest, left = hashlib.sha256(), size - FOOTER_LENGTH
        while verify and left and (chunk := file.read(min(left, 1 << 22))):
            digest.update(chunk)
            left -= len(chunk)
        if verify and digest.hexdigest().encode() != footer[2]:
            raise DamagedError("its content does not match its digest")
        try:
            with archives.opened(file, size - FOOTER_LENGTH) as archive:
                archives.check_pickled(archive)
            file.seek(0)
            return torch.load(file if verify else path, map_location="cpu", weights_only=True, mmap=not verify)
        except Exception as error:  # what is not an archive of plain data is refused by zipfile, pickle or torch
            if not checks.is_about_content(error):
                raise
            raise DamagedError(f"its content is not accepted ({checks.reason(error).split('. ')[0]})") from None


def newest(path: Path) -> tuple[Any, list[str], Path]:
    """Reads ``path`` or, if it is damaged or missing, :func:`previous_of` it.

    Returns:
        The state, None if nothing was ever stored; what is wrong with a file that was passed over; the file read.

    Raises:
        DamagedError: no good file is left; the message names each.
    """
    complaints = []
    for candidate in (path, previous_of(path)):
        try:
            return read(candidate), complaints, candidate
        except FileNotFoundError:
            continue
        except DamagedError as error:
            complaints.append(f"{candidate} is damaged or not a checkpoint of this program: {error}")
    if complaints:
        raise DamagedError("; ".join(complaints))
    return None, [], path


def _copy(value: Any, into: Any) -> Any:
    """Copies nested containers to the CPU; where tensors of ``into`` have the right shape, into those."""
    if isinstance(value, Tensor):
        value = value.detach()
        if isinstance(into, Tensor) and into.shape == value.shape and into.dtype == value.dtype:
            return into.copy_(value, non_blocking=True)
        copy = torch.empty(value.shape, dtype=value.dtype, device="cpu", pin_memory=value.is_cuda)
        return copy.copy_(value, non_blocking=True)
    if isinstance(value, dict):
        into = into if isinstance(into, dict) else {}
        return {key: _copy(item, into.get(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        into = into if isinstance(into, list | tuple) and len(into) == len(value) else [None] * len(value)
        return type(value)(_copy(item, old) for item, old in zip(value, into, strict=True))
    return value


def _gpus(value: Any) -> set[torch.device]:
    """The GPUs that the tensors of nested containers are on."""
    if isinstance(value, Tensor):
        return {value.device} if value.is_cuda else set()
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list | tuple):
        return set()
    return set().union(*map(_gpus, value))


class Writer:
    """Stores states in the background, one at a time: the caller waits only while a state is copied.

    If that fails, the next call raises the error, once.

    Attributes:
        damaged: whether the file there is damaged now, as :func:`write` takes it.
    """

    def __init__(self, path: Path):
        self.path, self.damaged = path, False
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._copied: Any = None

    def submit(self, state: Any, logs: Iterable[Path] = ()) -> None:
        """Copies ``state`` and starts to write it, once the ``logs`` that belong to it are on the disk.

        Raises:
            OSError: the state before this one could not be written.
        """
        self.wait()
        self._copied = _copy(state, self._copied)
        for device in _gpus(state):
            torch.cuda.synchronize(device)  # copies to pinned memory do not wait
        # a daemon: a process that has to stop at once does not wait for it
        self._thread = threading.Thread(
            target=self._write, args=(self._copied, list(logs)), name="checkpoint writer", daemon=True
        )
        self._thread.start()

    def _write(self, state: Any, logs: list[Path]) -> None:
        try:
            for path in logs:
                files.sync_file(path)
            write(self.path, state, self.damaged)
            self.damaged = False
        except BaseException as error:
            self._error = error

    def wait(self) -> None:
        """Waits until the last state is on the disk.

        Raises:
            OSError: it could not be written.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error
