"""The formats npz, csr and safetensors: every weight in a layout, the other tensors beside or folded.

csr folds BatchNorm to y = scale * x + shift after its convolution. See docs/exporting.md.
"""

import io
import json
import math
import struct
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib import format as npy
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F

from analysis.formats import description, layouts
from analysis.formats.layouts import Stored
from analysis.packages import imported
from analysis.snapshot import Snapshot
from training.errors import Refusal
from training.files import archives, checks

BATCH_NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
TEXTS = {"network": description.LENGTH, "sha256": 64}  # with their lengths
NPY_HEADER = 1024  # bytes; an array's header has 128
SAFETENSORS_HEADER = 1 << 20  # bytes; the CIFAR-10 network's has 8000


def pack(snapshot: Snapshot, choose: Callable[[NDArray], str]) -> tuple[dict[str, str], dict[str, NDArray]]:
    """The description and the digest, by name, and the arrays. ``choose`` names the layout of a weight."""
    arrays = {name: tensor.contiguous().numpy() for name, tensor in snapshot.state.items()}
    weights = {name: arrays.pop(name) for name in snapshot.shapes()}
    chosen = {name: choose(weight) for name, weight in weights.items()}
    if "csr" in chosen.values():
        arrays = _folded(snapshot.network(), arrays)
    for name, weight in weights.items():
        arrays |= {name + part: array for part, array in layouts.pack(chosen[name], weight).items()}
    layers = {name: _layer(weight.shape, chosen[name]) for name, weight in weights.items()}
    text = description.describe(snapshot, layers)
    return {"network": text, "sha256": description.digest(text, arrays)}, arrays


def read(path: Path, texts: Mapping[str, str], names: Iterable[str], get: Callable[[str, int], NDArray]) -> Snapshot:
    """Reads an export. Nothing is expanded before the names and sizes are known to be those of the network.

    Args:
        path: of the file.
        texts: the description and, if there is one, the digest, by name.
        names: of the arrays.
        get: reads an array by its name and the most bytes that it may have.
    """
    text, sha256 = texts["network"], texts.get("sha256")
    snapshot, layers = description.described(path, text, sha256)
    network, shapes = snapshot.plan(), snapshot.shapes()
    chosen = {name: layers[name].get("layout", "csr") for name in shapes}
    description.check_same("layers", layers, {name: _layer(shape, chosen[name]) for name, shape in shapes.items()})
    others = {
        name: Stored(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        for name, tensor in network.state_dict().items()
        if name not in shapes
    }
    folded = "csr" in chosen.values()
    if folded:
        norms = {name: Stored("float32", (norm.num_features,)) for name, _, norm in _norms(network)}
        others = {f"{name}/{key}": stored for name, stored in norms.items() for key in ("scale", "shift")}
    parts = {name: layouts.parts(chosen[name], shape) for name, shape in shapes.items()}
    wanted = others | {name + part: stored for name in parts for part, stored in parts[name].items()}
    checks.keys("it", names, wanted)
    found = {name: stored.check(name, get(name, stored.nbytes)) for name, stored in wanted.items()}
    description.check_digest(text, found, sha256)
    arrays = {name: found.pop(name).copy() for name in others}  # those of an archive are read-only
    if folded:
        arrays = _unfolded(network, arrays)
    for name, shape in shapes.items():
        try:
            arrays[name] = layouts.unpack(chosen[name], {part: found.pop(name + part) for part in parts[name]}, shape)
        except ValueError as error:
            raise ValueError(f"{name} {error}") from None
    return description.complete(snapshot, arrays)


def as_folded(snapshot: Snapshot) -> Snapshot:
    """The snapshot as csr holds it: with BatchNorms that compute scale * x + shift.

    On the CPU its spikes are the same, to the bit; a GPU rounds the two forms of BatchNorm differently.
    """
    network = snapshot.network()
    norms = _unfolded(network, _folded(network, {}))
    return replace(snapshot, state=snapshot.state | {name: torch.from_numpy(array) for name, array in norms.items()})


def _layer(shape: Iterable[int], layout: str) -> dict[str, Any]:
    return {"shape": list(shape)} | ({} if layout == "csr" else {"layout": layout})


# -- BatchNorm folded ------------------------------------------------------------------------------


def _norms(network: nn.Module) -> Iterator[tuple[str, str, nn.BatchNorm2d]]:
    """For each convolution that BatchNorm follows: its weight's name, the BatchNorm's name and module."""
    for name, sequence in network.named_modules():
        if isinstance(sequence, nn.Sequential):
            for (first, convolution), (second, norm) in pairwise(sequence.named_children()):
                if isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                    yield f"{name}.{first}.weight", f"{name}.{second}", norm


def _folded(network: nn.Module, others: Mapping[str, NDArray]) -> dict[str, NDArray]:
    """The scales and shifts, rounded as torch's own kernel rounds them."""
    folded, left = {}, set(others)
    for name, norm_name, norm in _norms(network):
        weight, zeros = norm.weight, torch.zeros_like(norm.weight)
        scale = F.batch_norm(zeros[None] + 1, zeros, norm.running_var, weight, zeros, eps=norm.eps)
        shift = F.batch_norm(zeros[None], norm.running_mean, norm.running_var, weight, norm.bias, eps=norm.eps)
        folded |= {f"{name}/scale": scale[0].numpy(), f"{name}/shift": shift[0].numpy()}
        left -= {f"{norm_name}.{key}" for key in BATCH_NORM}
    for name in left:
        raise Refusal(f"argument --format: csr has no place for {name}; npz has")
    return folded


def _unfolded(network: nn.Module, folded: Mapping[str, NDArray]) -> dict[str, NDArray]:
    """The tensors of BatchNorms that compute scale * x + shift, to the bit: mean 0, variance and eps add up to 1."""
    tensors = {}
    for name, norm_name, norm in _norms(network):
        scale, shift = (torch.from_numpy(folded[f"{name}/{key}"]) for key in ("scale", "shift"))
        steps = torch.zeros((), dtype=torch.int64, device="cpu")
        values = (scale, shift, torch.zeros_like(scale), torch.full_like(scale, 1 - norm.eps), steps)
        tensors |= {f"{norm_name}.{key}": value.numpy() for key, value in zip(BATCH_NORM, values, strict=True)}
    return tensors


# -- npz and csr ------------------------------------------------------------------------------------


def write_npz(layout: str, snapshot: Snapshot) -> bytes:
    texts, arrays = pack(snapshot, lambda weight: layout)
    file = io.BytesIO()
    np.savez_compressed(file, **{name: np.array(text) for name, text in texts.items()}, **arrays)
    return file.getvalue()


def read_npz(path: Path) -> Snapshot:
    """Reads npz and csr."""
    with open(path, "rb") as file, archives.opened(file, expanded=description.largest(path)) as archive:
        if others := [name for name in archive.namelist() if not name.endswith(".npy")]:
            raise ValueError(f"it has the unknown {checks.short(others[0])}")
        names = {name.removesuffix(".npy") for name in archive.namelist()}
        texts = {name: _text(archive, name, length) for name, length in TEXTS.items() if name in names}
        return read(path, texts, names - TEXTS.keys(), partial(_array, archive))


def _text(archive: zipfile.ZipFile, name: str, length: int) -> str:
    array = _array(archive, name, 4 * length)
    if array.shape != () or array.dtype.kind != "U":
        raise ValueError(f"{name} is {array.dtype} {list(array.shape)}, not a text")
    return str(array)


def _array(archive: zipfile.ZipFile, name: str, size: int) -> NDArray:
    """An array of at most ``size`` bytes, read-only. Its header has to declare them rightly."""
    info = archive.getinfo(f"{name}.npy")
    if info.file_size > size + NPY_HEADER:
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


# -- safetensors ------------------------------------------------------------------------------------


def _smaller(weight: NDArray) -> str:
    """The layout that takes the fewest bytes, of those that hold every value."""
    possible = ["dense", "bitmap", *(["half"] if layouts.fits_half(weight) else [])]
    sizes = {key: sum(a.nbytes for a in layouts.pack(key, weight).values()) for key in possible}
    return min(sizes, key=sizes.get)


def write_safetensors(snapshot: Snapshot) -> bytes:
    save = imported("safetensors.numpy", "the format safetensors").save
    texts, arrays = pack(snapshot, _smaller)
    content = save(arrays, metadata=texts)
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"] = texts  # in this order: the package writes them in any, and so other bytes every time
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8 bytes
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


def read_safetensors(path: Path) -> Snapshot:
    safe_open = imported("safetensors", str(path)).safe_open
    header = _header(path)
    texts = header.pop("__metadata__", None)
    if type(texts) is not dict or "network" not in texts or texts.keys() - {"network", "sha256"}:
        raise ValueError("its metadata are not network and sha256")
    with safe_open(path, framework="numpy") as file:
        return read(path, texts, header, lambda name, size: file.get_tensor(name))


def _header(path: Path) -> dict[str, Any]:
    """The JSON at the beginning of the file, once its length is bounded."""
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > SAFETENSORS_HEADER:
            raise ValueError(f"its header has {length} bytes, more than {SAFETENSORS_HEADER}")
        header = description.parse(file.read(length).decode())
    if type(header) is not dict:
        raise ValueError("its header is not a JSON object")
    return header
