"""Writes files whole or not at all, on any file system.

Where a file system cannot sync, one warning says so. Where a file cannot be written, an OSError names it.
"""

import contextlib
import errno
import os
import secrets
import shutil
import stat
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

WINDOWS = os.name == "nt"
# The errors of a file system that does not support a request.
UNSUPPORTED = {
    getattr(errno, name)
    for name in ("EINVAL", "ENOTSUP", "EOPNOTSUPP", "ENOSYS", "EPERM", "EACCES", "EBADF", "EISDIR", "ENOTTY", "EROFS")
}
BINARY = getattr(os, "O_BINARY", 0)  # for os.open: Windows would turn every \n into \r\n
PATIENCE = 2.0  # seconds to wait on Windows while another process has the file open

_told: set[str] = set()


def warn_once(what: str, message: str) -> None:
    """Prints a warning, once for each ``what`` in this process."""
    if what not in _told:
        _told.add(what)
        print(f"warning: {message}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Adds the file's name to an OSError from its body."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno or errno.EIO, error.strerror or str(error), str(path)) from error


def expanded(path: str | Path) -> Path:
    """Replaces a leading ``~`` or ``~user`` by the home folder.

    Raises:
        ValueError: there is no such home folder.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ValueError(f"{path} begins with ~, but there is no such home folder") from None


@contextlib.contextmanager
def _where_supported(path: Path) -> Iterator[None]:
    """Makes one warning of the errors of a file system that cannot sync."""
    try:
        yield
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        warn_once(
            "sync",
            f"{path} cannot be synced ({os.strerror(error.errno)}): files there are written whole, but a loss of power "
            "may cost the newest; a folder on a local disk keeps them",
        )


def sync(descriptor: int, path: Path) -> None:
    """Makes an open file survive a loss of power, where the file system can."""
    with _where_supported(path):
        os.fsync(descriptor)


def sync_file(path: Path, flags: int = os.O_RDWR | BINARY) -> None:
    """:func:`sync` of a closed file, opened with ``flags``: Windows syncs only what can be written."""
    descriptor = os.open(path, flags)
    try:
        sync(descriptor, path)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder survive a loss of power, where the file system can."""
    if WINDOWS:
        return  # folders cannot be opened there
    with _where_supported(folder):
        sync_file(folder, os.O_RDONLY)


def replace(source: Path, target: Path) -> None:
    """os.replace, which on Windows waits a while for another process that has the target open."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            os.replace(source, target)
            return
        except PermissionError:
            if not WINDOWS or time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def _short(name: str) -> str:
    """A name of its own for each name, which may be as long as one can be."""
    return name if len(name) <= 50 else f"{name[:50]}-{zlib.crc32(name.encode('utf-8', 'surrogatepass')):08x}"


@contextlib.contextmanager
def replacing(path: Path, parents: bool = False, ours: bool = False) -> Iterator[Path]:
    """Yields an empty temporary file, which replaces ``path`` at the end; on an error ``path`` is unchanged.

    A link stays a link: the file that it leads to is replaced. The content is written into a file that is not regular
    (a pipe, a device such as /dev/null).

    Args:
        path: the file to write.
        parents: make the folders above it that are missing.
        ours: it is in a folder that only this program writes to, each file by one process at a time. The folder may
            be a stranger's: links and pipes in it are replaced, never followed.

    Raises:
        OSError: it cannot be written, which shows at the beginning if possible; it names ``path``.
    """
    with naming(path):
        target = path if ours else Path(os.path.realpath(path))
        try:
            mode = os.stat(path, follow_symlinks=not ours).st_mode
        except FileNotFoundError:
            mode = None
            if parents:
                target.parent.mkdir(parents=True, exist_ok=True)
        if mode is not None and stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        regular = mode is not None and stat.S_ISREG(mode)
        special = mode is not None and not regular and not ours
        folder = Path(tempfile.gettempdir()) if special else target.parent
        temporary = folder / (f"{_short(path.name)}.tmp" if ours else f".{os.getpid()}-{secrets.token_hex(8)}.tmp")
        temporary.unlink(missing_ok=True)  # ours has the name that one of a process that was killed has
        temporary.touch(0o600 if special else 0o666, exist_ok=False)
    try:
        yield temporary
        with naming(path):
            if special:
                with open(temporary, "rb") as source, open(target, "wb") as out:
                    shutil.copyfileobj(source, out)
            else:
                if regular:
                    with contextlib.suppress(OSError):  # not all file systems have permissions
                        os.chmod(temporary, stat.S_IMODE(mode))
                sync_file(temporary)
                replace(temporary, target)
    finally:
        with contextlib.suppress(OSError):  # the first of two failures is the one to report
            temporary.unlink(missing_ok=True)


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a small file in a folder of ours; a text in UTF-8.

    Raises:
        OSError: it cannot be written; it names ``path``, whose content is unchanged.
    """
    with replacing(path, ours=True) as temporary, naming(path):
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
