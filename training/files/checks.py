"""What is accepted from a file: every reader asks here before it expands, allocates or uses anything.

A file may come from a stranger or from a failing disk, so its sizes, types and values are all checked: first what an
archive declares to hold (:mod:`training.files.archives`), then the fields, then the tensors. Every function raises
ValueError with one line that names what is wrong and says what is accepted; the caller names the file.
"""

import math
import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

T_LIMIT = 4096  # time steps; results need tens of them, and memory grows with them
WIDTH_LIMIT = 2**14  # of a network's layers; the weights of the wider one would take 500 GB

# -- fields ----------------------------------------------------------------------------------------


def keys(name: str, found: Iterable, expected: Iterable) -> None:
    """Raises ValueError unless ``found`` are the ``expected`` keys, no fewer and no more."""
    found, expected = set(found), set(expected)
    for what, others in (("lacks", expected - found), ("has the unknown", found - expected)):
        if others:
            raise ValueError(f"{name} {what} {short(', '.join(sorted(map(str, others))))}")


def whole_number(name: str, value: Any, low: int = 0, high: int = 2**62) -> int:
    """``value``, if it is an int (no bool, no float) with low <= value <= high; raises ValueError otherwise."""
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"{name} is {short(repr(value))}, not a whole number from {low} to {high}")
    return value


def number(name: str, value: Any, low: float = -math.inf, high: float = math.inf) -> float:
    """``value``, if it is a finite float or int with low <= value <= high; raises ValueError otherwise."""
    if type(value) not in (int, float) or not math.isfinite(value) or not low <= value <= high:
        raise ValueError(f"{name} is {short(repr(value))}, not a finite number from {low} to {high}")
    return value


def text(name: str, value: Any, length: int = 1000) -> str:
    """``value``, if it is a str of at most ``length`` characters on one line; raises ValueError otherwise."""
    if type(value) is not str or len(value) > length or not value.isprintable():
        raise ValueError(f"{name} is {short(repr(value))}, not a text of one line of up to {length} characters")
    return value


def short(text: str, length: int = 100) -> str:
    """The beginning of a text from a file, on one line, without control characters."""
    text = "".join(c if c.isprintable() else "?" for c in text[: length + 1])
    return text if len(text) <= length else text[: length - 3] + "..."


def reason(error: BaseException) -> str:
    """Why something failed, in one line that is never empty."""
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    text = f"no {error}" if isinstance(error, KeyError) else str(error)
    return short((text or type(error).__name__).splitlines()[0], 300)


def is_about_content(error: BaseException) -> bool:
    """Whether a reader failed by what it read, not by an error of the operating system or for lack of memory."""
    of_system = isinstance(error, OSError) and error.errno
    return not (of_system or isinstance(error, MemoryError) or "allocate memory" in str(error))


def types(value: Any) -> tuple[type, ...]:
    """The type of a value and, if it is a list or tuple, those of its items: 1, 1.0 and True are equal, but differ."""
    return (type(value), *map(type, value)) if isinstance(value, list | tuple) else (type(value),)


# -- tensors ---------------------------------------------------------------------------------------


def tensor(name: str, value: Any, shape: Iterable[int] | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """``value``, if it is a plain tensor with memory of its own.

    Plain: of class Tensor or Parameter and no subclass, dense, on the CPU, contiguous, not quantised, and no view of
    another tensor. Its storage holds its elements and nothing else. Floating-point elements are finite. A ``shape`` or
    ``dtype`` of None accepts any.

    Raises:
        ValueError: it is not; the message says how it differs.
    """
    if type(value) not in (Tensor, nn.Parameter):
        raise ValueError(f"{name} is of type {type(value).__name__}, not a tensor")
    if value.layout is not torch.strided or value.is_quantized or value.device.type != "cpu":
        raise ValueError(f"{name} is {value.layout}, {value.dtype}, on {value.device}, not a dense tensor on the CPU")
    there = _described(value.dtype, value.shape)
    wanted = _described(value.dtype if dtype is None else dtype, value.shape if shape is None else shape)
    if there != wanted:
        raise ValueError(f"{name} is {there}, not {wanted}")
    size = value.untyped_storage().nbytes()
    if not value.is_contiguous() or value.is_conj() or value.is_neg() or size != value.nbytes:
        raise ValueError(
            f"{name} is a view with strides {list(value.stride())} of {size} bytes, not {value.nbytes} bytes in a row"
        )
    if value.is_floating_point() and value.numel() and not torch.stack(value.detach().aminmax()).isfinite().all():
        raise ValueError(f"{name} has values that are not finite")
    return value


def tensors(name: str, found: Mapping[str, Any], expected: Mapping[str, Tensor]) -> None:
    """Checks tensors by name, such as a network's state; the ``expected`` ones may be on the device meta.

    Raises:
        ValueError: a name is missing or unknown, two tensors share their memory, or :func:`tensor` refuses one.
    """
    keys(name, found, expected)
    owners: dict[int, str] = {}
    for key, wanted in expected.items():
        value = tensor(key, found[key], wanted.shape, wanted.dtype)
        owner = owners.setdefault(value.data_ptr(), key) if value.nbytes else key
        if owner != key:
            raise ValueError(f"{key} shares its memory with {owner}")


def _described(dtype: torch.dtype, shape: Iterable[int]) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"
