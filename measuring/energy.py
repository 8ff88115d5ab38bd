"""The cost of an image: synaptic operations per layer, and the energy of their arithmetic.

A spike that arrives at a connected weight (w != 0) costs one synaptic operation: one accumulate (AC). Weights of 0
cost nothing. Padding costs nothing either: a spike at the border meets fewer weights of a kernel. Spikes are counted
at the input of the weights, so after max pooling. The first layer gets real numbers and runs once per image: each
input value at each connected weight costs one multiply-accumulate (MAC), whatever its value. BatchNorm (which can be
folded into the weights), biases, pooling and the updates of the neurons are not counted.

Energy of 32-bit floating point arithmetic in 45 nm at 0.9 V: 0.9 pJ per addition, 3.7 pJ per multiplication, without
memory access and communication. M. Horowitz, "Computing's energy problem (and what we can do about it)", ISSCC 2014,
doi 10.1109/ISSCC.2014.6757323.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from measuring import SpikeCounter, connected
from spiking import SpikingNetwork

PICOJOULES_PER_AC = 0.9
PICOJOULES_PER_MAC = 0.9 + 3.7


@dataclass(frozen=True)
class Operations:
    """The operations of one layer, summed over all images."""

    images: int  # their number
    pruned: int  # the operations at connected weights
    dense: int  # the operations for the same inputs if all weights were connected
    kind: str  # "MAC" for the first layer, "SynOp" for the other layers

    @property
    def picojoules(self) -> float:
        """The energy of one of these operations."""
        return PICOJOULES_PER_MAC if self.kind == "MAC" else PICOJOULES_PER_AC


@dataclass(frozen=True)
class Energy:
    """Energy per image in picojoules: of the connected weights, and if all weights were connected."""

    pruned: float
    dense: float


def energy_per_image(layers: Iterable[Operations]) -> Energy:
    """The energy per image, summed over layers."""
    layers = list(layers)
    return Energy(
        sum(operations.pruned * operations.picojoules / operations.images for operations in layers),
        sum(operations.dense * operations.picojoules / operations.images for operations in layers),
    )


def fan_out(module: nn.Linear | nn.Conv2d, mask: Tensor, shape: torch.Size) -> Tensor:
    """Counts, for each input element of a layer, the weights in ``mask`` to which it is connected.

    Args:
        module: the layer; a convolution's stride, padding, dilation and groups matter.
        mask: bool, of the weight's shape.
        shape: the input's shape without the batch: [C, H, W] for a convolution, [in] for a linear layer.

    Returns:
        int64 of ``shape``, on the device of ``mask``.

    Raises:
        ValueError: a convolution does not pad with zeros; other padding would cost operations, too.
    """
    if isinstance(module, nn.Linear):
        return mask.sum(0)
    if module.padding_mode != "zeros":
        raise ValueError(f"padding_mode={module.padding_mode!r} is not accepted: operations are counted with 'zeros'")
    # the transposed convolution of ones; float64 is exact, float32 may not be on a GPU
    settings = (module.stride, module.padding, module.dilation, module.groups)
    transposed = torch.func.grad(lambda x: F.conv2d(x, mask.double(), None, *settings).sum())
    return transposed(torch.zeros(shape, dtype=torch.float64, device=mask.device)).round().long()


class OperationCounter(SpikeCounter):
    """A :class:`SpikeCounter` that also counts the spikes at the input of each layer, for :meth:`operations`.

    The synaptic operations of a layer are the sum over its inputs of the spikes times the connected weights that each
    meets (:func:`fan_out`). So it records one count per input element, which stays on the device until
    :meth:`operations` is called.

    The first layer, which :meth:`spiking.SpikingNetwork.static` runs, is the one with real-valued inputs.
    """

    def __init__(self, network: SpikingNetwork):
        super().__init__(network)
        modules = network.named_modules()
        self._weighted = {name: m for name, m in modules if isinstance(m, (nn.Linear, nn.Conv2d))}
        self._counts |= dict.fromkeys(self._weighted, 0)

    def __enter__(self) -> "OperationCounter":
        super().__enter__()
        for number, (name, module) in enumerate(self._weighted.items()):
            hook = self._count_inputs(name, first=number == 0)
            self._hooks.append(module.register_forward_pre_hook(self._counted(hook) if number else hook))
        return self

    def _count_inputs(self, name: str, first: bool) -> Callable[..., None]:
        axes = 3 if isinstance(self._weighted[name], nn.Conv2d) else 1

        def count_inputs(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach()
            rows = x.reshape(-1, *x.shape[-axes:])  # time steps and images in one axis: [rows, C, H, W] or [rows, in]
            # float32 is exact for one batch, float64 for all batches; a fraction shows inputs that are no spikes
            arrived = (torch.ones_like(rows) if first else rows).sum(0, dtype=torch.float32)
            self._counts[name] = self._counts[name] + arrived.double()

        return count_inputs

    def operations(self) -> dict[str, Operations]:
        """The operations of each layer with its current weights, by the weight's name.

        Raises:
            ValueError: no image was counted, a layer after the first has inputs that are not spikes, or a convolution
                does not pad with zeros.
        """
        if not self._images:
            raise ValueError("no image was counted")
        result = {}
        for number, (name, module) in enumerate(self._weighted.items()):
            kind, arrived, mask = "SynOp" if number else "MAC", self._counts[name], connected(module.weight)
            if not isinstance(arrived, Tensor):  # it never ran
                result[f"{name}.weight"] = Operations(self._images, 0, 0, kind)
                continue
            if not torch.equal(arrived, arrived.round()):
                raise ValueError(f"{name} is not the first layer, but its inputs are not spikes")
            pruned, dense = (
                int((arrived.long() * fan_out(module, weights, arrived.shape)).sum())
                for weights in (mask, torch.ones_like(mask))
            )
            result[f"{name}.weight"] = Operations(self._images, pruned, dense, kind)
        return result
