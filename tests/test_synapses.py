"""Synapses: at how many positions the weights of a layer stand."""

import torch
from torch import nn

from c10.model import Cifar10Net
from measuring.synapses import positions
from mnist.model import MnistNet
from spiking import LIFNode, SpikingNetwork


class Strided(SpikingNetwork):
    """Convolutions with strides and padding, in step mode 's', and a layer that never runs."""

    def __init__(self, T):
        super().__init__(T, "s")
        self.first = nn.Conv2d(2, 3, (3, 5), stride=(2, 1), bias=False)
        self.second = nn.Conv2d(3, 4, 2, padding=1, bias=False)
        self.unused = nn.Linear(7, 7, bias=False)
        self.fc = nn.Linear(4 * 6 * 7, 10, bias=False)
        self.node, self.out = LIFNode(), LIFNode()

    def static(self, images):
        return self.first(images)

    def spiking(self, current):
        return self.out(self.fc(self.second(self.node(current)).flatten(-3)))


def test_the_weights_of_a_convolution_stand_at_each_position_of_its_output():
    network = Strided(3)
    found = positions(network, (2, 11, 10))
    assert found == {"first.weight": 5 * 6, "second.weight": 6 * 7, "fc.weight": 1}
    # as many as a layer of ones has inputs at all outputs of one channel, where nothing is padded
    ones = nn.Conv2d(2, 1, (3, 5), stride=(2, 1), bias=False)
    nn.init.ones_(ones.weight)
    assert ones(torch.ones(1, 2, 11, 10)).sum() == found["first.weight"] * ones.weight.numel()
    assert not any(module._forward_hooks for module in network.modules())
    assert positions(network.double(), (2, 11, 10)) == found


def test_the_published_networks_have_as_many_synapses_as_the_page_says():
    """7.1 + 1,208 + 453 million in the convolutions (docs/comparability.md); MNIST's network has none."""
    found = positions(Cifar10Net(1, width=8).eval(), (3, 32, 32))
    assert list(found.values()) == [1024, 1024, 1024, 256, 256, 256, 1, 1]
    weights = [256 * 3 * 9, *5 * [256 * 256 * 9]]
    synapses = [n * places for n, places in zip(weights, found.values(), strict=False)]
    assert [round(synapses[0] / 1e6, 1), *(round(sum(some) / 1e6) for some in (synapses[1:3], synapses[3:]))] == [
        7.1,
        1208,
        453,
    ]
    assert set(positions(MnistNet(1).eval(), (1, 28, 28)).values()) == {1}
