"""Data sets: where they come from, and their images in memory."""

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from training.data.transforms import Normalisation, RandomAffine, RandomCropFlip
from training.errors import Refusal


@dataclass(frozen=True)
class Split:
    """Images, uint8 [N, C, H, W], and their labels, int64 [N], on one device."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> "Split":
        return Split(self.images.to(device), self.labels.to(device))

    def part(self, which: slice) -> "Split":
        return Split(self.images[which], self.labels[which])


@dataclass(frozen=True)
class Dataset:
    """The training and the test part of a data set."""

    train: Split
    test: Split

    def fingerprint(self) -> str:
        """A checksum of all images and labels, which identifies the data."""
        checksum = 0
        for tensor in (self.train.images, self.train.labels, self.test.images, self.test.labels):
            checksum = zlib.crc32(tensor.contiguous().cpu().numpy(), checksum)
        return f"{len(self.train)}+{len(self.test)} images, crc32 {checksum:08x}"


@dataclass(frozen=True)
class DataSource:
    """A data set on which an experiment can train."""

    name: str  # for --dataset
    read: Callable[[Path], Dataset]  # from the folder --dataset-dir, where it may download it; may raise Refusal
    shape: tuple[int, int, int]  # of an image: channels, height, width
    mean: tuple[float, ...]  # of each channel, for pixels in [0, 1], as the standard deviation: they normalise images
    std: tuple[float, ...]
    augmentation: RandomAffine | RandomCropFlip  # of the training images
    about: str = ""  # an explanation for --help, if needed
    classes: int = 10  # labels are from 0 to classes - 1

    def normalisation(self, device: torch.device) -> Normalisation:
        return Normalisation(self.mean, self.std, device)

    def load(self, folder: Path) -> Dataset:
        """Reads the data set from a folder and checks shapes and labels.

        Raises:
            Refusal: the data cannot be loaded, or a check fails.
        """
        place = f"argument --dataset-dir: {self.name} in {folder}"
        try:
            dataset = self.read(folder)
        except OSError as error:  # for example a folder without permission
            raise Refusal(f"{place} cannot be read: {one_line(error)}") from None
        for split in (dataset.train, dataset.test):
            if split.images.shape[1:] != self.shape or split.images.dtype != torch.uint8:
                found, right = ("x".join(map(str, shape)) for shape in (split.images.shape[1:], self.shape))
                kind = str(split.images.dtype).removeprefix("torch.")
                raise Refusal(f"{place} has images {found} {kind}, not {right} uint8")
            if len(split) == 0 or len(split.images) != len(split.labels):
                raise Refusal(f"{place} has {len(split.images)} images and {len(split)} labels")
            if split.labels.dtype != torch.int64 or split.labels.dim() != 1:
                kind = str(split.labels.dtype).removeprefix("torch.")
                raise Refusal(f"{place} has labels {list(split.labels.shape)} {kind}, not [N] int64")
            if not 0 <= int(split.labels.min()) <= int(split.labels.max()) < self.classes:
                raise Refusal(f"{place} has labels outside 0 to {self.classes - 1}")
        return dataset


def one_line(error: Exception) -> str:
    """The text of an error on one line."""
    return " ".join(str(error).split()) or type(error).__name__
