"""The log folder of a run: run.json, and the log files, which are results.jsonl and TensorBoard's events."""

import errno
import os
import stat
from argparse import Namespace
from pathlib import Path
from typing import Any

from training.files import json_files

RESULTS, INFO = "results.jsonl", "run.json"


def log_folder(options: Namespace) -> Path:
    return options.dump_dir / "logs" / options.name


def info(folder: Path) -> dict[str, Any]:
    """The content of a log folder's ``run.json``; empty if the file is missing or damaged."""
    try:
        return json_files.read_object(folder / INFO) or {}
    except ValueError:
        return {}


def is_log(name: str) -> bool:
    return name == RESULTS or "tfevents" in name


def log_files(folder: Path) -> list[Path]:
    """The log files in a folder.

    Raises:
        OSError: one of them is a link or not a regular file; the run would change a file outside the folder.
    """
    paths = [path for path in sorted(folder.glob("*")) if is_log(path.name) and not stat.S_ISDIR(path.lstat().st_mode)]
    for path in paths:
        if not stat.S_ISREG(path.lstat().st_mode):
            raise OSError(errno.EINVAL, "it is a link or not a regular file; move it away", str(path))
    return paths


def rewind(folder: Path, lengths: dict[str, int]) -> None:
    """Truncates the log files to the lengths in a checkpoint, and removes those that it does not list."""
    for path in log_files(folder):
        if path.name not in lengths:
            path.unlink()
        elif path.stat().st_size > lengths[path.name]:
            os.truncate(path, lengths[path.name])
    for name, length in lengths.items():
        path = folder / name
        found = path.stat().st_size if path.exists() else 0
        if found < length:
            print(f"{path} has lost its end: {found} of {length} bytes are left. Appending to them.", flush=True)
            if name == RESULTS and found:
                _end_line(path)


def _end_line(path: Path) -> None:
    """Ends the last line, of which a part may be lost: what follows has its own."""
    with open(path, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b"\n":
            file.write(b"\n")
