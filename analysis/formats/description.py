"""The description and the digest that every export carries. See docs/exporting.md."""

import hashlib
import json
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from analysis.snapshot import FIELDS, Snapshot, Unreadable
from training.files import checks

FORMAT, VERSION = "gradrewire network", 4
SINCE = {"width": 3, "position": 4, "data": 4}  # the version that has a field first, if not the first version
SMALL, EXPANSION = 1 << 30, 1000  # bytes; deflate makes nothing smaller than a thousandth
LENGTH = 1 << 16  # characters of a description; it has a few hundred


def describe(snapshot: Snapshot, layers: dict[str, Any]) -> str:
    """The JSON text that every export carries."""
    fields = {key: getattr(snapshot, key) for key in FIELDS}
    start = {"format": FORMAT, "version": VERSION}
    return json.dumps({**start, **fields, **_settings(snapshot), "layers": layers})


def _settings(snapshot: Snapshot) -> dict[str, dict[str, Any]]:
    """What the program has to agree on with whoever reads an export."""
    normalisation = {"mean": list(snapshot.source.mean), "std": list(snapshot.source.std)}
    return {"neuron": snapshot.neuron(), "normalisation": normalisation}


def digest(text: str, arrays: Mapping[str, NDArray]) -> str:
    """SHA-256 of a description and arrays, in hexadecimal digits. See docs/exporting.md."""
    content = hashlib.sha256(text.encode())
    for name, array in sorted(arrays.items()):
        content.update(f"\n{name} {array.dtype.name} {list(array.shape)}\n".encode())
        content.update(np.ascontiguousarray(array, array.dtype.newbyteorder("<")).reshape(-1).view(np.uint8))
    return content.hexdigest()


def check_digest(text: str, arrays: Mapping[str, NDArray], sha256: str | None) -> None:
    """Raises ValueError unless a file's digest fits its content; version 1 has none."""
    if sha256 is not None and digest(text, arrays) != sha256:
        raise ValueError("its content does not match its digest")


def parse(text: str) -> Any:
    """JSON in which no name occurs twice and every number is finite."""

    def members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("its JSON has two members of one name")
        return found

    def constant(name: str) -> None:
        raise ValueError(f"its JSON has the number {name}")

    return json.loads(text, object_pairs_hook=members, parse_constant=constant)


def largest(path: Path) -> int:
    """How many bytes a file may be expanded to: so a small file takes little memory, whatever it declares."""
    return max(SMALL, EXPANSION * path.stat().st_size)


def described(path: Path, text: str, sha256: str | None) -> tuple[Snapshot, dict[str, Any]]:
    """A snapshot without its tensors, and the layers, from an export's description and, if it has one, its digest.

    The size of the export bounds that of the network.
    """
    if len(text) > LENGTH:
        raise ValueError(f"its description has {len(text)} characters, more than {LENGTH}")
    description = parse(text)
    if type(description) is not dict or description.get("format") != FORMAT:
        raise ValueError(f"it has no description of a {FORMAT}")
    version = checks.whole_number("its version", description.get("version"), 1)
    if version > VERSION:
        raise Unreadable(
            f"{path} is an export of version {version}, from a newer program: this one reads up to {VERSION}"
        )
    fields = [key for key in FIELDS if version >= SINCE.get(key, 1)]
    checks.keys("its description", description, {"format", "version", *fields, "neuron", "normalisation", "layers"})
    if (version == 1) != (sha256 is None):
        raise ValueError(f"its version is {version}, {'without' if sha256 is None else 'with'} a digest")
    snapshot = Snapshot.of({key: description[key] for key in fields}, state={})
    size, most = sum(tensor.nbytes for tensor in snapshot.plan().state_dict().values()), largest(path)
    if size > most:
        raise ValueError(f"its network of width {snapshot.width} has {size} bytes; a file of this size may hold {most}")
    for key, settings in _settings(snapshot).items():
        check_same(key, description[key], settings)
    if version == 1:
        warnings.warn(
            f"{path} is an export of version 1, which has no digest: a changed byte may go unnoticed; "
            "if you still have the run, export it again",
            stacklevel=2,
        )
    return snapshot, description["layers"]


def check_same(key: str, found: Any, expected: dict[str, Any]) -> None:
    """Raises ValueError unless a part of a description is as this program writes it."""
    if json.dumps(found, sort_keys=True) != json.dumps(expected, sort_keys=True):  # 1.0 is not true
        found, expected = (checks.short(str(value), 200) for value in (found, expected))
        raise ValueError(f"its {key} is {found}, but that of this network is {expected}")


def complete(snapshot: Snapshot, arrays: dict[str, NDArray]) -> Snapshot:
    """The snapshot with its tensors; raises ValueError unless they are those of its network."""
    snapshot = replace(snapshot, state={name: torch.from_numpy(array) for name, array in arrays.items()})
    snapshot.network()
    return snapshot
