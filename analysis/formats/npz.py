"""The formats npz and csr, archives of NumPy's. See :mod:`analysis.formats`."""

import io
import math
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from analysis.formats import packed
from analysis.formats.description import LENGTH, largest
from analysis.formats.layouts import Stored
from analysis.snapshot import Snapshot
from training.files import archives, checks

TEXTS = {"network": LENGTH, "sha256": 64}  # with their lengths
HEADER = 1024  # bytes; an array's header has 128


def write(layout: str, snapshot: Snapshot) -> bytes:
    texts, arrays = packed.pack(snapshot, lambda weight: layout)
    file = io.BytesIO()
    np.savez_compressed(file, **{name: np.array(text) for name, text in texts.items()}, **arrays)
    return file.getvalue()


def read_npz(path: Path) -> Snapshot:
    """Reads npz and csr."""
    with open(path, "rb") as file, archives.opened(file, expanded=largest(path)) as archive:
        if others := [name for name in archive.namelist() if not name.endswith(".npy")]:
            raise ValueError(f"it has the unknown {checks.short(others[0])}")
        names = {name.removesuffix(".npy") for name in archive.namelist()}
        texts = {name: _text(archive, name, length) for name, length in TEXTS.items() if name in names}
        return packed.read(path, texts, names - TEXTS.keys(), partial(_get, archive))


def _text(archive: zipfile.ZipFile, name: str, length: int) -> str:
    array = _array(archive, name, 4 * length)
    if array.shape != () or array.dtype.kind != "U":
        raise ValueError(f"{name} is {array.dtype} {list(array.shape)}, not a text")
    return str(array)


def _get(archive: zipfile.ZipFile, name: str, wanted: Stored) -> NDArray:
    array = _array(archive, name, wanted.nbytes)
    wanted.check(name, array.dtype.name if array.dtype.isnative else array.dtype.str, array.shape)
    return array


def _array(archive: zipfile.ZipFile, name: str, size: int) -> NDArray:
    """An array of at most ``size`` bytes, read-only. Its header has to declare them rightly."""
    info = archive.getinfo(f"{name}.npy")
    if info.file_size > size + HEADER:
        raise ValueError(f"{name} has {info.file_size} bytes, more than {size}")
    with archive.open(info) as member:
        version = npy.read_magic(member)
        if version != (1, 0):
            raise ValueError(f"{name} is an array of version {version}, not (1, 0)")
        shape, fortran, dtype = npy.read_array_header_1_0(member)
        content = member.read()
    if dtype.hasobject or len(content) != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name} has {len(content)} bytes for {dtype} {list(shape)}")
    return np.frombuffer(content, dtype).reshape(shape, order="F" if fortran else "C")
