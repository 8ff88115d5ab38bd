"""Synaptic operations against a count of every single spike at every single weight."""

import copy
import itertools
import json

import pytest
import torch
from spikingjelly.activation_based import functional, layer
from spikingjelly.activation_based.op_counter import DispatchCounterMode, SynOpCounter
from torch import nn

import measuring
import spiking_kernels
from c10.model import Cifar10Net
from measuring import energy
from mnist.model import MnistNet
from spiking import SpikingNetwork, lif

modes = pytest.mark.parametrize("step_mode", ["s", "m"])


class TinyNet(SpikingNetwork):
    """All that may stand between neurons and weights: padding, stride, pooling, flattening, dropout."""

    def __init__(self, T=3, step_mode="m"):
        super().__init__(T, step_mode)
        self.static_conv = nn.Conv2d(1, 2, 3, padding=1, bias=False)
        self.body = nn.Sequential(
            lif(),
            layer.Conv2d(2, 3, 3, padding=1, bias=False),
            lif(),
            layer.MaxPool2d(2, 2),  # 6x6 -> 3x3
            layer.Conv2d(3, 4, 3, stride=2, padding=1, bias=False),  # 3x3 -> 2x2
            lif(),
            layer.Flatten(),
            layer.Dropout(0.5),
            layer.Linear(16, 5, bias=False),
            lif(),
        )
        functional.set_step_mode(self.body, step_mode)

    def static(self, images):
        return self.static_conv(images)

    def spiking(self, current):
        return self.body(current)


def prune(network, sparsity, gain, seed=0):
    """Weights on a grid of powers of two, so that every sum is exact, in any order; ``sparsity`` of them 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for number, weight in enumerate(measuring.prunable(network).values()):
            values = torch.randn(weight.shape, generator=generator) + 0.3 * (number > 0)
            kept = torch.rand(weight.shape, generator=generator) >= sparsity
            weight.copy_((values * gain * 32).floor().add(0.5) / 32 * kept)  # none is 0 that is kept
    return network.eval()


def grid_images(*shape, seed=1):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 4).round() / 4


def met_weights(module, mask, position, shape):
    """How many weights of a convolution an input at a position meets, weight by weight."""
    channel, y, x = position
    (stride, _), (pad, _), (dilation, _) = module.stride, module.padding, module.dilation
    per_group, kernel_h, kernel_w = mask.shape[1:]
    height, width = (
        (n + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1
        for n, kernel in zip(shape[1:], (kernel_h, kernel_w), strict=True)
    )
    outputs_per_group = len(mask) // module.groups
    met = 0
    for out, ky, kx in itertools.product(range(len(mask)), range(kernel_h), range(kernel_w)):
        inside_group = channel // per_group == out // outputs_per_group
        row, column = y + pad - ky * dilation, x + pad - kx * dilation
        fits = row % stride == 0 and column % stride == 0
        if inside_group and fits and 0 <= row // stride < height and 0 <= column // stride < width:
            met += bool(mask[out, channel % per_group, ky, kx])
    return met


def brute_force(module, x, every_value):
    """Operations of one layer for x, [C, H, W] or [in], as (at connected weights, at all weights)."""
    masks = [module.weight.detach() != 0, torch.ones_like(module.weight, dtype=torch.bool)]
    masks = [mask.numpy() for mask in masks]
    counts = [0, 0]
    for position in (torch.ones_like(x) if every_value else x).nonzero().tolist():
        for number, mask in enumerate(masks):
            if isinstance(module, nn.Linear):
                counts[number] += sum(mask[:, position[0]].tolist())
            else:
                counts[number] += met_weights(module, mask, position, x.shape)
    return counts


def expected_operations(network, layers, images):
    """Operations by weight name, one image and one time step after the other.

    ``layers`` gives, of a network, the layers run once per image and those run at every time step.
    """
    network = copy.deepcopy(network)
    functional.set_step_mode(network, "s")
    static, spiking = layers(network)
    names = {module: f"{name}.weight" for name, module in network.named_modules()}
    counts = {}

    def run(module, x, every_value):
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            total = counts.setdefault(names[module], [0, 0])
            for number, n in enumerate(brute_force(module, x[0], every_value)):
                total[number] += n
        return module(x)

    with torch.no_grad():
        for image in images:
            functional.reset_net(network)
            current = image.unsqueeze(0)
            for module in static:
                current = run(module, current, True)
            for _ in range(network.T):
                x = current
                for module in spiking:
                    x = run(module, x, False)
    return counts


def counted(network, batches):
    with torch.no_grad(), energy.OperationCounter(network) as counter:
        for images in batches:
            network(images)
    with torch.no_grad():
        network(batches[0])  # not counted any more
    return counter


@modes
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.75, 0.9, 1.0])
def test_operations_are_the_brute_force_count(step_mode, sparsity):
    """Exactly, over two batches of unequal size."""
    network = prune(TinyNet(step_mode=step_mode), sparsity, 1 + 3 * sparsity)
    images = grid_images(5, 1, 6, 6)
    expected = expected_operations(network, lambda net: ([net.static_conv], net.body), images)
    operations = counted(network, [images[:3], images[3:]]).operations()
    assert list(operations) == list(measuring.prunable(network))
    assert {name: [layer.pruned, layer.dense] for name, layer in operations.items()} == expected
    assert [layer.kind for layer in operations.values()] == ["MAC", "SynOp", "SynOp", "SynOp"]
    assert {layer.images for layer in operations.values()} == {5}
    if sparsity == 0:
        assert all(layer.pruned == layer.dense for layer in operations.values())
    if 0 < sparsity < 1:
        assert all(0 < layer.pruned < layer.dense for layer in operations.values())
    if sparsity == 1:
        assert not any(layer.pruned for layer in operations.values())


def zero_respecting_rules():
    """SpikingJelly's rules for spikes, but weights of 0 cost nothing; for an input of numbers nothing is counted."""

    def spikes(x):
        return bool(((x == 0) | (x == 1)).all())

    def product(args, kwargs, out):
        x, weight = args
        return int((x.double() @ (weight != 0).double()).sum()) if spikes(x) else 0

    def convolution(args, kwargs, out):
        x, weight, *others = args
        return int(torch.convolution(x.double(), (weight != 0).double(), *others).sum()) if spikes(x) else 0

    return {torch.ops.aten.mm.default: product, torch.ops.aten.convolution.default: convolution}


@modes
def test_operations_are_those_of_spikingjellys_counter(step_mode):
    network = prune(TinyNet(step_mode=step_mode), 0.75, 3)
    images = grid_images(3, 1, 6, 6)
    layers = list(counted(network, [images]).operations().values())[1:]
    for rules, expected in ((None, "dense"), (zero_respecting_rules(), "pruned")):
        counter = SynOpCounter(extra_rules=rules)
        with torch.no_grad(), DispatchCounterMode([counter]):
            network(images)
        assert counter.get_total() == sum(getattr(layer, expected) for layer in layers) > 0


@pytest.mark.parametrize("execution", ["s", "m", "fused"])
@pytest.mark.parametrize("sparsity", [0.0, 0.9])
def test_operations_of_the_mnist_network(execution, sparsity, monkeypatch):
    if execution == "fused" and spiking_kernels.unavailable():
        pytest.skip("no fused kernels here")
    network = prune(MnistNet(3, "s" if execution == "s" else "m"), sparsity, 0.25)
    network.fused = execution == "fused"
    images = grid_images(3, 1, 28, 28)
    # the mask of the first layer at all 784 values of each image, without walking through 627 200 weights per image
    first = int((network.static_fc[1].weight != 0).sum())
    expected = expected_operations(network, lambda net: ([net.static_fc], net.fc), images)
    expected = {"static_fc.1.weight": [3 * first, 3 * 784 * 800], **expected}
    called, kernel = [], spiking_kernels.lif_linear_lif
    monkeypatch.setattr(spiking_kernels, "lif_linear_lif", lambda *a: called.append(True) or kernel(*a))
    counter = counted(network, [images[:2], images[2:]])
    assert len(called) == (3 if execution == "fused" else 0)
    operations = counter.operations()
    assert {name: [layer.pruned, layer.dense] for name, layer in operations.items()} == expected
    assert operations["fc.1.weight"].pruned > 0
    assert list(counter.rates()) == ["fc.0", "fc.2"]  # it is a SpikeCounter still
    assert counter.rates()["fc.0"].sum() * 3 * 3 * 10 == pytest.approx(operations["fc.1.weight"].dense)


def test_operations_of_batches_some_of_which_a_kernel_runs():
    if spiking_kernels.unavailable():
        pytest.skip("no fused kernels here")
    network, images = prune(MnistNet(3), 0.5, 0.25), grid_images(4, 1, 28, 28)
    with energy.OperationCounter(network) as one, energy.OperationCounter(network) as other, torch.no_grad():
        network(images[:1])
        network.fused = True
        network(images[1:3])
        network.fused = False
        network(images[3:])
    expected = counted(network, [images]).operations()
    assert expected["fc.1.weight"].pruned > 0
    assert one.operations() == other.operations() == expected
    assert network.spike_counts == []


@modes
def test_spikes_in_bfloat16_are_counted_exactly(step_mode):
    """More of them in a batch than bfloat16, with its 8 bits, could count."""
    network = prune(TinyNet(step_mode=step_mode), 0.5, 2)
    network.body[1].weight.data.fill_(1.0)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), energy.OperationCounter(network) as counter:
        arrived = []
        network.body[1].register_forward_pre_hook(lambda module, inputs: arrived.append(inputs[0].double()))
        network(torch.full((700, 1, 6, 6), 3.0))
    spikes = torch.cat([x.reshape(-1, 2, 6, 6) for x in arrived]).sum(0)
    assert spikes.max() > 512
    expected = (spikes * energy.fan_out(network.body[1], torch.ones(3, 2, 3, 3, dtype=torch.bool), spikes.shape)).sum()
    assert counter.operations()["body.1.weight"].pruned == expected


@modes
def test_operations_of_a_narrow_cifar10_network(step_mode):
    network = prune(Cifar10Net(2, step_mode, width=4), 0.5, 1).double()
    images = grid_images(2, 3, 32, 32).double()
    expected = expected_operations(network, lambda net: (net.static_conv, [*net.conv, *net.fc]), images)
    operations = counted(network, [images]).operations()
    assert {name: [layer.pruned, layer.dense] for name, layer in operations.items()} == expected
    assert all(0 < layer.pruned < layer.dense for layer in operations.values())


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("padding", [0, 1, 2])
@pytest.mark.parametrize(("kernel", "dilation", "groups"), [(3, 1, 1), (3, 2, 1), ((2, 3), 1, 2), (1, 1, 1)])
def test_fan_out_of_a_convolution_weight_by_weight(stride, padding, kernel, dilation, groups):
    module = nn.Conv2d(4, 6, kernel, stride, padding, dilation, groups)
    mask = torch.rand(module.weight.shape, generator=torch.Generator().manual_seed(0)) < 0.4
    shape = torch.Size([4, 7, 6])
    expected = [met_weights(module, mask, position, shape) for position in itertools.product(*map(range, shape))]
    fan_out = energy.fan_out(module, mask, shape)
    assert fan_out.dtype == torch.int64
    assert fan_out.flatten().tolist() == expected


def test_fan_out_by_hand():
    linear = nn.Linear(3, 2)
    mask = torch.tensor([[True, False, True], [True, False, False]])
    assert energy.fan_out(linear, mask, torch.Size([3])).tolist() == [2, 0, 1]
    conv = nn.Conv2d(1, 1, 3, padding=1)
    everything = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    assert energy.fan_out(conv, everything, torch.Size([1, 3, 3])).tolist() == [[[4, 6, 4], [6, 9, 6], [4, 6, 4]]]
    same = nn.Conv2d(1, 1, 3, padding="same")
    assert torch.equal(*(energy.fan_out(module, everything, torch.Size([1, 3, 3])) for module in (conv, same)))


def test_other_padding_than_zeros_is_refused():
    conv = nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular")
    with pytest.raises(ValueError, match="padding_mode='circular' is not accepted"):
        energy.fan_out(conv, torch.ones(1, 1, 3, 3, dtype=torch.bool), torch.Size([1, 3, 3]))


def test_what_is_no_spike_is_refused():
    network = prune(TinyNet(), 0.0, 1)
    network.body[0] = nn.Identity()  # the next layer gets a current
    with torch.no_grad(), energy.OperationCounter(network) as counter:
        network(torch.rand(2, 1, 6, 6) + 0.1)
    with pytest.raises(ValueError, match=r"body\.1 is not the first layer, but its inputs are not spikes"):
        counter.operations()


def test_a_kernel_adds_what_leaves_neurons_and_what_enters_weights():
    """Also behind pooling; what no counter asks for is left out."""
    network, images = prune(TinyNet(), 0.0, 1), grid_images(5, 1, 6, 6)
    everything, of_the_kernel = counted(network, [images]), counted(network, [images[2:]])
    with torch.no_grad(), energy.OperationCounter(network) as counter, measuring.SpikeCounter(network) as spikes:
        network(images[:2])
        network.add_spikes({**of_the_kernel._counts, "another layer": torch.ones(1)})  # as if a kernel ran the others
    counter._images = spikes._images = 5
    assert counter.operations() == everything.operations()
    assert list(spikes.rates()) == list(counter.rates()) == list(everything.rates())
    for name, rates in everything.rates().items():
        assert torch.equal(spikes.rates()[name], rates)
        assert torch.equal(counter.rates()[name], rates)


def test_a_layer_that_never_runs_has_no_operations():
    network = prune(TinyNet(), 0.0, 1)
    network.head = nn.Linear(3, 2)
    counter = counted(network, [grid_images(5, 1, 6, 6)])
    assert counter.operations()["head.weight"] == energy.Operations(5, 0, 0, "SynOp")


def test_a_network_without_spike_counts_is_refused_and_left_as_it_was():
    network = nn.Sequential(nn.Linear(2, 2), lif())
    with pytest.raises(TypeError, match="network is Sequential, not a SpikingNetwork"):
        measuring.SpikeCounter(network)
    assert not network._forward_hooks


def test_nothing_counted_is_refused():
    with energy.OperationCounter(TinyNet()) as counter:
        pass
    with pytest.raises(ValueError, match="no image was counted"):
        counter.operations()


def test_energy_by_hand():
    layers = [energy.Operations(4, 400, 4000, "MAC"), energy.Operations(4, 40, 80, "SynOp")]
    cost = energy.energy_per_image(layers)
    assert cost.pruned == pytest.approx(100 * 4.6 + 10 * 0.9)
    assert cost.dense == pytest.approx(1000 * 4.6 + 20 * 0.9)
    json.dumps([cost.pruned, cost.dense])  # plain numbers


@pytest.mark.gpu
@modes
def test_operations_on_cuda_as_on_the_cpu(step_mode):
    """TensorFloat-32 allowed; the weights' grid keeps it exact."""
    network = prune(TinyNet(step_mode=step_mode), 0.75, 3)
    images = grid_images(5, 1, 6, 6)
    expected = counted(network, [images]).operations()
    counter = counted(network.cuda(), [images.cuda()])
    assert all(tensor.is_cuda for tensor in counter._counts.values())
    assert counter.operations() == expected
