"""The training step on torch's meta device, which has shapes but no numbers.

An operation that waits for a number raises there, and so does one that mixes devices, as on a GPU.
"""

import importlib

import pytest
import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import measuring
import rewiring
import training.step
from analysis.experiments import EXPERIMENTS
from training import data
from training.methods import METHODS
from training.options import read
from training.step import TrainingStep

META = torch.device("meta")
MODES = [
    "-m grad -s 0.95",
    "-m deep -s 0.5 -temperature 1e-3",
    "-m deep -soft -s 0.95 -temperature 1e-3",
    "-m no_prune",
]
EXECUTIONS = {"one by one": {}, "foreach": dict(foreach=True), "compiled": dict(fused=True)}
BATCH, T = 4, 2


class AutocastToBfloat16(TorchFunctionMode):
    """What torch.autocast does to products on a GPU; it knows no meta device."""

    products = (F.linear, torch.conv2d, F.conv2d)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in self.products:
            args = [x.bfloat16() if isinstance(x, torch.Tensor) else x for x in args]
        return function(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    """The meta device takes what torch keeps for GPUs: autocast, steps counted on the device, compiled updates."""
    autocast = training.step.autocast
    monkeypatch.setattr(
        "training.step.autocast",
        lambda precision, device: AutocastToBfloat16() if precision == "bf16" else autocast(precision, device),
    )
    adam = importlib.import_module("torch.optim.adam")  # which torch.optim hides
    monkeypatch.setattr(adam, "_get_capturable_supported_devices", lambda **_: ["cuda", "meta"])
    compile, calls = torch.compile, []

    def compiled(update, **settings):
        made = compile(update, backend="eager", **settings)
        return lambda *args, **given: calls.append(update) or made(*args, **given)

    monkeypatch.setattr("rewiring.torch.compile", compiled)
    rewiring._compiled.cache_clear()
    yield calls
    rewiring._compiled.cache_clear()


def prepared(name, mode, precision="tf32", execution="one by one"):
    """An experiment's training step and its batches, all on the meta device but for the order of the images."""
    experiment = EXPERIMENTS[name]
    options = read(experiment, [*mode.split(), "-T", str(T), "--precision", precision])
    options.device, options.compile = META, False
    with META:
        network = experiment.network(T)
    optimizers = METHODS[options.mode].build(network, options)
    for optimizer in optimizers:
        pruning = isinstance(optimizer, rewiring.RewiringOptimizer)
        for group in optimizer.param_groups:  # torch has its fused Adam for CPUs and GPUs alone
            group.update(EXECUTIONS[execution] if pruning or execution == "foreach" else {}, capturable=True)
    source = experiment.datasets[0]
    split = data.Split(*(torch.zeros(n, dtype=torch.uint8, device=META) for n in ((12, *source.shape), 12)))
    split = data.Split(split.images, split.labels.long())
    batches = data.TrainingBatches(
        split, BATCH, source.augmentation, source.normalisation(META), torch.Generator().manual_seed(0)
    )
    return TrainingStep(network, optimizers, precision, META, graph=False), batches


def train(step, batches):
    """An epoch, with the sums that the training loop keeps."""
    total = torch.zeros((), dtype=torch.float64, device=META)
    for images, labels in batches:
        loss, right = step(images, labels)
        total += loss
        total += right
    assert total.is_meta


@pytest.mark.parametrize(
    ("mode", "precision", "execution"),
    [
        *[(mode, *how) for mode in MODES for how in (("tf32", "one by one"), ("bf16", "foreach"))],
        *[(mode, "tf32", "compiled") for mode in MODES[:-1]],
    ],
)
@pytest.mark.parametrize("name", ["mnist", "c10"])
def test_a_training_step_waits_for_nothing_and_stays_on_its_device(as_on_a_gpu, name, mode, precision, execution):
    step, batches = prepared(name, mode, precision, execution)
    train(step, batches)
    state = [x for optimizer in step.optimizers for own in optimizer.state.values() for x in own.values()]
    tensors = [*step.network.state_dict().values(), *state, step.finite.first, step.finite.steps]
    assert {x.device for x in tensors if isinstance(x, torch.Tensor)} == {META}
    assert len(state) > 2 * len(step.parameters)
    assert bool(as_on_a_gpu) == (execution == "compiled")


@pytest.mark.parametrize("name", ["mnist", "c10"])
def test_a_batch_is_evaluated_without_waiting(name):
    step, batches = prepared(name, "-m no_prune")
    network = step.network.eval()
    with torch.no_grad(), measuring.SpikeCounter(network):
        for images, labels in batches:
            assert measuring.confusion(network(images), labels).is_meta


FAULTS = {
    "a number": lambda counts: counts * float(counts.detach().sum()),
    "a decision": lambda counts: counts if counts.sum() > 0 else -counts,
    "positions": lambda counts: counts + counts.nonzero().sum(),
    "the CPU": lambda counts: counts + torch.ones(10),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_raises(fault):
    step, batches = prepared("mnist", "-m grad -s 0.95")
    train(step, batches)
    step.network.readout = FAULTS[fault]
    with pytest.raises((RuntimeError, NotImplementedError)):
        train(step, batches)
