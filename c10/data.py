"""CIFAR-10, from torchvision's files or from class folders of images."""

from pathlib import Path

import torch

from training.data.dataset import Dataset, DataSource, Split
from training.data.readers import read_class_folders, torchvision_parts
from training.data.transforms import RandomCropFlip

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def read_cifar10(folder: Path) -> Dataset:
    from torchvision.datasets import CIFAR10

    if any((folder / part).is_dir() for part in ("train", "test")):
        return Dataset(*(read_class_folders(folder / part, CLASSES, 32, 32) for part in ("train", "test")))
    # the files are pickles, which could run code: torchvision opens only those with the published MD5
    base, meta = folder / CIFAR10.base_folder, CIFAR10.meta
    published = [*CIFAR10.train_list, *CIFAR10.test_list, (meta["filename"], meta["md5"])]
    parts = torchvision_parts(
        CIFAR10,
        folder,
        "cifar-10-batches-py (this program also reads images train/<class>/* and test/<class>/*)",
        [(folder / CIFAR10.filename, CIFAR10.tgz_md5), *((base / name, md5) for name, md5 in published)],
    )
    images = (torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous() for part in parts)
    labels = (torch.tensor(part.targets, device="cpu") for part in parts)
    return Dataset(*map(Split, images, labels))


CIFAR10 = DataSource(
    "cifar10",
    read_cifar10,
    (3, 32, 32),
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2023, 0.1994, 0.2010),
    augmentation=RandomCropFlip(padding=4),
)
