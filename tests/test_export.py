"""Exports: what is written is what is read, in spikes and in bits; what is not an export is refused, and never run."""

import json
import math
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix
from torch.nn import functional as F

import c10.model
from analysis import export as export_module
from analysis import formats
from analysis.export import differing_counts, export, load_pruned, main
from analysis.formats import csr, description, nir, safetensors
from analysis.snapshot import EXPERIMENTS, Snapshot, Unreadable, from_checkpoint, models_folder
from c10.model import Cifar10Net
from mnist.model import MnistNet
from spiking import SpikingNetwork
from training import measure, storage
from training.command_line import Refusal

ROOT = Path(__file__).resolve().parent.parent
SPARSITIES = (0.0, 0.5, 0.9, 0.995, 1.0)


@pytest.fixture
def form(request) -> str:
    """One of the formats, where its packages are installed."""
    for package in {"safetensors": ["safetensors"], "csr": [], "nir": ["nir", "nirtorch"]}[request.param]:
        pytest.importorskip(package)
    return request.param


MODULES = {"safetensors": safetensors, "csr": csr, "nir": nir}
forms = pytest.mark.parametrize("form", ["safetensors", "csr", "nir"], indirect=True)
exact_forms = pytest.mark.parametrize("form", ["safetensors", "csr"], indirect=True)


@pytest.fixture
def narrow(monkeypatch):
    """The CIFAR-10 network with 8 channels instead of 256."""
    monkeypatch.setattr(c10.model, "WIDTH", 8)


@torch.no_grad()
def pruned(network: SpikingNetwork, sparsities, gain: float) -> SpikingNetwork:
    """Prunes a network at random, layer by layer to a sparsity, with weights that make it spike."""
    generator = torch.Generator().manual_seed(0)
    for weight, sparsity in zip(measure.prunable(network).values(), sparsities, strict=True):
        kept = torch.rand(weight.shape, generator=generator) >= sparsity
        weight.mul_(kept * gain / max(1 - sparsity, 0.01) ** 0.5)
    return network.eval()


def mnist(first=0.9, second=0.5, T=8) -> MnistNet:
    torch.manual_seed(1)
    return pruned(MnistNet(T), (first, second), gain=4)


@torch.no_grad()
def cifar10(sparsities=(0.0, 0.3, 0.5, 0.7, 0.9, 0.8, 0.95, 0.5), T=4) -> Cifar10Net:
    """With running statistics, weights and biases of BatchNorm that all matter."""
    torch.manual_seed(1)
    network = pruned(Cifar10Net(T), sparsities, gain=3)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.05, 3)
            module.weight.normal_(1, 0.5)
            module.bias.normal_(0.6, 0.4)
            module.num_batches_tracked.fill_(77)
    network.fc[2].weight.mul_(8)
    network.fc[4].weight.mul_(8)
    return network


def snapshot_of(network: SpikingNetwork) -> Snapshot:
    experiment = "mnist" if isinstance(network, MnistNet) else "c10"
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    return Snapshot(experiment, EXPERIMENTS[experiment][1].datasets[0], network.T, "a-run", 3, state)


def images_for(network: SpikingNetwork, n: int = 16) -> torch.Tensor:
    shape = (1, 28, 28) if isinstance(network, MnistNet) else (3, 32, 32)
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def assert_same_counts(one, other, n: int = 16) -> None:
    counts = one(images_for(one, n))
    assert counts.sum() > 0
    assert len(counts.unique()) > 2
    assert torch.equal(other(images_for(one, n)), counts)


def write_run(folder: Path, network: SpikingNetwork, name: str = "a-run") -> Path:
    """The checkpoint of a run, as training leaves it."""
    experiment = "mnist" if isinstance(network, MnistNet) else "c10"
    arguments = {"experiment": experiment, "dataset": EXPERIMENTS[experiment][1].datasets[0], "T": network.T}
    path = folder / "models" / name / "checkpoint.pt"
    path.parent.mkdir(parents=True)
    (folder / "logs" / name).mkdir(parents=True)
    state = {"format": 1, "arguments": arguments, "epoch": 3, "network": network.state_dict(), "optimizers": []}
    storage.write(path, state)
    return path.parent


# -- what comes back -------------------------------------------------------------------------------


@forms
@pytest.mark.parametrize(("first", "second"), [(0.0, 0.0), (0.9, 0.5), (0.99, 0.9)])
def test_mnist_comes_back_to_the_bit(form, tmp_path, first, second):
    network = mnist(first, second, T=5)
    export(snapshot_of(network), form, tmp_path / "file")
    loaded = load_pruned(tmp_path / "file")
    assert isinstance(loaded, MnistNet)
    assert loaded.T == 5
    for name, tensor in network.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert_same_counts(network, loaded)


@exact_forms
def test_cifar10_comes_back_with_the_same_spikes(form, tmp_path, narrow):
    network = cifar10()
    export(snapshot_of(network), form, tmp_path / "file")
    loaded = load_pruned(tmp_path / "file")
    assert isinstance(loaded, Cifar10Net)
    for name, weight in measure.prunable(network).items():
        assert torch.equal(loaded.get_parameter(name), weight), name
    # each layer's own output to the bit, not only what of it comes through as a spike
    for module, other in zip(network.conv, loaded.conv, strict=True):
        if isinstance(module, torch.nn.BatchNorm2d):
            x = torch.randn(2, 3, 8, 8, 8)
            assert torch.equal(module(x), other(x))
    assert_same_counts(network, loaded)
    if form == "safetensors":
        for name, tensor in network.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor), name


@forms
@pytest.mark.parametrize(("first", "second"), [(1.0, 0.5), (0.5, 1.0), (1.0, 1.0)])
def test_a_layer_without_connections(form, tmp_path, first, second):
    network = mnist(first, second)
    export(snapshot_of(network), form, tmp_path / "file")
    loaded = load_pruned(tmp_path / "file")
    for name, weight in measure.prunable(network).items():
        assert torch.equal(loaded.get_parameter(name), weight)
    assert loaded(images_for(network)).sum() == 0


@pytest.mark.parametrize("form", ["nir"], indirect=True)
def test_nir_by_a_general_importer_spikes_the_same_at_every_step(form, tmp_path):
    """SpikingJelly's own importer, which knows nothing of this program, step by step."""
    from spikingjelly.activation_based.nir_exchange import import_from_nir

    network, steps = mnist(0.9, 0.5), []
    network.fc[2].register_forward_hook(lambda module, inputs, output: steps.append(output))
    export(snapshot_of(network), form, tmp_path / "file.nir")
    graph, state = import_from_nir(str(tmp_path / "file.nir")), None
    with torch.no_grad():
        counts = network(images_for(network))
        (spikes,) = steps  # [T, N, 10]
        assert spikes.sum() > 0
        for expected in spikes:
            output, state = graph(images_for(network), state)
            assert torch.equal(output, expected)
    assert torch.equal(spikes.sum(0), counts)


def test_csr_is_plain_numpy_and_scipy(tmp_path, narrow):
    """The file as its description tells to read it, BatchNorm as scale and shift after the convolution."""
    network = cifar10()
    export(snapshot_of(network), "csr", tmp_path / "file.npz")
    file = np.load(tmp_path / "file.npz", allow_pickle=False)
    description = json.loads(str(file["network"]))
    assert (description["experiment"], description["T"], description["epoch"]) == ("c10", 4, 3)
    assert description["normalisation"] == {"mean": [0.4914, 0.4822, 0.4465], "std": [0.2023, 0.1994, 0.2010]}
    assert description["neuron"] == {"tau": 2.0, "v_threshold": 1.0, "v_reset": 0.0, "decay_input": True}
    matrices = {}
    for name, weight in measure.prunable(network).items():
        data, indices, indptr, shape = (file[f"{name}/{key}"] for key in ("data", "indices", "indptr", "shape"))
        matrices[name] = csr_matrix((data, indices, indptr), shape)
        assert matrices[name].nnz == int(measure.connected(weight).sum())
        np.testing.assert_array_equal(matrices[name].toarray(), weight.detach().flatten(1))
        assert description["layers"][name]["shape"] == list(weight.shape)
        assert (f"{name}/scale" in file) == ("conv" in name)
    images = images_for(network, 2)
    with torch.no_grad():
        expected = network.static(images).transpose(0, 1).flatten(1)
    patches = F.unfold(images, 3, padding=1).transpose(0, 1).flatten(1).numpy()
    scale, shift = (file[f"static_conv.0.weight/{key}"] for key in ("scale", "shift"))
    found = scale[:, None] * (matrices["static_conv.0.weight"] @ patches) + shift[:, None]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert not np.allclose(scale, 1, atol=0.1)


# -- layouts ---------------------------------------------------------------------------------------


def test_gaps_by_hand():
    connected = np.zeros(800, dtype=bool)
    connected[[0, 1, 5, 5 + 255, 5 + 255 + 256, 799]] = True  # gaps 0, 0, 3, 254, 255, 282
    assert safetensors._gaps(connected).tolist() == [0, 0, 3, 254, 255, 0, 255, 27]
    np.testing.assert_array_equal(safetensors._positions(safetensors._gaps(connected)), np.flatnonzero(connected))


@pytest.mark.parametrize("sparsity", [*SPARSITIES, 0.9999])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (40, 100), (8, 4, 3, 3), (2, 5000)])
def test_layouts_keep_every_bit(shape, sparsity):
    rng = np.random.default_rng(0)
    weight = (rng.normal(size=shape) * (rng.random(shape) >= sparsity)).astype(np.float32)
    weight.flat[-1] = 1e-38 if sparsity < 1 else 0  # as connected as any other
    layout, arrays = safetensors._pack(weight)
    found = safetensors._unpack(layout, arrays.__getitem__, shape)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, weight)
    connected = np.count_nonzero(weight)
    assert sum(array.nbytes for array in arrays.values()) <= min(
        weight.nbytes, 4 * connected + math.ceil(weight.size / 8)
    )


def test_each_layer_has_the_smallest_layout(tmp_path):
    safetensors = pytest.importorskip("safetensors")
    sizes = []
    for sparsity, layout in ((0.0, "dense"), (0.5, "bitmap"), (0.95, "gaps")):
        network = mnist(sparsity, 0.0)
        export(snapshot_of(network), "safetensors", tmp_path / "file")
        with safetensors.safe_open(tmp_path / "file", framework="numpy") as file:
            layers = json.loads(file.metadata()["network"])["layers"]
        assert layers["static_fc.1.weight"] == {"shape": [800, 784], "layout": layout}
        sizes.append((tmp_path / "file").stat().st_size)
    assert sizes[0] < 4 * 635_200 + 4096
    assert sizes[1] < 0.55 * sizes[0]
    assert sizes[2] < 0.08 * sizes[0]


# -- load_pruned -----------------------------------------------------------------------------------


def test_load_pruned_takes_runs_checkpoints_and_exports(tmp_path):
    network = mnist()
    models = write_run(tmp_path, network)
    export(from_checkpoint(models / "checkpoint.pt"), "csr", models / "export.npz")
    logs = tmp_path / "logs" / "a-run"
    (tmp_path / "renamed").write_bytes((models / "checkpoint.pt").read_bytes())
    for path in (models, logs, models / "checkpoint.pt", models / "export.npz", str(models), tmp_path / "renamed"):
        assert_same_counts(network, load_pruned(path))


def test_a_loaded_network_is_ready(tmp_path, narrow):
    """In eval mode, without gradients, from rest, in no debt to the random numbers of who loads it."""
    torch.manual_seed(3)
    models = write_run(tmp_path, cifar10())
    state = torch.get_rng_state()
    network = load_pruned(models)
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module.training for module in network.modules())
    assert not any(p.requires_grad for p in network.parameters())
    assert all(tensor.device.type == "cpu" for tensor in (*network.parameters(), *network.buffers()))
    first = network(images_for(network, 2))
    assert torch.equal(network(images_for(network, 2)), first)
    network.requires_grad_().train()
    network(images_for(network, 2)).sum().backward()
    assert network.fc[4].weight.grad is not None


def test_two_loads_share_nothing(tmp_path):
    models = write_run(tmp_path, mnist())
    one, other = load_pruned(models), load_pruned(models)
    one.fc[1].weight.zero_()
    assert other.fc[1].weight.abs().sum() > 0


# -- what is refused -------------------------------------------------------------------------------


class Trap:
    """What a pickle does when it is loaded: it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def refused(path: Path) -> str:
    with pytest.raises(Unreadable) as caught:
        load_pruned(path)
    assert isinstance(caught.value, ValueError)
    (line,) = str(caught.value).splitlines()
    assert str(path) in line
    return line


def test_no_pickle_runs(tmp_path):
    trap = tmp_path / "trap"
    files = {name: tmp_path / name for name in ("plain", "torch", "array", "member")}
    files["plain"].write_bytes(pickle.dumps(Trap(trap)))
    storage.write(files["torch"], {"arguments": Trap(trap)})
    with open(files["array"], "wb") as file:
        np.savez(file, network=np.array([Trap(trap)], dtype=object))
    with open(files["member"], "wb") as file:
        snapshot = snapshot_of(mnist())
        text = description.describe(snapshot, {})
        np.savez(file, network=np.array(text), **{"static_fc.1.weight/data": np.array([Trap(trap)], dtype=object)})
    for path in files.values():
        refused(path)
        assert not trap.exists(), path
    pickle.loads(files["plain"].read_bytes())
    assert trap.exists()  # the trap works


@forms
def test_damaged_files(form, tmp_path):
    export(snapshot_of(mnist()), form, tmp_path / "whole")
    content = (tmp_path / "whole").read_bytes()
    for size in (0, 3, 8, 9, 100, len(content) // 2, len(content) - 1):
        path = tmp_path / f"{size}"
        path.write_bytes(content[:size])
        refused(path)


def test_damaged_checkpoints(tmp_path):
    models = write_run(tmp_path, mnist())
    content = (models / "checkpoint.pt").read_bytes()
    for size in (0, 100, len(content) // 2, len(content) - 1):
        (models / "checkpoint.pt").write_bytes(content[:size])
        with pytest.raises(Unreadable, match=r"checkpoint\.pt is damaged"):
            load_pruned(models)


def test_foreign_files(tmp_path):
    path = tmp_path / "file"
    for content in (b"hello, world", b"\x89PNG\r\n\x1a\n" + bytes(100), b"PK\x03\x04" + bytes(100), bytes(1000)):
        path.write_bytes(content)
        refused(path)
    with open(path, "wb") as file:
        np.savez(file, a=np.zeros(3))
    refused(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("network.npy", "no array")
    refused(path)
    storage.write(path, {"weight": torch.zeros(3)})
    assert "arguments" in refused(path)
    storage.write(path, torch.zeros(3))
    refused(path)
    torch.save({"weight": torch.zeros(3)}, path)
    assert "its end is missing or foreign" in refused(path)
    with pytest.raises(FileNotFoundError):
        load_pruned(tmp_path / "nothing")
    assert "has no checkpoint.pt" in refused(tmp_path)


def test_a_foreign_safetensors_file(tmp_path):
    save = pytest.importorskip("safetensors.numpy").save
    path = tmp_path / "file"
    path.write_bytes(save({"a": np.zeros(3)}))
    assert "network" in refused(path)


CHANGES = {
    "another program's": lambda d: d.update(format="another"),
    "a later version": lambda d: d.update(version=3),
    "an unknown experiment": lambda d: d.update(experiment="imagenet"),
    "an unhashable experiment": lambda d: d.update(experiment=["mnist"]),
    "another experiment": lambda d: d.update(experiment="c10"),
    "no time": lambda d: d.update(T=0),
    "text for T": lambda d: d.update(T="8"),
    "other neurons": lambda d: d["neuron"].update(tau=3.0),
    "no neurons": lambda d: d.pop("neuron"),
    "a list": lambda d: d.clear(),
}


@forms
@pytest.mark.parametrize("change", CHANGES)
def test_descriptions_that_do_not_fit(form, change, tmp_path, monkeypatch):
    describe = description.describe

    def changed(snapshot, layers):
        description = json.loads(describe(snapshot, layers))
        CHANGES[change](description)
        return json.dumps(description)

    monkeypatch.setattr(MODULES[form], "describe", changed)
    (tmp_path / "file").write_bytes(formats.WRITERS[form](snapshot_of(mnist())))
    refused(tmp_path / "file")


def csr_file(path: Path, **changes) -> Path:
    snapshot = snapshot_of(mnist())
    path.write_bytes(formats.write_csr(snapshot))
    with np.load(path) as file:
        arrays = {
            **file,
            **{f"fc.1.weight/{key}": change(file[f"fc.1.weight/{key}"]) for key, change in changes.items()},
        }
    with open(path, "wb") as file:
        np.savez(file, **{name: array for name, array in arrays.items() if array is not None})
    return path


@pytest.mark.parametrize(
    "changes",
    [
        dict(indices=lambda a: a + 800),
        dict(indices=lambda a: a - 800),
        dict(indices=lambda a: a.astype(np.float32)),
        dict(indices=lambda a: a[:-1]),
        dict(indptr=lambda a: a[::-1].copy()),
        dict(indptr=lambda a: a[:-1]),
        dict(indptr=lambda a: a + 1),
        dict(indptr=lambda a: a.reshape(1, -1)),
        dict(data=lambda a: a[:-1]),
        dict(data=lambda a: a.astype(np.float64)),
        dict(data=lambda a: None),
    ],
)
def test_csr_arrays_that_do_not_fit(changes, tmp_path):
    refused(csr_file(tmp_path / "file", **changes))


def test_csr_unchanged_is_accepted(tmp_path):
    """The counterpart of the test above: it is the changes that are refused."""
    assert_same_counts(mnist(), load_pruned(csr_file(tmp_path / "file", data=lambda a: a)))


@pytest.mark.parametrize(
    ("sparsity", "change"),
    [
        (0.5, {".bitmap": lambda a: a[:-1]}),
        (0.5, {".bitmap": lambda a: np.full_like(a, 255)}),
        (0.5, {".values": lambda a: a[:-1]}),
        (0.5, {".values": lambda a: a.astype(np.float64)}),
        (0.95, {".gaps": lambda a: a[:-1]}),
        (0.95, {".gaps": lambda a: np.full(len(a), 254, np.uint8)}),
        (0.95, {".gaps": lambda a: a.astype(np.int16)}),
        (0.0, {"": lambda a: a[:-1]}),
        (0.0, {"": lambda a: a.astype(np.float16)}),
    ],
)
def test_packed_weights_that_do_not_fit(sparsity, change, tmp_path, monkeypatch):
    pytest.importorskip("safetensors")
    pack = safetensors._pack

    def changed(weight):
        layout, arrays = pack(weight)
        if weight.size > 10_000:
            arrays = {k: np.ascontiguousarray(change.get(k, lambda a: a)(a)) for k, a in arrays.items()}
        return layout, arrays

    monkeypatch.setattr(safetensors, "_pack", changed)
    (tmp_path / "file").write_bytes(formats.write_safetensors(snapshot_of(mnist(sparsity))))
    refused(tmp_path / "file")


@pytest.mark.parametrize("form", ["nir"], indirect=True)
def test_other_nir_graphs(form, tmp_path):
    """A graph that is not this network's is refused, whatever its metadata say."""
    import nir

    (tmp_path / "file").write_bytes(formats.write_nir(snapshot_of(mnist())))

    def changed(change):
        graph = nir.read(tmp_path / "file")
        change(graph)
        nir.write(tmp_path / "changed", graph)
        return refused(tmp_path / "changed")

    def threshold(graph):
        graph.nodes["fc_0"].v_threshold[7] = 2

    def tau(graph):
        graph.nodes["fc_2"].tau *= 2

    def weights(graph):
        graph.nodes["fc_1"].weight = graph.nodes["fc_1"].weight[:, :-1]

    def skip(graph):
        graph.edges.append(("fc_0", "fc_0"))

    assert "v_threshold" in changed(threshold)
    assert "tau" in changed(tau)
    changed(weights)
    changed(skip)
    changed(lambda graph: graph.metadata.clear())


def test_checkpoints_that_do_not_fit(tmp_path, narrow):
    network = mnist()
    for number, change in enumerate(
        (
            lambda state: state["network"].pop("fc.1.weight"),
            lambda state: state["network"].update(extra=torch.zeros(1)),
            lambda state: state["network"].update({"fc.1.weight": torch.zeros(10, 801)}),
            lambda state: state["network"].update({"fc.1.weight": torch.zeros(10, 800, dtype=torch.float64)}),
            lambda state: state["network"].update({"fc.1.weight": "text"}),
            lambda state: state["arguments"].update(experiment="c10"),
            lambda state: state["arguments"].update(experiment="nothing"),
            lambda state: state["arguments"].update(T=True),
            lambda state: state.pop("arguments"),
        )
    ):
        path = write_run(tmp_path / str(number), network) / "checkpoint.pt"
        state = torch.load(path, weights_only=True)
        change(state)
        storage.write(path, state)
        refused(path)


def test_nir_has_no_max_pooling(tmp_path, narrow):
    with pytest.raises(Refusal, match="max pooling"):
        export(snapshot_of(cifar10()), "nir", tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("form", "module"), [("safetensors", "safetensors.numpy"), ("nir", "nir")])
def test_a_package_that_is_not_there(form, module, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(Refusal, match=rf"pip install {form}"):
        export(snapshot_of(mnist()), form, tmp_path / "file")


# -- writing ---------------------------------------------------------------------------------------


def test_an_export_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "file"
    export(snapshot_of(mnist(0.5)), "csr", path)
    before = path.read_bytes()
    monkeypatch.setattr(export_module.os, "replace", lambda *paths: (_ for _ in ()).throw(OSError("no room")))
    with pytest.raises(OSError, match="no room"):
        export(snapshot_of(mnist(0.9)), "csr", path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_an_export_that_reads_back_otherwise_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setitem(formats.WRITERS, "csr", lambda snapshot: formats.write_csr(snapshot_of(mnist(0.5))))
    with pytest.raises(RuntimeError, match=r"static_fc\.1\.weight"):
        export(snapshot_of(mnist(0.9)), "csr", tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


def test_differing_counts_are_counted():
    one, other = mnist(), mnist()
    with torch.no_grad():
        other.fc[1].weight[3] = 0  # the counts of class 3
    images = images_for(one)
    batches = [(images[:10], None), (images[10:], None)]
    with torch.no_grad():
        expected = int((one(images)[:, 3] != 0).sum())
    assert expected > 0
    assert differing_counts(one, other, batches) == (expected, 160)
    assert differing_counts(one, one, batches) == (0, 160)


# -- the command -----------------------------------------------------------------------------------


@forms
def test_the_command(form, tmp_path, capsys, mnist_folder):
    models = write_run(tmp_path, mnist())
    for run in (models, tmp_path / "logs" / "a-run"):
        assert main([str(run), "--format", form, "--check", "--dataset-dir", str(mnist_folder)]) == 0
    out = capsys.readouterr().out
    path = models / f"export{formats.SUFFIXES[form]}"
    assert str(path) in out
    assert f"{path.stat().st_size:,} bytes" in out
    assert f"{(models / 'checkpoint.pt').stat().st_size:,} bytes" in out
    assert "0 of 200 spike counts differ on the 20 test images" in out
    masks = {name: measure.connected(weight) for name, weight in measure.prunable(mnist()).items()}
    total = measure.total(measure.count(masks))
    assert f"{total.connected} of 635200 connections, sparsity {100 * total.sparsity:.2f} %" in out
    assert main([str(models), "--format", form, "-o", str(tmp_path / "new folder" / "x")]) == 0
    assert_same_counts(mnist(), load_pruned(tmp_path / "new folder" / "x"))


def test_home_is_expanded(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_run(tmp_path, mnist())
    assert main(["~/models/a-run", "--format", "csr", "-o=~/x"]) == 0
    assert (tmp_path / "x").is_file()
    assert_same_counts(mnist(), load_pruned("~/x"))
    assert_same_counts(mnist(), load_pruned("~/models/a-run"))
    export(from_checkpoint(tmp_path / "models" / "a-run" / "checkpoint.pt"), "csr", "~/y")
    assert (tmp_path / "y").is_file()
    assert main(["~nobody-of-this-name/x", "--format", "csr"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(ValueError, match="~nobody-of-this-name/x"):
        load_pruned("~nobody-of-this-name/x")


def test_what_is_no_regular_file_is_not_replaced(tmp_path, capsys):
    models = write_run(tmp_path, mnist())
    link, null = tmp_path / "link", tmp_path / "null"
    link.symlink_to("target")
    null.symlink_to("/dev/null")
    for output in (link, null, Path("/dev/null")):
        assert main([str(models), "--format", "safetensors", "-o", str(output)]) == 0
    assert link.is_symlink()
    assert null.is_symlink()
    assert not Path("/dev/null").is_file()
    assert_same_counts(mnist(), load_pruned(tmp_path / "target"))
    size = (tmp_path / "target").stat().st_size
    assert capsys.readouterr().out.count(f"the export   {size:>11,} bytes") == 3
    assert main([str(models), "--format", "safetensors", "-o", str(null), "--check"]) == 2
    assert "argument --check: " in capsys.readouterr().err


def test_no_checkpoint_is_replaced_by_an_export(tmp_path, capsys):
    models = write_run(tmp_path, mnist())
    storage.write(models / "checkpoint.pt", storage.read(models / "checkpoint.pt"))
    (tmp_path / "link").symlink_to(models / "checkpoint-previous.pt")
    before = {path: path.read_bytes() for path in models.iterdir()}
    for output in (models / "checkpoint-previous.pt", tmp_path / "link"):
        assert main([str(models), "--format", "csr", "-o", str(output)]) == 2
        assert "is the run's checkpoint" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in models.iterdir()} == before


def test_the_check_fails_where_counts_differ(tmp_path, capsys, mnist_folder, monkeypatch):
    models = write_run(tmp_path, mnist())
    monkeypatch.setattr(export_module, "load_pruned", lambda path: mnist(0.5, 0.1))
    assert main([str(models), "--format", "csr", "--check", "--dataset-dir", str(mnist_folder)]) == 1
    assert "0 of 200" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["{run}"], "--format"),
        (["{run}", "--format", "onnx"], "must be safetensors, csr or nir, not 'onnx'"),
        (["{folder}", "--format", "csr"], "has no checkpoint.pt"),
        (["{folder}/nothing", "--format", "csr"], "has no checkpoint.pt"),
        (["{run}", "--format", "csr", "-o", "{folder}"], "is a folder"),
        (["{run}", "--format", "csr", "-o", "{run}/checkpoint.pt"], "is the run's checkpoint"),
        (["{run}", "--format", "csr", "--check", "--dataset-dir", "{folder}/logs/a-run/x/y"], "--dataset-dir"),
    ],
)
def test_bad_input_is_one_line_and_status_2(argv, message, tmp_path, capsys, monkeypatch):
    run = write_run(tmp_path, mnist())
    (tmp_path / "logs" / "a-run" / "x").write_text("a file where a folder should be")
    argv = [text.format(run=run, folder=tmp_path) for text in argv]
    assert main(argv) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert message in line


def test_statuses(tmp_path, capsys):
    run = write_run(tmp_path, mnist())
    assert main([str(run), "--format", "csr"]) == 0
    assert capsys.readouterr().err == ""
    assert main([str(run), "--format", "csr", "-o", "/proc/nothing/file"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_the_real_command(tmp_path):
    command = [sys.executable, "-m", "analysis.export", str(tmp_path), "--format", "csr"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1


def test_models_folder_from_within(tmp_path, monkeypatch):
    run = write_run(tmp_path, mnist())
    monkeypatch.chdir(tmp_path / "logs" / "a-run")
    assert models_folder(Path(".")).resolve() == run
    monkeypatch.chdir(run)
    assert from_checkpoint(models_folder(Path(".")) / "checkpoint.pt").run == "a-run"


def test_a_real_run(tmp_path, mnist_folder, capsys):
    """From the training script's own checkpoint."""
    from mnist.mnist import main as train

    argv = ["-m", "grad", "-s", "0.95", "-lr", "1e-2", "-b", "20", "-N", "2", "-T", "3"]
    assert train([*argv, "--dataset-dir", str(mnist_folder), "--dump-dir", str(tmp_path)]) == 0
    (models,) = (tmp_path / "models").iterdir()
    capsys.readouterr()
    assert main([str(models), "--format", "csr", "--check", "--dataset-dir", str(mnist_folder)]) == 0
    out = capsys.readouterr().out
    assert "T 3" in out
    assert "0 of 200 spike counts differ" in out
