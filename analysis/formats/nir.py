"""The format nir, the graph of one time step for other simulators and for chips. See docs/exporting.md."""

import io
from collections import OrderedDict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from spikingjelly.activation_based import layer, neuron
from torch import nn

from analysis.formats import description, hdf5
from analysis.formats.layouts import Stored
from analysis.packages import imported
from analysis.snapshot import Snapshot
from training.errors import Refusal
from training.files import checks

DT = 1e-4  # seconds per time step, as in NIR's frameworks; tau * DT / DT is exact
NODES = ("flatten", "static_fc_1", "fc_0", "fc_1", "fc_2")  # named after the layers of MnistNet
WEIGHTS = {"static_fc_1": "static_fc.1.weight", "fc_1": "fc.1.weight"}
ENDS = ("Input", "Output")
IMAGE = (1, 28, 28)


def one_step(snapshot: Snapshot) -> nn.Sequential:
    """MnistNet for one time step, in SpikingJelly's own layers: images [N, 1, 28, 28] to output spikes [N, 10]."""
    weights, settings = snapshot.state, snapshot.neuron()
    layers: list[nn.Module] = [layer.Flatten()]
    for name in WEIGHTS.values():
        linear = layer.Linear(*reversed(weights[name].shape), bias=False)
        linear.weight = nn.Parameter(weights[name], requires_grad=False)
        layers += [linear, neuron.LIFNode(**settings, detach_reset=True)]
    return nn.Sequential(OrderedDict(zip(NODES, layers, strict=True)))


def write_nir(snapshot: Snapshot) -> bytes:
    if snapshot.experiment != "mnist":
        raise Refusal(
            f"argument --format: nir cannot hold the {snapshot.experiment} network: NIR has no node for max pooling; "
            "use npz, safetensors or csr"
        )
    nir = imported("nir", "the format nir")
    imported("nirtorch", "the format nir")
    from spikingjelly.activation_based.nir_exchange import export_to_nir

    for name in snapshot.state.keys() - set(WEIGHTS.values()):
        raise Refusal(f"argument --format: nir has no place for {name}; npz has")
    size, most = sum(weight.nbytes for weight in snapshot.state.values()), hdf5.BYTES // 2  # the rest is far smaller
    if size > most:
        raise Refusal(f"argument --format: nir takes at most {most:,} bytes of weights, not {size:,}; use npz")
    graph = export_to_nir(one_step(snapshot), torch.zeros(1, *IMAGE, dtype=torch.float32, device="cpu"), dt=DT)
    text = description.describe(snapshot, {})
    arrays = {name: tensor.numpy() for name, tensor in snapshot.state.items()}
    graph.metadata = {"network": text, "sha256": description.digest(text, arrays), "dt": DT}
    file = io.BytesIO()
    nir.write(file, graph)
    return file.getvalue()


def read_nir(path: Path) -> Snapshot:
    """Reads a graph of :func:`write_nir`, and no other, as data: a general importer would make modules of it."""
    imported("h5py", str(path))
    found = hdf5.read(path)
    texts = [found.pop(f"node/metadata/{key}", None) for key in ("network", "sha256")]
    if texts[0] is None or any(text is not None and (text.shape, text.dtype.kind) != ((), "U") for text in texts):
        raise ValueError("its node/metadata/network is not a text")
    text, sha256 = (None if text is None else str(text) for text in texts)
    snapshot, layers = description.described(path, text, sha256)
    if snapshot.experiment != "mnist":
        raise ValueError(f"it has a network of {snapshot.experiment}, which nir cannot hold")
    description.check_same("layers", layers, {})
    shapes, stored = snapshot.shapes(), {}
    for node, name in WEIGHTS.items():
        stored[name] = Stored("float32", shapes[name]).check(name, found.pop(f"node/nodes/{node}/weight"))
    _check_graph(snapshot, found)
    description.check_digest(text, stored, sha256)
    return description.complete(snapshot, stored)


def _check_graph(snapshot: Snapshot, found: dict[str, NDArray]) -> None:
    """Raises ValueError unless everything but the weights is as :func:`write_nir` writes it."""
    found.pop("version", None)  # of the package that wrote it
    others = {path.split("/")[2] for path in found if path.startswith("node/nodes/")} - set(NODES)
    types = {node: found.get(f"node/nodes/{node}/type", "") for node in others}
    ends = [[node for node in others if np.array_equal(types[node], kind)] for kind in ENDS]
    if any(len(nodes) != 1 for nodes in ends):
        raise ValueError(f"it does not have exactly one {ENDS[0]} and one {ENDS[1]}")
    wanted = _graph(snapshot, *(node for (node,) in ends))
    checks.keys("it", found, wanted)
    found["node/edges"] = np.array(sorted(map(tuple, found["node/edges"].tolist())))
    for path, array in wanted.items():
        there = found[path]
        if there.shape != array.shape or there.dtype.kind != array.dtype.kind or not (there == array).all():
            raise ValueError(f"{path.removeprefix('node/nodes/')} is not {array.reshape(-1)[:6].tolist()}")


def _graph(snapshot: Snapshot, source: str, sink: str) -> dict[str, NDArray]:
    """What a file of a network holds besides the weights, by its path in the file."""
    settings, shapes = snapshot.neuron(), snapshot.shapes()
    lif = {
        "tau": settings["tau"] * DT,
        "r": 1.0 if settings["decay_input"] else settings["tau"],
        "v_leak": settings["v_reset"],
        "v_threshold": settings["v_threshold"],
        "v_reset": settings["v_reset"],
    }
    hidden, outputs = (shapes[name][0] for name in WEIGHTS.values())
    nodes: dict[str, dict[str, Any]] = {
        source: {"type": ENDS[0], "shape": IMAGE},
        "flatten": {"type": "Flatten", "start_dim": 0, "end_dim": -1, "input_type": IMAGE},
        "static_fc_1": {"type": "Linear"},
        "fc_0": {"type": "LIF", **{key: np.full(hidden, value) for key, value in lif.items()}},
        "fc_1": {"type": "Linear"},
        "fc_2": {"type": "LIF", **{key: np.full(outputs, value) for key, value in lif.items()}},
        sink: {"type": ENDS[1], "shape": (outputs,)},
    }
    edges = sorted(pairwise([source, *NODES, sink]))
    graph = {"node/type": "NIRGraph", "node/metadata/dt": DT, "node/edges": edges}
    graph |= {f"node/nodes/{node}/{key}": value for node, keys in nodes.items() for key, value in keys.items()}
    return {path: np.array(value) for path, value in graph.items()}
