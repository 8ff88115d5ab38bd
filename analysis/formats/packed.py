"""What npz, safetensors and csr share: every weight in a layout, the other tensors beside or folded.

csr folds BatchNorm to y = scale * x + shift after its convolution. See :mod:`analysis.formats`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F

from analysis.formats import layouts
from analysis.formats.description import arrays_of, check_digest, check_same, complete, describe, described, digest
from analysis.formats.layouts import Stored
from analysis.snapshot import Snapshot
from training.errors import Refusal
from training.files import checks

BATCH_NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def pack(snapshot: Snapshot, choose: Callable[[NDArray], str]) -> tuple[dict[str, str], dict[str, NDArray]]:
    """The description and the digest, by name, and the arrays. ``choose`` names the layout of a weight."""
    weights, others = arrays_of(snapshot)
    chosen = {name: choose(weight) for name, weight in weights.items()}
    arrays = _folded(snapshot.network(), others) if "csr" in chosen.values() else others
    for name, weight in weights.items():
        arrays |= {name + part: array for part, array in layouts.pack(chosen[name], weight).items()}
    text = describe(snapshot, {name: _layer(weight.shape, chosen[name]) for name, weight in weights.items()})
    return {"network": text, "sha256": digest(text, arrays)}, arrays


def read(path: Path, texts: Mapping[str, str], names: Iterable[str], get: Callable[[str, Stored], NDArray]) -> Snapshot:
    """Reads an export. Nothing is expanded before the names and sizes are known to be those of the network.

    Args:
        path: of the file.
        texts: the description and, if there is one, the digest, by name.
        names: of the arrays.
        get: reads an array by its name; raises ValueError unless it is what it has to be.
    """
    text, sha256 = texts["network"], texts.get("sha256")
    snapshot, layers = described(path, text, sha256)
    network, shapes = snapshot.plan(), snapshot.shapes()
    chosen = {name: layers[name].get("layout", "csr") for name in shapes}
    check_same("layers", layers, {name: _layer(shape, chosen[name]) for name, shape in shapes.items()})
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
    found = {name: get(name, stored) for name, stored in wanted.items()}
    check_digest(text, found, sha256)
    arrays = {name: found.pop(name).copy() for name in others}  # those of an archive are read-only
    if folded:
        arrays = _unfolded(network, arrays)
    for name, shape in shapes.items():
        try:
            arrays[name] = layouts.unpack(chosen[name], {part: found.pop(name + part) for part in parts[name]}, shape)
        except ValueError as error:
            raise ValueError(f"{name} {error}") from None
    return complete(snapshot, arrays)


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
