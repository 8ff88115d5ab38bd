"""Runs that diverge: the first loss, gradient or weight that is not finite is named, and nothing good is lost."""

import json

import pytest
import torch
from optim_helpers import VARIANTS
from run_helpers import load, results, same
from torch import Tensor, nn

import spiking_kernels
from mnist.data import MNIST
from mnist.model import MnistNet
from training.data import TrainingBatches
from training.divergence import FiniteCheck

GRAD = ["-m", "grad", "-s", "0.95", "-lr", "1e-2", "-b", "8", "-N", "3"]
CPU = torch.device("cpu")
needs_kernels = pytest.mark.skipif(spiking_kernels.unavailable() is not None, reason="no fused kernels")


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


REWIRING = {name: VARIANTS[name] for name in ("grad", "deep", "soft deep")}


def stepped(variant, n=83, change=None, **settings):
    """A network of n weights after two steps of a fused optimizer; what ``change`` does comes before the second."""
    optimizer_class, own = REWIRING[variant]
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(n, 1, bias=False))
    weight = layers[0].weight
    optimizer = optimizer_class([weight], lr=1e-3, fused=True, **{**own, **settings})
    for change_it in (None, change):
        weight.grad = torch.randn_like(weight)
        if change_it is not None:
            change_it(optimizer, weight)
        optimizer.step()
    return layers, optimizer, weight


def seen(optimizer):
    return [id(parameter) for parameter in optimizer.seen_finite()]


@needs_kernels
@pytest.mark.parametrize("variant", REWIRING)
def test_what_a_kernel_has_seen_is_not_summed_again(variant, monkeypatch):
    layers, optimizer, weight = stepped(variant)
    assert seen(optimizer) == [id(weight)]
    check = FiniteCheck(layers, CPU)
    monkeypatch.setattr(Tensor, "sum", lambda *_: pytest.fail("there is a sum"))
    check.update(torch.ones(()), optimizer.seen_finite())
    assert check.found() is None
    monkeypatch.undo()
    check.update(torch.tensor(float("nan")), optimizer.seen_finite())  # the loss is looked at nevertheless
    assert check.found().what == "the loss"


@needs_kernels
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), 3e38])
@pytest.mark.parametrize("place", [0, 15, 16, 79, 80, 82])  # of 83: 80 are taken by sixteen
@pytest.mark.parametrize("variant", REWIRING)
def test_a_kernel_sees_what_is_not_finite(variant, place, bad):
    """A sum of two 3e38 overflows: it counts as not finite, with a kernel and without."""

    def spoil(optimizer, weight):
        weight.grad.view(-1)[place] = bad
        weight.grad.view(-1)[(place + 7) % 83] = bad

    layers, optimizer, _ = stepped(variant, change=spoil)
    assert seen(optimizer) == []
    checks = [FiniteCheck(layers, CPU) for _ in range(2)]
    for check, finite in zip(checks, (optimizer.seen_finite(), []), strict=True):
        check.update(torch.ones(()), finite)
    assert checks[0].found() == checks[1].found()
    assert checks[0].found().what == "the gradient of 0.weight"


@needs_kernels
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 3e38])
@pytest.mark.parametrize("place", [0, 15, 16, 79, 80, 82])
@pytest.mark.parametrize("variant", REWIRING)
def test_a_kernel_sees_weights_that_are_not_finite(variant, place, bad):
    def spoil(optimizer, weight):
        state = optimizer.state[weight]
        for i in (place, (place + 7) % 83):
            state["sign"].view(-1)[i] = 1
            state.get("theta", weight.data).view(-1)[i] = bad

    layers, optimizer, _ = stepped(variant, change=spoil)
    assert seen(optimizer) == []
    check = FiniteCheck(layers, CPU)
    check.update(torch.ones(()), optimizer.seen_finite())
    assert check.found().what == "the parameter 0.weight"


@needs_kernels
def test_what_deep_r_activates_may_be_too_large():
    _, optimizer, weight = stepped("deep", eps=1e37, max_s=0.0)
    assert seen(optimizer) == []
    assert weight.abs().max() == 1e37


@needs_kernels
@pytest.mark.parametrize("variant", REWIRING)
def test_a_kernel_has_not_seen_later_changes(variant):
    def scaled(_, weight):
        with torch.no_grad():
            weight.mul_(2)

    changes = {
        "the weight": scaled,
        "the gradient": lambda _, weight: weight.grad.mul_(2),
        "another gradient": lambda _, weight: setattr(weight, "grad", weight.grad.clone()),
        "no gradient": lambda _, weight: setattr(weight, "grad", None),
    }
    for name, change in changes.items():
        _, optimizer, weight = stepped(variant)
        assert seen(optimizer) == [id(weight)], name
        change(optimizer, weight)
        assert seen(optimizer) == [], name


@needs_kernels
@pytest.mark.parametrize("variant", REWIRING)
def test_a_step_without_the_kernel_sees_nothing(variant):
    """A gradient that is not contiguous is left to the compiled update, here to the plain one."""

    def spread(optimizer, weight):
        weight.grad = torch.randn(1, 2 * weight.numel())[:, ::2]
        optimizer.param_groups[0]["fused"] = False

    assert seen(stepped(variant, change=spread)[1]) == []
    memory = stepped(variant)[1]._seen[0].memory[0]
    assert memory.parameter.moderate
    with pytest.raises(spiking_kernels.Unfit):
        memory.take(torch.randn(1, 166)[:, ::2])
    assert not memory.parameter.moderate
