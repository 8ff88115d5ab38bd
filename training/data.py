"""Batches of a data set: order, augmentation and normalisation.

All randomness comes from one CPU generator, so the batches of a seed are the same on every device.
"""

import math
from collections.abc import Iterator

import torch
from torch import Generator, Tensor

import spiking_kernels
from spiking_kernels.tensors import flaw
from training.datasets import CIFAR10_CLASSES, Dataset, Split, load
from training.errors import Refusal

__all__ = [
    "CIFAR10_CLASSES",
    "Dataset",
    "Normalisation",
    "RandomAffine",
    "RandomCropFlip",
    "Split",
    "TestBatches",
    "TrainingBatches",
    "load",
]


class RandomAffine:
    """torchvision's RandomAffine (nearest, fill 0) for a batch of uint8 images, each with its own parameters.

    The inverse map is evaluated in 16.16 fixed point, as Pillow does for a PIL image.

    Args:
        degrees: the angle is uniform in [-degrees, degrees].
        translate: largest shifts, as fractions of width and height; a shift is a whole number of pixels.
        scale: range of the scale factor.
    """

    def __init__(self, degrees: float, translate: tuple[float, float], scale: tuple[float, float]):
        self.degrees, self.translate, self.scale = degrees, translate, scale

    def draw(self, images: Tensor, generator: Generator) -> Tensor:
        """Draws the transform of every image [N, C, H, W]; returns int32 [N, 6], for :meth:`apply`."""
        n, _, height, width = images.shape
        uniform = torch.rand(4, n, generator=generator, dtype=torch.float64, device="cpu")
        angle = (2 * uniform[0] - 1) * self.degrees
        shift_x = ((2 * uniform[1] - 1) * (self.translate[0] * width)).round()
        shift_y = ((2 * uniform[2] - 1) * (self.translate[1] * height)).round()
        scale = self.scale[0] + uniform[3] * (self.scale[1] - self.scale[0])
        return self.inverse(angle, shift_x, shift_y, scale, height, width)

    @staticmethod
    def inverse(angle: Tensor, shift_x: Tensor, shift_y: Tensor, scale: Tensor, height: int, width: int) -> Tensor:
        """The inverse maps, output to input pixel, in 16.16 fixed point.

        With x, y the output pixel, the input pixel is (a x + b y + c, d x + e y + f) / 65536, rounded down.

        Args:
            angle: degrees, clockwise, float64 [N]; rotation about the centre, before the shift.
            shift_x: pixels to the right, float64 [N].
            shift_y: pixels down, float64 [N].
            scale: scale factors, float64 [N].

        Returns:
            a, b, c, d, e, f of every image, int32 [N, 6].
        """
        radians = angle * (math.pi / 180)
        cos, sin = radians.cos() / scale, radians.sin() / scale
        centre_x, centre_y = width * 0.5, height * 0.5
        offset_x = cos * (-centre_x - shift_x) + sin * (-centre_y - shift_y) + centre_x
        offset_y = -sin * (-centre_x - shift_x) + cos * (-centre_y - shift_y) + centre_y
        # pixel centres lie at halves
        start_x = offset_x + cos * 0.5 + sin * 0.5
        start_y = offset_y - sin * 0.5 + cos * 0.5
        matrices = torch.stack([cos, sin, start_x, -sin, cos, start_y], dim=1)
        return (matrices * 65536 + 0.5).floor().to(torch.int32)

    @staticmethod
    def apply(images: Tensor, matrices: Tensor) -> Tensor:
        """Transforms images, uint8 [N, C, H, W], by matrices, int32 [N, 6]."""
        n, channels, height, width = images.shape
        x = torch.arange(width, dtype=torch.int32, device=images.device)
        y = torch.arange(height, dtype=torch.int32, device=images.device).unsqueeze(1)
        a, b, c, d, e, f = matrices.view(n, 6, 1, 1).unbind(1)
        source_x = (a * x + (b * y + c)) >> 16  # [N, H, W]
        source_y = (d * x + (e * y + f)) >> 16
        inside = (source_x >= 0) & (source_x < width) & (source_y >= 0) & (source_y < height)
        index = torch.where(inside, source_y * width + source_x, 0).long().view(n, 1, -1)
        picked = images.flatten(2).gather(2, index.expand(n, channels, -1)).view(images.shape)
        return picked * inside.unsqueeze(1)


class RandomCropFlip:
    """torchvision's RandomCrop (padding with 0) and RandomHorizontalFlip for a batch of uint8 images."""

    def __init__(self, padding: int):
        self.padding = padding

    def draw(self, images: Tensor, generator: Generator) -> Tensor:
        """Draws the transform of every image; returns top, left (of the padded image) and flip, int32 [N, 3]."""
        n = len(images)
        corner = torch.randint(0, 2 * self.padding + 1, (n, 2), generator=generator, device="cpu")
        flip = torch.randint(0, 2, (n, 1), generator=generator, device="cpu")
        return torch.cat([corner, flip], dim=1).to(torch.int32)

    def apply(self, images: Tensor, parameters: Tensor) -> Tensor:
        """Transforms images, uint8 [N, C, H, W], by parameters, int32 [N, 3]."""
        n, channels, height, width = images.shape
        top, left, flip = parameters.view(n, 3, 1).unbind(1)  # [N, 1]
        column = torch.arange(width, dtype=torch.int32, device=images.device)
        row = torch.arange(height, dtype=torch.int32, device=images.device)
        source_x = torch.where(flip.bool(), width - 1 - column, column) + left - self.padding  # [N, W]
        source_y = row + top - self.padding  # [N, H]
        inside_x, inside_y = (source_x >= 0) & (source_x < width), (source_y >= 0) & (source_y < height)
        index = source_y.clamp(0, height - 1).unsqueeze(2) * width + source_x.clamp(0, width - 1).unsqueeze(1)
        index = index.long().view(n, 1, -1).expand(n, channels, -1)
        picked = images.flatten(2).gather(2, index).view(images.shape)
        return picked * (inside_y.unsqueeze(2) & inside_x.unsqueeze(1)).unsqueeze(1)


class Normalisation:
    """Maps uint8 pixels to (pixel / 255 - mean) / std, per channel, as ToTensor and Normalize do."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...], device: torch.device):
        self.mean = torch.tensor(mean, dtype=torch.float32, device=device).view(-1, 1, 1)
        self.std = torch.tensor(std, dtype=torch.float32, device=device).view(-1, 1, 1)

    def table(self) -> Tensor:
        """What each pixel value becomes, float32 [256]; for images of one channel."""
        return self(torch.arange(256, device=self.mean.device).view(1, 1, 256)).flatten()

    def __call__(self, images: Tensor) -> Tensor:
        return images.float().div_(255).sub_(self.mean).div_(self.std)


class TrainingBatches:
    """The batches of training epochs: shuffled, augmented, normalised, the last incomplete one dropped.

    Args:
        split: the training part, on the device of the network.
        batch_size: at most the number of images.
        augmentation: :class:`RandomAffine` or :class:`RandomCropFlip`.
        normalisation: from uint8 to the network's input.
        generator: of the order and of the augmentation, on the CPU; each epoch draws from it once, at its start.
        fused: let a fused kernel make the batches where there is one, bitwise the same.

    Raises:
        Refusal: the training part is smaller than a batch.
    """

    def __init__(
        self,
        split: Split,
        batch_size: int,
        augmentation: RandomAffine | RandomCropFlip,
        normalisation: Normalisation,
        generator: Generator,
        fused: bool = False,
    ):
        if batch_size > len(split):
            raise Refusal(
                f"argument -b/--batch-size: must be at most {len(split)}, the training images, not {batch_size}"
            )
        self.split, self.batch_size, self.generator = split, batch_size, generator
        self.augmentation, self.normalisation = augmentation, normalisation
        self.fused = fused and self._kernel_applies()
        self.table = normalisation.table() if self.fused else None

    def __len__(self) -> int:
        return len(self.split) // self.batch_size

    def _kernel_applies(self) -> bool:
        """Whether affine_lookup computes what _inputs does otherwise."""
        images, parts = self.split.images, (self.augmentation, self.normalisation)
        known = [type(part) for part in parts] == [RandomAffine, Normalisation]
        as_made = not any(hasattr(type(part), key) for part in parts for key in vars(part))
        takes = flaw(images, torch.uint8) is None and images.dim() == 4 and images.shape[1] == 1
        return known and as_made and takes and spiking_kernels.unavailable() is None

    def _inputs(self, index: Tensor, transforms: Tensor) -> Tensor:
        """The images of one batch, as the network takes them."""
        if self.fused:
            return spiking_kernels.affine_lookup(self.split.images, index, transforms, self.table)
        return self.normalisation(self.augmentation.apply(self.split.images[index], transforms))

    def epoch(self, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields the (images, labels) of one epoch from batch ``start`` on: float32 [B, C, H, W] and int64 [B]."""
        device = self.split.images.device
        self.order = torch.randperm(len(self.split), generator=self.generator, device="cpu")
        order = self.order.to(device)
        transforms = self.augmentation.draw(self.split.images, self.generator).to(device)
        labels = self.split.labels[order]
        for step in range(start, len(self)):
            batch = slice(step * self.batch_size, (step + 1) * self.batch_size)
            yield self._inputs(order[batch], transforms[batch]), labels[batch]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.epoch()

    def indices(self, step: int) -> Tensor:
        """Which training images the batch ``step`` of the epoch begun has, int64 [B]."""
        return self.order[step * self.batch_size : (step + 1) * self.batch_size]


class TestBatches:
    """All images of a split in their order, normalised: (images, labels), the last batch as it comes."""

    __test__ = False  # not a test class, whatever pytest thinks of its name

    def __init__(self, split: Split, batch_size: int, normalisation: Normalisation):
        self.split, self.batch_size, self.normalisation = split, batch_size, normalisation

    def __len__(self) -> int:
        return math.ceil(len(self.split) / self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(self.split), self.batch_size):
            batch = slice(start, start + self.batch_size)
            yield self.normalisation(self.split.images[batch]), self.split.labels[batch]
