"""Readers for the files of published data sets. Each file is checked before use."""

import contextlib
import io
import math
import struct
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from training.data.dataset import Split, one_line
from training.errors import Refusal
from training.files.locks import Lock


def torchvision_parts(dataset_class: type, folder: Path, files: str, published: Iterable[tuple[Path, str]]) -> list:
    """Loads the training and the test part of a data set of torchvision, into its root folder unless they are there.

    Of several processes, one downloads, and the others wait.

    Raises:
        Refusal: that fails; it names the ``files`` that are needed, and those of the ``published`` whose MD5 differs.
    """
    from torchvision.datasets.utils import check_integrity

    def parts(download: bool) -> list:
        with contextlib.redirect_stdout(io.StringIO()):  # torchvision prints its attempts
            return [dataset_class(root=folder, train=train, download=download) for train in (True, False)]

    try:
        with contextlib.suppress(RuntimeError):  # not there, or not as published
            return parts(download=False)
        with _alone(folder):
            return parts(download=True)
    except Exception as error:  # torchvision passes on errors of the operating system, urllib and zlib
        reason = one_line(error)
    changed = [str(path) for path, md5 in published if path.is_file() and not check_integrity(path, md5)]
    if changed:
        reason = f"{', '.join(changed)} not as published; {reason}"
    raise Refusal(
        f"argument --dataset-dir: {dataset_class.__name__} in {folder} is not usable ({reason}). Torchvision expects "
        f"{files} there and downloads missing files. Copy the files there, or try mnist.py --dataset digits, which "
        "needs no download"
    )


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Waits until no other process downloads to the folder, and keeps others from it."""
    lock = Lock(folder)
    if not lock.acquire():
        print(f"Waiting for another process, which downloads to {folder}.", flush=True)
        while not lock.acquire():
            time.sleep(0.2)
    try:
        yield
    finally:
        lock.release()


def read_idx(path: Path, shape: tuple[int, ...] = ()) -> Tensor:
    """Reads an IDX file (yann.lecun.com/exdb/mnist) of bytes: uint8 [N, *shape].

    Raises:
        Refusal: the file is not an IDX file, or has another shape or another length than its header says.
    """
    try:
        with open(path, "rb") as file:
            header = file.read(8 + 4 * len(shape))
            size = file.seek(0, io.SEEK_END)
        if header[:2] == b"\x1f\x8b":
            raise ValueError("it is compressed (gzip): unpack it")
        if header[:4] != bytes([0, 0, 8, 1 + len(shape)]) or len(header) < 8 + 4 * len(shape):
            dimensions = 1 + len(shape)
            raise ValueError(f"it is not an IDX file of bytes with {dimensions} dimensions: it begins {header[:12]}")
        n, *found = struct.unpack(f">{1 + len(shape)}I", header[4:])
        if tuple(found) != shape:
            raise ValueError(f"its images are {'x'.join(map(str, found))}, not {'x'.join(map(str, shape))}")
        expected = len(header) + n * math.prod(shape)
        if size != expected:
            raise ValueError(f"it has {size:,} bytes, not the {expected:,} that its header says")
        return torch.from_numpy(np.fromfile(path, np.uint8, offset=len(header))).view(n, *shape)
    except (OSError, ValueError, RuntimeError) as error:  # the last: it has become shorter meanwhile
        text = f"{path} is not usable: {one_line(error)}; replace it, or move it away to have torchvision download it"
        raise Refusal(f"argument --dataset-dir: {text}") from None


def read_class_folders(folder: Path, classes: Sequence[str], width: int, height: int) -> Split:
    """Reads PNG or JPEG images ``<folder>/<class>/<image>``, sorted by class and file name.

    It ignores hidden files and folders, and files whose name is not that of an image.

    Raises:
        Refusal: the folders are not the ``classes``, which are in alphabetical order, or
            :func:`training.data.images.read_rgb` refuses a file.
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
    filled = {label for _, label in paths}
    if empty := [folder / name for label, name in enumerate(classes) if label not in filled]:
        raise Refusal(f"argument --dataset-dir: {empty[0] if filled else folder} holds no PNG or JPEG images")

    def read(path: Path) -> np.ndarray:
        try:
            return read_rgb(path, width, height)
        except (OSError, ValueError) as error:
            text = f"{path} cannot be read as an image of 8-bit RGB: {one_line(error)}"
            raise Refusal(f"argument --dataset-dir: {text}") from None

    with warnings.catch_warnings(), ThreadPoolExecutor() as pool:
        warnings.simplefilter("ignore")  # Pillow's, about a large picture that read_rgb then refuses
        images = np.stack(list(pool.map(read, (path for path, _ in paths))))
    return Split(
        torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(),
        torch.tensor([label for _, label in paths], device="cpu"),
    )
