"""The three forms of an exported network: what is in the files, how they are written and read.

Every file carries the same description, JSON text named ``network``, and beside it a digest, ``sha256``::

    {"format": "gradrewire network", "version": 2, "experiment": "mnist", "dataset": "mnist",
     "T": 8, "run": "lr-1e-4-...", "epoch": 512,
     "neuron": {"tau": 2.0, "v_threshold": 1.0, "v_reset": 0.0, "decay_input": true},
     "normalisation": {"mean": [0.1307], "std": [0.3081]}, "layers": {...}}

A pixel in [0, 1] enters the network as (pixel - mean) / std, T times. A neuron with input x has the potential
h = v + (x - (v - v_reset)) / tau, spikes where h >= v_threshold, and goes on from v = v_reset there, v = h elsewhere.

The digest is the SHA-256, in hexadecimal digits, of the description in UTF-8, and then, for every array in the order
of their names, of "\\n", its name, its NumPy dtype and its shape as Python prints a list, "\\n" (as in
``"\\nfc.1.weight float32 [10, 800]\\n"``) and its elements, little-endian, in C order. In csr the names are those of
the arrays (``<name>/data``), in nir those of the network's weights. Exports of version 1, which had none, are still
read, with a warning; whatever else is wrong in a file is refused in either version (:mod:`training.files.checks`).

**safetensors**, for a copy that is small and exact. ``network`` is in the metadata. Its ``layers`` has for every weight
that can be pruned its shape and layout; the values that are not 0 are in ``<name>.values``, float32, in C order:

- ``dense``: all weights, in ``<name>``.
- ``bitmap``: ``<name>.bitmap``, uint8, one bit per weight (numpy.packbits), 1 where it is connected.
- ``gaps``: ``<name>.gaps``, uint8. A byte b < 255 passes over b weights to the next connection; 255 passes over 255
  weights, and no connection follows it: ``positions = (cumsum(g + (g < 255)) - 1)[g < 255]``, with g as integers.

Each layer has the layout that is smallest for it: at 4 bytes a value, gaps need 5 bytes per connection, a bitmap 4 and
an eighth of a byte per weight. Other tensors (BatchNorm's) are there under their own names.

**csr**, an .npz for NumPy and SciPy, with a matrix [outputs, inputs] for every layer; a convolution's row is its filter
[C, kh, kw] in C order (the shape is in ``layers``)::

    file = numpy.load("export.npz")
    data, indices, indptr, shape = (file[f"{name}/{key}"] for key in ("data", "indices", "indptr", "shape"))
    W = scipy.sparse.csr_matrix((data, indices, indptr), shape)

BatchNorm, in eval mode the same affine map at every time step, is folded to ``<name>/scale`` and ``<name>/shift`` of
the convolution's outputs: y = scale * (W x) + shift. The scale is kept beside W, and not multiplied into it, because
that rounds the weights anew, and some spikes then fall differently; ``scipy.sparse.diags(scale) @ W`` is the product.

**nir**, the graph of one time step for other simulators and for chips (Pedersen et al., "Neuromorphic intermediate
representation", Nature Communications 15, 2024): Flatten, Linear, LIF, Linear, LIF, with ``network`` in the metadata.
The time step is :data:`analysis.formats.nir.DT` seconds. Dense weights, gzipped. Needs the packages nir and nirtorch.
"""

from collections.abc import Callable
from pathlib import Path

from analysis.formats.csr import read_csr, write_csr
from analysis.formats.nir import read_nir, write_nir
from analysis.formats.safetensors import read_safetensors, write_safetensors
from analysis.snapshot import Snapshot, Unreadable, from_checkpoint, reason
from training.errors import Refusal

WRITERS: dict[str, Callable[[Snapshot], bytes]] = {
    "safetensors": write_safetensors,
    "csr": write_csr,
    "nir": write_nir,
}
SUFFIXES = {"safetensors": ".safetensors", "csr": ".npz", "nir": ".nir"}


def _reader(path: Path) -> Callable[[Path], Snapshot]:
    """The reader of a file, chosen by its first bytes; the reader then checks that the file is what it seems."""
    with open(path, "rb") as file:
        head = file.read(41)
    if head.startswith(b"PK"):
        return read_csr if head[30:] == b"network.npy" else from_checkpoint  # the name of its first member
    if head.startswith(b"\x89HDF"):
        return read_nir
    if head[8:9] == b"{":
        return read_safetensors
    raise Unreadable(f"{path} is not an export or a checkpoint of this program")


def read(path: Path) -> Snapshot:
    """Reads an export or a checkpoint, told apart by their content. Nothing in a file is executed.

    Raises:
        Unreadable: the file is damaged, or none of these.
        Refusal: a package that reads it is not installed.
        OSError: the file cannot be read.
    """
    if path.exists() and not path.is_file():  # opening a pipe would wait for its other end
        raise Unreadable(f"{path} is not a file")
    read_format = _reader(path)
    try:
        return read_format(path)
    except Refusal:
        raise
    except Exception as error:  # what a damaged file raises is up to zipfile, NumPy, HDF5 and safetensors
        if isinstance(error, OSError) and error.errno:
            raise
        raise Unreadable(f"{path} is damaged or not an export of this program ({reason(error)})") from None
