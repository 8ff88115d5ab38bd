"""Structural connectivity: the connections that lie on some path from an input to an output.

A connected weight changes nothing when no input reaches the unit that it starts from, or when the unit
that it ends at reaches no output. What remains after both are taken away is the structural network.

A unit is a feature of a linear layer or a channel of a convolution, and a weight of a kernel is a
connection between its two channels: positions within a channel are not told apart. Where a convolution
is flattened into a linear layer, a channel is connected by every weight at any of its positions. So, in
a convolution, the count is an upper bound of what paths through single neurons would give. All pixels
are inputs, all units of the last layer outputs. Biases and BatchNorm's shifts are no inputs, although
they may let a unit spike that nothing reaches.
"""

import torch
from torch import Tensor


def _adjacency(mask: Tensor) -> Tensor:
    """Which units of a layer are connected, [out, in], from its mask of a linear layer or a convolution."""
    return mask if mask.dim() == 2 else mask.flatten(2).any(2)  # [out, in, kernel height, kernel width]


def _positions(masks: dict[str, Tensor]) -> list[int]:
    """For every layer, how many of its inputs come from one unit before: 1, or after flattening H x W."""
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
    """Which connections are structural, from which are connected.

    Args:
        masks: bool by layer, a chain in the order of the layers: [out, in] of linear layers,
            [out, in, kernel height, kernel width] of convolutions.

    Returns:
        Masks of the same names, shapes and devices; to be counted with :func:`measuring.count`.

    Raises:
        ValueError: a layer's inputs do not fit the units of the layer before.
    """
    positions = _positions(masks)
    adjacencies = [_adjacency(mask) for mask in masks.values()]
    reached = []  # by layer: which of its inputs are reached from an input of the network
    units = torch.ones_like(adjacencies[0][0])
    for adjacency, size in zip(adjacencies, positions, strict=True):
        reached.append(units.repeat_interleave(size))
        units = (adjacency & reached[-1]).any(1)
    result = {}
    units = torch.ones_like(adjacencies[-1][:, 0])  # which units of a layer reach an output
    for name, adjacency, size, inputs in reversed(list(zip(masks, adjacencies, positions, reached, strict=True))):
        mask = masks[name]
        on_path = units.unsqueeze(1) & inputs
        result[name] = mask & on_path.view(*on_path.shape, *[1] * (mask.dim() - 2))
        units = (adjacency & units.unsqueeze(1)).any(0).view(-1, size).any(1)
    return {name: result[name] for name in masks}
