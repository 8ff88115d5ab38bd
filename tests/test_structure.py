"""Structural connectivity, on networks worked by hand and against every path of small ones."""

import itertools

import pytest
import torch
from test_energy import TinyNet, grid_images, prune

import measuring
from c10.model import Cifar10Net
from measuring.paths import structural
from mnist.model import MnistNet


def masks_of(*layers):
    return {f"layer {number}": torch.tensor(layer, dtype=torch.bool) for number, layer in enumerate(layers)}


def connections(masks):
    """The connected ones, by layer, as (output, input)."""
    return [list(map(tuple, mask.nonzero().tolist())) for mask in masks.values()]


def test_a_neuron_without_outputs_takes_its_inputs_away():
    masks = masks_of([[1, 1], [1, 0]], [[0, 1]])
    assert connections(structural(masks)) == [[(1, 0)], [(0, 1)]]


def test_a_neuron_without_inputs_takes_its_outputs_away():
    masks = masks_of([[0, 0], [1, 0]], [[1, 1], [1, 0]])
    assert connections(structural(masks)) == [[(1, 0)], [(0, 1)]]


def test_effects_go_on_through_all_layers():
    """First layer, hidden unit 0: no input; so hidden unit 0 of the next, fed by it alone, is dead too, and so on."""
    masks = masks_of([[0, 0], [1, 1]], [[1, 0], [0, 1]], [[1, 0], [1, 1]])
    assert connections(structural(masks)) == [[(1, 0), (1, 1)], [(1, 1)], [(1, 1)]]
    # and backward: nothing reads unit 1 of the last hidden layer, which alone reads unit 1 before it
    masks = masks_of([[1, 0], [1, 1]], [[1, 0], [0, 1]], [[1, 0]])
    assert connections(structural(masks)) == [[(0, 0)], [(0, 0)], [(0, 0)]]


def test_a_broken_chain_has_no_structure():
    """Input and output halves that meet nowhere: all is connected, nothing structural."""
    masks = masks_of([[1, 1], [0, 0]], [[0, 1], [0, 1]])
    assert measuring.total(measuring.count(structural(masks))) == measuring.Connections(0, 8)


def test_an_empty_layer_leaves_nothing():
    masks = masks_of([[1, 1], [1, 1]], [[0, 0], [0, 0]], [[1, 1]])
    assert connections(structural(masks)) == [[], [], []]


def test_kernel_weights_connect_channels():
    """Two channels of 1x2 kernels; the second output channel is read by nobody."""
    masks = masks_of([[[[1, 0]], [[1, 1]]], [[[1, 1]], [[0, 1]]]], [[[[0, 1]], [[0, 0]]]])
    first, second = structural(masks).values()
    assert first.tolist() == [[[[True, False]], [[True, True]]], [[[False, False]], [[False, False]]]]
    assert second.tolist() == [[[[False, True]], [[False, False]]]]


def test_a_flattened_channel_is_all_its_positions():
    """Three channels of 2x2 positions: channel 0 has no input, channel 1 is read at one position, channel 2 nowhere."""
    convolution = torch.tensor([0, 1, 1], dtype=torch.bool).view(3, 1, 1, 1)  # [out, in, kernel height, kernel width]
    linear = torch.zeros(2, 12, dtype=torch.bool)
    linear[0, 0:4] = True  # channel 0
    linear[1, 6] = True  # channel 1, its third position
    first, second = structural({"conv": convolution, "fc": linear}).values()
    assert first.flatten().tolist() == [False, True, False]
    assert second.nonzero().tolist() == [[1, 6]]


def random_masks(seed, connectivity):
    """Two convolutions, flattened at 2x2 positions, two linear layers: each small enough for all its paths."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"conv.0": (3, 2, 1, 2), "conv.1": (2, 3, 2, 1), "fc.0": (4, 8), "fc.1": (3, 4)}
    return {name: torch.rand(shape, generator=generator) < connectivity for name, shape in shapes.items()}


def by_paths(masks, positions=4):
    """Follows every path from every input through single weights; marks the weights of those that arrive."""
    on_path = {name: torch.zeros_like(mask) for name, mask in masks.items()}
    edges = [mask.nonzero().tolist() for mask in masks.values()]
    names = list(masks)

    def follow(depth, unit, path):
        if depth == len(names):
            for name, edge in zip(names, path, strict=True):
                on_path[name][tuple(edge)] = True
            return
        flattened = depth and masks[names[depth]].dim() == 2 and masks[names[depth - 1]].dim() == 4
        for edge in edges[depth]:
            start = edge[1] // positions if flattened else edge[1]
            if start == unit:
                follow(depth + 1, edge[0], [*path, edge])

    for unit in range(masks[names[0]].shape[1]):
        follow(0, unit, [])
    return on_path


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("connectivity", [0.1, 0.2, 0.3, 0.5])
def test_structural_connections_are_those_on_paths(seed, connectivity):
    masks = random_masks(seed, connectivity)
    found = structural(masks)
    expected = by_paths(masks)
    assert list(found) == list(masks)
    for name, mask in found.items():
        assert torch.equal(mask, expected[name]), name
        assert not (mask & ~masks[name]).any()  # only connected ones
    for name, mask in structural(found).items():
        assert torch.equal(mask, found[name])  # nothing more to take away


def test_the_paths_are_no_trivial_case():
    kept = [measuring.total(measuring.count(structural(random_masks(seed, 0.2)))).connected for seed in range(8)]
    there = [measuring.total(measuring.count(random_masks(seed, 0.2))).connected for seed in range(8)]
    assert any(0 < n < m for n, m in zip(kept, there, strict=True))


def test_all_is_structural_in_a_dense_network():
    masks = random_masks(0, 2.0)
    for name, mask in structural(masks).items():
        assert mask.all(), name


@pytest.mark.parametrize("seed", range(3))
def test_what_is_not_structural_changes_nothing(seed):
    """The network's output is the same without it."""
    network = prune(TinyNet(), 0.5, 2, seed)
    images = grid_images(20, 1, 6, 6)
    weights = measuring.prunable(network)
    with torch.no_grad():
        network.static_conv.weight[1] = 0  # nothing reaches this channel
        network.body[8].weight[:, 12:] = 0  # nothing reads the last channel before
    masks = {name: measuring.connected(weight) for name, weight in weights.items()}
    kept = structural(masks)
    with torch.no_grad():
        before = network(images)
        for name, weight in weights.items():
            weight *= kept[name]
        after = network(images)
    assert torch.equal(after, before)
    assert before.sum() > 0
    taken = [name for name, mask in masks.items() if not torch.equal(kept[name], mask)]
    assert taken == ["body.1.weight", "body.4.weight"]


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([(3, 2), (2, 4)], "b takes 4 inputs, which do not fit the 3 units of a"),
        ([(3, 2, 1, 1), (2, 4, 1, 1)], "b takes 4 inputs, which do not fit the 3 units of a"),
        ([(3, 2, 1, 1), (2, 7)], "b takes 7 inputs, which do not fit the 3 units of a"),
        ([(3, 2), (2, 6)], "b takes 6 inputs, which do not fit the 3 units of a"),
        ([(3, 2), (2, 3, 1)], "b has 3 axes: must be 2"),
    ],
)
def test_layers_that_are_no_chain_are_refused(shapes, message):
    masks = {name: torch.ones(shape, dtype=torch.bool) for name, shape in zip("ab", shapes, strict=True)}
    with pytest.raises(ValueError, match=message):
        structural(masks)


def test_the_networks_are_chains():
    with torch.device("meta"):
        networks = [MnistNet(), Cifar10Net()]
    for network in networks:
        masks = {name: measuring.connected(weight) for name, weight in measuring.prunable(network).items()}
        assert {name: mask.shape for name, mask in structural(masks).items()} == {n: m.shape for n, m in masks.items()}


@pytest.mark.gpu
def test_masks_stay_on_their_device():
    masks = random_masks(0, 0.3)
    found = structural({name: mask.cuda() for name, mask in masks.items()})
    for (name, mask), expected in zip(found.items(), structural(masks).values(), strict=True):
        assert mask.is_cuda
        assert torch.equal(mask.cpu(), expected), name


def test_a_cut_takes_its_own_chain_away():
    """Three chains side by side: wherever one is cut, all of it goes, and nothing else."""
    for cut, depth in itertools.product(range(3), range(3)):
        masks = {f"layer {number}": torch.eye(3, dtype=torch.bool) for number in range(3)}
        masks[f"layer {depth}"][cut, cut] = False
        for mask in structural(masks).values():
            assert mask.diagonal().tolist() == [unit != cut for unit in range(3)]
