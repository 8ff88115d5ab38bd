"""The networks: what they consist of, and two executions of one network."""

import copy
import functools

import pytest
import torch
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import nn

import measuring
from c10.model import Cifar10Net
from mnist.model import MnistNet
from spiking import StepwiseBatchNorm2d, lif
from training.step import set_precision

modes = pytest.mark.parametrize("step_mode", ["s", "m"])

CIFAR10_KEYS = [
    "static_conv.0.weight",
    *[f"static_conv.1.{k}" for k in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")],
    *[
        key
        for conv in (1, 4, 8, 11, 14)
        for key in [
            f"conv.{conv}.weight",
            *[f"conv.{conv + 1}.{k}" for k in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")],
        ]
    ],
    "fc.2.weight",
    "fc.4.weight",
]


def narrow_cifar10(step_mode, seed=0):
    """The CIFAR-10 network with 8 channels instead of 256, and weights that make all layers spike."""
    torch.manual_seed(seed)
    network = Cifar10Net(T=4, step_mode=step_mode, width=8)
    with torch.no_grad():
        network.fc[2].weight *= 12
        network.fc[4].weight *= 12
    return network


def spiking_mnist(T, step_mode):
    """The MNIST network with weights that make its outputs spike for images of unit noise."""
    torch.manual_seed(0)
    network = MnistNet(T, step_mode)
    with torch.no_grad():
        network.static_fc[1].weight *= 10
        network.fc[1].weight *= 8
    return network


def test_state_dict_keys():
    assert list(MnistNet().state_dict()) == ["static_fc.1.weight", "fc.1.weight"]
    with torch.device("meta"):
        assert list(Cifar10Net().state_dict()) == CIFAR10_KEYS


def test_sizes():
    assert sum(w.numel() for w in measuring.prunable(MnistNet()).values()) == 784 * 800 + 8000
    with torch.device("meta"):
        network = Cifar10Net()
    prunable = measuring.prunable(network)
    assert list(prunable) == [k for k in CIFAR10_KEYS if k.endswith("weight") and network.get_parameter(k).dim() > 1]
    assert sum(w.numel() for w in prunable.values()) == 36_715_264
    assert sum(p.numel() for p in network.parameters()) == 36_715_264 + 6 * 2 * 256


def test_neurons_are_the_papers():
    with torch.device("meta"):
        networks = [MnistNet(), Cifar10Net()]
    neurons = [m for network in networks for m in network.modules() if isinstance(m, neuron.BaseNode)]
    assert len(neurons) == 2 + 8
    for node in neurons:
        assert isinstance(node, neuron.LIFNode)
        assert (node.tau, node.v_threshold, node.v_reset) == (2.0, 1.0, 0.0)
        assert node.decay_input
        assert node.detach_reset
        assert type(node.surrogate_function).__name__ == "ATan"
        assert node.surrogate_function.alpha == 2.0


def test_lif_by_hand():
    """h = v + (x - v) / 2, a spike where h >= 1, then v = 0."""
    node, v, expected = lif(), 0.0, []
    inputs = [1.5, 1.5, 0.5, 3.0, 1.0]
    for x in inputs:
        v = v + (x - v) / 2
        expected.append(float(v >= 1))
        v = 0.0 if v >= 1 else v
    assert expected == [0.0, 1.0, 0.0, 1.0, 0.0]
    assert [float(node(torch.tensor([x]))) for x in inputs] == expected


@pytest.mark.parametrize("step_mode", ["s", "m"])
def test_neurons_that_replace_others_start_at_rest_too(step_mode):
    """SpikingJelly's reset_net keeps a list of the layers of a network, as long as all of them exist."""
    images = torch.randn(5, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    network = spiking_mnist(6, step_mode)
    expected, replaced = network(images), network.fc[0]
    network.fc[0] = lif()
    network.step_mode = step_mode
    for _ in range(3):
        assert torch.equal(network(images), expected)
    assert expected.sum() > 0
    assert (network.fc[0].v, replaced.v) == (0.0, 0.0)


@pytest.mark.parametrize("bad", [dict(T=0), dict(T=-1), dict(T=2.0), dict(T=True), dict(step_mode="x")])
def test_bad_arguments(bad):
    with pytest.raises(ValueError, match=f"{next(iter(bad))}=.*must be"):
        MnistNet(**bad)


@pytest.mark.parametrize("bad", [dict(T=0), dict(T=2.5), dict(step_mode="x")])
def test_bad_settings_of_a_network_that_is_there(bad):
    network, (name, value) = spiking_mnist(4, "m"), *bad.items()
    before = getattr(network, name)
    with pytest.raises(ValueError, match=f"{name}=.*must be"):
        setattr(network, name, value)
    assert getattr(network, name) == before


@pytest.mark.parametrize("change", [functional.set_step_mode, MnistNet.step_mode.fset])
@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_the_step_mode_of_a_network_is_that_of_its_layers(name, change):
    """Whether it was so from the beginning or is set later; images are not taken for time steps."""
    network = (spiking_mnist(4, "m") if name == "mnist" else narrow_cifar10("m")).double()
    images = torch.randn(4, 1, 28, 28) if name == "mnist" else torch.randn(4, 3, 32, 32)

    def counts():
        torch.manual_seed(7)  # the dropout mask
        return network(images.double())

    expected = counts()
    assert expected.sum() > 0
    for step_mode in ("s", "m"):
        change(network, step_mode)
        assert network.step_mode == network.fc[-1].step_mode == step_mode
        torch.testing.assert_close(counts(), expected)


@modes
def test_no_images_have_no_counts(step_mode):
    for network, shape in ((MnistNet(2, step_mode), (0, 1, 28, 28)), (narrow_cifar10(step_mode), (0, 3, 32, 32))):
        assert network(torch.zeros(shape)).shape == (0, 10)


def run(network, images, labels):
    """Counts, loss gradients and buffers of one training batch."""
    network.train()
    torch.manual_seed(7)  # the dropout mask
    counts = network(images)
    measuring.loss_function(counts, labels, network.T).backward()
    return counts.detach(), {n: p.grad for n, p in network.named_parameters()}, dict(network.named_buffers())


@pytest.mark.parametrize("batch", [1, 5])
def test_both_executions_are_the_same_mnist_network(batch):
    one, other = spiking_mnist(6, "s"), spiking_mnist(6, "m")
    images, labels = torch.randn(batch, 1, 28, 28), torch.arange(batch)
    (counts, gradients, _), (others, other_gradients, _) = run(one, images, labels), run(other, images, labels)
    assert counts.shape == (batch, 10)
    assert counts.sum() > 0
    assert torch.equal(counts, others)
    for name, gradient in gradients.items():
        torch.testing.assert_close(other_gradients[name], gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("make", "shape"), [(spiking_mnist, (1, 28, 28)), (lambda T, step_mode: narrow_cifar10(step_mode), (3, 32, 32))]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_both_executions_in_every_precision(dtype, make, shape):
    """The membrane potential is float32 at least, in both; counts are exact whatever the weights' precision."""
    found, images = [], torch.randn(3, *shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    for step_mode in ("s", "m"):
        network = make(4, step_mode).to(dtype)
        dtypes = set()
        for node in network.modules():
            if isinstance(node, neuron.LIFNode):
                node.register_forward_hook(lambda m, i, o, dtypes=dtypes: dtypes.add((o.dtype, m.v.dtype)))
        counts, gradients, _ = run(network, images, torch.tensor([1, 2, 3]))
        assert dtypes == {(dtype, torch.promote_types(dtype, torch.float32))}
        assert counts.dtype == torch.promote_types(dtype, torch.float32)
        assert all(gradient.dtype == dtype for gradient in gradients.values())
        found.append(counts)
    assert found[0].sum() > 0
    assert torch.equal(*found)


def test_both_executions_are_the_same_cifar10_network():
    """Dropout and BatchNorm per time step included: counts, gradients, running statistics, evaluation."""
    one, other = narrow_cifar10("s").double(), narrow_cifar10("m").double()
    images, labels = torch.randn(3, 3, 32, 32, dtype=torch.float64), torch.tensor([1, 2, 3])
    (counts, gradients, buffers), (others, other_gradients, other_buffers) = (
        run(network, images, labels) for network in (one, other)
    )
    assert counts.sum() > 0
    torch.testing.assert_close(others, counts)
    for name, gradient in gradients.items():
        assert gradient.abs().sum() > 0
        torch.testing.assert_close(other_gradients[name], gradient)
    for name, buffer in buffers.items():
        torch.testing.assert_close(other_buffers[name], buffer)
        if name.endswith("tracked"):
            assert buffer == (1 if name.startswith("static") else 4)
    with torch.no_grad():
        torch.testing.assert_close(other.eval()(images), one.eval()(images))


def every(kind, **settings):
    """A change of the settings of all layers of a kind."""

    def change(network):
        for module in network.modules():
            if isinstance(module, kind):
                for key, value in settings.items():
                    setattr(module, key, value)

    return change


def unchanged_settings(network):
    pass


@functools.cache
def results_in_double(step_mode, change):
    """Counts, gradients and buffers of a batch, and the counts of evaluation, of a network with changed settings."""
    network = narrow_cifar10(step_mode).double()
    change(network)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    counts, gradients, buffers = run(network, images, torch.tensor([1, 2]))
    with torch.no_grad():
        return {**gradients, **buffers, "counts": counts, "evaluated": network.eval()(images)}


@pytest.mark.parametrize(
    "change",
    [
        every(neuron.LIFNode, tau=4.0),
        every(neuron.LIFNode, v_threshold=0.5),
        every(neuron.LIFNode, v_reset=None),
        every(neuron.LIFNode, v_reset=-0.25),
        every(neuron.LIFNode, decay_input=False),
        every(neuron.LIFNode, detach_reset=False),
        every(neuron.LIFNode, surrogate_function=surrogate.Sigmoid(alpha=3.0)),
        every(neuron.LIFNode, surrogate_function=surrogate.ATan(spiking=False)),
        every(nn.BatchNorm2d, track_running_stats=False, running_mean=None, running_var=None),
        every(nn.BatchNorm2d, weight=None, bias=None),
        every(nn.BatchNorm2d, momentum=None),
        every(nn.BatchNorm2d, momentum=0.5, eps=0.1),
        every(nn.Conv2d, padding_mode="circular"),
        every(nn.MaxPool2d, kernel_size=3, padding=1),
        every(layer.Dropout, p=0.9),
        every(nn.Linear, bias=nn.Parameter(torch.tensor(0.25, dtype=torch.float64))),
    ],
)
def test_both_executions_are_the_same_network_whatever_its_settings(change):
    one, other = results_in_double("s", change), results_in_double("m", change)
    unchanged = results_in_double("s", unchanged_settings)
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, msg=name)
    assert one["conv.1.weight"].abs().sum() > 0
    assert one.keys() != unchanged.keys() or any(not torch.allclose(one[name], unchanged[name]) for name in one)


@modes
def test_batch_norm_is_by_time_step(step_mode):
    """Each step has its own statistics; pooling T and N together would give something else."""
    torch.manual_seed(0)
    norm, reference = StepwiseBatchNorm2d(3, step_mode), nn.BatchNorm2d(3)
    x = torch.randn(4, 2, 3, 5, 5) * torch.arange(1, 5).view(4, 1, 1, 1, 1)  # [T, N, C, H, W]
    expected = torch.stack([reference(x_t) for x_t in x])
    out = norm(x) if step_mode == "m" else torch.stack([norm(x_t) for x_t in x])
    torch.testing.assert_close(out, expected)
    for (name, buffer), (_, other) in zip(norm.named_buffers(), reference.named_buffers(), strict=True):
        torch.testing.assert_close(buffer, other, msg=name)
    pooled = nn.BatchNorm2d(3)(x.flatten(0, 1)).view_as(x)
    assert not torch.allclose(out, pooled, atol=0.1)
    norm.eval(), reference.eval()
    evaluated = norm(x) if step_mode == "m" else torch.stack([norm(x_t) for x_t in x])
    torch.testing.assert_close(evaluated, torch.stack([reference(x_t) for x_t in x]))


def test_dropout_is_the_published_one():
    layer = Cifar10Net(width=1).fc[1].train()
    assert layer.p == 0.5
    torch.manual_seed(0)
    kept = layer(torch.ones(1, 10_000))
    assert set(kept.unique().tolist()) == {0.0, 2.0}
    assert kept.mean() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("fused", [False, True])
def test_no_dropout_mask_is_left_behind(fused):
    network = narrow_cifar10("m").train()
    network.fused = fused
    network(torch.randn(2, 3, 32, 32))
    assert network.fc[1].mask is None
    copied = copy.deepcopy(network)
    copied(torch.randn(3, 3, 32, 32))  # of another size


@modes
def test_dropout_holds_one_mask_for_all_time_steps(step_mode):
    network = narrow_cifar10(step_mode)
    masked = []
    network.fc[1].register_forward_hook(
        lambda m, i, o: masked.extend((o == 0) & (i[0] != 0) if step_mode == "m" else [(o == 0) & (i[0] != 0)]) or None
    )
    network.train()
    images = torch.randn(2, 3, 32, 32)
    masks = []
    for _ in range(2):
        masked.clear()
        torch.manual_seed(len(masks))
        network(images)
        union = torch.stack(masked).any(0)
        masks.append(union)
        assert len(masked) == network.T
        assert union.any()
    assert not torch.equal(masks[0], masks[1])
    # a neuron dropped at one step never passes a spike at another
    passed = []
    network.fc[1].register_forward_hook(lambda m, i, o: passed.extend(o if step_mode == "m" else [o]) or None)
    masked.clear()
    network(images)
    assert not (torch.stack(masked).any(0) & (torch.stack(passed) != 0).any(0)).any()


@modes
def test_every_batch_starts_from_rest(step_mode):
    network = spiking_mnist(3, step_mode).eval()
    images = torch.randn(4, 1, 28, 28)
    first = network(images)
    assert first.sum() > 0
    network.fc(torch.randn(3, 2, 800) if step_mode == "m" else torch.randn(2, 800))  # leaves potentials behind
    assert torch.equal(network(images), first)
    assert torch.equal(network(images[:2]), first[:2])  # another batch size
    copy.deepcopy(network.train())  # nothing of a graph is left


@modes
def test_more_time_steps_give_more_spikes(step_mode):
    counts = []
    for T in (1, 4, 16):
        network = spiking_mnist(T, step_mode)
        images = torch.randn(4, 1, 28, 28, generator=torch.Generator().manual_seed(0))
        counts.append(network(images).sum().item())
        assert network(images).max() <= T
    assert counts[0] < counts[1] < counts[2]


@pytest.mark.gpu
@modes
def test_on_cuda_as_on_the_cpu(step_mode):
    network = narrow_cifar10(step_mode)
    other = narrow_cifar10(step_mode).cuda()
    for net in (network, other):
        net.fc[1].p = 0.0
    images, labels = torch.randn(3, 3, 32, 32), torch.tensor([1, 2, 3])
    set_precision("fp32", torch.device("cuda"))
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        counts, _, buffers = run(network, images, labels)
        others, _, other_buffers = run(other, images.cuda(), labels.cuda())
    # a rounding difference may flip single spikes
    assert (others.cpu() - counts).abs().mean() < 0.05
    for name, buffer in buffers.items():
        torch.testing.assert_close(other_buffers[name].cpu(), buffer, rtol=0.05, atol=0.05)
