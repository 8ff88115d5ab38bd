"""Spikes: how often each neuron fires."""

from collections.abc import Callable
from typing import Any

import torch
from spikingjelly.activation_based import neuron
from torch import Tensor

from spiking import SpikingNetwork


class SpikeCounter:
    """A context manager that counts the spikes of each neuron of a network.

    It covers all layers of SpikingJelly's neurons, LIF or other. The counts stay on the device until :meth:`rates`.

    Raises:
        TypeError: the network is no SpikingNetwork.
    """

    def __init__(self, network: SpikingNetwork):
        if not isinstance(network, SpikingNetwork):
            raise TypeError(f"network is {type(network).__name__}, not a SpikingNetwork")
        self.network = network
        self._neurons = {name: m for name, m in network.named_modules() if isinstance(m, neuron.BaseNode)}
        # the names tell fused kernels, which do not call the hooks, what to add
        self._counts: dict[str, Tensor | int] = dict.fromkeys(self._neurons, 0)
        self._images = 0

    def __enter__(self) -> "SpikeCounter":
        self._hooks = [m.register_forward_hook(self._count_layer(name)) for name, m in self._neurons.items()]
        self._hooks.append(self.network.register_forward_hook(self._count_images))
        self.network.spike_counts.append(self._counts)
        return self

    def __exit__(self, *exception: Any) -> None:
        self.network.spike_counts = [counts for counts in self.network.spike_counts if counts is not self._counts]
        for hook in self._hooks:
            hook.remove()

    def _counted(self, hook: Callable[..., None]) -> Callable[..., None]:
        """Marks a layer's hook: a fused kernel need not call it, because the kernel adds to the counts itself."""
        hook.spike_counts = self._counts
        return hook

    def _count_images(self, network: SpikingNetwork, inputs: Any, counts: Tensor) -> None:
        self._images += len(counts)

    def _count_layer(self, name: str):
        def count_spikes(module: neuron.BaseNode, inputs: Any, spikes: Tensor) -> None:
            if module.step_mode == "m":
                spikes = spikes.flatten(0, 1)  # [T, N, ...] -> [T N, ...]
            # float32 is exact for one batch, int64 for all batches
            self._counts[name] = self._counts[name] + spikes.detach().sum(0, dtype=torch.float32).long()

        return self._counted(count_spikes)

    def add_up(self, total: Callable[[Tensor], Tensor]) -> None:
        """Replaces all counts by their totals over several processes that have tested a part each."""
        for name, counts in self._counts.items():
            if isinstance(counts, Tensor):
                self._counts[name] = total(counts)
        self._images = int(total(torch.tensor(self._images, dtype=torch.int64, device="cpu")))

    def rates(self) -> dict[str, Tensor]:
        """Spikes per image and time step of each neuron: float32 [C, H, W] or [C], by the layer's name."""
        outputs = self._images * self.network.T
        spikes = {name: self._counts[name] for name in self._neurons}
        # a layer that never ran has none
        return {name: (n.double() / outputs).float() for name, n in spikes.items() if isinstance(n, Tensor)}


def neuron_results(rates: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    """The mean firing rate and the share of silent neurons of each layer, from the rates of its neurons."""
    return {
        name: {"firing_rate": float(rate.mean()), "silent": float((rate == 0).float().mean())}
        for name, rate in rates.items()
    }


def record_neurons(record: Callable[..., None], rates: dict[str, Tensor]) -> None:
    """Records the numbers of :func:`neuron_results` by ``record(key, number, layer=name)``."""
    for name, layer in neuron_results(rates).items():
        for key, number in layer.items():
            record(key, number, layer=name)
