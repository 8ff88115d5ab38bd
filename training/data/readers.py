"""Readers of the files that data sets are published in; each file is checked before it is used."""

import contextlib
import io
import math
import struct
import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from training.data.dataset import Split, one_line
from training.errors import Refusal


def torchvision_parts(dataset_class: type, folder: Path, files: str, published: Iterable[tuple[Path, str]]) -> list:
    """The training and the test part by torchvision, downloaded if need be.

    Args:
        dataset_class: torchvision's.
        folder: that it is given.
        files: what it looks for there, for the message.
        published: the files whose MD5 it checks, with that.
    """
    from torchvision.datasets.utils import check_integrity

    try:
        # torchvision reports its attempts on the standard output
        with contextlib.redirect_stdout(io.StringIO()):
            return [dataset_class(root=folder, train=train, download=True) for train in (True, False)]
    except Exception as error:  # torchvision raises what the operating system, urllib and zlib do
        reason = one_line(error)
    changed = [str(path) for path, md5 in published if path.is_file() and not check_integrity(path, md5)]
    if changed:
        reason = f"{', '.join(changed)} not as published; {reason}"
    raise Refusal(
        f"argument --dataset-dir: {dataset_class.__name__} is not usable in {folder} "
        f"({reason}), where torchvision looks for {files} and downloads what is missing; "
        "put the files there, or try mnist.py --dataset digits, which needs no download"
    )


def read_idx(path: Path, shape: tuple[int, ...] = ()) -> Tensor:
    """Reads an IDX file (yann.lecun.com/exdb/mnist) of bytes: uint8 [N, *shape].

    Raises:
        Refusal: the file is not one, is of another shape, or is not of the length that its header says.
    """
    try:
        with open(path, "rb") as file:
            header = file.read(8 + 4 * len(shape))
            size = file.seek(0, io.SEEK_END)
        if header[:2] == b"\x1f\x8b":
            raise ValueError("it is compressed (gzip): unpack it")
        if header[:4] != bytes([0, 0, 8, 1 + len(shape)]) or len(header) < 8 + 4 * len(shape):
            raise ValueError(
                f"it is not an IDX file of bytes with {1 + len(shape)} dimensions: it begins {header[:12]}"
            )
        n, *found = struct.unpack(f">{1 + len(shape)}I", header[4:])
        if tuple(found) != shape:
            raise ValueError(f"its images are {'x'.join(map(str, found))}, not {'x'.join(map(str, shape))}")
        expected = len(header) + n * math.prod(shape)
        if size != expected:
            raise ValueError(f"it has {size:,} bytes, not the {expected:,} that its header says")
        return torch.from_numpy(np.fromfile(path, np.uint8, offset=len(header))).view(n, *shape)
    except (OSError, ValueError) as error:
        reason = one_line(error)
    raise Refusal(
        f"argument --dataset-dir: {path} is not usable: {reason}; put the right one there, or move it away, and "
        "torchvision downloads it"
    )


def read_class_folders(folder: Path, classes: Sequence[str], width: int, height: int) -> Split:
    """Reads images kept as ``<folder>/<class>/<image>``, PNG or JPEG, in the files' order.

    Hidden files and folders, and files that are no images by their names, are passed over.

    Raises:
        Refusal: the folders are not the ``classes``, in the alphabet's order, or a file is not an image of this size in
            8-bit RGB, as :func:`training.data.images.read_rgb` says.
    """
    try:
        found = [entry for entry in folder.iterdir() if entry.is_dir()] if folder.is_dir() else []
        names = sorted(entry.name for entry in found if not entry.name.startswith("."))
        files = {name: sorted((folder / name).iterdir()) for name in names}
    except OSError as error:
        raise Refusal(f"argument --dataset-dir: {folder} cannot be read: {error}") from None
    if names != list(classes):
        shown = ", ".join(names[:12]) or "none"
        raise Refusal(
            f"argument --dataset-dir: {folder} must hold the {len(classes)} class folders {', '.join(classes)}; "
            f"found: {shown}"
        )
    from training.data.images import is_image, read_rgb

    paths = [(path, label) for label, name in enumerate(classes) for path in files[name] if is_image(path)]
    if not paths:
        raise Refusal(f"argument --dataset-dir: {folder} holds no PNG or JPEG images")

    def read(path: Path) -> np.ndarray:
        try:
            return read_rgb(path, width, height)
        except (OSError, ValueError) as error:
            raise Refusal(
                f"argument --dataset-dir: {path} cannot be read as an image of 8-bit RGB: {one_line(error)}"
            ) from None

    with warnings.catch_warnings(), ThreadPoolExecutor() as pool:
        warnings.simplefilter("ignore")  # Pillow's, of a picture that is refused for its size a moment later
        images = np.stack(list(pool.map(read, (path for path, _ in paths))))
    return Split(
        torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(),
        torch.tensor([label for _, label in paths], device="cpu"),
    )
