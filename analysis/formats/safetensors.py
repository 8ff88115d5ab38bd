"""The format safetensors. See :mod:`analysis.formats`."""

import struct
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from analysis.formats import layouts, packed
from analysis.formats.description import parse
from analysis.formats.layouts import Stored
from analysis.packages import imported
from analysis.snapshot import Snapshot

HEADER_LIMIT = 1 << 20  # bytes; the CIFAR-10 network's has 8000
DTYPES = {"F32": "float32", "I64": "int64", "U8": "uint8"}


def _smaller(weight: NDArray) -> str:
    """The layout that takes fewer bytes."""
    sizes = {key: sum(a.nbytes for a in layouts.pack(key, weight).values()) for key in ("dense", "bitmap")}
    return min(sizes, key=sizes.get)


def write_safetensors(snapshot: Snapshot) -> bytes:
    save = imported("safetensors.numpy", "this format").save
    texts, arrays = packed.pack(snapshot, _smaller)
    return save(arrays, metadata=texts)


def read_safetensors(path: Path) -> Snapshot:
    safe_open = imported("safetensors", "this format").safe_open
    header = _header(path)
    texts = header.pop("__metadata__", None)
    if type(texts) is not dict or "network" not in texts or texts.keys() - {"network", "sha256"}:
        raise ValueError("its metadata are not network and sha256")
    with safe_open(path, framework="numpy") as file:

        def get(name: str, wanted: Stored) -> NDArray:
            dtype = header[name]["dtype"]
            wanted.check(name, DTYPES.get(dtype, dtype), tuple(header[name]["shape"]))
            return file.get_tensor(name)

        return packed.read(path, texts, header, get)


def _header(path: Path) -> dict[str, Any]:
    """The JSON at the beginning of the file, once its length is bounded."""
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > HEADER_LIMIT:
            raise ValueError(f"its header has {length} bytes, more than {HEADER_LIMIT}")
        header = parse(file.read(length).decode())
    if type(header) is not dict:
        raise ValueError("its header is not a JSON object")
    return header
