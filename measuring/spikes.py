"""Spikes: how often every neuron fires."""

from collections.abc import Callable
from typing import Any

import torch
from spikingjelly.activation_based import neuron
from torch import Tensor

from spiking import SpikingNetwork


class SpikeCounter:
    """Counts the spikes of every neuron of a network while it is open (a context manager).

    ``rates()`` gives, by the name of a layer of SpikingJelly's neurons, LIF or other, the firing rate of each
    of its neurons: spikes per image and time step, float32 of the layer's shape [C, H, W] or [C]. Counts stay
    on the device until then.
    """

    def __init__(self, network: SpikingNetwork):
        self.network = network
        self._counts: dict[str, Tensor] = {}
        self._images = 0

    def __enter__(self) -> "SpikeCounter":
        layers = [(name, m) for name, m in self.network.named_modules() if isinstance(m, neuron.BaseNode)]
        self._hooks = [module.register_forward_hook(self._count_layer(name)) for name, module in layers]
        self._hooks.append(self.network.register_forward_hook(self._count_images))
        self.network.spike_counts.append(self._counts)  # for what runs fused, without the layers' hooks
        return self

    def __exit__(self, *exception: Any) -> None:
        self.network.spike_counts = [counts for counts in self.network.spike_counts if counts is not self._counts]
        for hook in self._hooks:
            hook.remove()

    def _counted(self, hook: Callable[..., None]) -> Callable[..., None]:
        """Marks a layer's hook as one that need not be called where a fused kernel adds to the counts."""
        hook.spike_counts = self._counts
        return hook

    def _count_images(self, network: SpikingNetwork, inputs: Any, counts: Tensor) -> None:
        self._images += len(counts)

    def _count_layer(self, name: str):
        def count_spikes(module: neuron.BaseNode, inputs: Any, spikes: Tensor) -> None:
            if module.step_mode == "m":
                spikes = spikes.flatten(0, 1)  # [T, N, ...] -> [T N, ...]
            # one batch's sum is exact in float32, the sum of all in int64
            self._counts[name] = self._counts.get(name, 0) + spikes.detach().sum(0, dtype=torch.float32).long()

        return self._counted(count_spikes)

    def rates(self) -> dict[str, Tensor]:
        outputs = self._images * self.network.T
        return {name: (counts.double() / outputs).float() for name, counts in self._counts.items()}


def neuron_results(rates: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    """Mean firing rate and share of silent neurons of each LIF layer, from the rates of its neurons."""
    return {
        name: {"firing_rate": float(rate.mean()), "silent": float((rate == 0).float().mean())}
        for name, rate in rates.items()
    }


def record_neurons(record: Callable[..., None], rates: dict[str, Tensor]) -> None:
    """Records :func:`neuron_results`, each number as ``record(key, number, layer=name)``."""
    for name, layer in neuron_results(rates).items():
        record("firing_rate", layer["firing_rate"], layer=name)
        record("silent", layer["silent"], layer=name)
