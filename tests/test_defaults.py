"""Other defaults of torch than float32 and the CPU change nothing."""

import contextlib
import threading
import warnings

import pytest
import torch

import measuring
from analysis.export import export, load_pruned
from analysis.snapshot import from_checkpoint
from analysis.sparse import event_driven
from mnist import mnist
from mnist.data import MNIST
from mnist.model import MnistNet
from training import data
from training.command_line import command
from training.defaults import torch_defaults
from training.files import storage

KINDS = ["float64", "bfloat16", "float16", "meta"]


@contextlib.contextmanager
def other_defaults(kind):
    dtype = torch.get_default_dtype()
    try:
        torch.set_default_device("meta") if kind == "meta" else torch.set_default_dtype(getattr(torch, kind))
        yield
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(dtype)


def run(folder, data_folder, capsys, options=()):
    """Trains and tests; returns what was printed, and the checkpoint. The writer of checkpoints is waited for."""
    argv = ["-m", "deep", "-s", "0.9", "-temperature", "1e-3", "-b", "8", "-N", "2", "-T", "4", *options]
    argv += ["--dataset-dir", str(data_folder), "--dump-dir", str(folder)]
    capsys.readouterr()
    assert mnist.main(argv) == 0
    assert mnist.main([*argv, "-test"]) == 0
    for thread in threading.enumerate():
        if thread.name == "checkpoint writer":
            thread.join()
    (path,) = folder.glob("**/checkpoint.pt")
    lines = [line for line in capsys.readouterr().out.splitlines() if " s" not in line and str(folder) not in line]
    return lines, path


def assert_equal(a, b):
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert (a.dtype, a.device) == (b.dtype, b.device)
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_equal(x, y)
    else:
        assert a == b


def test_a_run_and_its_test_do_not_depend_on_torchs_defaults(tmp_path, mnist_folder, capsys):
    expected, path = run(tmp_path / "plain", mnist_folder, capsys)
    state = storage.read(path)
    assert any("test accuracy" in line for line in expected)
    network = load_pruned(path.parent)
    for kind in ("float64", "meta"):
        with other_defaults(kind):
            before = torch.get_default_dtype(), torch.empty(0).device
            found, path = run(tmp_path / kind, mnist_folder, capsys)
            assert (torch.get_default_dtype(), torch.empty(0).device) == before
            loaded = load_pruned(path.parent)
            export(from_checkpoint(path), "safetensors", tmp_path / f"{kind}.safetensors")
            exported = load_pruned(tmp_path / f"{kind}.safetensors")
        assert found == expected
        other = storage.read(path)
        for key in ("network", "optimizers", "random", "masks", "best_accuracy", "epoch_loss", "data"):
            assert_equal(other[key], state[key])
        for copy in (loaded, exported):
            assert_equal(dict(copy.state_dict()), dict(network.state_dict()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fused", [False, True])
def test_batches_and_what_a_network_makes_of_them(kind, fused):
    """The library, without the scripts that set the defaults."""
    images = torch.randint(0, 256, (20, 1, 28, 28), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    split = data.Split(images, torch.arange(20) % 10)
    network = MnistNet(4)
    network.fused = fused
    with torch.no_grad():
        network.fc[1].weight *= 12

    def results():
        normalise = data.Normalisation((0.1307,), (0.3081,), torch.device("cpu"))
        generator = torch.Generator("cpu").manual_seed(3)
        batches = data.TrainingBatches(split, 8, MNIST.augmentation, normalise, generator, fused=fused)
        made = list(batches)
        network.zero_grad()
        with measuring.SpikeCounter(network) as spikes:
            counts = network(made[0][0])
        loss = measuring.loss_function(counts, made[0][1], network.T)
        loss.backward()
        events = event_driven(network)(made[0][0])
        seen = measuring.evaluate(network, data.TestBatches(split, 8, normalise))
        gradients = [p.grad.clone() for p in network.parameters()]
        return [made, counts.detach(), loss.detach(), gradients, spikes.rates(), seen.confusion, events]

    expected = results()
    assert expected[1].sum() > 0
    with other_defaults(kind):
        found = results()
    assert_equal(found, expected)


def test_a_warning_is_one_line_in_a_script(monkeypatch):
    usual = warnings.formatwarning

    @command
    def main():
        ours, others = (warnings.formatwarning("a\nb", kind, "x.py", 3) for kind in (UserWarning, FutureWarning))
        assert ours == "mnist.py: warning: a b\n"
        assert others == usual("a\nb", FutureWarning, "x.py", 3)
        return 0

    monkeypatch.setattr("sys.argv", ["mnist/mnist.py"])
    assert main() == 0
    assert warnings.formatwarning is usual


def test_the_defaults_come_back_after_a_failure():
    @command
    def main():
        assert (torch.get_default_dtype(), torch.empty(0).device.type) == (torch.float32, "cpu")
        raise OSError("no space left")

    with other_defaults("float64"):
        assert main() == 1
        assert torch.get_default_dtype() == torch.float64
    with other_defaults("meta"):
        assert main() == 1
        assert torch.empty(0).device.type == "meta"
        with torch_defaults():
            assert torch.zeros(2).tolist() == [0, 0]
