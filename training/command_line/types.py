"""The types of options: numbers, folders and files; and checks of the files that options name."""

import argparse
import contextlib
import math
import re
import tempfile
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path

from training import files
from training.errors import Refusal
from training.files import storage

LARGEST = 2**63 - 1  # the largest whole number in a tensor


def whole_number(least: int, most: int = LARGEST) -> Callable[[str], int]:
    """The type of an option that takes a whole number in [least, most]."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:  # not a number, or one of thousands of digits
            value = None
        if value is None or not least <= value <= most:
            from_least = f">= {least}" if value is None or value < least else "below 2^63"
            accepted = from_least if most == LARGEST else f"from {least} to {most}"
            raise argparse.ArgumentTypeError(f"must be a whole number {accepted}, not {shown(text)}")
        return value

    return parse


def number(accepted: str, condition: Callable[[float], bool], share: bool = False) -> Callable[[str], float]:
    """The type of an option that takes a finite number for which ``condition`` holds.

    ``accepted`` is the condition in words. The message recognises a decimal comma and, if the number is a ``share``,
    a percentage.
    """

    def parse(text: str) -> float:
        value = _float(text)
        if not math.isfinite(value) or not condition(value):
            percent = _float(text.strip().removesuffix("%"))
            hint = ""
            if share and 0 <= percent <= 100 and (percent > 1 or "%" in text):
                hint = f"; {percent:g} % is {percent / 100:.12g}"
            elif math.isfinite(value := _float(text.replace(",", "."))) and condition(value):
                hint = f"; did you mean {text.replace(',', '.')}?"
            raise argparse.ArgumentTypeError(f"must be a finite number {accepted}, not {shown(text)}{hint}")
        return value

    return parse


def format_number(value: float) -> str:
    """Formats a number for run names with the fewest digits: 0.001 is 1e-3, 0.00025 is 2.5e-4."""
    if value == 0:
        return "0"
    exponent = Decimal(repr(value)).adjusted()
    mantissa = Decimal(repr(value)).scaleb(-exponent).normalize()
    return f"{mantissa:f}e{exponent}"


def _float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def shown(text: str) -> str:
    """Quotes what was typed, and shortens it if it is long."""
    return repr(text if len(text) <= 40 else text[:40] + "…")


def _path_to(what: str) -> Callable[[str], Path]:
    def parse(text: str) -> Path:
        # surrogates stand for bytes that are not UTF-8; TensorBoard cannot write to such a path
        if not text.strip() or "\0" in text or re.search("[\ud800-\udfff]", text):
            raise argparse.ArgumentTypeError(f"must be the path of a {what}, in UTF-8, not {shown(text)}")
        try:
            return files.expanded(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parse


folder_path = _path_to("folder")  # the type of an option that takes a folder; it need not exist
file_path = _path_to("file")  # the type of an option that takes a file; it need not exist


@contextlib.contextmanager
def writing(option: str, path: Path) -> Iterator[None]:
    """Turns an OSError into a Refusal: the file or folder that an option names cannot be written."""
    try:
        yield
    except OSError as error:
        raise Refusal(f"argument {option}: cannot write {path}: {error.strerror or error}") from None


def check_writable(option: str, folder: Path) -> None:
    """Creates the folder that an option names; raises Refusal unless a file can be written in it."""
    with writing(option, folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass


@contextlib.contextmanager
def output_file(option: str, path: Path, parents: bool = False) -> Iterator[Path]:
    """:func:`training.files.replacing` for the file that an option names.

    Raises:
        Refusal: the file cannot be written, or is a checkpoint. This is known at the start, before anything is
            computed.
    """
    with contextlib.ExitStack() as stack:
        with writing(option, path):
            if storage.is_stored(path):
                raise Refusal(f"argument {option}: {path} is the checkpoint of a run")
            temporary = stack.enter_context(files.replacing(path, parents=parents))
        yield temporary


class _Unchanged(Exception):
    """Leaves :func:`output_file` without a new file."""


def check_output(option: str, path: Path, parents: bool = False) -> None:
    """Raises Refusal unless the file that an option names can be written. Call it before a long computation."""
    with contextlib.suppress(_Unchanged), output_file(option, path, parents):
        raise _Unchanged
