"""The formats of an exported network: how they are written and read. docs/exporting.md describes the files."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from analysis.formats.nir import read_nir, write_nir
from analysis.formats.packed import read_npz, read_safetensors, write_npz, write_safetensors
from analysis.snapshot import Snapshot, Unreadable, from_checkpoint
from training.errors import Refusal
from training.files import checks

WRITERS: dict[str, Callable[[Snapshot], bytes]] = {
    "npz": partial(write_npz, "bitmap"),
    "safetensors": write_safetensors,
    "csr": partial(write_npz, "csr"),
    "nir": write_nir,
}
SUFFIXES = {"npz": ".npz", "safetensors": ".safetensors", "csr": ".csr.npz", "nir": ".nir"}


def read(path: Path) -> Snapshot:
    """Reads an export or a checkpoint; its first bytes say which. Nothing in a file is executed.

    Raises:
        Unreadable: the file is damaged, or neither.
        Refusal: a package that reads it is not installed.
        OSError: the file cannot be read.
    """
    if path.exists() and not path.is_file():  # opening a pipe would wait for its other end
        raise Unreadable(f"{path} is not a file")
    with open(path, "rb") as file:
        head = file.read(30 + 200)
    if head.startswith(b"PK"):  # an archive, with the name of its first member and that name's length
        first = head[30 : 30 + int.from_bytes(head[26:28], "little")]
        reader = read_npz if first.endswith(b".npy") else from_checkpoint
    elif head.startswith(b"\x89HDF"):
        reader = read_nir
    elif head[8:9] == b"{":
        reader = read_safetensors
    else:
        raise Unreadable(f"{path} is not an export or a checkpoint of this program")
    try:
        return reader(path)
    except Exception as error:  # zipfile, NumPy, HDF5 and safetensors raise what they like
        if isinstance(error, Refusal) or not checks.is_about_content(error):
            raise
        raise Unreadable(f"{path} is damaged or not an export of this program ({checks.reason(error)})") from None
