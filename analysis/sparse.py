"""Evaluates a pruned network by its connections and its spikes alone, on the CPU.

What is 0 costs nothing: pruned weights are not stored, hidden neurons that lead to no output are not computed, a neuron
whose current stays below the threshold is not simulated, one that does not spike adds nothing to the next layer.
benchmarks/RESULTS.md says from which sparsity on this pays.
"""

import numpy as np
import torch
from torch import Tensor

import measuring
import spiking_kernels
from analysis.packages import imported
from mnist.model import MnistNet
from spiking import LIFNode, SpikingNetwork
from spiking_kernels import proof
from spiking_kernels.tensors import Unfit, flaw

BLOCK = 256  # images at a time, whose currents the caches hold


def event_driven(network: SpikingNetwork) -> "EventDrivenMnist":
    """A function from images to spike counts that computes what ``network`` does in eval mode.

    Raises:
        ValueError: there is none for this network. A sparse convolution gathers its input for every position of the
            kernel: at a sparsity of 95 % it is less than twice as fast as the dense one.
    """
    if type(network) is not MnistNet:
        raise ValueError(
            f"{type(network).__name__} has no event-driven evaluation, only MnistNet has one: "
            "sparse convolutions gain too little on a CPU (benchmarks/RESULTS.md)"
        )
    return EventDrivenMnist(network)


def _obstacle(network: MnistNet) -> str | None:
    """Why a network does not compute what :class:`EventDrivenMnist` does, in words; None if it does."""
    if own := proof.overridden(network):
        return f"it has a {own} of its own"
    with torch.device("meta"):
        like = MnistNet(network.T)
    # what a spike is worth backward, and how the layers are run, changes no spike
    free = proof.SIZES | {"_memories", "_step_mode", "tau", "v_threshold", "detach_reset", "alpha"}
    for name, layers in like.named_children():
        if reason := proof.difference(getattr(network, name), layers, name, free):
            return reason
    for name, weight in measuring.prunable(network).items():
        if weight.dtype != torch.float32 or weight.layout != torch.strided:
            return f"{name} is {weight.dtype}, {weight.layout}, not torch.float32, torch.strided"
        if not weight.isfinite().all():
            return f"{name} is not finite"
    return None


class EventDrivenMnist:
    """Maps images [N, 1, 28, 28] to spike counts [N, 10] as a MnistNet in eval mode does.

    The image does not change over time, and neither does a hidden neuron's current: reset to 0 at every spike, it fires
    with a period, which the current gives. The spikes are the dense network's but for potentials within rounding of the
    threshold.

    Args:
        network: its weights are copied.

    Attributes:
        fused: the fused kernel for two layers of neurons does what follows the first product. It is True where there
            is one for this network and machine; otherwise the events are a sparse product too.

    Raises:
        ValueError: the network is not MnistNet as it is made, but for its sizes and its neurons' tau and threshold,
            or a weight is not float32, or not finite.
        training.errors.Refusal: SciPy is not installed.
    """

    def __init__(self, network: MnistNet):
        if reason := _obstacle(network):
            raise ValueError(f"there is no event-driven evaluation of this network: {reason}")
        self.hidden, linear, self.output = network.fc
        self.T = network.T
        # v after k steps of a current x is x (1 - (1 - 1/tau)^k): the least x that spikes by step T, ..., 1
        charge = 1 - (1 - 1 / self.hidden.tau) ** torch.arange(self.T, 0, -1, dtype=torch.float64, device="cpu")
        self.firing = (self.hidden.v_threshold / charge).float()
        first, second = network.static_fc[1].weight.detach(), linear.weight.detach()
        leads_on = measuring.connected(second).any(0)  # the others change nothing
        # SciPy's is on a par with torch.sparse's CSR (benchmarks.sparse), which is in beta state
        self.csr_matrix = imported("scipy.sparse", "the event-driven evaluation").csr_matrix
        self.first = self.csr_matrix(first[leads_on].cpu().float().numpy())  # [H, 784]
        self.second = second[:, leads_on].cpu().float().contiguous()  # [10, H]
        self.fused = self.T <= spiking_kernels.MAX_T and bool(leads_on.any())
        try:  # the step mode and the neurons' state do not matter here
            proof.check_layers(network.fc, "fc", LIFNode, proof.STATE | {"_step_mode"})
        except Unfit:
            self.fused = False

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Normalised images [N, 1, 28, 28], float32 on the CPU, to spike counts [N, 10].

        Raises:
            ValueError: the images are something else.
        """
        if reason := flaw(images, torch.float32, contiguous=False):
            raise ValueError(f"images {reason}")
        return torch.cat([self._block(block) for block in images.flatten(1).split(BLOCK)])

    def _block(self, images: Tensor) -> Tensor:
        n = len(images)
        current = torch.from_numpy(self.first @ images.t().contiguous().numpy())  # [H, n]
        if self.fused:
            return spiking_kernels.lif_linear_lif(current.t(), self.second, self.T)
        neuron, image = (current >= self.firing[0]).nonzero(as_tuple=True)
        step = self.T - torch.bucketize(current[neuron, image], self.firing, right=True)  # of the first spike, from 0
        events = (np.ones(len(step), np.float32), ((step * n + image).numpy(), neuron.numpy()))
        arriving = self.csr_matrix(events, (self.T * n, self.first.shape[0])) @ self.second.t().numpy()
        return self._count(torch.from_numpy(arriving).view(self.T, n, len(self.second)))

    def _count(self, inputs: Tensor) -> Tensor:
        """Output spikes [n, 10], from what the neurons that first spike at each step send: [T, n, 10]."""
        v, counts = torch.zeros_like(inputs[0]), torch.zeros_like(inputs[0])
        for step in range(1, self.T + 1):
            arriving = sum(inputs[period - 1] for period in range(1, step + 1) if step % period == 0)
            v = v + (arriving - v) / self.output.tau
            spikes = v >= self.output.v_threshold
            counts += spikes
            v = v.masked_fill(spikes, 0.0)
        return counts
