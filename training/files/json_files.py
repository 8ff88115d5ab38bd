"""JSON files: written whole, and read where they may be damaged or come from a stranger; their size is bounded."""

import json
import math
import stat
from pathlib import Path
from typing import Any

from training.files.checks import reason as reason
from training.files.writing import write_whole

LARGEST = 1 << 24  # bytes of a file or a line, many times what any run writes


def nested(entry: Any, *keys: str) -> dict[str, Any] | None:
    """The dictionary that ``keys`` lead to, None where there is none."""
    for key in keys:
        entry = entry.get(key) if isinstance(entry, dict) else None
    return entry if isinstance(entry, dict) else None


def number(entry: Any, *keys: str) -> float:
    """The finite number that ``keys`` lead to, NaN where there is none."""
    *path, key = keys
    value = (nested(entry, *path) or {}).get(key)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not abs(value) < 2**63:
        return math.nan
    return float(value)


def printable(text: str) -> str:
    """Replaces the characters that XML, a terminal or UTF-8 cannot show."""
    return "".join(c if c.isprintable() else "�" for c in text)


def shown(value: Any, most: int = 200) -> str:
    """A text or a number to display, cut to ``most`` characters; empty for anything else."""
    if not isinstance(value, (str, int, float)) or isinstance(value, bool):
        return ""
    text = printable(str(value))
    return text if len(text) <= most else text[: most - 1] + "…"


def read_file(path: Path, most: int = LARGEST) -> bytes:
    """Reads a regular file of at most ``most`` bytes.

    Raises:
        ValueError: it is not such a file.
        OSError: it cannot be read.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):  # reading a pipe would wait for ever
        raise ValueError("not a regular file")
    if status.st_size > most:
        raise ValueError(f"{status.st_size:,} bytes, more than {most:,}")
    return path.read_bytes()


def read_object(path: Path) -> dict[str, Any] | None:
    """Reads a JSON object from a file; None where there is no file.

    Raises:
        ValueError: it cannot be read or holds something else; the message is the reason.
    """
    try:
        return parse_object(read_file(path))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ValueError(reason(error)) from None


def parse_object(content: bytes) -> dict[str, Any]:
    """Parses a JSON object; ValueError, with the reason, for anything else."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        raise ValueError("damaged, not JSON") from None
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def write(path: Path, content: Any) -> None:
    """Writes a JSON file, whole or not at all."""
    write_whole(path, json.dumps(content, indent=2) + "\n")
