"""The networks that come with the program: each is what its card says; the command that keeps them."""

import copy
import csv
import functools
import re
import shutil
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from export_helpers import mnist, write_run

import measuring
from analysis import shipped
from analysis.export import load_pruned, load_snapshot
from measuring.report import percent
from mnist.data import MNIST
from reproduce import grid, networks
from training.errors import Refusal
from training.files import json_files

SHIPPED = shipped.networks()
MOST = 3_000_000  # bytes of a grid's networks


def card_of(path: Path) -> dict[str, str]:
    """The table of a card."""
    return dict(re.findall(r"^\| (.+?) \| (.+) \|$", path.with_suffix(".md").read_text("utf-8"), re.MULTILINE))


def test_the_networks_of_mnist_are_all_there_and_small():
    assert {name for name in SHIPPED if "/" not in name} == grid.networks("mnist").keys()
    for folder in {path.parent for path in SHIPPED.values()}:
        files = list(folder.iterdir())
        assert sum(file.stat().st_size for file in files) <= MOST
        assert {file.suffix for file in files} == {".safetensors", ".md"}
        assert {file.stem for file in files} <= grid.networks(folder.parent.name).keys()


@pytest.mark.parametrize("name", SHIPPED)
def test_a_network_has_the_connections_of_its_card_and_of_its_name(name):
    pytest.importorskip("safetensors")
    card, path = card_of(SHIPPED[name]), SHIPPED[name]
    total = measuring.total(measuring.count(measuring.masks(load_pruned(name))))
    text = f"{percent(total.connectivity)}, {total.connected:,} of {total.weights:,} connections"
    assert card["connectivity"] == text
    assert card["file"] == f"{path.name}, {path.stat().st_size:,} bytes"
    row = grid.networks(path.parent.parent.name)[path.stem]
    snapshot = load_snapshot(name)
    assert (card["command"], snapshot.run, snapshot.epoch) == (f"`{row.command}`", row.name, row.epochs)
    if share := re.search(r"\d+$", path.stem):
        assert abs(100 * total.connectivity - int(share[0])) < max(0.6, 0.04 * int(share[0]))


@pytest.mark.parametrize("name", [name for name in SHIPPED if name.startswith("c10-narrow/")])
def test_the_layers_of_the_rows_are_those_of_the_kept_networks(name):
    """So that the counts of synapses can be looked up in the networks themselves."""
    pytest.importorskip("safetensors")
    folder, row = SHIPPED[name].parent.parent, grid.networks("c10-narrow")[SHIPPED[name].stem]
    with open(folder / "layers.csv", encoding="utf-8") as file:
        lines = {line["layer"]: line for line in csv.DictReader(file) if line["row"] == row.key}
    layers = measuring.count(measuring.masks(load_pruned(name)))
    if not row.method.prunes:
        assert not lines  # of the dense network with this seed they were not kept; it has all
        return
    assert {key: (int(line["connected"]), int(line["weights"])) for key, line in lines.items()} == {
        key: (layer.connected, layer.weights) for key, layer in layers.items()
    }
    with open(folder / "rows.csv", encoding="utf-8") as file:
        (synops,) = [float(line["synops"]) for line in csv.DictReader(file) if line["row"] == row.key]
    first, *others = [float(line["operations"]) for line in lines.values()]
    assert sum(others) == pytest.approx(synops, rel=1e-12)
    assert first == round(first)  # all pixels count as inputs, so the number is the same for every image


@pytest.fixture(scope="module")
def datasets(real_data, tmp_path_factory):
    """The data set of a source, with all its real test images; each is read once."""

    @functools.cache
    def load(source):
        if source is MNIST:
            return MNIST.load(real_data)
        archive, folder = real_data / "cifar10-jpeg.tar.xz", tmp_path_factory.mktemp("cifar10")
        if not archive.is_file():
            pytest.skip(f"needs {archive.name} in the folder SPIKING_TEST_DATA")
        with tarfile.open(archive) as tar:
            for file in tar:
                if file.isfile() and re.search(r"^test/|/0000\.jpg$", file.name):  # few to train
                    (folder / file.name).parent.mkdir(parents=True, exist_ok=True)
                    (folder / file.name).write_bytes(tar.extractfile(file).read())
        return source.load(folder)

    return load


@pytest.mark.parametrize("name", SHIPPED)
def test_a_network_is_as_accurate_as_its_card_says(name, datasets):
    """To the image: in float64 every fortieth, and in float32, where that is sure and takes seconds, all of MNIST's."""
    pytest.importorskip("safetensors")
    card, snapshot = card_of(SHIPPED[name]), load_snapshot(name)
    dataset = datasets(snapshot.source)
    assert len(dataset.test) == 10_000
    assert networks.right_of_some(snapshot, dataset) == card["every fortieth test image in float64"]
    assert card["every fortieth test image in float64"].endswith(" of 250 right")
    if snapshot.source is MNIST:
        assert card["data"] == f"mnist: {dataset.fingerprint()}"
        seen = networks.tested(snapshot, dataset).evaluation
        assert card["test accuracy"].startswith(f"{percent(seen.accuracy)}, {seen.right:,} of {seen.images:,} images; ")


def test_every_fortieth_image_is_tested_in_float64(tmp_path, mnist_folder, monkeypatch):
    """With float32 the real images' numbers would most often agree too."""
    evaluated = []

    def evaluate(network, batches):
        ((images, labels),) = batches
        evaluated.extend([images.dtype, *(tensor.dtype for tensor in network.parameters()), len(labels)])
        return measuring.classification.evaluate(network, [(images, labels)])

    monkeypatch.setattr(measuring, "evaluate", evaluate)
    snapshot = load_snapshot(write_run(tmp_path, mnist()))
    networks.right_of_some(snapshot, MNIST.load(mnist_folder))
    assert evaluated == [torch.float64, torch.float64, torch.float64, 1]


def test_a_name_that_is_none_is_an_error_that_says_the_names():
    with pytest.raises(FileNotFoundError, match=r"no network of this name: .*grad-5") as error:
        load_pruned("grad-6")
    assert error.value.filename == "grad-6"


def test_a_file_comes_before_a_network_of_its_name(tmp_path, monkeypatch):
    pytest.importorskip("safetensors")
    monkeypatch.chdir(tmp_path)
    network = mnist(0.5)
    write_run(tmp_path, network).rename(tmp_path / "grad-5")
    assert torch.equal(load_pruned("grad-5").fc[1].weight, network.fc[1].weight)
    assert not torch.equal(load_pruned("grad-2").fc[1].weight, network.fc[1].weight)


@pytest.fixture
def dump(tmp_path, mnist_folder):
    """A dump folder with the finished runs of two of MNIST's networks, and three others: one that is not finished, one
    within the epoch behind its row's last, and one that has just begun."""
    places = {"grad-5": (60, 0), "dense": (60, 0), "grad-2": (59, 0), "grad-17": (60, 3)}
    for name, (epoch, position) in places.items():
        run = grid.networks("mnist")[name].name
        network = {"grad-5": mnist(0.95), "dense": mnist(0.0, 0.0)}.get(name, mnist())
        data = MNIST.load(mnist_folder).fingerprint()
        write_run(tmp_path / "dump", network, run, epoch=epoch, position=position, data=data)
        json_files.write(tmp_path / "dump" / "logs" / run / "run.json", {"git_commit": f"commit of {name}"})
    (tmp_path / "dump" / "models" / grid.networks("mnist")["grad-1"].name).mkdir()
    return tmp_path / "dump"


def test_the_command_keeps_the_finished_networks_with_their_cards(dump, tmp_path, mnist_folder, capsys):
    pytest.importorskip("safetensors")
    argv = ["mnist", "--dump-dir", str(dump), "-o", str(tmp_path / "out"), "--dataset-dir", str(mnist_folder)]
    assert networks.main(argv) == 0
    out = capsys.readouterr().out
    for name in ("grad-1", "grad-2", "grad-17"):
        assert f"not there: {name}, python mnist/mnist.py" in out
    files = {path.name: path for path in (tmp_path / "out").iterdir()}
    assert files.keys() == {f"{name}.{suffix}" for name in ("grad-5", "dense") for suffix in ("safetensors", "md")}
    sparse, dense = mnist(0.95), mnist(0.0, 0.0)
    loaded = load_pruned(files["grad-5.safetensors"])
    assert all(torch.equal(one, other) for one, other in zip(loaded.parameters(), sparse.parameters(), strict=True))
    loaded = load_pruned(files["dense.safetensors"])
    for one, other in zip(loaded.parameters(), dense.parameters(), strict=True):
        assert torch.equal(one, other.half().float())
        assert not torch.equal(one, other)
    assert files["dense.safetensors"].stat().st_size < 2 * 635_200 + 4096
    for name, network in (("grad-5", sparse), ("dense", loaded)):
        card = card_of(files[f"{name}.md"])
        seen = measuring.evaluate(network, _batches(mnist_folder))
        assert card["test accuracy"] == (
            f"{percent(seen.accuracy)}, {seen.right} of 20 images; after the last of 60 epochs"
        )
        images, labels = next(iter(_batches(mnist_folder)))
        chosen = images[::40].double(), labels[::40]
        seen = measuring.evaluate(copy.deepcopy(network).double(), [chosen])
        assert card["every fortieth test image in float64"] == f"{seen.right} of 1 right"
        assert card["commit"] == f"commit of {name}"
        assert card["command"] == f"`{grid.networks('mnist')[name].command}`"
        assert card["data"].startswith("mnist: 40+20 images, crc32 ")
        assert ("rounded to float16" in card["weights"]) == (name == "dense")
        assert float(card["SynOps per image"].replace(",", "")) > 0
    before = {name: path.read_text("utf-8") for name, path in files.items() if path.suffix == ".md"}
    assert networks.main(argv) == 0
    assert {name: files[name].read_text("utf-8") for name in before} == before
    other = tmp_path / "other"
    shutil.copytree(mnist_folder, other)
    labels = next(other.rglob("t10k-labels*"))
    content = bytearray(labels.read_bytes())
    content[-1] = (content[-1] + 1) % 10
    labels.write_bytes(content)
    assert networks.main([*argv[:-1], str(other)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "argument --dataset-dir: " in line
    assert "was trained on other data (40+20 images, crc32 " in line
    assert {name: files[name].read_text("utf-8") for name in before} == before


def test_a_card_says_what_the_grid_says_of_the_data():
    pytest.importorskip("safetensors")
    for name, path in SHIPPED.items():
        assert (", JPEG copies of the images" in card_of(path)["data"]) == name.startswith("c10-narrow/")
        snapshot, note = load_snapshot(name), grid.data_note(path.parent.parent.name, load_snapshot(name).data)
        assert card_of(path)["data"] == f"{snapshot.dataset}: {snapshot.data}" + (f", {note}" if note else "")
    assert grid.data_note("c10-narrow", "other") == ""


def _batches(folder):
    """MNIST's test images in the folder, normalised by hand, in one batch."""
    test = MNIST.load(folder).test
    yield (test.images / 255 - 0.1307) / 0.3081, test.labels


def test_a_folder_or_grid_without_networks_is_refused(tmp_path, capsys):
    for name, text in (("mnist", "has no finished row"), ("c10", r"c10.toml names no networks")):
        argv = [name, "--dump-dir", str(tmp_path), "-o", str(tmp_path / "out")]
        assert networks.main(argv) == 2
        err = capsys.readouterr().err
        assert text in err
        assert err.count("\n") == 1
        assert not (tmp_path / "out").exists()


def test_a_network_that_is_no_row_is_refused(tmp_path):
    table = (
        'epochs = 1\nseeds = [1]\n[networks]\nsmall = "-m deep"\n[[group]]\ntitle = "a"\nvariants = ["-m no_prune"]\n'
    )
    (tmp_path / "mnist.toml").write_text(table)
    with pytest.raises(Refusal, match=r"mnist\.toml: networks: no row of small is: -m deep"):
        grid.networks("mnist", tmp_path)


def test_a_network_of_which_something_cannot_be_told_gets_no_card(monkeypatch, tmp_path):
    left_out = ("Operations per image are left out: it is so.",)
    monkeypatch.setattr(networks, "load_snapshot", lambda path: None)
    monkeypatch.setattr(networks, "tested", lambda snapshot, dataset: SimpleNamespace(left_out=left_out))
    with pytest.raises(Refusal, match=r"^grad-5: Operations per image are left out: it is so\.$"):
        networks.card("grad-5", None, "", tmp_path, None, None, "")
