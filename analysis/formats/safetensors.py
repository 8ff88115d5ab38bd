"""The format safetensors: small and exact. See :mod:`analysis.formats`."""

import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import measuring
from analysis.formats.description import (
    arrays_of,
    check_digest,
    check_layers,
    complete,
    describe,
    described,
    digest,
    parse,
)
from analysis.packages import imported
from analysis.snapshot import Snapshot
from training.files import checks

HEADER_LIMIT = 1 << 20  # bytes; the CIFAR-10 network's has 8000
DTYPES = {torch.float32: "F32", torch.int64: "I64"}  # of a network's tensors


def _gaps(connected: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """How far it is to each connection, in bytes; see the layout ``gaps``."""
    gap = np.diff(np.flatnonzero(connected), prepend=-1) - 1
    gaps = np.full(len(gap) + int((gap // 255).sum()), 255, dtype=np.uint8)
    gaps[np.cumsum(gap // 255 + 1) - 1] = gap % 255
    return gaps


def _positions(gaps: NDArray[np.uint8]) -> NDArray[np.int64]:
    """The flat positions of the connections; undoes :func:`_gaps`."""
    ends = gaps < 255
    positions = np.cumsum(gaps + ends, dtype=np.int64)[ends]  # gaps + ends is 255 at most
    positions -= 1
    return positions


def _pack(weight: NDArray[np.float32]) -> tuple[str, dict[str, NDArray]]:
    """The smallest layout of a weight: its name, and its arrays by the suffix of their names."""
    connected = measuring.connected(torch.from_numpy(weight)).numpy().ravel()
    values = weight.ravel()[connected]
    layouts = {
        "dense": {"": weight},
        "bitmap": {".values": values, ".bitmap": np.packbits(connected)},
        "gaps": {".values": values, ".gaps": _gaps(connected)},
    }
    name = min(layouts, key=lambda name: sum(array.nbytes for array in layouts[name].values()))
    return name, layouts[name]


def _unpack(layout: str, get: Callable[[str], NDArray], shape: tuple[int, ...]) -> NDArray[np.float32]:
    """A weight from its layout; ``get`` gives its arrays, of the right types, by the suffix of their names."""
    if layout == "dense":
        return get("").reshape(shape)
    size, values = math.prod(shape), get(".values")
    weight = np.zeros(size, dtype=np.float32)
    if layout == "bitmap":
        connected = np.unpackbits(get(".bitmap"), count=size).view(bool)
        count = np.count_nonzero(connected)
    else:
        connected = _positions(get(".gaps"))
        count = len(connected)
        if count and connected[-1] >= size:
            raise ValueError(f"a connection at {connected[-1]} of {size} weights")
    if len(values) != count or not values.all():
        raise ValueError(f"{np.count_nonzero(values)} values other than 0 for {count} connections")
    weight[connected] = values
    return weight.reshape(shape)


def write_safetensors(snapshot: Snapshot) -> bytes:
    save = imported("safetensors.numpy", "this format").save
    weights, arrays = arrays_of(snapshot)
    layers = {}
    for name, weight in weights.items():
        layout, packed = _pack(weight)
        layers[name] = {"shape": list(weight.shape), "layout": layout}
        arrays |= {name + suffix: array for suffix, array in packed.items()}
    text = describe(snapshot, layers)
    return save(arrays, metadata={"network": text, "sha256": digest(text, arrays)})


def read_safetensors(path: Path) -> Snapshot:
    safe_open = imported("safetensors", "this format").safe_open
    header = _header(path)
    metadata = header.pop("__metadata__", None)
    if type(metadata) is not dict or "network" not in metadata or metadata.keys() - {"network", "sha256"}:
        raise ValueError("its metadata are not network and sha256")
    text = metadata["network"]
    snapshot, layers = described(path, text, metadata.get("sha256"))
    tensors = snapshot.plan().state_dict()
    shapes = snapshot.shapes()
    layouts = {name: _layout(layers, name) for name in shapes}
    check_layers(layers, {name: {"shape": list(shape), "layout": layouts[name]} for name, shape in shapes.items()})
    others = {name: (DTYPES[t.dtype], list(t.shape)) for name, t in tensors.items() if name not in shapes}
    expected = others | _packed(shapes, layouts)
    _check_header(header, expected)
    with safe_open(path, framework="numpy") as file:
        stored = {name: file.get_tensor(name) for name in expected}
    check_digest(text, stored, metadata.get("sha256"))
    arrays = {name: stored[name] for name in others}
    for name, shape in shapes.items():
        arrays[name] = _unpack(layouts[name], lambda suffix, name=name: stored.pop(name + suffix), shape)
    return complete(snapshot, arrays)


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


def _layout(layers: Any, name: str) -> str:
    layout = layers[name]["layout"]
    if layout not in ("dense", "bitmap", "gaps"):
        raise ValueError(f"layout {str(layout)[:100]!r} is not one of dense, bitmap, gaps")
    return layout


def _packed(shapes: dict[str, tuple[int, ...]], layouts: dict[str, str]) -> dict[str, tuple[str, list[int | None]]]:
    """The arrays of the weights' layouts: dtype and shape, in which None is any length."""
    packed: dict[str, tuple[str, list[int | None]]] = {}
    for name, shape in shapes.items():
        if layouts[name] == "dense":
            packed[name] = "F32", list(shape)
        else:
            length = -(-math.prod(shape) // 8) if layouts[name] == "bitmap" else None
            packed |= {f"{name}.values": ("F32", [None]), f"{name}.{layouts[name]}": ("U8", [length])}
    return packed


def _check_header(header: dict[str, Any], expected: dict[str, tuple[str, list[int | None]]]) -> None:
    checks.keys("it", header, expected)
    for name, (dtype, shape) in expected.items():
        there = header[name]["dtype"], header[name]["shape"]
        free = [wanted if wanted is not None else size for wanted, size in zip(shape, there[1], strict=False)]
        if there != (dtype, free) or len(free) != len(shape):
            raise ValueError(f"{name} is {there[0]} {there[1]}, not {dtype} {shape}"[:300].replace("None", "n"))
