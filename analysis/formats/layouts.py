"""The layouts: how a weight is packed into the arrays of a file, and unpacked. See docs/exporting.md."""

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

import measuring
from training.files import checks


class Stored(NamedTuple):
    """What an array in a file has to be: NumPy's name of its dtype, and its shape."""

    dtype: str
    shape: tuple[int, ...]
    or_shorter: bool = False  # ``shape`` has one axis, and bounds its length

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    def check(self, name: str, array: NDArray) -> NDArray:
        """The array, if it has this dtype and shape; raises ValueError otherwise."""
        shorter = self.or_shorter and array.ndim == 1 and len(array) <= self.shape[0]
        if array.dtype != self.dtype or not (array.shape == self.shape or shorter):
            wanted = f"{self.dtype} {'of up to ' if self.or_shorter else ''}{list(self.shape)}"
            raise ValueError(f"{name} is {array.dtype} {list(array.shape)[:9]}, not {wanted}")
        return array


def parts(layout: str, shape: tuple[int, ...]) -> dict[str, Stored]:
    """The arrays of a weight; each has the weight's name, followed by the key.

    Raises:
        ValueError: there is no such layout.
    """
    size = math.prod(shape)
    values = Stored("float32", (size,), or_shorter=True)
    if layout == "dense":
        return {"": Stored("float32", shape)}
    if layout == "half":
        return {"": Stored("float16", shape)}
    if layout == "bitmap":
        return {".bitmap": Stored("uint8", (-(-size // 8),)), ".values": values}
    if layout == "gaps":  # a byte for each connection, and one for every 255 weights passed over
        return {".gaps": Stored("uint8", (size + size // 255,), or_shorter=True), ".values": values}
    if layout == "csr":
        indices, indptr = Stored("int32", (size,), or_shorter=True), Stored("int32", (shape[0] + 1,))
        return {"/data": values, "/indices": indices, "/indptr": indptr, "/shape": Stored("int64", (2,))}
    raise ValueError(f"layout {checks.short(repr(layout))} is not one of dense, half, bitmap, gaps, csr")


def pack(layout: str, weight: NDArray[np.float32]) -> dict[str, NDArray]:
    """A weight as the arrays of :func:`parts`. Nothing writes the layout gaps any more."""
    connected = measuring.connected(torch.from_numpy(weight))
    values, mask = weight[connected.numpy()], connected.numpy().reshape(len(weight), -1)
    if layout == "dense":
        return {"": weight}
    if layout == "half":
        return {"": weight.astype(np.float16)}
    if layout == "bitmap":
        return {".bitmap": measuring.pack(connected).numpy(), ".values": values}
    return {
        "/data": values,
        "/indices": np.nonzero(mask)[1].astype(np.int32),
        "/indptr": np.append(0, np.cumsum(mask.sum(1))).astype(np.int32),
        "/shape": np.array(mask.shape, np.int64),
    }


def fits_half(weight: NDArray[np.float32]) -> bool:
    """Whether half precision holds every value, so that the layout half loses nothing."""
    with np.errstate(over="ignore"):
        return np.array_equal(weight.astype(np.float16), weight)


def unpack(layout: str, arrays: Mapping[str, NDArray], shape: tuple[int, ...]) -> NDArray[np.float32]:
    """A weight from its arrays, which :func:`parts` describes.

    Raises:
        ValueError: they do not fit together; the text follows the weight's name.
    """
    if layout == "dense":
        return arrays[""]
    if layout == "half":
        return arrays[""].astype(np.float32)
    if layout == "csr":
        return _from_csr(*(arrays[key] for key in ("/data", "/indices", "/indptr", "/shape")), shape)
    size, values = math.prod(shape), arrays[".values"]
    weight = np.zeros(size, dtype=np.float32)
    if layout == "bitmap":
        connected = np.unpackbits(arrays[".bitmap"], count=size).view(bool)
        count = np.count_nonzero(connected)
    else:
        gaps, ends = arrays[".gaps"], arrays[".gaps"] < 255
        connected = np.cumsum(gaps + ends, dtype=np.int64)[ends] - 1  # positions; gaps + ends is 255 at most
        count = len(connected)
        if count and connected[-1] >= size:
            raise ValueError(f"has a connection at {connected[-1]} of {size} weights")
    if len(values) != count or not values.all():
        raise ValueError(f"has {np.count_nonzero(values)} values other than 0 for {count} connections")
    weight[connected] = values
    return weight.reshape(shape)


def _from_csr(data: NDArray, indices: NDArray, indptr: NDArray, declared: NDArray, shape: tuple[int, ...]) -> NDArray:
    weight = np.zeros((shape[0], math.prod(shape[1:])), dtype=np.float32)
    if declared.tolist() != list(weight.shape):
        raise ValueError(f"has the shape {declared.tolist()}, not {list(weight.shape)}")
    ascending = (indptr[1:] >= indptr[:-1]).all()  # differences could wrap
    if not ascending or indptr[0] != 0 or indptr[-1] != len(indices) or len(data) != len(indices):
        raise ValueError("has inconsistent CSR arrays")
    if ((indices < 0) | (indices >= weight.shape[1])).any():
        raise ValueError(f"has indices outside its {weight.shape[1]} columns")
    if not data.all():
        raise ValueError("has connections with the weight 0")
    for row, (start, end) in zip(weight, pairwise(indptr.tolist()), strict=True):
        columns = indices[start:end]
        if not (columns[1:] > columns[:-1]).all():
            raise ValueError("has a row with a repeated index, or indices out of order")
        row[columns] = data[start:end]
    return weight.reshape(shape)
