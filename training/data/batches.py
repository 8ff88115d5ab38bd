"""Batches of a data set: order, augmentation and normalisation."""

import math
from collections.abc import Iterator

import torch
from torch import Generator, Tensor

import spiking_kernels
from spiking_kernels.tensors import CPU, flaw
from training.data.dataset import Split
from training.data.transforms import Normalisation, RandomAffine, RandomCropFlip
from training.errors import Refusal

VIEWS = 512  # of batches are made at a time: in a step, each would take longer


class TrainingBatches:
    """The batches of a training epoch: shuffled, augmented and normalised, without the last incomplete batch.

    Args:
        split: the training images, on the device of the network.
        batch_size: at most the number of images.
        normalisation: maps uint8 images to the network's input.
        generator: a CPU generator for the order and the augmentation; only the start of an epoch draws from it.
        fused: makes the batches with a fused kernel if there is one; they are bitwise the same.
        share: the part of each batch to make; the whole batch is drawn.

    Raises:
        Refusal: there are fewer training images than a batch holds.
    """

    def __init__(
        self,
        split: Split,
        batch_size: int,
        augmentation: RandomAffine | RandomCropFlip,
        normalisation: Normalisation,
        generator: Generator,
        fused: bool = False,
        share: slice = slice(None),
    ):
        if batch_size > len(split):
            most = f"{len(split)} (all training images)"
            raise Refusal(f"argument -b/--batch-size: must be at most {most}, not {batch_size}")
        self.split, self.batch_size, self.generator, self.share = split, batch_size, generator, share
        self.augmentation, self.normalisation = augmentation, normalisation
        self.fused = fused and self._kernel_applies()
        self.table = normalisation.table() if self.fused else None

    def __len__(self) -> int:
        return len(self.split) // self.batch_size

    def _kernel_applies(self) -> bool:
        """Whether the kernel computes the same as the other branch of :meth:`_inputs`."""
        images, parts = self.split.images, (self.augmentation, self.normalisation)
        known = type(parts[0]) in (RandomAffine, RandomCropFlip) and type(parts[1]) is Normalisation
        as_made = not any(hasattr(type(part), key) for part in parts for key in vars(part))
        device = images.device if images.is_cuda else CPU
        if not known or not as_made or flaw(images, torch.uint8, device=device) or images.dim() != 4:
            return False
        if images.is_cuda:
            if reason := self._flaw_on_gpu():
                print(f"Training images are made without the kernel: {reason}.", flush=True)
            return reason is None
        in_c = type(self.augmentation) is RandomAffine and images.shape[1] == 1
        return in_c and spiking_kernels.unavailable() is None

    def _flaw_on_gpu(self) -> str | None:
        """Makes a batch by the kernel and by torch; what is wrong, in words, or None.

        A GPU gets its kernel from a compiler that may fail, and this code may never have run on such a GPU.
        """
        images, device = self.split.images, self.split.images.device
        index = torch.arange(self.batch_size, device=device).flip(0)
        drawn = self.augmentation.draw(images[: self.batch_size], Generator("cpu").manual_seed(0))
        matrices = self.augmentation.matrices(drawn, images.shape[3]).to(device)
        try:
            made = spiking_kernels.affine_lookup(images, index, matrices, self.normalisation.table())
            if torch.equal(made, self._plain_inputs(index, drawn.to(device))):
                return None
            return f"on {device} it makes others than torch does"
        except Exception as error:
            return f"on {device} it fails with {type(error).__name__}: {' '.join(str(error).split())[:200]}"

    def make(self, index: Tensor, transforms: Tensor) -> tuple[Tensor, Tensor]:
        """A batch of what :meth:`parts` yields: images, float32 [B, C, H, W], and labels, int64 [B]."""
        return self._inputs(index, transforms), self.split.labels.index_select(0, index)

    def _inputs(self, index: Tensor, transforms: Tensor) -> Tensor:
        if self.fused:
            return spiking_kernels.affine_lookup(self.split.images, index, transforms, self.table)
        return self._plain_inputs(index, transforms)

    def _plain_inputs(self, index: Tensor, drawn: Tensor) -> Tensor:
        return self.normalisation(self.augmentation.apply(self.split.images[index], drawn))

    def parts(self, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields what each batch of an epoch is made of, from batch ``start``: indices, int64 [B], and transforms."""
        device = self.split.images.device
        self.order = torch.randperm(len(self.split), generator=self.generator, device="cpu")
        order = self.order.to(device)
        transforms = self.augmentation.draw(self.split.images, self.generator)
        if self.fused:
            transforms = self.augmentation.matrices(transforms, self.split.images.shape[3])
        transforms = transforms.to(device)
        for begin in range(start, len(self), VIEWS):
            end = min(begin + VIEWS, len(self))
            some = slice(begin * self.batch_size, end * self.batch_size)
            batches = [x[some].unflatten(0, (-1, self.batch_size))[:, self.share] for x in (order, transforms)]
            yield from zip(*(x.unbind() for x in batches), strict=True)

    def epoch(self, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields an epoch's (images, labels) from batch ``start``: float32 [B, C, H, W] and int64 [B]."""
        return (self.make(*parts) for parts in self.parts(start))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.epoch()

    def indices(self, step: int) -> Tensor:
        """The indices of the training images in batch ``step`` of the current epoch: int64 [B]."""
        return self.order[step * self.batch_size : (step + 1) * self.batch_size]


class TestBatches:
    """All images of a split in order, normalised, as (images, labels). The last batch may be smaller."""

    __test__ = False  # not a test class of pytest

    def __init__(self, split: Split, batch_size: int, normalisation: Normalisation):
        self.split, self.batch_size, self.normalisation = split, batch_size, normalisation

    def __len__(self) -> int:
        return math.ceil(len(self.split) / self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        batches = (part.split(self.batch_size) for part in (self.split.images, self.split.labels))
        for images, labels in zip(*batches, strict=True):
            yield self.normalisation(images), labels
