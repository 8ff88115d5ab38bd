"""The MNIST network: a spiking multilayer perceptron, 784-800-10 as published."""

import functools

import torch
from spikingjelly.activation_based import layer
from torch import Tensor, nn

import spiking_kernels
from spiking import LIFNode, SpikingNetwork, lif
from spiking_kernels import Unfit, products, proof

# attributes that may differ: they change nothing that is computed, the kernel is given them, or they are checked apart
FREE = proof.SIZES | {"_T", "fused", "spike_counts", "_ranks", "_warned"}


class MnistNet(SpikingNetwork):
    """Maps images [N, 1, 28, 28] to spike counts [N, 10]; no biases.

    Args:
        T, step_mode: see :class:`spiking.SpikingNetwork`.
        width: number of hidden neurons.
    """

    def __init__(self, T: int = 8, step_mode: str = "m", width: int = 800):
        super().__init__(T, step_mode)
        self.static_fc = nn.Sequential(nn.Flatten(), nn.Linear(28 * 28, width, bias=False))
        self.fc = nn.Sequential(lif(), layer.Linear(width, 10, bias=False), lif())
        self.step_mode = step_mode

    def static(self, images: Tensor) -> Tensor:
        return self.static_fc(images)  # [N, width]

    def spiking(self, current: Tensor) -> Tensor:
        return self.fc(current)

    def fused_counts(self, current: Tensor) -> Tensor | None:
        if not current.is_cpu:
            return None
        proof.check_network(self, MnistNet)
        weight = proof.check_layers(self.fc, "fc", LIFNode, harmless=self.counts_for).weight
        rounding, hidden = proof.autocast_dtype("cpu"), None
        if current.dtype is rounding:
            current = current.float()
        if self.spike_counts:
            hidden = torch.zeros(weight.shape[1], dtype=torch.int64, device="cpu")
        counts = spiking_kernels.lif_linear_lif(current, weight, self.T, hidden, rounding)  # [N, 10]
        if hidden is not None:
            first, linear, last = (f"fc.{name}" for name in self.fc._modules)
            self.add_spikes({first: hidden, linear: hidden, last: counts.detach().sum(0).long()})
        return counts

    def fused_gradients(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor] | None:
        if not images.is_cpu or images.requires_grad or images.is_inference():
            return None
        if self.spike_counts or self.T > spiking_kernels.MAX_T or proof.autocast_dtype("cpu") is not None:
            return None
        proof.check_unwatched()
        if (MnistNet.forward, MnistNet.static) != AS_KNOWN:
            raise Unfit("MnistNet has been given another forward or static")
        if reason := proof.difference(self, _as_published(), "it", FREE) or spiking_kernels.unavailable():
            raise Unfit(reason)
        # past nn.Module's look-ups, which take longer
        first, second = (self._modules[part]._modules["1"]._parameters["weight"] for part in ("static_fc", "fc"))
        proof.check_learns(first, second)
        images = images.flatten(1)
        current = products.linear(images, first.detach())
        loss, right, grad, second_grad = spiking_kernels.lif_linear_lif_learn(current, second, labels, self.T)
        first.grad, second.grad = grad.t() @ images, second_grad
        return loss, right


AS_KNOWN = MnistNet.forward, MnistNet.static


@functools.cache
def _as_published() -> MnistNet:
    """What :meth:`MnistNet.fused_gradients` knows; of no size."""
    with torch.device("meta"):
        return MnistNet(width=1)
