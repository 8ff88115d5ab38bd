"""Synapses: the connections of a network whose convolutions are unrolled, as hardware without shared weights has them.

There a weight of a convolution is one synapse at each position of the output. Those that lie on the padding at the
borders are counted as well.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from measuring import prunable
from spiking import SpikingNetwork


def positions(network: SpikingNetwork, shape: tuple[int, int, int]) -> dict[str, int]:
    """At how many positions of a layer's output each of its weights stands, by the weight's name.

    These are the height times the width of a convolution's output, and 1 for a linear layer. A layer that never runs
    is left out.

    Args:
        network: runs once, on an image of zeros, in the mode that it is in.
        shape: of an image: channels, height, width.
    """
    found: dict[str, int] = {}

    def of(name: str) -> Callable[..., None]:
        def look(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            found[name] = output.shape[-2:].numel() if isinstance(module, nn.Conv2d) else 1

        return look

    names = [name.removesuffix(".weight") for name in prunable(network)]
    hooks = [network.get_submodule(name).register_forward_hook(of(f"{name}.weight")) for name in names]
    try:
        with torch.no_grad():
            network(next(network.parameters()).new_zeros(1, *shape))
    finally:
        for hook in hooks:
            hook.remove()
    return found
