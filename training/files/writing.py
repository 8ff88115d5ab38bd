"""Files on any file system: written whole or not at all, synced where possible, and named when something fails.

Not every file system can do all that is asked of it here. What only makes a file safer is then left out, with one
line that says so; what a file needs raises an OSError that names it.
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
from collections.abc import Iterator
from pathlib import Path

WINDOWS = os.name == "nt"
# The errors of file systems for a request that they do not know or do not allow.
UNSUPPORTED = {
    getattr(errno, name)
    for name in ("EINVAL", "ENOTSUP", "EOPNOTSUPP", "ENOSYS", "EPERM", "EACCES", "EBADF", "EISDIR", "ENOTTY", "EROFS")
}
BINARY = getattr(os, "O_BINARY", 0)  # for os.open: Windows would turn every \n into \r\n
PATIENCE = 2.0  # seconds to wait on Windows while another process has the file open

_told: set[str] = set()


def warn_once(what: str, message: str) -> None:
    """Prints a warning, the first of its kind in this process."""
    if what not in _told:
        _told.add(what)
        print(f"warning: {message}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Raises an OSError of its body as one that names the file, with the system's reason."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno or errno.EIO, error.strerror or str(error), str(path)) from error


def expanded(path: str | Path) -> Path:
    """The path, with the home folder in the place of a leading ``~`` or ``~user``.

    Raises:
        ValueError: there is no such home folder.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ValueError(f"{path} begins with ~, but there is no such home folder") from None


def sync(descriptor: int, path: Path) -> None:
    """Makes an open file or folder survive a loss of power, if its file system can do that; else warns once."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        _unsynced(path, error)


def sync_file(path: Path) -> None:
    """:func:`sync` of a closed file."""
    descriptor = os.open(path, os.O_RDWR | BINARY)  # Windows syncs only what can be written
    try:
        sync(descriptor, path)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder survive a loss of power, where the file system can; else warns once."""
    if WINDOWS:
        return  # folders cannot be opened there
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        _unsynced(folder, error)
        return
    try:
        sync(descriptor, folder)
    finally:
        os.close(descriptor)


def _unsynced(path: Path, error: OSError) -> None:
    if error.errno not in UNSUPPORTED:
        raise error
    warn_once(
        "sync",
        f"{path} cannot be synced ({os.strerror(error.errno)}): files there are written whole, but a loss of power "
        "may cost the newest; a folder on a local disk keeps them",
    )


def replace(source: Path, target: Path) -> None:
    """os.replace; on Windows it waits a while if another process has the target open."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            os.replace(source, target)
            return
        except PermissionError:
            if not WINDOWS or time.monotonic() > deadline:
                raise
            time.sleep(0.05)


class _Replacement:
    """A file to be replaced, and the temporary file, made here, that gives it its content."""

    def __init__(self, path: Path, parents: bool = False, ours: bool = False):
        with naming(path):
            self.target = path if ours else Path(os.path.realpath(path))
            try:
                mode = os.stat(path, follow_symlinks=not ours).st_mode
            except FileNotFoundError:
                mode = None
                if parents:
                    self.target.parent.mkdir(parents=True, exist_ok=True)
            if mode is not None and stat.S_ISDIR(mode):
                raise IsADirectoryError(errno.EISDIR, "it is a folder")
            regular = mode is not None and stat.S_ISREG(mode)
            self.special = mode is not None and not regular and not ours
            self.permissions = stat.S_IMODE(mode) if regular else None
            folder = Path(tempfile.gettempdir()) if self.special else self.target.parent
            # not the whole name of the target: that may already be as long as a name can be
            name = f"{path.name[:50]}.tmp" if ours else f".{os.getpid()}-{secrets.token_hex(8)}.tmp"
            self.temporary = folder / name
            self.temporary.unlink(missing_ok=True)  # of a process that was killed
            self.temporary.touch(0o600 if self.special else 0o666, exist_ok=False)

    def finish(self) -> None:
        if self.special:
            with open(self.temporary, "rb") as source, open(self.target, "wb") as out:
                shutil.copyfileobj(source, out)
            return
        if self.permissions is not None:
            with contextlib.suppress(OSError):  # not all file systems have them
                os.chmod(self.temporary, self.permissions)
        sync_file(self.temporary)
        replace(self.temporary, self.target)

    def clean_up(self) -> None:
        with contextlib.suppress(OSError):  # the first of two failures is the one to report
            self.temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing(path: Path, parents: bool = False, ours: bool = False) -> Iterator[Path]:
    """Yields a temporary file, empty at first; at the end its content becomes that of ``path``, all of it or nothing.

    A link stays a link: the file that it leads to is replaced. A file that is not regular (a pipe, a device such as
    /dev/null) stays what it is, and the content is written to it.

    Args:
        path: the file to write.
        parents: make the folders above it that are missing.
        ours: it is in a folder of ours, where one process writes at a time. Such a folder may come from somebody else:
            a link or a pipe in it is not followed, but replaced like any file.

    Raises:
        OSError: it cannot be written (found at the beginning if possible); it names ``path``.
    """
    replacement = _Replacement(path, parents, ours)
    try:
        yield replacement.temporary
        with naming(path):
            replacement.finish()
    finally:
        replacement.clean_up()


def check_replacing(path: Path, parents: bool = False) -> None:
    """Raises the OSError that :func:`replacing` would begin with; it names ``path``."""
    _Replacement(path, parents).clean_up()


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a small file of a folder of ours, a text in UTF-8, complete or not at all.

    Raises:
        OSError: it cannot be written; it names ``path``, which is as it was.
    """
    with replacing(path, ours=True) as temporary, naming(path):
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
