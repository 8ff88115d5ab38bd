"""Data sets as tensors in memory, read from the files that publish them, each checked before it is used."""

import contextlib
import io
import math
import struct
import warnings
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from training.errors import Refusal
from training.images import read_rgb

CIFAR10_CLASSES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)


@dataclass(frozen=True)
class Split:
    """Images, uint8 [N, C, H, W], and their labels, int64 [N]."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> "Split":
        return Split(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Dataset:
    """The training and the test part of a data set."""

    train: Split
    test: Split

    def fingerprint(self) -> str:
        """A checksum of all images and labels, to tell one data set from another."""
        checksum = 0
        for split in (self.train, self.test):
            for tensor in (split.images, split.labels):
                checksum = zlib.crc32(tensor.contiguous().cpu().numpy(), checksum)
        return f"{len(self.train)}+{len(self.test)} images, crc32 {checksum:08x}"


def load(name: str, folder: Path) -> Dataset:
    """Loads a data set by its name: mnist, digits or cifar10.

    MNIST and CIFAR-10 are read from ``folder`` as torchvision keeps them, and downloaded to it if they
    are not there; CIFAR-10 is read from class folders if there are any (see :func:`load_class_folders`).

    Raises:
        Refusal: the data cannot be loaded, or are not what they should be.
    """
    try:
        dataset = {"mnist": _load_mnist, "digits": _load_digits, "cifar10": _load_cifar10}[name](folder)
    except OSError as error:  # a folder that may not even be looked into
        raise Refusal(f"argument --dataset-dir: {name} in {folder} cannot be read: {_one_line(error)}") from None
    shape = (3, 32, 32) if name == "cifar10" else (1, 28, 28)
    for split in (dataset.train, dataset.test):
        if split.images.shape[1:] != shape or split.images.dtype != torch.uint8:
            found, right = ("x".join(map(str, s)) for s in (split.images.shape[1:], shape))
            kind = str(split.images.dtype).removeprefix("torch.")
            raise Refusal(f"argument --dataset-dir: {name} in {folder} has images {found} {kind}, not {right} uint8")
        if len(split) == 0 or len(split.images) != len(split.labels):
            raise Refusal(
                f"argument --dataset-dir: {name} in {folder} has {len(split.images)} images and {len(split)} labels"
            )
        if not 0 <= int(split.labels.min()) <= int(split.labels.max()) <= 9:
            raise Refusal(f"argument --dataset-dir: {name} in {folder} has labels outside 0 to 9")
    return dataset


def _torchvision(dataset_class: type, folder: Path, files: str, published: Iterable[tuple[Path, str]]) -> list:
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
        reason = _one_line(error)
    changed = [str(path) for path, md5 in published if path.is_file() and not check_integrity(path, md5)]
    if changed:
        reason = f"{', '.join(changed)} not as published; {reason}"
    raise Refusal(
        f"argument --dataset-dir: {dataset_class.__name__} is not usable in {folder} "
        f"({reason}), where torchvision looks for {files} and downloads what is missing; "
        "put the files there, or try mnist.py --dataset digits, which needs no download"
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _load_mnist(folder: Path) -> Dataset:
    from torchvision.datasets import MNIST

    raw = folder / "MNIST" / "raw"
    parts = [[raw / f"{part}-{what}-ubyte" for what in ("images-idx3", "labels-idx1")] for part in ("train", "t10k")]
    if not all(path.is_file() for part in parts for path in part):
        published = ((raw / name, md5) for name, md5 in MNIST.resources)
        _torchvision(MNIST, folder, "MNIST/raw/{train,t10k}-{images-idx3,labels-idx1}-ubyte", published)
    # torchvision checks the MD5 of downloads only, and what it then reads with assertions that have no text
    return Dataset(
        *(Split(_read_idx(images, (28, 28)).unsqueeze(1), _read_idx(labels).long()) for images, labels in parts)
    )


def _read_idx(path: Path, shape: tuple[int, ...] = ()) -> Tensor:
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
        reason = _one_line(error)
    raise Refusal(
        f"argument --dataset-dir: {path} is not usable: {reason}; put the right one there, or move it away, and "
        "torchvision downloads it"
    )


def _load_cifar10(folder: Path) -> Dataset:
    from torchvision.datasets import CIFAR10

    if any((folder / part).is_dir() for part in ("train", "test")):
        return Dataset(*(load_class_folders(folder / part) for part in ("train", "test")))
    # they are pickles, which could run code: torchvision opens none whose MD5 is not the published one's
    base, meta = folder / CIFAR10.base_folder, CIFAR10.meta
    published = [*CIFAR10.train_list, *CIFAR10.test_list, (meta["filename"], meta["md5"])]
    parts = _torchvision(
        CIFAR10,
        folder,
        "cifar-10-batches-py, or train/<class>/* and test/<class>/* images,",
        [(folder / CIFAR10.filename, CIFAR10.tgz_md5), *((base / name, md5) for name, md5 in published)],
    )
    return Dataset(
        *(
            Split(
                torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets, device="cpu")
            )
            for part in parts
        )
    )


def load_class_folders(folder: Path) -> Split:
    """Loads CIFAR-10 images kept as ``<folder>/<class>/<image>``, PNG or JPEG, 32x32, in the files' order.

    Hidden files and folders, and files that are no images by their names, are passed over.

    Raises:
        Refusal: the classes are not CIFAR-10's ten, or a file is not a 32x32 image that is one in 8-bit RGB, as
            :func:`training.images.read_rgb` says.
    """
    try:
        found = [entry for entry in folder.iterdir() if entry.is_dir()] if folder.is_dir() else []
        classes = sorted(entry.name for entry in found if not entry.name.startswith("."))
        files = {name: sorted((folder / name).iterdir()) for name in classes}
    except OSError as error:
        raise Refusal(f"argument --dataset-dir: {folder} cannot be read: {error}") from None
    if tuple(classes) != CIFAR10_CLASSES:
        shown = ", ".join(classes[:12]) or "none"
        raise Refusal(
            f"argument --dataset-dir: {folder} must hold CIFAR-10's ten class folders "
            f"({', '.join(CIFAR10_CLASSES)}); found: {shown}"
        )
    paths = [(path, label) for label, name in enumerate(classes) for path in files[name] if _is_image(path)]
    if not paths:
        raise Refusal(f"argument --dataset-dir: {folder} holds no PNG or JPEG images")

    def read(path: Path) -> np.ndarray:
        try:
            return read_rgb(path, 32, 32)
        except (OSError, ValueError) as error:
            raise Refusal(
                f"argument --dataset-dir: {path} cannot be read as an image of 8-bit RGB: {_one_line(error)}"
            ) from None

    with warnings.catch_warnings(), ThreadPoolExecutor() as pool:
        warnings.simplefilter("ignore")  # Pillow's, of a picture that is refused for its size a moment later
        images = np.stack(list(pool.map(read, (path for path, _ in paths))))
    return Split(
        torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(),
        torch.tensor([label for _, label in paths], device="cpu"),
    )


def _is_image(path: Path) -> bool:
    """Whether a file in a class folder is to be read; Refusal for an image, or a folder, that would be left out."""
    suffix = path.suffix.lower()
    if path.name.startswith(".") or (suffix not in Image.registered_extensions() and not path.is_dir()):
        return False
    if suffix not in (".png", ".jpg", ".jpeg"):
        what = "a folder in a class folder" if path.is_dir() else "an image, but not .png, .jpg or .jpeg"
        raise Refusal(f"argument --dataset-dir: {path} is {what}; move it away, or convert it")
    return True


def _load_digits(folder: Path) -> Dataset:
    """scikit-learn's digits: 1797 images of 8x8 pixels, part of the UCI Optical Recognition of Handwritten Digits.

    Scaled to 28x28 (bilinear) so that they fit MNIST's network. Every sixth image is a test image; the
    same people wrote both parts, so the accuracy is not to be set beside MNIST's.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise Refusal("argument --dataset: digits needs the package scikit-learn (pip install scikit-learn)") from None
    digits = load_digits()
    small = torch.from_numpy(digits.images).float().unsqueeze(1) * (255 / 16)  # [1797, 1, 8, 8]
    images = torch.nn.functional.interpolate(small, size=(28, 28), mode="bilinear").round().to(torch.uint8)
    labels = torch.from_numpy(digits.target).long()
    is_test = torch.arange(len(labels), device="cpu") % 6 == 5
    return Dataset(Split(images[~is_test], labels[~is_test]), Split(images[is_test], labels[is_test]))
