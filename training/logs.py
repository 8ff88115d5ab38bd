"""The log folder of a run, and the files in it that grow while the run goes on."""

import errno
import os
import stat
from argparse import Namespace
from pathlib import Path

RESULTS = "results.jsonl"


def log_folder(options: Namespace) -> Path:
    """Where the logs of a run are."""
    return options.dump_dir / "logs" / options.name


def is_log(name: str) -> bool:
    """Whether a file of this name grows while a run goes on: the results and TensorBoard's events."""
    return name == RESULTS or "tfevents" in name


def log_files(folder: Path) -> list[Path]:
    """The files of a log folder that grow while a run goes on.

    Raises:
        OSError: one of them is a link, or no regular file: the run would cut and write what is not in the folder.
    """
    paths = [path for path in sorted(folder.glob("*")) if is_log(path.name) and not stat.S_ISDIR(path.lstat().st_mode)]
    for path in paths:
        if not stat.S_ISREG(path.lstat().st_mode):
            raise OSError(errno.EINVAL, "it is a link, or no regular file; move it away", str(path))
    return paths


def rewind(folder: Path, lengths: dict[str, int]) -> None:
    """Cuts the log files to the lengths that a checkpoint knows, and removes the files that are newer."""
    for path in log_files(folder):
        if path.name not in lengths:
            path.unlink()
        elif path.stat().st_size > lengths[path.name]:
            os.truncate(path, lengths[path.name])
    for name, length in lengths.items():
        path = folder / name
        there = path.stat().st_size if path.exists() else 0
        if there < length:
            print(f"{path} has lost its end ({there} of {length} bytes are left); going on after it.", flush=True)
