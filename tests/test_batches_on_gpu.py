"""The kernel that makes training images on a GPU: what it computes, and what happens where it is wrong."""

import importlib.util
from pathlib import Path

import pytest
import torch
import triton_program

import spiking_kernels
from mnist.data import MNIST
from training import data

PROGRAM = Path(__file__).parent / "triton_images.py"
CPU = torch.device("cpu")
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
needs_kernels = pytest.mark.skipif(spiking_kernels.unavailable() is not None, reason="no fused kernels")


@pytest.mark.parametrize("width", [32, 7])
def test_crops_and_flips_are_inverse_maps(width):
    """All of them, beside the picture as well: in 16.16 fixed point they are exact."""
    crops = data.RandomCropFlip(padding=4)
    drawn = torch.cartesian_prod(torch.arange(9), torch.arange(9), torch.arange(2)).to(torch.int32)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(1, 256, (len(drawn), 3, 32, width), generator=generator, dtype=torch.uint8)
    matrices = crops.matrices(drawn, width)
    assert matrices.dtype is torch.int32
    assert torch.equal(data.RandomAffine.apply(images, matrices), crops.apply(images, drawn))


@needs_triton
def test_the_triton_kernel_makes_the_images_that_torch_makes():
    triton_program.interpret(PROGRAM)


@needs_triton
@pytest.mark.parametrize("capabilities", [[90], pytest.param([75, 80, 86, 100], marks=pytest.mark.slow)])
def test_the_triton_kernel_compiles(capabilities, tmp_path):
    triton_program.compile(PROGRAM, tmp_path, *capabilities)


def one_pixel_off(lookup):
    def made(*tensors):
        images = lookup(*tensors)
        images[-1, -1, -1, -1] += 1
        return images

    return made


def failing(lookup):
    def made(*tensors):
        raise RuntimeError("no such\nfunction")

    return made


@needs_kernels
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda lookup: lookup, ""),
        (one_pixel_off, "Training images are made without the kernel: on cpu it makes others than torch does.\n"),
        (
            failing,
            "Training images are made without the kernel: on cpu it fails with RuntimeError: no such function.\n",
        ),
    ],
)
def test_a_gpu_that_makes_other_images_than_torch_leaves_them_to_torch(monkeypatch, capsys, change, said):
    """As tried on the CPU; neither the order of the images nor the augmentation changes."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (50, 1, 28, 28), generator=generator, dtype=torch.uint8)
    split = data.Split(images, torch.arange(50) % 10)

    def batches(fused):
        generator = torch.Generator().manual_seed(3)
        normalisation = data.Normalisation((0.1307,), (0.3081,), CPU)
        return data.TrainingBatches(split, 8, MNIST.augmentation, normalisation, generator, fused=fused)

    expected = [*batches(fused=False)]
    monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)
    monkeypatch.setattr(spiking_kernels, "affine_lookup", change(spiking_kernels.affine_lookup))
    made = batches(fused=True)
    assert made.fused == (not said)
    assert capsys.readouterr().out == said
    for (x, y), (other, label) in zip(made, expected, strict=True):
        assert torch.equal(x, other)
        assert torch.equal(y, label)


@pytest.mark.gpu
@pytest.mark.parametrize("channels", [1, 3])
def test_batches_on_a_gpu_are_those_of_torch(channels):
    device = torch.device("cuda")
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (50, channels, 32, 32), generator=generator, dtype=torch.uint8)
    split = data.Split(images, torch.arange(50) % 10).to(device)
    augmentation = MNIST.augmentation if channels == 1 else data.RandomCropFlip(4)
    epochs = []
    for fused in (True, False):
        normalisation = data.Normalisation((0.4,) * channels, (0.2,) * channels, device)
        generator = torch.Generator().manual_seed(3)
        epochs.append(data.TrainingBatches(split, 8, augmentation, normalisation, generator, fused=fused))
    assert epochs[0].fused
    for (x, _), (y, _) in zip(*epochs, strict=True):
        assert torch.equal(x, y)
