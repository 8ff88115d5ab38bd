"""Locks: one training process per folder."""

import contextlib
import errno
import hashlib
import os
import tempfile
from pathlib import Path

import filelock

from training import files

# The errors where there are no locks.
NO_LOCKS = {getattr(errno, name) for name in ("ENOLCK", "ENOSYS", "ENOTSUP", "EOPNOTSUPP", "EINVAL", "EPERM")}


class Lock:
    """Keeps a folder to one process, from :meth:`acquire` until :meth:`release` or the end of the process.

    Where the folder's file system has no locks, a file in this machine's temporary folder is locked instead. A warning
    then says that processes on other machines are not kept out or, if that fails too, that nothing is locked.
    """

    def __init__(self, folder: Path):
        self.folder, self.path = folder, folder / "lock"
        self.descriptor: int | None = None
        self.in_folder = False  # whether the locked file is the folder's own

    def acquire(self) -> bool:
        """Takes the lock; False if another process, or another Lock of this one, has it.

        Raises:
            OSError: the folder or the file in it cannot be made.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        descriptor = self._open(self.path)
        try:
            locked = self._lock(descriptor)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            return self._acquire_on_this_machine(os.strerror(error.errno))
        self.in_folder |= locked
        return locked

    @staticmethod
    def _open(path: Path) -> int:
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o666)  # child processes do not inherit it

    def _lock(self, descriptor: int) -> bool:
        """Locks an open file, and keeps it open as long as it is locked."""
        with contextlib.ExitStack() as stack:
            stack.callback(os.close, descriptor)
            if locked := filelock.lock_descriptor(descriptor, blocking=False):
                self.descriptor = descriptor
                stack.pop_all()
        return locked

    def _acquire_on_this_machine(self, reason: str) -> bool:
        whom, taken = " against processes on other machines", True
        folder = os.path.realpath(self.folder).encode(errors="surrogateescape")
        try:
            name = f"gradrewire-{hashlib.sha256(folder).hexdigest()[:32]}.lock"
            taken = self._lock(self._open(Path(tempfile.gettempdir()) / name))
        except OSError:
            whom = ""
        if taken:
            files.warn_once(
                "lock",
                f"{self.folder} cannot be locked{whom} ({reason}): do not run its command twice at the same time, "
                "or use a --dump-dir on a file system with locks",
            )
        return taken

    def check(self) -> None:
        """Raises FileNotFoundError if the folder, or its lock, was removed since the lock was taken."""
        if self.in_folder:
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(self.descriptor), os.stat(self.path)):
                    return
        elif self.folder.is_dir():
            return
        raise FileNotFoundError(errno.ENOENT, "its folder was removed during the run", str(self.folder))

    def release(self) -> None:
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None
