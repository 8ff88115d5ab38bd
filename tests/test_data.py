"""Data sets and batches, the augmentation against torchvision's image by image."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, RandomAffine, RandomCrop, functional

from training import data
from training.data import batches
from training.errors import Refusal

CPU = torch.device("cpu")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# -- augmentation ----------------------------------------------------------------------------------

AFFINE = data.RandomAffine(degrees=30, translate=(0.15, 0.15), scale=(0.85, 1.11))


def noise_images(n, channels=1, size=28):
    return torch.randint(1, 256, (n, channels, size, size), generator=generator(), dtype=torch.uint8)


def test_affine_is_torchvisions_pixel_for_pixel():
    n = 500
    images = noise_images(n)
    uniform = torch.rand(4, n, generator=generator(1), dtype=torch.float64)
    angle, scale = (uniform[0] - 0.5) * 60, 0.85 + uniform[1] * 0.26
    shift_x, shift_y = ((uniform[2] - 0.5) * 8.4).round(), ((uniform[3] - 0.5) * 8.4).round()
    ours = AFFINE.apply(images, AFFINE.inverse(angle, shift_x, shift_y, scale, 28, 28))
    for i in range(n):
        theirs = functional.affine(
            Image.fromarray(images[i, 0].numpy()),
            angle=float(angle[i]),
            translate=[int(shift_x[i]), int(shift_y[i])],
            scale=float(scale[i]),
            shear=[0.0, 0.0],
            interpolation=InterpolationMode.NEAREST,
            fill=0,
        )
        assert np.array_equal(ours[i, 0].numpy(), np.asarray(theirs)), i


def test_affine_moves_the_way_that_its_arguments_say():
    image = torch.zeros(1, 1, 28, 28, dtype=torch.uint8)
    image[0, 0, 10, 14] = 255  # above the centre

    def transform(angle=0.0, shift_x=0.0, shift_y=0.0, scale=1.0):
        numbers = [torch.tensor([x], dtype=torch.float64) for x in (angle, shift_x, shift_y, scale)]
        return AFFINE.apply(image, AFFINE.inverse(*numbers, 28, 28))[0, 0].nonzero().tolist()

    assert transform() == [[10, 14]]
    assert transform(shift_x=3, shift_y=-2) == [[8, 17]]
    assert transform(angle=90) == [[14, 17]]  # clockwise
    assert transform(scale=2) == [[6, 14], [6, 15], [7, 14], [7, 15]]


def test_affine_parameters_have_torchvisions_distribution():
    """Angle, shifts and scale, recovered from the maps, against torchvision's own draws."""
    n = 20_000
    maps = AFFINE.draw(torch.empty(n, 1, 28, 28, dtype=torch.uint8), generator()).double() / 65536
    a, b, c, d, e, f = maps.unbind(1)
    scale = 1 / (a**2 + b**2).sqrt()
    angle = torch.atan2(b, a) * 180 / math.pi
    # the output centre, moved by the shift, maps to the input centre
    forward = torch.linalg.inv(torch.stack([torch.stack([a, b], 1), torch.stack([d, e], 1)], 1))
    shift = (forward @ torch.stack([14 - c, 14 - f], 1).unsqueeze(2)).squeeze(2) - 13.5
    assert (shift - shift.round()).abs().max() < 0.01  # whole pixels
    torch.manual_seed(0)
    theirs = [RandomAffine.get_params([-30.0, 30.0], [0.15, 0.15], [0.85, 1.11], None, [28, 28]) for _ in range(n)]
    for ours, expected in [
        (angle, [p[0] for p in theirs]),
        (shift[:, 0].round(), [p[1][0] for p in theirs]),
        (shift[:, 1].round(), [p[1][1] for p in theirs]),
        (scale, [p[2] for p in theirs]),
    ]:
        expected = torch.tensor(expected, dtype=torch.float64)
        # Kolmogorov-Smirnov: at most 0.02 with 20 000 draws each, but for one case in a thousand
        points = torch.cat([ours, expected]).round(decimals=3).unique()
        ours, expected = (x.round(decimals=3).sort().values for x in (ours, expected))
        distance = torch.searchsorted(ours, points, right=True) - torch.searchsorted(expected, points, right=True)
        assert distance.abs().max() / n < 0.02
    # independent of each other
    together = torch.stack([angle, shift[:, 0], shift[:, 1], scale])
    assert (torch.corrcoef(together) - torch.eye(4)).abs().max() < 0.03


def test_crop_and_flip_are_torchvisions_exactly():
    images = noise_images(200, channels=3, size=32)
    augmentation = data.RandomCropFlip(padding=4)
    parameters = augmentation.draw(images, generator())
    ours = augmentation.apply(images, parameters)
    for i, (top, left, flip) in enumerate(parameters.tolist()):
        padded = functional.pad(Image.fromarray(images[i].permute(1, 2, 0).numpy()), 4, fill=0)
        theirs = functional.crop(padded, top, left, 32, 32)
        theirs = functional.hflip(theirs) if flip else theirs
        assert np.array_equal(ours[i].permute(1, 2, 0).numpy(), np.asarray(theirs)), i


def test_crop_and_flip_have_torchvisions_distribution():
    parameters = data.RandomCropFlip(4).draw(torch.empty(30_000, 3, 32, 32, dtype=torch.uint8), generator())
    theirs = {RandomCrop.get_params(torch.empty(3, 40, 40), (32, 32))[0] for _ in range(500)}
    for column in (0, 1):
        values, counts = parameters[:, column].unique(return_counts=True)
        assert set(values.tolist()) == theirs == set(range(9))
        assert (counts / 30_000 - 1 / 9).abs().max() < 0.01
    assert abs(parameters[:, 2].float().mean() - 0.5) < 0.01
    assert torch.corrcoef(parameters.T.float()).fill_diagonal_(0).abs().max() < 0.03


def test_normalisation_is_totensors_and_normalizes():
    images = noise_images(3, channels=3, size=32)
    mean, std = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
    ours = data.Normalisation(mean, std, CPU)(images)
    for image, expected in zip(ours, images, strict=True):
        pil = Image.fromarray(expected.permute(1, 2, 0).numpy())
        assert torch.equal(image, functional.normalize(functional.to_tensor(pil), mean, std))


# -- batches ---------------------------------------------------------------------------------------


class NoAugmentation:
    """Moves no pixel, but remembers the parameters that each image got."""

    def draw(self, images, generator):
        return torch.arange(len(images))

    def apply(self, images, parameters):
        return images


def labelled(n):
    """Images whose every pixel is the number of the image."""
    numbers = torch.arange(n)
    return data.Split(numbers.to(torch.uint8).view(n, 1, 1, 1).expand(n, 1, 28, 28).contiguous(), numbers)


def training_batches(n=23, batch_size=5, augmentation=None, seed=0):
    normalisation = data.Normalisation((0.0,), (1 / 255,), CPU)
    return data.TrainingBatches(
        labelled(n), batch_size, augmentation or NoAugmentation(), normalisation, generator(seed)
    )


def test_training_batches_are_shuffled_and_the_last_incomplete_one_is_dropped():
    batches = training_batches()
    assert len(batches) == 4
    epochs = [list(batches), list(batches)]
    for epoch in epochs:
        assert [len(labels) for _, labels in epoch] == [5] * 4
        for images, labels in epoch:
            assert images.shape == (5, 1, 28, 28)
            assert torch.equal(images[:, 0, 0, 0].round().long(), labels)  # each image with its label
        assert torch.cat([labels for _, labels in epoch]).unique().numel() == 20  # none twice
    orders = [torch.cat([labels for _, labels in epoch]).tolist() for epoch in epochs]
    assert orders[0] != orders[1]
    assert sorted(orders[0]) != orders[0]
    assert sorted(set(orders[0])) != sorted(set(orders[1]))  # not the same ones are dropped


def test_the_seed_gives_the_batches():
    first, second, other = (list(training_batches(augmentation=AFFINE, seed=s)) for s in (1, 1, 2))
    for (a, x), (b, y) in zip(first, second, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(x, y)
    assert not torch.equal(first[0][1], other[0][1])
    torch.manual_seed(99)  # the default generator has no part in it
    assert torch.equal(next(iter(training_batches(augmentation=AFFINE, seed=1)))[0], first[0][0])


def test_a_batch_is_made_of_its_parts():
    """Of small tensors, so that a captured graph can do the rest."""
    first, second = training_batches(augmentation=AFFINE), training_batches(augmentation=AFFINE)
    for start in (0, 2):
        made = [first.make(*parts) for parts in first.parts(start)]
        assert len(made) == 4 - start
        for (images, labels), (expected, expected_labels) in zip(made, second.epoch(start), strict=True):
            assert torch.equal(images, expected)
            assert torch.equal(labels, expected_labels)
    assert [(part.shape[0], part.dim()) for part in next(first.parts())] == [(5, 1), (5, 2)]


@pytest.mark.parametrize("share", [slice(None), slice(1, 3)])
def test_batches_do_not_depend_on_how_many_views_are_made_at_a_time(monkeypatch, share):
    epochs = []
    for views in (1, 3, batches.VIEWS):
        monkeypatch.setattr(batches, "VIEWS", views)
        made = training_batches(augmentation=AFFINE)
        made.share = share
        epochs.append([*made.parts(0), *made.parts(1)])
        for step, (index, _) in enumerate(epochs[-1][4:], 1):
            assert torch.equal(index, made.indices(step)[share])
    assert len(epochs[0]) == 4 + 3
    assert len(epochs[0][0][0]) == len(range(5)[share])
    for epoch in epochs[1:]:
        for parts, expected in zip(epoch, epochs[0], strict=True):
            assert all(map(torch.equal, parts, expected))


def test_each_image_has_its_own_augmentation_and_a_new_one_each_epoch():
    split = data.Split(noise_images(1).expand(40, 1, 28, 28).contiguous(), torch.zeros(40, dtype=torch.long))
    batches = data.TrainingBatches(split, 20, AFFINE, data.Normalisation((0.0,), (1.0,), CPU), generator())
    images = torch.cat([images for _ in range(2) for images, _ in batches])
    assert len(images.flatten(1).unique(dim=0)) == 80


def test_a_batch_larger_than_the_training_set_is_refused():
    assert len(training_batches(n=5, batch_size=5)) == 1
    with pytest.raises(Refusal, match=r"-b/--batch-size: must be at most 4"):
        training_batches(n=4, batch_size=5)


def test_test_batches_are_all_images_in_order():
    normalisation = data.Normalisation((0.0,), (1 / 255,), CPU)
    batches = list(data.TestBatches(labelled(23), 10, normalisation))
    assert [len(labels) for _, labels in batches] == [10, 10, 3]
    assert torch.cat([labels for _, labels in batches]).tolist() == list(range(23))
    assert torch.cat([images for images, _ in batches])[:, 0, 0, 0].round().tolist() == list(range(23))
