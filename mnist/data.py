"""The data sets of the MNIST network: MNIST, and scikit-learn's small digits."""

from dataclasses import replace
from pathlib import Path

import torch

from training.data.dataset import Dataset, DataSource, Split
from training.data.readers import read_idx, torchvision_parts
from training.data.transforms import RandomAffine
from training.errors import Refusal


def read_mnist(folder: Path) -> Dataset:
    from torchvision.datasets import MNIST

    raw = folder / "MNIST" / "raw"
    parts = [[raw / f"{part}-{what}-ubyte" for what in ("images-idx3", "labels-idx1")] for part in ("train", "t10k")]
    if missing := [(name, md5) for name, md5 in MNIST.resources if not (raw / name.removesuffix(".gz")).is_file()]:
        # torchvision would download all of them, over those that are there, which may be others than the published ones
        only_these = type("MNIST", (MNIST,), {"resources": missing})
        published = ((raw / name, md5) for name, md5 in missing)
        torchvision_parts(only_these, folder, "MNIST/raw/{train,t10k}-{images-idx3,labels-idx1}-ubyte", published)
    # not read by torchvision: it checks the MD5 only of downloads, and its assertions have no message
    return Dataset(
        *(Split(read_idx(images, (28, 28)).unsqueeze(1), read_idx(labels).long()) for images, labels in parts)
    )


def read_digits(folder: Path) -> Dataset:
    """scikit-learn's digits: 1797 images of 8x8 pixels, part of the UCI Optical Recognition of Handwritten Digits.

    Scaled to 28x28 (bilinear) for MNIST's network. Every sixth image is a test image. The same people wrote both
    parts, so the accuracy is not comparable to MNIST's.
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


MNIST = DataSource(
    "mnist",
    read_mnist,
    (1, 28, 28),
    mean=(0.1307,),
    std=(0.3081,),
    augmentation=RandomAffine(degrees=30, translate=(0.15, 0.15), scale=(0.85, 1.11)),
)

DIGITS = replace(  # with MNIST's mean and std, whose place the digits take in trials
    MNIST, name="digits", read=read_digits, about="scikit-learn's 1797 small digits, without a download"
)
