"""The format csr, an .npz for NumPy and SciPy. See :mod:`analysis.formats`."""

import io
import math
import zipfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from numpy.lib import format as npy
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

import measuring
from analysis.formats.description import (
    LENGTH,
    arrays_of,
    check_digest,
    check_layers,
    complete,
    describe,
    described,
    digest,
)
from analysis.snapshot import Snapshot, batch_norms
from training.errors import Refusal
from training.files import archives, checks

BATCH_NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
KEYS = ("data", "indices", "indptr", "shape")
EXPANDED = 1 << 29  # bytes of all members together; the dense CIFAR-10 network has 294 MB


def _affine(norm: dict[str, Tensor], eps: float) -> tuple[Tensor, Tensor]:
    """BatchNorm in eval mode as y = scale * x + shift, rounded as torch's own kernel rounds it."""
    zeros = torch.zeros_like(norm["weight"])
    mean, var, weight, bias = (norm[key] for key in ("running_mean", "running_var", "weight", "bias"))
    scale = F.batch_norm(zeros[None] + 1, zeros, var, weight, zeros, eps=eps)[0]
    return scale, F.batch_norm(zeros[None], mean, var, weight, bias, eps=eps)[0]


def _batch_norm(scale: Tensor, shift: Tensor, eps: float) -> dict[str, Tensor]:
    """A BatchNorm that computes scale * x + shift, to the bit: its mean is 0, its variance and eps add up to 1."""
    return {
        "weight": scale,
        "bias": shift,
        "running_mean": torch.zeros_like(scale),
        "running_var": torch.full_like(scale, 1 - eps),
        "num_batches_tracked": torch.zeros((), dtype=torch.int64, device="cpu"),
    }


def write_csr(snapshot: Snapshot) -> bytes:
    network = snapshot.network()
    norms = batch_norms(network)
    weights, others = arrays_of(snapshot)
    arrays: dict[str, NDArray] = {}
    for name, weight in weights.items():
        matrix = weight.reshape(len(weight), -1)
        connected = measuring.connected(torch.from_numpy(matrix)).numpy()
        rows, columns = np.nonzero(connected)
        arrays[f"{name}/data"] = matrix[rows, columns]
        arrays[f"{name}/indices"] = columns.astype(np.int32)
        arrays[f"{name}/indptr"] = np.append(0, np.cumsum(connected.sum(1))).astype(np.int32)
        arrays[f"{name}/shape"] = np.array(matrix.shape)
        norm = norms.get(name.removesuffix(".weight"))
        if norm:
            tensors = {key: snapshot.state[f"{norm}.{key}"] for key in BATCH_NORM}
            scale, shift = _affine(tensors, network.get_submodule(norm).eps)
            arrays |= {f"{name}/scale": scale.numpy(), f"{name}/shift": shift.numpy()}
    for name in others.keys() - {f"{norm}.{key}" for norm in norms.values() for key in BATCH_NORM}:
        raise Refusal(f"argument --format: csr has no place for {name}; safetensors has")
    text = describe(snapshot, {name: {"shape": list(weight.shape)} for name, weight in weights.items()})
    file = io.BytesIO()
    np.savez_compressed(file, network=np.array(text), sha256=np.array(digest(text, arrays)), **arrays)
    return file.getvalue()


def read_csr(path: Path) -> Snapshot:
    with open(path, "rb") as file, archives.opened(file, expanded=EXPANDED) as archive:
        names = archive.namelist()
        text = _text(archive, "network", LENGTH)
        sha256 = _text(archive, "sha256", 64) if "sha256.npy" in names else None
        snapshot, layers = described(path, text, sha256)
        shapes, network = snapshot.shapes(), snapshot.plan()
        check_layers(layers, {name: {"shape": list(shape)} for name, shape in shapes.items()})
        norms = {name: norm for name in shapes if (norm := batch_norms(network).get(name.removesuffix(".weight")))}
        members = [f"{name}/{key}" for name in shapes for key in KEYS + ("scale", "shift") * (name in norms)]
        members += ["network"] + ["sha256"] * (sha256 is not None)
        checks.keys("it", names, {f"{name}.npy" for name in members})
        stored: dict[str, NDArray] = {}
        for name, shape in shapes.items():
            rows, columns = shape[0], math.prod(shape[1:])
            for key, dtype, size in (
                ("data", np.float32, None),
                ("indices", np.int32, None),
                ("indptr", np.int32, rows + 1),
                ("shape", np.int64, 2),
                *((key, np.float32, rows) for key in ("scale", "shift") if name in norms),
            ):
                longest = rows * columns if size is None else size
                stored[f"{name}/{key}"] = _array(archive, f"{name}/{key}", dtype, longest, exactly=size is not None)
    check_digest(text, stored, sha256)
    arrays: dict[str, NDArray] = {}
    for name, shape in shapes.items():
        arrays[name] = _dense(name, [stored.pop(f"{name}/{key}") for key in KEYS], shape)
        if name in norms:
            scale, shift = (torch.from_numpy(stored[f"{name}/{key}"].copy()) for key in ("scale", "shift"))
            tensors = _batch_norm(scale, shift, network.get_submodule(norms[name]).eps)
            arrays |= {f"{norms[name]}.{key}": tensor.numpy() for key, tensor in tensors.items()}
    return complete(snapshot, arrays)


def _member(archive: zipfile.ZipFile, name: str, size: int) -> tuple[tuple[int, ...], np.dtype, bytes]:
    """The shape, dtype and bytes of an array, which its header, in ``size`` bytes at most, has to declare rightly."""
    info = archive.getinfo(f"{name}.npy")
    if info.file_size > size + 1024:  # a header has 128 bytes
        raise ValueError(f"{name} has {info.file_size} bytes, more than {size}")
    with archive.open(info) as member:
        version = npy.read_magic(member)
        if version != (1, 0):
            raise ValueError(f"{name} is an array of version {version}, not (1, 0)")
        shape, _, dtype = npy.read_array_header_1_0(member)
        content = member.read()
    if dtype.hasobject or len(content) != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name} has {len(content)} bytes for {dtype} {list(shape)}")
    return shape, dtype, content


def _text(archive: zipfile.ZipFile, name: str, length: int) -> str:
    shape, dtype, content = _member(archive, name, 4 * length)
    if shape != () or dtype.kind != "U":
        raise ValueError(f"{name} is {dtype} {list(shape)}, not a text")
    return str(np.frombuffer(content, dtype)[0])


def _array(archive: zipfile.ZipFile, name: str, dtype: type, longest: int, exactly: bool) -> NDArray:
    """An array of one axis; read-only."""
    wanted = np.dtype(dtype).newbyteorder("<")
    shape, there, content = _member(archive, name, longest * wanted.itemsize)
    if there != wanted or len(shape) != 1 or (exactly and shape != (longest,)):
        size = longest if exactly else f"up to {longest}"
        raise ValueError(f"{name} is {there} {list(shape)}, not {wanted} [{size}]")
    return np.frombuffer(content, wanted)


def _dense(name: str, arrays: list[NDArray], shape: tuple[int, ...]) -> NDArray[np.float32]:
    """A weight from its CSR matrix, in which every row's indices increase."""
    data, indices, indptr, declared = arrays
    rows, columns = shape[0], math.prod(shape[1:])
    if declared.tolist() != [rows, columns]:
        raise ValueError(f"{name} has the shape {declared.tolist()}, not {[rows, columns]}")
    ascending = (indptr[1:] >= indptr[:-1]).all()  # differences could wrap
    if not ascending or indptr[0] != 0 or indptr[-1] != len(indices) or len(data) != len(indices):
        raise ValueError(f"{name} has inconsistent CSR arrays")
    if ((indices < 0) | (indices >= columns)).any():
        raise ValueError(f"{name} has indices outside its {columns} columns")
    if not data.all():
        raise ValueError(f"{name} has connections with the weight 0")
    increases = np.append(True, indices[1:] > indices[:-1])
    increases[indptr[:-1][indptr[:-1] < len(indices)]] = True  # the first of a row
    if not increases.all():
        raise ValueError(f"{name} has a row with a repeated index, or indices out of order")
    weight = np.zeros((rows, columns), dtype=np.float32)
    for row, (start, end) in zip(weight, pairwise(indptr.tolist()), strict=True):
        row[indices[start:end]] = data[start:end]
    return weight.reshape(shape)
