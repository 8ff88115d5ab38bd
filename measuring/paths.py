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
    layers = []  # of each: its name; which units it connects, [out, in]; inputs per unit before it; the reached inputs
    units = before = None  # the outputs of a layer that an input of the network reaches, and the layer's name
    for name, mask in masks.items():
        if mask.dim() not in (2, 4):
            raise ValueError(f"{name} has {mask.dim()} axes: must be 2 (linear) or 4 (convolution)")
        adjacency = mask if mask.dim() == 2 else mask.flatten(2).any(2)
        size, reached = 1, torch.ones_like(adjacency[0])
        if before is not None:
            size, rest = divmod(len(reached), len(units))  # H x W after flattening, otherwise 1
            if rest or (size != 1 and (masks[before].dim(), mask.dim()) != (4, 2)):
                raise ValueError(
                    f"{name} takes {len(reached)} inputs, which do not fit the {len(units)} units of {before}"
                )
            reached = units.repeat_interleave(size)
        layers.append((name, adjacency, size, reached))
        units, before = (adjacency & reached).any(1), name
    result = dict(masks)
    units = torch.ones_like(units)  # which outputs of a layer reach an output of the network
    for name, adjacency, size, reached in reversed(layers):
        mask, on_path = masks[name], units.unsqueeze(1) & reached
        result[name] = mask & on_path.view(*on_path.shape, *[1] * (mask.dim() - 2))
        units = (adjacency & units.unsqueeze(1)).any(0).view(-1, size).any(1)
    return result
