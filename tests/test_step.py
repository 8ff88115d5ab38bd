"""A training step as a unit: precisions, and on a GPU the CUDA graph."""

import copy

import pytest
import torch
from spikingjelly.activation_based import functional, neuron
from test_models import narrow_cifar10, spiking_mnist
from torch.optim import Adam

import measuring
from deeprewire import DeepRewiring
from gradrewire import GradRewiring
from spiking import lif
from training.step import TrainingStep, autocast, set_precision

CPU = torch.device("cpu")


def batches(n, shape, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(shape, generator=generator).to(device), torch.arange(shape[0], device=device) % 10)
        for _ in range(n)
    ]


def optimizers_of(network, cls=GradRewiring, **settings):
    weights = list(measuring.prunable(network).values())
    others = [p for p in network.parameters() if p.dim() == 1]
    defaults = dict(alpha=1e-3, s=0.95) if cls is GradRewiring else dict(l1=1e-3, max_s=0.5, T=0.01, soft=True)
    capturable = settings.get("capturable", False)
    pruning = cls(weights, lr=1e-3, **{**defaults, **settings})
    return [pruning, Adam(others, lr=1e-3, capturable=capturable)] if others else [pruning]


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


def test_a_renewed_step_is_taken_as_it_is_once_and_captured_anew(monkeypatch):
    taken = []

    class Graph:
        def replay(self):
            taken.append("replay")

    def capture(self, images, labels):
        taken.append("capture")
        self.images, self.labels, self.outputs, self.graph = images.clone(), labels.clone(), None, Graph()

    monkeypatch.setattr(TrainingStep, "_warm_up", lambda self, images, labels: taken.append("eager"))
    monkeypatch.setattr(TrainingStep, "_capture", capture)
    network = spiking_mnist(4, "m")
    step = TrainingStep(network, optimizers_of(network), "fp32", CPU, graph=True)
    step.use_graph = True  # as on a GPU
    for i, batch in enumerate(batches(8, (5, 1, 28, 28))):
        if i in (1, 5):  # before the first capture, and after it
            step.drop_graph()
        step(*batch)
    wanted = ["eager", "eager", "eager", "capture", "replay", "replay", "eager", "capture", "replay", "replay"]
    assert taken == wanted


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
