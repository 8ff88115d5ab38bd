"""Data sets and batches, the augmentation against torchvision's image by image."""

import math
import shutil

import numpy as np
import pytest
import torch
from conftest import write_class_folders
from PIL import Image
from torchvision.transforms import InterpolationMode, RandomAffine, RandomCrop, functional

from training import data
from training.options import Refusal

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
    assert all(row < 10 for row, _ in transform(scale=2))


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


# -- data sets -------------------------------------------------------------------------------------


def test_mnist_is_what_the_files_hold(mnist_folder):
    dataset = data.load("mnist", mnist_folder)
    raw = mnist_folder / "MNIST" / "raw"
    for split, part, n in ((dataset.train, "train", 40), (dataset.test, "t10k", 20)):
        assert split.images.shape == (n, 1, 28, 28)
        assert split.images.numpy().tobytes() == (raw / f"{part}-images-idx3-ubyte").read_bytes()[16:]
        assert split.labels.tolist() == list((raw / f"{part}-labels-idx1-ubyte").read_bytes()[8:])


def test_real_mnist(real_data):
    dataset = data.load("mnist", real_data)
    assert dataset.train.images.shape == (60_000, 1, 28, 28)
    assert dataset.test.images.shape == (10_000, 1, 28, 28)
    assert dataset.train.labels[:5].tolist() == [5, 0, 4, 1, 9]


def test_digits_are_scikit_learns_with_a_fixed_split(tmp_path):
    from sklearn.datasets import load_digits

    digits = load_digits()
    dataset = data.load("digits", tmp_path)
    assert (len(dataset.train), len(dataset.test)) == (1498, 299)
    assert dataset.train.images.shape[1:] == (1, 28, 28)
    assert dataset.train.images.dtype == torch.uint8
    assert dataset.test.labels.tolist() == digits.target[5::6].tolist()
    # the same pictures, larger: each quarter's mean brightness is the original's
    small = torch.from_numpy(digits.images[5::6]).float() * 255 / 16
    for rows in (0, 1):
        large = dataset.test.images[:, 0, 14 * rows : 14 * (rows + 1)].float().mean((1, 2))
        expected = small[:, 4 * rows : 4 * (rows + 1)].mean((1, 2))
        assert (large - expected).abs().max() < 12
    assert dataset.train.images.max() == 255
    assert data.load("digits", tmp_path).fingerprint() == dataset.fingerprint()


def test_class_folders(cifar_folder):
    dataset = data.load("cifar10", cifar_folder)
    for split, part in ((dataset.train, "train"), (dataset.test, "test")):
        assert split.images.shape == (10, 3, 32, 32)
        assert split.labels.tolist() == list(range(10))
        with Image.open(cifar_folder / part / "automobile" / "0000.png") as image:
            assert np.array_equal(split.images[1].permute(1, 2, 0).numpy(), np.asarray(image))


def test_cifar10_by_torchvision(tmp_path, monkeypatch):
    class Fake:
        def __init__(self, root, train, download):
            assert (root, download) == (tmp_path, True)
            n = 4 if train else 2
            self.data = np.arange(n * 32 * 32 * 3, dtype=np.uint32).astype(np.uint8).reshape(n, 32, 32, 3)
            self.targets = list(range(n))

    monkeypatch.setattr("torchvision.datasets.CIFAR10", Fake)
    dataset = data.load("cifar10", tmp_path)
    assert dataset.train.images.shape == (4, 3, 32, 32)
    assert torch.equal(dataset.train.images[1, 2], torch.from_numpy(Fake(tmp_path, True, True).data[1, :, :, 2]))
    assert dataset.test.labels.tolist() == [0, 1]


@pytest.mark.parametrize(("name", "dataset_class"), [("mnist", "MNIST"), ("cifar10", "CIFAR10")])
def test_data_that_cannot_be_had_are_refused_with_the_ways_out(tmp_path, monkeypatch, name, dataset_class):
    def no_network(*args, **kwargs):
        raise OSError("Name or service not known")

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    with pytest.raises(Refusal) as refusal:
        data.load(name, tmp_path)
    text = str(refusal.value)
    assert "--dataset-dir" in text
    assert str(tmp_path) in text
    assert "Name or service not known" in text  # what was tried
    assert "MNIST/raw" in text if name == "mnist" else "cifar-10-batches-py" in text  # where to put the files
    assert "--dataset digits" in text


def test_class_folders_that_are_not_cifar10_are_refused(tmp_path):
    names = [*data.CIFAR10_CLASSES[:9], "lorry"]
    write_class_folders(tmp_path / "names", names)
    with pytest.raises(Refusal, match=r"must hold CIFAR-10's ten class folders.*truck.*found: .*lorry"):
        data.load("cifar10", tmp_path / "names")
    write_class_folders(tmp_path / "sizes", size=33)
    with pytest.raises(Refusal, match=r"0000\.\w+ is 33x33; CIFAR-10 images are 32x32"):
        data.load("cifar10", tmp_path / "sizes")
    write_class_folders(tmp_path / "no test")
    shutil.rmtree(tmp_path / "no test" / "test")
    with pytest.raises(Refusal, match=r"test must hold CIFAR-10's ten class folders.*found: none"):
        data.load("cifar10", tmp_path / "no test")
    write_class_folders(tmp_path / "damaged")
    (tmp_path / "damaged" / "train" / "cat" / "0001.png").write_bytes(b"not an image")
    with pytest.raises(Refusal, match=r"0001.png cannot be read as an image"):
        data.load("cifar10", tmp_path / "damaged")
    for part in ("train", "test"):
        for name in data.CIFAR10_CLASSES:
            (tmp_path / "empty" / part / name).mkdir(parents=True)
    with pytest.raises(Refusal, match="holds no PNG or JPEG images"):
        data.load("cifar10", tmp_path / "empty")


@pytest.mark.parametrize("damage", ["truncated", "labels", "size", "type", "empty"])
def test_damaged_mnist_files_are_refused(mnist_folder, tmp_path, damage):
    folder = tmp_path / "data"
    shutil.copytree(mnist_folder, folder)
    if damage == "truncated":
        path = folder / "MNIST" / "raw" / "train-images-idx3-ubyte"
        path.write_bytes(path.read_bytes()[:-1])
    elif damage == "labels":
        path = folder / "MNIST" / "raw" / "t10k-labels-idx1-ubyte"
        path.write_bytes(path.read_bytes()[:-1] + b"\x0a")
    else:
        path = folder / "MNIST" / "raw" / "t10k-images-idx3-ubyte"
        header = np.array([0xB03 if damage == "type" else 0x803, 20, 28, 14 if damage == "size" else 28], dtype=">i4")
        path.write_bytes(header.tobytes() + bytes(20 * 28 * {"size": 14, "type": 56, "empty": 0}[damage]))
    with pytest.raises(Refusal, match="--dataset-dir") as refusal:
        data.load("mnist", folder)
    said = {"labels": "labels outside 0 to 9", "size": "images 1x28x14 uint8, not 1x28x28 uint8", "type": "int16"}
    assert said.get(damage, "MNIST is not usable") in str(refusal.value)


def test_a_folder_that_cannot_be_read_is_refused(cifar_folder, monkeypatch):
    def forbidden(self):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(data.Path, "iterdir", forbidden)
    with pytest.raises(Refusal, match=r"--dataset-dir: .* cannot be read: .*Permission denied"):
        data.load("cifar10", cifar_folder)


def test_fingerprints_tell_data_sets_apart(mnist_folder):
    dataset = data.load("mnist", mnist_folder)
    images = dataset.test.images.clone()
    images[3, 0, 5, 5] ^= 1
    changed = data.Dataset(dataset.train, data.Split(images, dataset.test.labels))
    labels = dataset.train.labels.flip(0)
    relabelled = data.Dataset(data.Split(dataset.train.images, labels), dataset.test)
    assert len({d.fingerprint() for d in (dataset, changed, relabelled)}) == 3
