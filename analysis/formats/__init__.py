"""The formats of an exported network: what is in the files, how they are written and read.

Every file carries a description, JSON text named ``network``, and beside it a digest, ``sha256``::

    {"format": "gradrewire network", "version": 3, "experiment": "mnist", "dataset": "mnist",
     "T": 8, "width": 800, "run": "lr-1e-4-...", "epoch": 512,
     "neuron": {"tau": 2.0, "v_threshold": 1.0, "v_reset": 0.0, "decay_input": true},
     "normalisation": {"mean": [0.1307], "std": [0.3081]},
     "layers": {"fc.1.weight": {"shape": [10, 800], "layout": "bitmap"}, ...}}

A pixel in [0, 1] enters the network as (pixel - mean) / std, T times. A neuron with input x has the potential
h = v + (x - (v - v_reset)) / tau. It spikes where h >= v_threshold. The next v is v_reset there, h elsewhere.

``sha256`` is the SHA-256, in hexadecimal digits, of the description in UTF-8, followed by every array in the order of
their names: "\\n", name, NumPy dtype and shape as Python prints a list, "\\n" (as in
``"\\nfc.1.weight float32 [10, 800]\\n"``), then its elements, little-endian, in C order. In nir the names are those of
the network's weights, elsewhere those of the arrays in the file.

**npz**, small and exact, for NumPy. ``<name>.bitmap`` has one bit per weight, 1 where it is connected, and
``<name>.values`` the values of the connections, in C order. Other tensors (BatchNorm's) have their own names::

    file = numpy.load("export.npz")
    weight = numpy.zeros(shape, "float32")
    connected = numpy.unpackbits(file["fc.1.weight.bitmap"], count=weight.size)
    weight[connected.reshape(shape) == 1] = file["fc.1.weight.values"]

**safetensors**, the same without compression, for any language. ``network`` and ``sha256`` are in the metadata. The
arrays are ``<name>.bitmap`` and ``<name>.values``, or ``<name>`` alone where the layout is ``dense``.

**csr**, an .npz for SciPy, with a matrix [outputs, inputs] for every layer, which has no ``layout``. A convolution's
row is its filter [C, kh, kw] in C order::

    file = numpy.load("export.csr.npz")
    data, indices, indptr, shape = (file[f"fc.1.weight/{key}"] for key in ("data", "indices", "indptr", "shape"))
    W = scipy.sparse.csr_matrix((data, indices, indptr), shape)

BatchNorm is the same affine map at every time step in eval mode: y = scale * (W x) + shift, with ``<name>/scale`` and
``<name>/shift`` of the convolution's outputs. The scale is not multiplied into W, because that rounds the weights
again, and some spikes then differ; ``scipy.sparse.diags(scale) @ W`` is the product.

**nir**, the graph of one time step for other simulators and for chips (Pedersen et al., "Neuromorphic intermediate
representation", Nature Communications 15, 2024): Flatten, Linear, LIF, Linear, LIF, with ``network`` in the metadata.
A time step is :data:`analysis.formats.nir.DT` seconds. Dense weights, gzipped. Needs the packages nir and nirtorch.

Older exports are still read. Before version 3 they have no width, and the network has the default one. Those of
version 1 have no digest, and a warning says so. In safetensors there may be the layout ``gaps``, with ``<name>.gaps``
in the place of the bitmap. A byte b < 255 passes over b weights to the next connection. 255 passes over 255 weights,
and no connection follows it: ``positions = (cumsum(g + (g < 255)) - 1)[g < 255]``, with g as integers.
"""

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
        head = file.read(41)
    if head.startswith(b"PK"):  # an archive, with the name of its first member
        reader = read_npz if head[30:] == b"network.npy" else from_checkpoint
    elif head.startswith(b"\x89HDF"):
        reader = read_nir
    elif head[8:9] == b"{":
        reader = read_safetensors
    else:
        raise Unreadable(f"{path} is not an export or a checkpoint of this program")
    try:
        return reader(path)
    except Exception as error:  # zipfile, NumPy, HDF5 and safetensors raise what they like
        if isinstance(error, Refusal) or (isinstance(error, OSError) and error.errno):
            raise
        raise Unreadable(f"{path} is damaged or not an export of this program ({checks.reason(error)})") from None
