"""The three forms of an exported network: what is in the files, how they are written and read.

Every file carries the same description, JSON text named ``network``::

    {"format": "gradrewire network", "version": 1, "experiment": "mnist", "dataset": "mnist",
     "T": 8, "run": "lr-1e-4-...", "epoch": 512,
     "neuron": {"tau": 2.0, "v_threshold": 1.0, "v_reset": 0.0, "decay_input": true},
     "normalisation": {"mean": [0.1307], "std": [0.3081]}, "layers": {...}}

A pixel in [0, 1] enters the network as (pixel - mean) / std, T times. A neuron with input x has the potential
h = v + (x - (v - v_reset)) / tau, spikes where h >= v_threshold, and goes on from v = v_reset there, v = h elsewhere.

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
The time step is :data:`DT` seconds. Dense weights, gzipped. Needs the packages nir and nirtorch.
"""

import importlib
import io
import json
import math
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from spikingjelly.activation_based import layer, neuron
from torch import Tensor, nn
from torch.nn import functional as F

from analysis.snapshot import EXPERIMENTS, Snapshot, Unreadable, batch_norms, from_checkpoint, reason
from training import measure
from training.options import Refusal

FORMAT, VERSION = "gradrewire network", 1
DT = 1e-4  # what NIR's frameworks take for a step; tau * DT and back is exact
BATCH_NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def describe(snapshot: Snapshot, layers: dict[str, Any]) -> str:
    """The JSON text that every export carries."""
    recipe = snapshot.recipe
    description = {
        "format": FORMAT,
        "version": VERSION,
        "experiment": snapshot.experiment,
        "dataset": snapshot.dataset,
        "T": snapshot.T,
        "run": snapshot.run,
        "epoch": snapshot.epoch,
        "neuron": snapshot.neuron(),
        "normalisation": {"mean": recipe.mean, "std": recipe.std},
        "layers": layers,
    }
    return json.dumps(description)


def _described(text: str) -> tuple[Snapshot, dict[str, Any]]:
    """A snapshot without its tensors, and the layers, from an export's description."""
    description = json.loads(text)
    if description["format"] != FORMAT or description["version"] != VERSION:
        raise ValueError(f"{description['format']} {description['version']} instead of {FORMAT} {VERSION}")
    if description["experiment"] not in EXPERIMENTS:
        raise ValueError(f"experiment {description['experiment']!r}, not one of {', '.join(EXPERIMENTS)}")
    snapshot = Snapshot(*(description[key] for key in ("experiment", "dataset", "T", "run", "epoch")), state={})
    if description["neuron"] != snapshot.neuron():
        raise ValueError(f"neurons {description['neuron']} instead of {snapshot.neuron()}")
    return snapshot, description["layers"]


def _arrays(snapshot: Snapshot) -> tuple[dict[str, NDArray], dict[str, NDArray]]:
    """The weights that can be pruned, and the other tensors, by name."""
    prunable = measure.prunable(snapshot.network())
    arrays = {name: tensor.contiguous().numpy() for name, tensor in snapshot.state.items()}
    return {k: v for k, v in arrays.items() if k in prunable}, {k: v for k, v in arrays.items() if k not in prunable}


def _complete(snapshot: Snapshot, arrays: dict[str, NDArray]) -> Snapshot:
    """The snapshot with its tensors; fails unless they are those of its network."""
    snapshot = replace(snapshot, state={name: torch.from_numpy(array) for name, array in arrays.items()})
    snapshot.network()
    return snapshot


def _shapes(snapshot: Snapshot) -> dict[str, tuple[int, ...]]:
    """The shape of every weight that can be pruned, as this program's network has it: what a file says is checked."""
    with torch.device("meta"):
        network = EXPERIMENTS[snapshot.experiment][0](snapshot.T)
    return {name: tuple(weight.shape) for name, weight in measure.prunable(network).items()}


# -- safetensors -----------------------------------------------------------------------------------


def _gaps(connected: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """How far it is to each connection, in bytes; see the layout ``gaps``."""
    gap = np.diff(np.flatnonzero(connected), prepend=-1) - 1
    gaps = np.full(len(gap) + int((gap // 255).sum()), 255, dtype=np.uint8)
    gaps[np.cumsum(gap // 255 + 1) - 1] = gap % 255
    return gaps


def _positions(gaps: NDArray[np.uint8]) -> NDArray[np.int64]:
    """The flat positions of the connections; undoes :func:`_gaps`."""
    return (np.cumsum(gaps.astype(np.int64) + (gaps < 255)) - 1)[gaps < 255]


def _pack(weight: NDArray[np.float32]) -> tuple[str, dict[str, NDArray]]:
    """The smallest layout of a weight: its name, and its arrays by the suffix of their names."""
    connected = measure.connected(torch.from_numpy(weight)).numpy().ravel()
    values = weight.ravel()[connected]
    layouts = {
        "dense": {"": weight},
        "bitmap": {".values": values, ".bitmap": np.packbits(connected)},
        "gaps": {".values": values, ".gaps": _gaps(connected)},
    }
    name = min(layouts, key=lambda name: sum(array.nbytes for array in layouts[name].values()))
    return name, layouts[name]


def _unpack(layout: str, get: Callable[[str], NDArray], shape: tuple[int, ...]) -> NDArray[np.float32]:
    """A weight from its layout; ``get`` gives its arrays by the suffix of their names."""
    if layout == "dense":
        return get("")
    size, values = math.prod(shape), get(".values")
    if layout == "bitmap":
        bitmap = get(".bitmap")
        if bitmap.dtype != np.uint8 or bitmap.shape != (-(-size // 8),):
            raise ValueError(f"a bitmap of {bitmap.dtype} {list(bitmap.shape)} for {size} weights")
        positions = np.flatnonzero(np.unpackbits(bitmap, count=size))
    elif layout == "gaps":
        gaps = get(".gaps")
        if gaps.dtype != np.uint8 or gaps.ndim != 1:
            raise ValueError(f"gaps of {gaps.dtype} {list(gaps.shape)}")
        positions = _positions(gaps)
    else:
        raise ValueError(f"layout {layout!r} is not one of dense, bitmap, gaps")
    if values.dtype != np.float32 or values.shape != positions.shape or (positions >= size).any():
        raise ValueError(f"{values.dtype} {list(values.shape)} values for {len(positions)} of {size} weights")
    weight = np.zeros(size, dtype=np.float32)
    weight[positions] = values
    return weight.reshape(shape)


def write_safetensors(snapshot: Snapshot) -> bytes:
    save = _imported("safetensors.numpy", "safetensors").save
    weights, arrays = _arrays(snapshot)
    layers = {}
    for name, weight in weights.items():
        layout, packed = _pack(weight)
        layers[name] = {"shape": weight.shape, "layout": layout}
        arrays |= {name + suffix: array for suffix, array in packed.items()}
    return save(arrays, metadata={"network": describe(snapshot, layers)})


def read_safetensors(path: Path) -> Snapshot:
    safe_open = _imported("safetensors", "safetensors").safe_open
    with safe_open(path, framework="numpy") as file:
        snapshot, layers = _described((file.metadata() or {})["network"])
        arrays = {
            name: _unpack(layers[name]["layout"], lambda suffix, name=name: file.get_tensor(name + suffix), shape)
            for name, shape in _shapes(snapshot).items()
        }
        packed = {name + suffix for name in arrays for suffix in ("", ".values", ".bitmap", ".gaps")}
        arrays |= {name: file.get_tensor(name) for name in file.keys() if name not in packed}  # noqa: SIM118
    return _complete(snapshot, arrays)


# -- CSR -------------------------------------------------------------------------------------------


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
        "num_batches_tracked": torch.zeros((), dtype=torch.int64),
    }


def write_csr(snapshot: Snapshot) -> bytes:
    network = snapshot.network()
    norms = batch_norms(network)
    weights, _ = _arrays(snapshot)
    arrays: dict[str, NDArray] = {}
    for name, weight in weights.items():
        matrix = weight.reshape(len(weight), -1)
        connected = measure.connected(torch.from_numpy(matrix)).numpy()
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
    text = describe(snapshot, {name: {"shape": weight.shape} for name, weight in weights.items()})
    file = io.BytesIO()
    np.savez_compressed(file, network=np.array(text), **arrays)
    return file.getvalue()


def _dense(file: np.lib.npyio.NpzFile, name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    data, indices, indptr = (file[f"{name}/{key}"] for key in ("data", "indices", "indptr"))
    rows, columns = shape[0], math.prod(shape[1:])
    if data.dtype != np.float32 or any(a.dtype != np.int32 or a.ndim != 1 for a in (indices, indptr)):
        raise ValueError(f"{name} has data of {data.dtype}, indices of {indices.dtype}, indptr of {indptr.dtype}")
    counts = np.diff(indptr)
    consistent = indptr.shape == (rows + 1,) and indptr[0] == 0 and indptr[-1] == len(indices)
    if not consistent or (counts < 0).any() or data.shape != indices.shape:
        raise ValueError(f"{name} has inconsistent CSR arrays")
    if ((indices < 0) | (indices >= columns)).any():
        raise ValueError(f"{name} has indices outside its {columns} columns")
    weight = np.zeros((rows, columns), dtype=np.float32)
    weight[np.repeat(np.arange(rows), counts), indices] = data
    return weight.reshape(shape)


def read_csr(path: Path) -> Snapshot:
    arrays: dict[str, NDArray] = {}
    with np.load(path, allow_pickle=False) as file:
        snapshot, _ = _described(str(file["network"]))
        with torch.device("meta"):
            network = EXPERIMENTS[snapshot.experiment][0](snapshot.T)
        norms = batch_norms(network)
        for name, shape in _shapes(snapshot).items():
            arrays[name] = _dense(file, name, shape)
            norm = norms.get(name.removesuffix(".weight"))
            if norm:
                scale, shift = (torch.from_numpy(file[f"{name}/{key}"]) for key in ("scale", "shift"))
                eps = network.get_submodule(norm).eps
                tensors = _batch_norm(scale, shift, eps)
                arrays |= {f"{norm}.{key}": tensor.numpy() for key, tensor in tensors.items()}
    return _complete(snapshot, arrays)


# -- NIR -------------------------------------------------------------------------------------------

NIR_NODES = ("flatten", "static_fc_1", "fc_0", "fc_1", "fc_2")  # after the layers of MnistNet


def one_step(snapshot: Snapshot) -> nn.Sequential:
    """MnistNet for one time step, in SpikingJelly's own layers: images [N, 1, 28, 28] to output spikes [N, 10]."""
    weights, settings = snapshot.state, snapshot.neuron()
    layers: list[nn.Module] = [layer.Flatten()]
    for name in ("static_fc.1.weight", "fc.1.weight"):
        linear = layer.Linear(*reversed(weights[name].shape), bias=False)
        linear.weight = nn.Parameter(weights[name], requires_grad=False)
        layers += [linear, neuron.LIFNode(**settings, detach_reset=True)]
    return nn.Sequential(OrderedDict(zip(NIR_NODES, layers, strict=True)))


def write_nir(snapshot: Snapshot) -> bytes:
    if snapshot.experiment != "mnist":
        raise Refusal(
            "argument --format: nir cannot hold the c10 network, which has max pooling, for which NIR has no node; "
            "safetensors and csr can"
        )
    nir = _imported("nir", "nir nirtorch")
    _imported("nirtorch", "nir nirtorch")
    from spikingjelly.activation_based.nir_exchange import export_to_nir

    graph = export_to_nir(one_step(snapshot), torch.zeros(1, 1, 28, 28), dt=DT)
    graph.metadata = {"network": describe(snapshot, {}), "dt": DT}
    file = io.BytesIO()
    nir.write(file, graph)
    return file.getvalue()


def read_nir(path: Path) -> Snapshot:
    """Reads the graph that :func:`write_nir` makes, and no other, as data: a general importer makes code of it."""
    nir = _imported("nir", "nir nirtorch")
    graph = nir.read(path)
    snapshot, _ = _described(str(graph.metadata["network"]))
    names = list(graph.nodes)
    inputs, outputs = ([n for n in names if type(graph.nodes[n]) is kind] for kind in (nir.Input, nir.Output))
    chain = [*inputs, *NIR_NODES, *outputs]
    if sorted(chain) != sorted(names) or sorted(graph.edges) != sorted(pairwise(chain)):
        raise ValueError(f"a graph of {', '.join(names)} instead of {', '.join(NIR_NODES)} in a row")
    flatten, first, *_ = nodes = [graph.nodes[name] for name in NIR_NODES]
    kinds = (nir.Flatten, nir.Linear, nir.LIF, nir.Linear, nir.LIF)
    if tuple(map(type, nodes)) != kinds or (int(flatten.start_dim), int(flatten.end_dim)) != (0, -1):
        raise ValueError("its nodes are not Flatten, Linear, LIF, Linear, LIF")
    settings = snapshot.neuron()
    wanted = {
        "tau": settings["tau"] * DT,
        "r": 1.0 if settings["decay_input"] else settings["tau"],
        "v_leak": settings["v_reset"],
        "v_threshold": settings["v_threshold"],
        "v_reset": settings["v_reset"],
    }
    for name in ("fc_0", "fc_2"):
        for key, value in wanted.items():
            if not (getattr(graph.nodes[name], key) == value).all():
                raise ValueError(f"{name} has another {key} than {value}")
    return _complete(snapshot, {"static_fc.1.weight": first.weight, "fc.1.weight": nodes[3].weight})


# -- all -------------------------------------------------------------------------------------------


def _imported(module: str, packages: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        missing = module.partition(".")[0]
        raise Refusal(f"this format needs {missing}, which is not installed (pip install {packages})") from None


WRITERS: dict[str, Callable[[Snapshot], bytes]] = {
    "safetensors": write_safetensors,
    "csr": write_csr,
    "nir": write_nir,
}
SUFFIXES = {"safetensors": ".safetensors", "csr": ".npz", "nir": ".nir"}


def read(path: Path) -> Snapshot:
    """Reads an export or a checkpoint, told apart by their content. Nothing in a file is executed.

    Raises:
        Unreadable: the file is damaged, or none of these.
        Refusal: a package that reads it is not installed.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(9)
        if head.startswith(b"PK"):
            with zipfile.ZipFile(path) as archive:
                is_npz = "network.npy" in archive.namelist()
            return read_csr(path) if is_npz else from_checkpoint(path)
        if head.startswith(b"\x89HDF"):
            return read_nir(path)
        if head[8:] == b"{":
            return read_safetensors(path)
    except (Refusal, OSError) as error:
        if isinstance(error, Refusal) or error.errno:  # h5py's OSErrors of damaged files have no errno
            raise
        raise _damaged(path, error) from None
    except Exception as error:  # what a damaged file raises is up to zipfile, NumPy, h5py and safetensors
        raise _damaged(path, error) from None
    raise Unreadable(f"{path} is not an export or a checkpoint of this program")


def _damaged(path: Path, error: Exception) -> Unreadable:
    return Unreadable(f"{path} is damaged or not an export of this program ({reason(error)})")
