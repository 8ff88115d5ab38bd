"""Exports: what is written is what is read, in spikes and in bits."""

import json
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from export_helpers import assert_same_counts, cifar10, forms, images_for, mnist, packed_forms, snapshot_of, write_run
from scipy.sparse import csr_matrix
from torch.nn import functional as F

import measuring
from analysis import export as export_module
from analysis import formats
from analysis.export import differing_counts, export, load_pruned, main
from analysis.formats import packed
from analysis.snapshot import from_checkpoint, models_folder
from c10.model import Cifar10Net
from mnist.model import MnistNet
from training.command_line import output_file
from training.errors import Refusal
from training.files import storage

ROOT = Path(__file__).resolve().parent.parent
SPARSITIES = (0.0, 0.5, 0.9, 0.995, 1.0)


# -- what comes back -------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("can't allocate memory: 9 bytes")])
def test_what_cannot_be_read_for_lack_of_memory_is_not_damaged(tmp_path, monkeypatch, error):
    export(snapshot_of(mnist()), "npz", tmp_path / "file")

    def fail(path):
        raise error

    monkeypatch.setattr(formats, "read_npz", fail)
    with pytest.raises(type(error)) as raised:
        load_pruned(tmp_path / "file")
    assert raised.value is error


@pytest.mark.parametrize("form", ["npz", "csr"])
@pytest.mark.parametrize("name", ["static_conv.0.weight", "conv.2.running_mean"])
def test_what_reads_back_otherwise_is_not_kept(form, tmp_path, monkeypatch, name):
    snapshot = snapshot_of(cifar10())
    assert name in snapshot.state
    export(snapshot, form, tmp_path / "good")
    changed = {**snapshot.state, name: snapshot.state[name] + 1}
    write = formats.WRITERS[form]
    monkeypatch.setitem(export_module.WRITERS, form, lambda snapshot: write(replace(snapshot, state=changed)))
    with pytest.raises(
        RuntimeError, match=f"does not read back as it was written: .*{name.removesuffix('running_mean')}"
    ):
        export(snapshot, form, tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["good"]


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


@packed_forms
def test_cifar10_comes_back_with_the_same_spikes(form, tmp_path):
    network = cifar10()
    export(snapshot_of(network), form, tmp_path / "file")
    loaded = load_pruned(tmp_path / "file")
    assert isinstance(loaded, Cifar10Net)
    for name, weight in measuring.prunable(network).items():
        assert torch.equal(loaded.get_parameter(name), weight), name
    # each layer's own output to the bit, not only what of it comes through as a spike
    for module, other in zip(network.conv, loaded.conv, strict=True):
        if isinstance(module, torch.nn.BatchNorm2d):
            x = torch.randn(2, 3, 8, 8, 8)
            assert torch.equal(module(x), other(x))
    assert_same_counts(network, loaded)
    if form != "csr":  # which folds BatchNorm
        for name, tensor in network.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor), name


@forms
@pytest.mark.parametrize(("first", "second"), [(1.0, 0.5), (0.5, 1.0), (1.0, 1.0)])
def test_a_layer_without_connections(form, tmp_path, first, second):
    network = mnist(first, second)
    export(snapshot_of(network), form, tmp_path / "file")
    loaded = load_pruned(tmp_path / "file")
    for name, weight in measuring.prunable(network).items():
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


def test_csr_is_plain_numpy_and_scipy(tmp_path):
    """The file as its description tells to read it, BatchNorm as scale and shift after the convolution."""
    network = cifar10()
    export(snapshot_of(network), "csr", tmp_path / "file.npz")
    file = np.load(tmp_path / "file.npz", allow_pickle=False)
    description = json.loads(str(file["network"]))
    assert (description["experiment"], description["T"], description["epoch"]) == ("c10", 4, 3)
    assert description["normalisation"] == {"mean": [0.4914, 0.4822, 0.4465], "std": [0.2023, 0.1994, 0.2010]}
    assert description["neuron"] == {"tau": 2.0, "v_threshold": 1.0, "v_reset": 0.0, "decay_input": True}
    matrices = {}
    for name, weight in measuring.prunable(network).items():
        data, indices, indptr, shape = (file[f"{name}/{key}"] for key in ("data", "indices", "indptr", "shape"))
        matrices[name] = csr_matrix((data, indices, indptr), shape)
        assert matrices[name].nnz == int(measuring.connected(weight).sum())
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


# -- load_pruned -----------------------------------------------------------------------------------


def test_load_pruned_takes_runs_checkpoints_and_exports(tmp_path):
    network = mnist()
    models = write_run(tmp_path, network)
    export(from_checkpoint(models / "checkpoint.pt"), "csr", models / "export.npz")
    logs = tmp_path / "logs" / "a-run"
    (tmp_path / "renamed").write_bytes((models / "checkpoint.pt").read_bytes())
    for path in (models, logs, models / "checkpoint.pt", models / "export.npz", str(models), tmp_path / "renamed"):
        assert_same_counts(network, load_pruned(path))


def test_a_loaded_network_is_ready(tmp_path):
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


@packed_forms
def test_no_tensor_is_read_only(form, tmp_path, monkeypatch):
    """Training goes on in the tensors of a file; torch writes to read-only memory without a word."""
    export(snapshot_of(cifar10()), form, tmp_path / "file")
    seen, from_numpy = [], torch.from_numpy
    monkeypatch.setattr(torch, "from_numpy", lambda array: seen.append(array) or from_numpy(array))
    load_pruned(tmp_path / "file")
    assert len(seen) > 10
    assert all(array.flags.writeable for array in seen)


def test_a_run_is_loaded_from_the_newest_checkpoint_that_is_good(tmp_path, capsys):
    """As training resumes: from the one before where the last is damaged, or missing after a kill."""
    older, newer = mnist(0.5), mnist(0.9)
    models = write_run(tmp_path, older)
    last, previous = models / "checkpoint.pt", models / "checkpoint-previous.pt"
    saved = storage.read(last)
    storage.write(last, saved | {"network": newer.state_dict(), "epoch": 4})
    assert_same_counts(newer, load_pruned(models))
    whole = last.read_bytes()
    last.write_bytes(whole[:500] + b"?" + whole[501:])
    with pytest.warns(
        UserWarning, match=r"checkpoint\.pt is damaged.*; this is the network of checkpoint-previous\.pt"
    ):
        assert_same_counts(older, load_pruned(models))
    with pytest.raises(ValueError, match=r"checkpoint\.pt is damaged"):
        load_pruned(last)
    with pytest.warns(UserWarning, match="is damaged"):
        assert main([str(models), "--format", "csr"]) == 0
    assert f"checkpoint   {previous.stat().st_size:>11,} bytes" in capsys.readouterr().out
    last.unlink()
    with warnings.catch_warnings(action="error"):
        for folder in (models, tmp_path / "logs" / "a-run"):
            assert_same_counts(older, load_pruned(folder))
        assert main([str(models), "--format", "csr"]) == 0
    assert "after 3 epochs: " in capsys.readouterr().out
    previous.write_bytes(whole[:500])
    with pytest.raises(ValueError, match=r"checkpoint-previous\.pt is damaged"):
        load_pruned(models)


def test_a_folder_that_hides_a_network_of_its_name_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dense").mkdir()
    with pytest.raises(ValueError, match=r"^dense has no checkpoint\.pt: .*; it hides the network dense, which comes"):
        load_pruned("dense")
    (tmp_path / "another").mkdir()
    with pytest.raises(ValueError, match="another has no checkpoint") as raised:
        load_pruned("another")
    assert "hides" not in str(raised.value)


# -- writing ---------------------------------------------------------------------------------------


def test_an_unknown_format_is_named_before_anything_is_made(tmp_path):
    with pytest.raises(ValueError, match="must be one of npz, safetensors, csr, nir, not 'onnx'"):
        export(snapshot_of(mnist()), "onnx", tmp_path / "new" / "file")
    assert list(tmp_path.iterdir()) == []


@forms
def test_an_export_has_the_same_bytes_every_time(form, tmp_path):
    snapshot, contents = snapshot_of(mnist()), set()
    for _ in range(10):
        export(snapshot, form, tmp_path / "network")
        contents.add((tmp_path / "network").read_bytes())
    assert len(contents) == 1


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
    write = formats.WRITERS["csr"]
    monkeypatch.setitem(formats.WRITERS, "csr", lambda snapshot: write(snapshot_of(mnist(0.5))))
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
    masks = {name: measuring.connected(weight) for name, weight in measuring.prunable(mnist()).items()}
    total = measuring.total(measuring.count(masks))
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


def test_no_checkpoint_of_another_run_is_replaced(tmp_path, capsys):
    """Whatever its name, and by whatever writes a file that an option names."""
    run, other = (write_run(tmp_path, mnist(), name) for name in ("a-run", "other"))
    kept = other / "checkpoint.pt"
    kept = kept.rename(other / "kept.pt")
    before = kept.read_bytes()
    assert main([str(run), "--format", "csr", "-o", str(kept)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(f"argument -o/--output: {kept} is the checkpoint of a run")
    with pytest.raises(Refusal, match=r"kept\.pt is the checkpoint of a run"):
        export(snapshot_of(mnist()), "csr", kept)
    with pytest.raises(Refusal, match=r"argument --json: .*kept\.pt is the checkpoint"), output_file("--json", kept):
        pass
    assert kept.read_bytes() == before
    kept.write_bytes(before[:-1])  # damaged, so that nothing is lost
    assert main([str(run), "--format", "csr", "-o", str(kept)]) == 0


def test_the_check_fails_where_counts_differ(tmp_path, capsys, mnist_folder, monkeypatch):
    models = write_run(tmp_path, mnist())
    monkeypatch.setattr(export_module, "load_pruned", lambda path: mnist(0.5, 0.1))
    assert main([str(models), "--format", "csr", "--check", "--dataset-dir", str(mnist_folder)]) == 1
    assert "0 of 200" not in capsys.readouterr().out


@pytest.mark.parametrize("form", ["npz", "csr"])
def test_the_check_computes_on_the_device_chosen(form, tmp_path, mnist_folder, monkeypatch):
    """The device meta stands for a GPU: it has no values, so the counts are not compared."""
    models, seen = write_run(tmp_path, mnist()), []

    def choose(place):
        seen.append((place.gpu, place.precision))
        place.device, place.precision_used = torch.device("meta"), place.precision

    def compare(one, other, test_set):
        networks = {parameter.device.type for network in (one, other) for parameter in network.parameters()}
        (images, _), *_ = test_set
        seen.append((networks, images.device.type))
        return 0, 1

    monkeypatch.setattr(export_module.device, "choose", choose)
    monkeypatch.setattr(export_module, "differing_counts", compare)
    argv = [str(models), "--format", form, "-gpu", "3", "--dataset-dir", str(mnist_folder)]
    assert main(argv) == 0
    assert seen == []  # without --check, no device is looked for
    assert main([*argv, "--check"]) == 0
    assert seen == [(3, "fp32"), ({"meta"}, "meta")]


@pytest.mark.gpu
@forms
def test_the_check_on_a_gpu_finds_no_difference(form, tmp_path, capsys, mnist_folder):
    models = write_run(tmp_path, mnist())
    assert main([str(models), "--format", form, "--check", "--dataset-dir", str(mnist_folder)]) == 0
    out = capsys.readouterr().out
    assert "0 of 200 spike counts differ" in out
    assert "No GPU found" not in out


def test_csr_holds_the_batch_norms_of_as_folded(tmp_path):
    """To the bit, so that their spikes are the same on any device; on the CPU, those of the network itself too."""
    network = cifar10()
    snapshot = snapshot_of(network)
    export(snapshot, "csr", tmp_path / "file")
    folded, loaded = packed.as_folded(snapshot).network(), load_pruned(tmp_path / "file")
    states = [module.state_dict() for module in (network, folded, loaded)]
    changed = [name for name in states[0] if not torch.equal(states[0][name], states[1][name])]
    assert {name.rpartition(".")[2] for name in changed} >= {"weight", "bias", "running_mean", "running_var"}
    assert not set(changed) & measuring.prunable(network).keys()
    assert all(torch.equal(states[1][name], states[2][name]) for name in states[0])
    assert_same_counts(network, folded)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["{run}", "--format", "onnx"], "must be npz, safetensors, csr or nir, not 'onnx'"),
        (["{folder}"], "has no checkpoint.pt"),
        (["{folder}", "--format", "csr"], "has no checkpoint.pt"),
        (["{folder}/nothing", "--format", "csr"], "has no checkpoint.pt"),
        (["{run}", "--format", "csr", "-o", "{folder}"], "is a folder"),
        (["{run}", "--format", "csr", "-o", "{run}/checkpoint.pt"], "is the run's checkpoint"),
        (["{run}", "--format", "csr", "--check", "--dataset-dir", "{folder}/logs/a-run/x/y"], "--dataset-dir"),
        (["{run}", "--check", "-gpu", "99"], "argument -gpu/--gpu: there is no GPU 99"),
        (["{run}", "--check", "-gpu", "cpu"], "argument -gpu/--gpu: must be the id of a GPU"),
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
    if "-gpu" in argv:
        assert not list(run.glob("export*"))


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


@pytest.mark.parametrize(("width", "weights"), [([], 800 * 794), (["--width", "50"], 50 * 794)])
def test_a_real_run(width, weights, tmp_path, mnist_folder, capsys):
    """From the training script's own checkpoint, in the default format."""
    from mnist.mnist import main as train

    argv = ["-m", "grad", "-s", "0.95", "-lr", "1e-2", "-b", "20", "-N", "2", "-T", "3", *width]
    assert train([*argv, "--dataset-dir", str(mnist_folder), "--dump-dir", str(tmp_path)]) == 0
    (models,) = (tmp_path / "models").iterdir()
    capsys.readouterr()
    assert main([str(models), "--check", "--dataset-dir", str(mnist_folder)]) == 0
    out = capsys.readouterr().out
    assert f" of {weights} connections" in out
    assert "T 3" in out
    assert "after 2 epochs: " in out
    assert (models / "export.npz").read_bytes()[:2] == b"PK"
    assert "0 of 200 spike counts differ" in out
    storage.write(models / "checkpoint.pt", storage.read(models / "checkpoint.pt") | {"position": 1})
    assert main([str(models), "-o", str(tmp_path / "export.npz")]) == 0
    assert "after 2 epochs and 1 step of the next: " in capsys.readouterr().out
