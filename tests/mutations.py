"""Exports and checkpoints, whole and damaged in every way that tests/fuzz.py tries."""

import contextlib
import functools
import hashlib
import io
import json
import random
import struct
import tempfile
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from export_helpers import OLD_EXPORTS, about, old_network, snapshot_of

import measuring
from analysis import formats
from analysis.experiments import EXPERIMENTS
from analysis.formats import nir
from analysis.formats.description import digest
from spiking import SpikingNetwork
from training.files import storage

# -- files to begin with ---------------------------------------------------------------------------


@torch.no_grad()
def a_network(experiment: str) -> SpikingNetwork:
    """A pruned network, with connections of every layout; that of CIFAR-10 has 4 channels."""
    generator = torch.Generator().manual_seed(1)
    network = EXPERIMENTS[experiment].network(T=3, width={"mnist": 800, "c10": 4}[experiment])
    for number, weight in enumerate(measuring.prunable(network).values()):
        weight.copy_(torch.randn(weight.shape, generator=generator))
        weight.masked_fill_(torch.rand(weight.shape, generator=generator) >= (0.01, 0.5, 1)[number % 3], 0)
    return network.eval()


@functools.cache
def contents(form: str) -> list[tuple[SpikingNetwork, bytes]]:
    """Networks, the second one narrow, and whole files of them."""
    if form == "gaps":
        return [(old_network(), OLD_EXPORTS["safetensors"].read_bytes())]
    found = []
    for experiment in ("mnist",) if form == "nir" else ("mnist", "c10"):
        network = a_network(experiment)
        if form == "checkpoint":
            state = {"format": 2, "arguments": about(network), "epoch": 3, "network": network.state_dict()}
            found.append((network, signed(state)))
        else:
            found.append((network, formats.WRITERS[form](snapshot_of(network))))
    return found


def signed(state: Any) -> bytes:
    """A checkpoint of a state."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint.pt"
        storage.write(path, state)
        return path.read_bytes()


# -- blind mutations -------------------------------------------------------------------------------

LENGTHS = (0, 1, 2, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**32 - 1, 2**40, 2**63, 2**64 - 1)


def place(rng: random.Random, size: int) -> int:
    """A position, often near one of the ends, where the structure of most files is."""
    reach = rng.choice((64, 1024, size))
    return max(0, min(size - 1, rng.choice((rng.randrange(reach), size - 1 - rng.randrange(reach)))))


def flip(rng: random.Random, content: bytearray) -> None:
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        content[place(rng, len(content))] ^= rng.choice((1 << rng.randrange(8), rng.randrange(1, 256)))


def truncate(rng: random.Random, content: bytearray) -> None:
    del content[place(rng, len(content)) :]


def insert(rng: random.Random, content: bytearray) -> None:
    position = place(rng, len(content))
    content[position:position] = rng.choice((rng.randbytes, bytes))(rng.choice((1, 8, 100)))


def remove(rng: random.Random, content: bytearray) -> None:
    position = place(rng, len(content))
    del content[position : position + rng.choice((1, 8, 100))]


def zero(rng: random.Random, content: bytearray) -> None:
    position = place(rng, len(content))
    length = len(content[position : position + rng.choice((4, 64, 4096))])
    content[position : position + length] = rng.choice((b"\0", b"\xff")) * length


def copy(rng: random.Random, content: bytearray) -> None:
    position, length = place(rng, len(content)), rng.choice((8, 64, 1024))
    block = content[position : position + length]
    position = place(rng, len(content))
    content[position : position + len(block)] = block


def length_field(rng: random.Random, content: bytearray) -> None:
    form, position = rng.choice(("<H", "<I", "<Q", ">I")), place(rng, len(content) - 8)
    struct.pack_into(form, content, position, rng.choice(LENGTHS) % 256 ** struct.calcsize(form))


BLIND = (flip, flip, flip, truncate, insert, remove, zero, copy, length_field, length_field)

# -- mutations that know the format ------------------------------------------------------------------

ODD = (None, True, False, 0, -1, 1, 2, 0.5, 1e308, 10**9, 2**63, 2**70, "", "8", "mnist", "x" * 3000, "a\nb", [], {})
ODD = (*ODD, [[]] * 100, [1, 2], {"a": 1}, float("nan"), float("inf"))


def edit(rng: random.Random, value: Any, odd: tuple[Any, ...]) -> Any:
    """Changes one place in nested dictionaries and lists; the containers themselves are changed."""
    if isinstance(value, dict | list) and value and rng.random() < 0.85:
        key = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
        if rng.random() < 0.1:
            del value[key]
        elif isinstance(value, dict) and rng.random() < 0.1:
            value[rng.choice(("extra", key + "2" if isinstance(key, str) else 7))] = rng.choice(odd)
        else:
            value[key] = edit(rng, value[key], odd)
        return value
    return rng.choice(odd)


def edited_text(rng: random.Random, text: str) -> str:
    """A description with something changed, or said twice."""
    if rng.random() < 0.15:
        return text[:-1] + rng.choice((', "T": 4}', ', "version": 1}', "," * 9 + "}", "[" * 5000 + "}"))
    return json.dumps(edit(rng, json.loads(text), ODD))


def odd_array(rng: random.Random, array: np.ndarray) -> np.ndarray:
    """An array that is not, or not quite, what it should be."""
    number = array.dtype.kind in "fiu"
    flat = array.reshape(-1).copy()
    position = rng.randrange(len(flat)) if len(flat) else None
    if number and position is not None and rng.random() < 0.6:
        values = [0, 1, flat[position - 1], flat.max()]
        values += [np.nan, np.inf, -1e38, 1e-44] if array.dtype.kind == "f" else [np.iinfo(array.dtype).max]
        flat[position] = rng.choice(values)
        return flat.reshape(array.shape)
    return rng.choice(
        (
            lambda: flat[:-1],
            lambda: np.concatenate([flat, flat[:1]]),
            lambda: array[..., None],
            lambda: flat[::-1].copy(),
            lambda: flat[:0],
            lambda: np.zeros(1 << 24, array.dtype if number else np.uint8),
            lambda: flat.astype(np.float64) if number else flat,
            lambda: flat.astype(np.uint8) if number else flat,
            lambda: np.zeros_like(flat) if number else flat,
        )
    )()


def edited(rng: random.Random, text: str, arrays: dict[str, np.ndarray]) -> tuple[str, str, dict[str, np.ndarray]]:
    """A description, its digest and its arrays, of which one was changed; the digest fits."""
    if rng.random() < 0.4:
        text = edited_text(rng, text)
    else:
        name, other = rng.choice(list(arrays)), rng.choice(list(arrays))
        change = rng.choice(("odd", "odd", "odd", "odd", "drop", "add", "swap"))
        arrays = dict(arrays)
        if change == "odd":
            arrays[name] = odd_array(rng, arrays[name])
        elif change == "drop":
            del arrays[name]
        elif change == "add":
            arrays[rng.choice((name + "x", "x", name + ".gaps"))] = arrays[name]
        else:
            arrays[name], arrays[other] = arrays[other], arrays[name]
    return text, digest(text, arrays), arrays


def sign_safetensors(rng: random.Random, content: bytes) -> bytes:
    from safetensors.numpy import load, save

    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    if rng.random() < 0.4:  # a header that may not fit its body
        if rng.random() < 0.3:
            names = {f"{number:06x}": header["__metadata__"] for number in range(rng.choice((10, 20_000)))}
            header |= {name: {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for name in names}
        else:
            edit(rng, header, ODD)
        text = json.dumps(header).encode()
        if rng.random() < 0.2:
            text = text[:-1] + b", " + text[1:]
        return len(text).to_bytes(8, "little") + text + content[8 + length :]
    text, sha256, arrays = edited(rng, header["__metadata__"]["network"], load(content))
    return save(arrays, metadata={"network": text, "sha256": sha256})


def sign_npz(rng: random.Random, content: bytes) -> bytes:
    with np.load(io.BytesIO(content)) as file:
        arrays = dict(file)
    text, _ = str(arrays.pop("network")), arrays.pop("sha256")
    text, sha256, arrays = edited(rng, text, arrays)
    file = io.BytesIO()
    np.savez_compressed(file, network=np.array(text), sha256=np.array(sha256), **arrays)
    if rng.random() < 0.4:
        return rezipped(rng, file.getvalue(), zipfile.ZIP_DEFLATED)
    return file.getvalue()


def rezipped(rng: random.Random, content: bytes, compression: int) -> bytes:
    """A zip archive with other members; their lengths and CRCs fit."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    number = rng.randrange(len(members))
    name, member = members[number]
    change = rng.choice(("blind", "blind", "blind", "twice", "case", "many", "bomb", "drop", "compress"))
    if change == "blind":
        changed = bytearray(member or b"\0" * 16)
        rng.choice(BLIND)(rng, changed if len(changed) > 16 else changed.ljust(16, b"\0"))
        members[number] = name, bytes(changed)
    elif change in ("twice", "case"):
        members.append((name if change == "twice" else name.upper(), rng.choice(members)[1]))
    elif change == "many":
        members += [(f"{name}{n}", b"") for n in range(20_000)]
    elif change == "bomb":
        members[number] = name, member[:128] + bytes(1 << 27)
    elif change == "drop":
        del members[number]
    file = io.BytesIO()
    with warnings.catch_warnings(action="ignore"), zipfile.ZipFile(file, "w", compression) as archive:
        for name, member in members:
            kind = zipfile.ZIP_DEFLATED if change in ("bomb", "compress") else compression
            archive.writestr(zipfile.ZipInfo(name), member, kind)  # its time is always the same
    return file.getvalue()


def sign_nir(rng: random.Random, content: bytes) -> bytes:
    import h5py

    file = io.BytesIO(content)
    with h5py.File(file, "r+") as graph:
        metadata, nodes = graph["node/metadata"], graph["node/nodes"]
        text = metadata["network"][()].decode()
        places = [f"{node}/{key}" for node in nodes for key in nodes[node]]
        name = rng.choice(places)
        change = rng.choice(("odd", "odd", "odd", "text", "text", "drop", "link", "empty", "chunk", "many", "edges"))
        if change == "text":
            text = edited_text(rng, text)
        elif change == "edges":
            edges = [tuple(pair) for pair in graph["node/edges"].asstr()[()]]
            del graph["node/edges"]
            edges += rng.choice(([], edges[:1], [("fc_0", "fc_0")]))
            rng.shuffle(edges)
            graph["node"].create_dataset("edges", data=edges[rng.randrange(2) :], dtype=h5py.string_dtype())
        elif change == "many":
            for number in range(rng.choice((1, 3000))):
                nodes.create_group(f"more-{number}")
        else:
            value = nodes[name][()]
            del nodes[name]
            if change == "odd" and isinstance(value, bytes):
                nodes.create_dataset(name, data=rng.choice((b"", b"LI", 1)))
            elif change == "odd":
                value = odd_array(rng, np.asarray(value))
                nodes.create_dataset(name, data=value, compression="gzip" if np.ndim(value) else None)
            elif change == "link":
                nodes[name] = rng.choice(
                    (h5py.SoftLink("/node/nodes/fc_1/weight"), h5py.ExternalLink("/etc/passwd", "/"), graph["node"])
                )
            elif change in ("empty", "chunk"):
                shape = np.shape(value) if rng.random() < 0.5 else (1 << 17, 1 << 10)
                chunks = True if change == "empty" or not shape else tuple(max(1, n) * 8 for n in shape)
                nodes.create_dataset(
                    name, shape, np.float32, chunks=chunks if shape else None, maxshape=[None] * len(shape) or None
                )
        with contextlib.suppress(Exception):  # weights that are no longer there have no digest
            arrays = {name: nodes[f"{node}/weight"][()] for node, name in nir.WEIGHTS.items()}
            sha256 = digest(text, arrays)
            for key, value in (("network", text), ("sha256", sha256)):
                del metadata[key]
                metadata.create_dataset(key, data=value, dtype=h5py.string_dtype())
    return file.getvalue()


def odd_tensors() -> tuple[Any, ...]:
    weight = torch.ones(10, 800)
    nan, shared = weight.clone(), torch.ones(20, 800)
    nan[3, 7] = float("nan")
    with warnings.catch_warnings(action="ignore"):
        quantised = torch.quantize_per_tensor(weight, 0.1, 0, torch.qint8)
    return (
        nan,
        weight / 0,
        torch.ones(1, 1).expand(10, 800),
        torch.ones(809).as_strided((10, 800), (1, 1)),
        torch.ones(800, 10).t(),
        shared[:10],
        shared[10:],
        weight.to_sparse(),
        weight.to_sparse_csr(),
        quantised,
        weight.to("meta"),
        weight.double(),
        weight.half(),
        weight.int(),
        torch.nn.Parameter(weight),
        torch.nn.Buffer(weight) if hasattr(torch.nn, "Buffer") else weight,
        torch.ones(1).expand(1 << 20, 1 << 10),
        torch.zeros(0),
        bytearray(10),
        {1, 2},
        1j,
        torch.float32,
    )


def sign_checkpoint(rng: random.Random, content: bytes) -> bytes:
    body = content[: -storage.FOOTER_LENGTH]
    if rng.random() < 0.5:
        state = torch.load(io.BytesIO(body), weights_only=True)
        with warnings.catch_warnings(action="ignore"):  # sparse CSR tensors are in beta state
            return signed(edit(rng, state, (*ODD, *odd_tensors())))
    if rng.random() < 0.6:
        body = rezipped(rng, body, zipfile.ZIP_STORED)
    else:
        changed = bytearray(body)
        rng.choice(BLIND)(rng, changed)
        body = bytes(changed)
    footer = f"\ngradrewire 2 bytes {len(body):020d} sha256 {hashlib.sha256(body).hexdigest()}\n"
    return body + footer.encode()


SIGNED = {
    "npz": sign_npz,
    "csr": sign_npz,
    "safetensors": sign_safetensors,
    "gaps": sign_safetensors,
    "nir": sign_nir,
    "checkpoint": sign_checkpoint,
}


def mutation(form: str, number: int, content: bytes) -> tuple[bytes, str]:
    """A damaged file and what was done to it: odd numbers know the format and are signed anew."""
    rng = random.Random(f"{form} {number}")
    if number % 2:
        return SIGNED[form](rng, content), "signed anew"
    changed = bytearray(content)
    change = rng.choice(BLIND)
    change(rng, changed)
    return bytes(changed), change.__name__
