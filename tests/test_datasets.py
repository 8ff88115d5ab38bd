"""Data sets read from their files, and what is refused in their place."""

import gzip
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from conftest import write_class_folders
from PIL import Image

from c10.data import CIFAR10, CLASSES
from mnist.data import DIGITS, MNIST
from training.data import Dataset, Split
from training.errors import Refusal
from training.files.locks import Lock

SOURCES = {source.name: source for source in (MNIST, DIGITS, CIFAR10)}


def test_mnist_is_what_the_files_hold(mnist_folder):
    dataset = MNIST.load(mnist_folder)
    raw = mnist_folder / "MNIST" / "raw"
    for split, part, n in ((dataset.train, "train", 40), (dataset.test, "t10k", 20)):
        assert split.images.shape == (n, 1, 28, 28)
        assert split.images.numpy().tobytes() == (raw / f"{part}-images-idx3-ubyte").read_bytes()[16:]
        assert split.labels.tolist() == list((raw / f"{part}-labels-idx1-ubyte").read_bytes()[8:])


def test_real_mnist(real_data):
    dataset = MNIST.load(real_data)
    assert dataset.train.images.shape == (60_000, 1, 28, 28)
    assert dataset.test.images.shape == (10_000, 1, 28, 28)
    assert dataset.train.labels[:5].tolist() == [5, 0, 4, 1, 9]


def test_digits_are_scikit_learns_with_a_fixed_split(tmp_path):
    from sklearn.datasets import load_digits

    digits = load_digits()
    dataset = DIGITS.load(tmp_path)
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
    assert DIGITS.load(tmp_path).fingerprint() == dataset.fingerprint()


def test_class_folders(cifar_folder):
    dataset = CIFAR10.load(cifar_folder)
    for split, part in ((dataset.train, "train"), (dataset.test, "test")):
        assert split.images.shape == (10, 3, 32, 32)
        assert split.labels.tolist() == list(range(10))
        with Image.open(cifar_folder / part / "automobile" / "0000.png") as image:
            assert np.array_equal(split.images[1].permute(1, 2, 0).numpy(), np.asarray(image))


def test_data_are_on_the_cpu_whatever_torchs_default(cifar_folder, mnist_folder):
    for name, folder in (("cifar10", cifar_folder), ("mnist", mnist_folder), ("digits", mnist_folder)):
        with torch.device("meta"):
            dataset = SOURCES[name].load(folder)
        for split in (dataset.train, dataset.test):
            assert (split.images.device.type, split.labels.device.type) == ("cpu", "cpu")


def test_the_experiments_augment_as_published():
    assert vars(MNIST.augmentation) == {"degrees": 30, "translate": (0.15, 0.15), "scale": (0.85, 1.11)}
    assert vars(CIFAR10.augmentation) == {"padding": 4}
    assert DIGITS.augmentation == MNIST.augmentation


def test_cifar10_by_torchvision(tmp_path, monkeypatch):
    class Fake(torchvision.datasets.CIFAR10):
        def __init__(self, root, train, download):
            assert root == tmp_path
            if not download:
                raise RuntimeError("Dataset not found or corrupted.")
            n = 4 if train else 2
            self.data = np.arange(n * 32 * 32 * 3, dtype=np.uint32).astype(np.uint8).reshape(n, 32, 32, 3)
            self.targets = list(range(n))

    monkeypatch.setattr("torchvision.datasets.CIFAR10", Fake)
    dataset = CIFAR10.load(tmp_path)
    assert dataset.train.images.shape == (4, 3, 32, 32)
    assert torch.equal(dataset.train.images[1, 2], torch.from_numpy(Fake(tmp_path, True, True).data[1, :, :, 2]))
    assert dataset.test.labels.tolist() == [0, 1]


def test_a_missing_file_of_mnist_is_downloaded_alone(tmp_path, mnist_folder, monkeypatch):
    """The others may be the user's own."""
    shutil.copytree(mnist_folder, tmp_path / "data")
    raw = tmp_path / "data" / "MNIST" / "raw"
    missing = raw / "t10k-labels-idx1-ubyte"
    content = missing.read_bytes()
    missing.unlink()
    before, fetched = {path: path.read_bytes() for path in raw.iterdir()}, []

    def fetch(url, download_root, filename, md5):
        fetched.append((Path(download_root) / filename, md5))
        missing.write_bytes(content)

    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", fetch)
    dataset = MNIST.load(tmp_path / "data")
    assert dataset.fingerprint() == MNIST.load(mnist_folder).fingerprint()
    assert fetched == [(raw / "t10k-labels-idx1-ubyte.gz", "ec29112dd5afa0611ce80d1b7f02629c")]
    for path, bytes_before in before.items():
        assert path.read_bytes() == bytes_before


def test_one_process_downloads_and_the_others_wait(tmp_path, monkeypatch, capsys):
    calls, lock = [], Lock(tmp_path)

    class Fake(torchvision.datasets.CIFAR10):
        def __init__(self, root, train, download):
            calls.append(download)
            if not download:
                raise RuntimeError("Dataset not found or corrupted.")
            self.data, self.targets = np.zeros((1, 32, 32, 3), np.uint8), [0]

    monkeypatch.setattr("torchvision.datasets.CIFAR10", Fake)
    monkeypatch.setattr("time.sleep", lambda seconds: (calls.append("waits"), lock.release()))
    assert lock.acquire()
    CIFAR10.load(tmp_path)
    assert calls == [False, "waits", True, True]
    assert capsys.readouterr().out == f"Waiting for another process, which downloads to {tmp_path}.\n"
    assert lock.acquire()  # it is free again
    lock.release()


def test_a_class_without_images_is_refused(tmp_path, cifar_folder):
    shutil.copytree(cifar_folder, tmp_path / "data")
    for image in (tmp_path / "data" / "test" / "cat").iterdir():
        image.rename(image.with_suffix(".txt"))
    with pytest.raises(Refusal, match=r"test/cat holds no PNG or JPEG images$"):
        CIFAR10.load(tmp_path / "data")


@pytest.mark.parametrize(("name", "dataset_class"), [("mnist", "MNIST"), ("cifar10", "CIFAR10")])
def test_data_that_cannot_be_had_are_refused_with_the_ways_out(tmp_path, monkeypatch, name, dataset_class):
    def no_network(*args, **kwargs):
        raise OSError("Name or service not known")

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    with pytest.raises(Refusal) as refusal:
        SOURCES[name].load(tmp_path)
    text = str(refusal.value)
    assert "--dataset-dir" in text
    assert str(tmp_path) in text
    assert "Name or service not known" in text  # what was tried
    assert "MNIST/raw" in text if name == "mnist" else "cifar-10-batches-py" in text  # where to put the files
    assert "--dataset digits" in text


def test_class_folders_that_are_not_cifar10_are_refused(tmp_path):
    names = [*CLASSES[:9], "lorry"]
    write_class_folders(tmp_path / "names", names)
    with pytest.raises(Refusal, match=r"must hold the 10 class folders .*truck.*found: .*lorry"):
        CIFAR10.load(tmp_path / "names")
    write_class_folders(tmp_path / "sizes", size=33)
    with pytest.raises(Refusal, match=r"0000\.\w+ cannot be read as .*: it is 33x33, not 32x32"):
        CIFAR10.load(tmp_path / "sizes")
    write_class_folders(tmp_path / "no test")
    shutil.rmtree(tmp_path / "no test" / "test")
    with pytest.raises(Refusal, match=r"test must hold the 10 class folders .*found: none"):
        CIFAR10.load(tmp_path / "no test")
    write_class_folders(tmp_path / "damaged")
    (tmp_path / "damaged" / "train" / "cat" / "0001.png").write_bytes(b"not an image")
    with pytest.raises(Refusal, match=r"0001.png cannot be read as .*: it is damaged, or neither PNG nor JPEG"):
        CIFAR10.load(tmp_path / "damaged")
    for part in ("train", "test"):
        for name in CLASSES:
            (tmp_path / "empty" / part / name).mkdir(parents=True)
    with pytest.raises(Refusal, match="holds no PNG or JPEG images"):
        CIFAR10.load(tmp_path / "empty")


HTML = b"<!DOCTYPE html><html>Moved</html>"


@pytest.mark.parametrize(
    ("file", "change", "reason"),
    [
        ("images-idx3", lambda content: content[:-1], "it has 15,695 bytes, not the 15,696 that its header says"),
        ("images-idx3", lambda content: content + b"x", "it has 15,697 bytes, not the 15,696"),
        ("images-idx3", lambda content: content[:16], "it has 16 bytes, not the 15,696"),
        ("images-idx3", lambda content: b"", "it is not an IDX file of bytes with 3 dimensions: it begins b''"),
        ("images-idx3", lambda content: HTML, "it begins b'<!DOCTYPE ht'"),
        ("images-idx3", gzip.compress, "it is compressed (gzip): unpack it"),
        ("images-idx3", lambda content: b"\0\0\x0b" + content[3:], "it is not an IDX file of bytes"),
        (
            "images-idx3",
            lambda content: content[:12] + bytes(3) + b"\x0e" + content[16:],
            "its images are 28x14, not 28x28",
        ),
        ("images-idx3", lambda content: content[:4] + b"\xff" * 4 + content[8:], "not the 3,367,254,359,296 that"),
        ("labels-idx1", lambda content: HTML, "it is not an IDX file of bytes with 1 dimensions"),
        ("labels-idx1", lambda content: content[:4] + bytes(3) + b"\x13" + content[8:-1], "20 images and 19 labels"),
        ("labels-idx1", lambda content: content[:-1] + b"\x0a", "labels outside 0 to 9"),
    ],
)
def test_files_in_place_of_mnists_are_refused_by_name(mnist_folder, tmp_path, file, change, reason):
    folder = tmp_path / "data"
    shutil.copytree(mnist_folder, folder)
    path = folder / "MNIST" / "raw" / f"t10k-{file}-ubyte"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(Refusal, match="--dataset-dir") as refusal:
        MNIST.load(folder)
    text = str(refusal.value)
    assert reason in text
    assert "\n" not in text
    assert str(path) in text or "labels" in reason


def test_files_that_are_not_as_published_are_named(tmp_path, monkeypatch):
    """What torchvision would download anew, over them, cannot be had here."""

    def no_network(*args, **kwargs):
        raise AssertionError  # which has no text

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    raw, base = tmp_path / "MNIST" / "raw", tmp_path / torchvision.datasets.CIFAR10.base_folder
    raw.mkdir(parents=True)
    base.mkdir()
    (raw / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(b"odd"))
    (base / "data_batch_3").write_bytes(HTML)
    for name, path in (("mnist", raw / "train-images-idx3-ubyte.gz"), ("cifar10", base / "data_batch_3")):
        with pytest.raises(Refusal) as refusal:
            SOURCES[name].load(tmp_path)
        assert f"({path} not as published; AssertionError)" in str(refusal.value)


def test_a_pickle_that_is_not_cifar10s_is_never_opened(tmp_path, monkeypatch):
    class Code:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "has run"),)

    def no_network(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    base = tmp_path / torchvision.datasets.CIFAR10.base_folder
    base.mkdir()
    for name in [
        name for name, _ in torchvision.datasets.CIFAR10.train_list + torchvision.datasets.CIFAR10.test_list
    ] + ["batches.meta"]:
        (base / name).write_bytes(pickle.dumps(Code()))
    with pytest.raises(Refusal, match=r"data_batch_1.*batches\.meta not as published"):
        CIFAR10.load(tmp_path)
    assert not (tmp_path / "has run").exists()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("0001.bmp", r"0001\.bmp is an image, but not \.png, \.jpg or \.jpeg; move it away or convert it"),
        ("0001.webp", r"0001\.webp is an image, but"),
        ("more", r"more is a folder in a class folder"),
    ],
)
def test_no_image_of_a_class_folder_is_left_out_in_silence(tmp_path, name, reason):
    write_class_folders(tmp_path)
    folder = tmp_path / "test" / "cat"
    for harmless in ("._0000.png", ".DS_Store", "notes.txt"):
        (folder / harmless).write_text("no image")
    (tmp_path / "train" / ".cache").mkdir()
    assert len(CIFAR10.load(tmp_path).test) == 10
    (folder / name).mkdir() if name == "more" else (folder / name).write_bytes(b"BM")
    with pytest.raises(Refusal, match=f"argument --dataset-dir: .*{reason}"):
        CIFAR10.load(tmp_path)


def test_a_folder_that_cannot_be_read_is_refused(cifar_folder, monkeypatch):
    def forbidden(self):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "iterdir", forbidden)
    with pytest.raises(Refusal, match=r"--dataset-dir: .* cannot be read: .*Permission denied"):
        CIFAR10.load(cifar_folder)


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_a_folder_that_may_not_even_be_looked_into_is_refused(tmp_path, name):
    folder = tmp_path / ("x" * 300)  # as without permission, the system answers with an error, to whomever
    with pytest.raises(Refusal, match=r"argument --dataset-dir: .*x{300}"):
        SOURCES[name].load(folder)


def test_fingerprints_tell_data_sets_apart(mnist_folder):
    dataset = MNIST.load(mnist_folder)
    images = dataset.test.images.clone()
    images[3, 0, 5, 5] ^= 1
    changed = Dataset(dataset.train, Split(images, dataset.test.labels))
    labels = dataset.train.labels.flip(0)
    relabelled = Dataset(Split(dataset.train.images, labels), dataset.test)
    assert len({d.fingerprint() for d in (dataset, changed, relabelled)}) == 3
