"""Structural connectivity: the connections on a path from an input to an output.

A connected weight has no effect if no input reaches the unit where it starts, or if the unit where it ends reaches no
output. The structural network is what remains without such weights.

A unit is a feature of a linear layer or a channel of a convolution. Each weight of a kernel connects two channels,
whatever its position. After flattening, each weight at any position of a channel connects that channel. So for
convolutions the count is an upper bound of the count over paths through single neurons. All pixels are inputs; all
units of the last layer are outputs. Biases and BatchNorm's shifts do not count as inputs, although they can make an
unreached unit spike.
"""

import torch
from torch import Tensor


def _adjacency(mask: Tensor) -> Tensor:
    """Which units a layer connects: [out, in], from the mask of its weight."""
    return mask if mask.dim() == 2 else mask.flatten(2).any(2)  # [out, in, kernel height, kernel width]


def _positions(masks: dict[str, Tensor]) -> list[int]:
    """The inputs of each layer per unit of the layer before: 1, or H x W after flattening."""
    positions, before, units = [], None, None
    for name, mask in masks.items():
        if mask.dim() not in (2, 4):
            raise ValueError(f"{name} has {mask.dim()} axes: must be 2 (linear) or 4 (convolution)")
        inputs = mask.shape[1]
        flattened = before is not None and masks[before].dim() == 4 and mask.dim() == 2
        if before is not None and (inputs % units if flattened else inputs != units):
            raise ValueError(f"{name} takes {inputs} inputs, which do not fit the {units} units of {before}")
        positions.append(inputs // units if flattened else 1)
        before, units = name, mask.shape[0]
    return positions


def structural(masks: dict[str, Tensor]) -> dict[str, Tensor]:
    """Finds the structural connections among the connected ones.

    Args:
        masks: the connected weights, bool, of a chain of layers in order: [out, in] for linear layers,
            [out, in, kernel height, kernel width] for convolutions.

    Returns:
        The structural connections: masks of the same names, shapes and devices.

    Raises:
        ValueError: a layer's inputs do not fit the units of the layer before.
    """
    positions = _positions(masks)
    adjacencies = [_adjacency(mask) for mask in masks.values()]
    reached = []  # for each layer: which of its inputs an input of the network reaches
    units = torch.ones_like(adjacencies[0][0])
    for adjacency, size in zip(adjacencies, positions, strict=True):
        reached.append(units.repeat_interleave(size))
        units = (adjacency & reached[-1]).any(1)
    result = {}
    units = torch.ones_like(adjacencies[-1][:, 0])  # which outputs of a layer reach an output of the network
    for name, adjacency, size, inputs in reversed(list(zip(masks, adjacencies, positions, reached, strict=True))):
        mask = masks[name]
        on_path = units.unsqueeze(1) & inputs
        result[name] = mask & on_path.view(*on_path.shape, *[1] * (mask.dim() - 2))
        units = (adjacency & units.unsqueeze(1)).any(0).view(-1, size).any(1)
    return {name: result[name] for name in masks}
