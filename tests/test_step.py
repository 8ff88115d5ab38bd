"""A training step as a unit: precisions, and on a GPU the CUDA graph."""

import contextlib
import copy
import re
from types import SimpleNamespace

import pytest
import torch
from spikingjelly.activation_based import functional, neuron
from test_models import narrow_cifar10, spiking_mnist
from torch.optim import Adam

import measuring
from deeprewire import DeepRewiring
from gradrewire import GradRewiring
from spiking import lif
from training.checkpoint import load_optimizer
from training.errors import Refusal
from training.first_step import Saved
from training.step import TrainingStep, autocast, set_precision

CPU = torch.device("cpu")


def batches(n, shape, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(shape, generator=generator).to(device), torch.arange(shape[0], device=device) % 10)
        for _ in range(n)
    ]


def optimizers_of(network, cls=GradRewiring, lr=1e-3, **settings):
    weights = list(measuring.prunable(network).values())
    others = [p for p in network.parameters() if p.dim() == 1]
    defaults = dict(alpha=1e-3, s=0.95) if cls is GradRewiring else dict(l1=1e-3, max_s=0.5, T=0.01, soft=True)
    capturable = settings.get("capturable", False)
    pruning = cls(weights, lr=lr, **{**defaults, **settings})
    return [pruning, Adam(others, lr=lr, capturable=capturable)] if others else [pruning]


def test_a_step_is_forward_loss_backward_and_optimizers():
    network, by_hand = spiking_mnist(4, "m"), spiking_mnist(4, "m")
    step = TrainingStep(network, optimizers_of(network), "fp32", CPU, graph=True)  # no graph without a GPU
    (optimizer,) = optimizers_of(by_hand)
    for images, labels in batches(3, (5, 1, 28, 28)):
        loss, right = step(images, labels)
        counts = by_hand(images)
        expected = measuring.loss_function(counts, labels, 4)
        optimizer.zero_grad()
        expected.backward()
        optimizer.step()
        assert torch.equal(loss, expected.detach())
        assert right == (counts.argmax(1) == labels).sum()
        assert not loss.requires_grad
    for p, q in zip(network.parameters(), by_hand.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_membrane_potentials_stay_float32(dtype):
    """Input of low precision: the spikes of a float32 neuron with the same input, and their gradient."""
    x = (torch.randn(6, 3, 20, generator=torch.Generator().manual_seed(0)) * 2).to(dtype)
    runs = []
    for inputs in (x.clone().requires_grad_(), x.float().requires_grad_()):
        node = lif()
        functional.set_step_mode(node, "m")
        spikes = node(inputs)
        assert spikes.dtype == inputs.dtype
        assert node.v.dtype == torch.float32
        spikes.float().mul(torch.arange(20.0)).sum().backward()
        runs.append((spikes.float(), inputs.grad.float()))
    assert torch.equal(runs[0][0], runs[1][0])
    torch.testing.assert_close(runs[0][1], runs[1][1], rtol=0.02, atol=0.02)


def test_bf16_keeps_all_state_in_float32():
    torch.manual_seed(0)
    network = narrow_cifar10("m")
    optimizers = optimizers_of(network)
    step = TrainingStep(network, optimizers, "bf16", CPU, graph=False)
    seen = {}
    for name, module in network.named_modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
            module.register_forward_hook(lambda m, i, o, name=name: seen.__setitem__(name, o.dtype))
        if isinstance(module, neuron.LIFNode):
            module.register_forward_hook(lambda m, i, o, name=name: seen.__setitem__(name, m.v.dtype))
    ((images, labels),) = batches(1, (4, 3, 32, 32))
    network.train()
    loss, _ = step(images, labels)
    assert loss.dtype == torch.float32
    for name, dtype in seen.items():
        is_lif = isinstance(network.get_submodule(name), neuron.LIFNode)
        assert dtype == (torch.float32 if is_lif else torch.bfloat16), name
    assert len(seen) == 8 + 8
    state = [*network.parameters(), *(b for b in network.buffers() if b.is_floating_point())]
    state += [t for o in optimizers for s in o.state.values() for k, t in s.items() if k not in ("sign", "step")]
    assert {t.dtype for t in state} == {torch.float32}


@pytest.mark.parametrize("fused", [False, True])
def test_precisions_agree_on_one_batch(fused):
    network = spiking_mnist(8, "m").eval()
    network.fused = fused
    images, _ = batches(1, (50, 1, 28, 28))[0]
    counts = {}
    for precision in ("fp32", "bf16"):
        with torch.no_grad(), autocast(precision, CPU):
            counts[precision] = network(images)
    assert counts["bf16"].dtype == torch.float32
    assert counts["fp32"].sum() > 0
    assert not torch.equal(counts["bf16"], counts["fp32"])  # it does something
    assert (counts["bf16"] - counts["fp32"]).abs().mean() < 0.1


class Streams:
    """Stands for the streams of a GPU: what runs on which, and who waits for whom."""

    def __init__(self, monkeypatch):
        self.made, self.current, self.captured_on = [], "default", []
        for name in ("Stream", "stream", "current_stream", "graph", "CUDAGraph"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))

    def Stream(self, device=None):
        self.made.append(SimpleNamespace(wait_stream=lambda other: None, device=device))
        return self.made[-1]

    @contextlib.contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream
        yield
        self.current = before

    def current_stream(self, device=None):
        return SimpleNamespace(wait_stream=lambda other: None)

    @contextlib.contextmanager
    def graph(self, graph, stream=None):
        """A capture: nothing that runs in it changes anything."""
        self.captured_on.append(stream)
        step = graph.step
        counters = step.finite.first, step.finite.steps
        held = Saved([*step.parameters, *step.network.buffers(), *counters], step.optimizers, CPU)
        yield
        held.restore()

    def CUDAGraph(self):
        return SimpleNamespace(step=self.step, replay=self.replay)

    def replay(self):
        """A replay takes a step with the batch and the settings as they are in the tensors of the graph.

        A setting that was a number in the capture stays that number.
        """
        now = [dict(group) for group in self.groups()]
        for group, captured in zip(self.groups(), self.captured, strict=True):
            group.update(captured)
        for place, made in zip(self.step.outputs, self.step._eager(*self.step.batch), strict=True):
            place.copy_(made)
        for group, settings in zip(self.groups(), now, strict=True):
            group.update(settings)

    def groups(self):
        return [group for optimizer in self.step.optimizers for group in optimizer.param_groups]


@pytest.fixture
def on_gpu(monkeypatch):
    """Makes a step that believes to be on a GPU, and what stands for it."""

    def make(network, optimizers, **settings):
        streams = Streams(monkeypatch)
        streams.step = TrainingStep(network, optimizers, "fp32", CPU, graph=True, **settings)
        streams.step.use_graph, eager = True, streams.step._eager

        def noted(*batch):
            streams.captured = [dict(group) for group in streams.groups()]
            return eager(*batch)

        streams.step._eager = noted
        return streams.step, streams

    return make


def noted(monkeypatch, *names):
    """The calls of some methods of a step, by their names."""
    taken = []
    for name in names:
        method = getattr(TrainingStep, name)

        def call(self, *batch, name=name, method=method):
            taken.append(name.strip("_"))
            return method(self, *batch)

        monkeypatch.setattr(TrainingStep, name, call)
    return taken


def train_both(step, plain, changes, n=9):
    """Takes the same steps with both, with settings that change."""
    for i, batch in enumerate(batches(n, (5, 1, 28, 28))):
        for one in (step, plain):
            for group in one.optimizers[0].param_groups:
                group.update(changes.get(i, {}))
        loss, right = step(*batch)
        expected, expected_right = plain(*batch)
        torch.testing.assert_close(loss, expected)
        assert right == expected_right
    for p, q in zip(step.parameters, plain.parameters, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    assert step.finite.steps == plain.finite.steps == n


@pytest.mark.parametrize(
    ("changes", "captures"),
    [
        ({i: {"lr": 1e-3 * (i + 1)} for i in range(9)}, 1),
        ({i: {"alpha": 0.1 * (i % 3)} for i in range(9)}, 1),
        ({6: {"s": 0.6}}, 2),
        ({0: {"betas": (0.8, 0.9)}, 2: {"eps": 1e-7}}, 1),
        ({7: {"maximize": True}}, 2),
    ],
)
def test_a_captured_step_follows_its_settings(on_gpu, changes, captures):
    """Those that a schedule changes are read at each replay; after any other change the step is captured anew."""
    plain_network, network = spiking_mnist(4, "m"), spiking_mnist(4, "m")
    step, streams = on_gpu(network, optimizers_of(network), changing=("lr", "alpha"))
    plain = TrainingStep(plain_network, optimizers_of(plain_network), "fp32", CPU, graph=False)
    train_both(step, plain, changes)
    assert len(streams.captured_on) == captures
    for group in step.optimizers[0].param_groups:  # what a checkpoint stores
        assert type(group["lr"]) is type(group["alpha"]) is float
        assert (group["lr"], group["alpha"]) == tuple(
            plain.optimizers[0].param_groups[0][key] for key in ("lr", "alpha")
        )


@pytest.mark.parametrize("after", [0, 6])
def test_a_captured_step_follows_the_settings_of_a_state_that_was_loaded(on_gpu, after):
    """When a run goes on, the step is there before the state; the optimizers then have other groups."""
    earlier = spiking_mnist(4, "m")
    trained = TrainingStep(earlier, optimizers_of(earlier), "fp32", CPU, graph=False)
    for batch in batches(3, (5, 1, 28, 28)):
        trained(*batch)
    plain_network, network = spiking_mnist(4, "m"), spiking_mnist(4, "m")
    step, streams = on_gpu(network, optimizers_of(network), changing=("lr", "alpha"))
    plain = TrainingStep(plain_network, optimizers_of(plain_network), "fp32", CPU, graph=False)
    for one in (step, plain):
        for batch in batches(after, (5, 1, 28, 28)):
            one(*batch)
        one.network.load_state_dict(earlier.state_dict())
        load_optimizer(one.optimizers[0], copy.deepcopy(trained.optimizers[0].state_dict()))
        one.finite.steps.zero_()
    train_both(step, plain, {i: {"lr": 1e-3 * (i + 1), "alpha": 0.1 * (i % 3)} for i in range(9)})
    assert len(streams.captured_on) == (2 if after else 1)
    assert all(type(group[key]) is float for group in step.optimizers[0].param_groups for key in ("lr", "alpha"))


def test_a_gpu_that_cannot_go_on_after_a_capture_says_how_to(on_gpu, monkeypatch):
    """As with torch before 2.10 or so, where a capture was broken off: dropout finds its generator in the capture."""
    network, broken = spiking_mnist(4, "m"), []
    step, _ = on_gpu(network, optimizers_of(network))

    def fail(self, *batch):
        broken.append(True)
        raise RuntimeError("operation not permitted")

    def stuck(module, inputs):
        if broken:
            raise RuntimeError("Offset increment outside graph capture\nencountered unexpectedly.")

    monkeypatch.setattr(TrainingStep, "_capture", fail)
    network.register_forward_pre_hook(stuck)
    *first, last = batches(4, (5, 1, 28, 28))
    for batch in first:
        step(*batch)
    with pytest.raises(Refusal, match=r"not permitted.*\(Offset increment.* run again with --no-compile$"):
        step(*last)


def test_one_stream_serves_all_that_runs_before_a_graph(on_gpu, monkeypatch):
    """The allocator keeps the memory of each stream for that one."""
    network, ran_on = spiking_mnist(4, "m"), []
    step, streams = on_gpu(network, optimizers_of(network))
    network.register_forward_hook(lambda *_: ran_on.append(streams.current))
    taken = noted(monkeypatch, "_plain", "_warm_up", "_capture", "_replay")
    for batch in batches(7, (5, 1, 28, 28)):
        step(*batch)
    assert len(streams.made) == 1
    assert streams.captured_on == streams.made
    assert set(map(id, ran_on[:5])) == {id(streams.made[0])}
    assert taken == [
        "plain",
        "warm_up",
        "warm_up",
        "warm_up",
        "plain",
        "capture",
        "replay",
        "replay",
        "replay",
        "replay",
    ]


def test_nothing_is_written_while_no_setting_changes(on_gpu):
    network = spiking_mnist(4, "m")
    step, _ = on_gpu(network, optimizers_of(network), changing=("lr", "alpha"))
    versions = []
    for batch in batches(6, (5, 1, 28, 28)):
        step(*batch)
        versions.append([tensor._version for _, _, tensor in step.settings.lent])
    assert len(versions[0]) == 2
    assert versions == [versions[0]] * 6


@pytest.mark.parametrize("fault", ["a graph that does nothing", "a capture that fails", "a kernel that fails"])
def test_a_gpu_that_cannot_run_the_fast_step_trains_with_the_plain_one(on_gpu, monkeypatch, capsys, fault):
    plain_network, network = spiking_mnist(4, "m"), spiking_mnist(4, "m")
    step, streams = on_gpu(network, optimizers_of(network, fused=True), changing=("lr", "alpha"))
    plain = TrainingStep(plain_network, optimizers_of(plain_network, fused=False), "fp32", CPU, graph=False)

    def fail(*args, **kwargs):
        raise RuntimeError("operation not permitted\nsee the documentation")

    if fault == "a graph that does nothing":
        streams.replay = lambda: None
    else:
        monkeypatch.setattr(TrainingStep, "_capture" if "capture" in fault else "_warm_up", fail)
    train_both(step, plain, {5: {"lr": 1e-2}})
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert re.search(
        "The (compiled|captured) step is not used .*(not permitted|differ|its loss).*: training as with --no-compile",
        said,
    )
    assert ("captured" in said) == (fault != "a kernel that fails")
    assert step.graph is None
    assert [group["fused"] for optimizer in step.optimizers for group in optimizer.param_groups] == [False]


def test_a_step_makes_its_batch_of_what_it_gets(on_gpu):
    """So that a graph has the augmentation in it."""
    pool = torch.randn(20, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    network, expected = spiking_mnist(4, "m"), spiking_mnist(4, "m")
    step, _ = on_gpu(network, optimizers_of(network), make=lambda index: (pool[index], index % 10))
    plain = TrainingStep(expected, optimizers_of(expected), "fp32", CPU, graph=False)
    for i in range(8):
        index = torch.arange(i, i + 5)
        torch.testing.assert_close(step(index)[0], plain(pool[index], index % 10)[0])
    assert step.graph is not None


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
@pytest.mark.parametrize("cls", [GradRewiring, DeepRewiring])
def test_the_graph_is_the_step(precision, cls):
    """Without dropout and noise the replays are the eager steps; BatchNorm's statistics and counters included."""
    device = torch.device("cuda")
    set_precision(precision, device)
    torch.manual_seed(0)
    eager = narrow_cifar10("m").cuda()
    eager.fc[1].p = 0.0
    graphed = copy.deepcopy(eager)
    settings = dict(capturable=True) | (dict(T=0.0) if cls is DeepRewiring else {})
    steps = [
        TrainingStep(network, optimizers_of(network, cls, **settings), precision, device, graph)
        for network, graph in ((eager, False), (graphed, True))
    ]
    for i, (images, labels) in enumerate(batches(10, (4, 3, 32, 32), device)):
        losses = [float(step(images, labels)[0]) for step in steps]
        assert losses[0] == pytest.approx(losses[1], rel=0.05), i
    assert steps[1].graph is not None
    for (name, a), (_, b) in zip(eager.state_dict().items(), graphed.state_dict().items(), strict=True):
        torch.testing.assert_close(b.float(), a.float(), rtol=0.05, atol=0.05, msg=name)
        if name.endswith("num_batches_tracked"):
            assert a == b


@pytest.mark.gpu
def test_replays_draw_fresh_dropout_masks():
    device = torch.device("cuda")
    network = narrow_cifar10("m").cuda()
    step = TrainingStep(network, optimizers_of(network, capturable=True, lr=0.0), "fp32", device, graph=True)
    images, labels = batches(1, (4, 3, 32, 32), device)[0]
    losses = [float(step(images, labels)[0]) for _ in range(12)][TrainingStep.WARMUP :]
    assert len(set(losses)) > 3
