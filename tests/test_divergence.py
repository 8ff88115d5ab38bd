"""Runs that diverge: the first loss, gradient or weight that is not finite is named, and nothing good is lost."""

import json

import pytest
import torch
from run_helpers import load, results, same
from torch import nn

from mnist.data import MNIST
from mnist.model import MnistNet
from training.data import TrainingBatches
from training.divergence import FiniteCheck

GRAD = ["-m", "grad", "-s", "0.95", "-lr", "1e-2", "-b", "8", "-N", "3"]
CPU = torch.device("cpu")


def network():
    layers = nn.Sequential(nn.Linear(3, 2, bias=False), nn.Linear(2, 1, bias=False))
    for parameter in layers.parameters():
        parameter.grad = torch.ones_like(parameter)
    return layers


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_first_one_is_found_and_stays_found(bad, device):
    for what in ("the loss", "the gradient of 0.weight", "the gradient of 1.weight", "the parameter 1.weight"):
        layers = network().to(device)
        for parameter in layers.parameters():
            parameter.grad = torch.ones_like(parameter)
        check, loss = FiniteCheck(layers, torch.device(device)), torch.ones((), device=device)
        for _ in range(3):
            check.update(loss)
            assert check.found() is None
        if what == "the loss":
            loss = loss * bad
        elif "gradient" in what:
            layers[int(what[-8])].weight.grad[0, -1] = bad
        else:
            layers[1].weight.data[0, 0] = bad
        for _ in range(2):
            check.update(loss)
        layers[0].weight.data[0, 0] = bad  # later, if earlier in the order
        check.update(loss)
        found = check.found()
        assert (found.what, found.step) == (what, 3)


@pytest.mark.parametrize("what", ["gradient", "parameter"])
@pytest.mark.parametrize("bad", ["0.weight", "0.bias", "1.bias", "2.weight", "3.weight"])
def test_tensors_that_are_summed_together_are_named_one_by_one(bad, what, monkeypatch):
    """As on a GPU; a gradient that is missing has another shape than those beside it."""
    monkeypatch.setattr(FiniteCheck, "STACKED", {"cpu": 20})
    layers = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 8, bias=False))
    for parameter in layers.parameters():
        parameter.grad = torch.ones_like(parameter)
    layers[1].weight.grad = None
    check = FiniteCheck(layers, CPU)
    assert sorted(map(len, check.groups)) == [1, 2, 3]
    check.update(torch.ones(()))
    assert check.found() is None
    parameter = layers.get_parameter(bad)
    (parameter.grad if what == "gradient" else parameter.data).view(-1)[-1] = float("nan")
    check.update(torch.ones(()))
    assert (check.found().what, check.found().step) == (f"the {what} {'of ' if what == 'gradient' else ''}{bad}", 1)
    for other in layers.parameters():  # of several in one step, the first of the network's order
        other.data.fill_(float("inf"))
    again = FiniteCheck(layers, CPU)
    again.update(torch.ones(()))
    assert again.found().what == (f"the gradient of {bad}" if what == "gradient" else "the parameter 0.weight")


def test_numbers_without_axes_are_summed_together(monkeypatch):
    """As on a GPU; ParametricLIFNode has such a parameter."""
    monkeypatch.setattr(FiniteCheck, "STACKED", {"cpu": 20})
    numbers = nn.ParameterList([torch.ones(()), torch.ones(())])
    check = FiniteCheck(numbers, CPU)
    check.update(torch.ones(()))
    assert check.found() is None
    numbers[1].data.fill_(float("nan"))
    check.update(torch.ones(()))
    assert (check.found().what, check.found().step) == ("the parameter 1", 1)


def test_what_has_no_gradient_is_finite():
    layers = network()
    layers[0].weight.grad = None
    check = FiniteCheck(layers, CPU)
    check.update(torch.ones(()))
    assert check.found() is None


@pytest.mark.gpu
def test_watching_does_not_wait_for_the_device():
    layers = network().cuda()
    for parameter in layers.parameters():
        parameter.grad = torch.ones_like(parameter)
    check, loss = FiniteCheck(layers, torch.device("cuda")), torch.ones((), device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        check.update(loss)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("what", ["the loss", "the gradient of fc.1.weight"])
@pytest.mark.parametrize("compiled", ["--compile", "--no-compile"])
def test_a_run_that_diverges_stops_before_its_last_good_checkpoint(
    run, tmp_path, monkeypatch, mnist_folder, what, compiled
):
    run(*GRAD[:-2], "-N", "1", compiled)
    before, lines = load(tmp_path), results(tmp_path)
    forward, passes = MnistNet.forward, []

    def diverge(self, images):
        counts = forward(self, images)
        if self.training:
            passes.append(1)
            if len(passes) == 3:  # the step 7 of the run, from 0: the third of the second epoch
                if what == "the loss":
                    return counts * float("inf")
                self.fc[1].weight.register_hook(lambda gradient: gradient / 0)
        return counts

    monkeypatch.setattr(MnistNet, "forward", diverge)
    result = run(*GRAD, compiled)
    assert result.status == 1
    assert result.err.count("\n") == 1
    assert f"{what} is not finite since epoch 2, step 7;" in result.err
    assert same(load(tmp_path), before)
    assert results(tmp_path) == lines
    (path,) = tmp_path.glob("logs/*/diverged-epoch-2-step-7.json")
    kept = json.loads(path.read_text())
    # the indices are those of the third batch of the second epoch
    generator = torch.Generator().manual_seed(2020)
    data = MNIST.load(mnist_folder).train
    batches = TrainingBatches(data, 8, MNIST.augmentation, MNIST.normalisation(CPU), generator)
    for _ in range(2):
        images = [labels for _, labels in batches]
    assert kept["indices"] == batches.indices(2).tolist()
    assert torch.equal(data.labels[kept["indices"]], images[2])
    # and once the cause is gone the run goes on
    monkeypatch.undo()
    assert run(*GRAD, compiled).status == 0


def test_weights_that_overflow_are_named(run, tmp_path):
    result = run("-lr", "1e37", "-b", "8", "-N", "1", "-i2", "1")
    assert result.status == 1
    assert "is not finite since epoch 1, step" in result.err
    state = load(tmp_path)
    assert state["step"] == 0
    assert all(tensor.isfinite().all() for tensor in state["network"].values())


def test_a_step_greater_than_float32_is_one_line(run, tmp_path):
    result = run("-lr", "1e38", "-b", "8", "-N", "1", "--no-compile")
    assert result.status == 1
    assert "a step is too large for float32: use a smaller -lr" in result.err
    assert result.err.count("\n") == 1
    assert load(tmp_path)["step"] == 0


def test_the_run_stops_at_the_next_recording(run, tmp_path, monkeypatch):
    forward, passes = MnistNet.forward, []

    def diverge(self, images):
        passes.append(1)
        return forward(self, images) * float("nan")

    monkeypatch.setattr(MnistNet, "forward", diverge)
    assert run(*GRAD, "-i2", "2").status == 1
    assert len(passes) == 1  # step 0 is recorded
