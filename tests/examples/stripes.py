"""A data set in one file: images of stripes, whose period is the class."""

from pathlib import Path

import torch

from training.data import Dataset, DataSource, RandomCropFlip, Split


def read_stripes(folder: Path) -> Dataset:
    """Makes the images; a data set of files would read them from the folder, or download them to it."""

    def split(n: int, seed: int) -> Split:
        labels = torch.arange(n) % 10
        columns = torch.arange(28)
        shift = torch.randint(0, 28, (n, 1), generator=torch.Generator().manual_seed(seed))
        bright = (columns + shift) // (labels.unsqueeze(1) + 1) % 2  # [n, 28]
        return Split((255 * bright).to(torch.uint8).view(n, 1, 1, 28).repeat(1, 1, 28, 1), labels)

    return Dataset(split(40, seed=0), split(20, seed=1))


STRIPES = DataSource(
    "stripes",
    read_stripes,
    shape=(1, 28, 28),
    mean=(0.5,),
    std=(0.5,),
    augmentation=RandomCropFlip(padding=2),
    about="stripes, which are made and not read",
)
