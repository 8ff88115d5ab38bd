"""The paper's neuron, BatchNorm per time step, and the simulation over time.

Chen et al., "Pruning of Deep Spiking Neural Networks through Gradient Rewiring", IJCAI 2021.
"""

import warnings
from typing import Any

import torch
from spikingjelly.activation_based import base, functional, neuron, surrogate
from torch import Tensor, nn

from spiking_kernels import Unfit


class LIFNode(neuron.LIFNode):
    """SpikingJelly's LIF neuron, but the membrane potential stays float32 if the input has a lower precision."""

    def materialize_states(self, inputs: tuple[Tensor, ...], states: tuple[Any, ...], step_mode: str) -> tuple:
        x, *others = inputs
        if x.dtype in (torch.bfloat16, torch.float16):  # the potential gets dtype, shape and device of x
            x = x.new_empty((), dtype=torch.float32).expand(x.shape)
        return super().materialize_states((x, *others), states, step_mode)


def lif() -> LIFNode:
    """The paper's leaky integrate-and-fire neuron: tau 2, threshold 1, hard reset to 0, ATan surrogate."""
    return LIFNode(
        tau=2.0,
        decay_input=True,
        v_threshold=1.0,
        v_reset=0.0,
        surrogate_function=surrogate.ATan(alpha=2.0),
        detach_reset=True,
    )


class StepwiseBatchNorm2d(nn.BatchNorm2d, base.StepModule):
    """BatchNorm2d for each time step separately, as in the paper's network.

    Batch statistics are over [N, H, W] of one time step. The running statistics are updated at every time step, in
    order. SpikingJelly's ``layer.BatchNorm2d`` pools all time steps in 'm' mode: a different network.
    """

    def __init__(self, num_features: int, step_mode: str = "s"):
        super().__init__(num_features)
        self.step_mode = step_mode

    def forward(self, x: Tensor) -> Tensor:
        """Normalises [N, C, H, W] in 's' mode, [T, N, C, H, W] in 'm' mode."""
        if self.step_mode == "s":
            return super().forward(x)
        if self.training or self.running_mean is None:  # without running statistics, evaluation uses batch statistics
            return torch.stack([nn.BatchNorm2d.forward(self, x_t) for x_t in x])
        return nn.BatchNorm2d.forward(self, x.flatten(0, 1)).view_as(x)


class SpikingNetwork(nn.Module):
    """Counts the output spikes for a static image in T time steps.

    The input is constant, so the first layer (:meth:`static`) runs once per image, and the other layers
    (:meth:`spiking`) run T times on its output.

    Args:
        T: number of time steps, >= 1.
        step_mode: 'm' runs the spiking part layer by layer, each over all time steps; 's' runs it time step by time
            step. Both give the same results within rounding.

    Both can be changed later; the layers follow the network's step_mode.

    Attributes:
        fused: whether to run fused kernels, if they are proven to give the same results within rounding
            (:mod:`spiking_kernels.proof`). If a kernel exists but does not apply, the plain layers run and a warning
            says why, once for each reason. The default is False.
        spike_counts: dictionaries to which fused kernels add numbers of spikes, int64 of the layer's shape, by the
            names in them: what leaves a LIF layer, what enters a layer with weights. Kernels need not call a hook whose
            attribute ``spike_counts`` is one of these dictionaries (see measuring.SpikeCounter).

    Raises:
        ValueError: T or step_mode is not accepted.
    """

    def __init__(self, T: int, step_mode: str):
        super().__init__()
        self.T = T
        self.step_mode = step_mode
        self.fused = False
        self.spike_counts: list[dict[str, Tensor]] = []
        self._warned: set[str] = set()

    @property
    def T(self) -> int:
        return self._T

    @T.setter
    def T(self, T: int) -> None:
        if isinstance(T, bool) or not isinstance(T, int) or T < 1:
            raise ValueError(f"T={T!r} is not accepted: T must be a whole number >= 1")
        self._T = T

    @property
    def step_mode(self) -> str:
        return self._step_mode

    @step_mode.setter
    def step_mode(self, step_mode: str) -> None:
        if step_mode not in ("s", "m"):
            raise ValueError(f"step_mode={step_mode!r} is not accepted: step_mode must be 's' or 'm'")
        self._step_mode = step_mode
        for child in self.children():  # in the wrong mode, a layer would take images for time steps
            functional.set_step_mode(child, step_mode)

    def static(self, images: Tensor) -> Tensor:
        """The first layer: maps images to the input current of the first neurons."""
        raise NotImplementedError

    def spiking(self, current: Tensor) -> Tensor:
        """Maps the input current to output spikes, for one time step ('s') or for all, time first ('m')."""
        raise NotImplementedError

    def readout(self, counts: Tensor) -> Tensor:
        """Maps the spike counts of the output neurons to one number per class."""
        return counts

    def _counts(self, current: Tensor) -> Tensor:
        if self.step_mode == "m":
            spikes = self.spiking(current.expand(self.T, *current.shape))
        else:
            spikes = torch.stack([self.spiking(current) for _ in range(self.T)])
        return self.readout(spikes.sum(0, dtype=torch.promote_types(spikes.dtype, torch.float32)))

    def fused_counts(self, current: Tensor) -> Tensor | None:
        """Computes the result of :meth:`forward` from :meth:`static`'s output by a kernel, if there is one.

        Raises:
            Unfit: the kernel would not compute the same, or does not accept this input; nothing has changed.
        """
        return None

    def counts_for(self, hook: Any) -> bool:
        """Whether a hook gets its numbers from :attr:`spike_counts`."""
        return any(getattr(hook, "spike_counts", None) is counts for counts in self.spike_counts)

    def add_spikes(self, spikes: dict[str, Tensor]) -> None:
        for counts in self.spike_counts:
            for name in counts.keys() & spikes.keys():
                counts[name] = counts[name] + spikes[name]

    def forward(self, images: Tensor) -> Tensor:
        """Maps normalised images [N, C, H, W] to spike counts [N, classes] from T time steps.

        Membrane potentials and dropout masks are reset before and after.
        """
        functional.reset_net(self)
        current, counts = self.static(images), None
        if self.fused and isinstance(current, Tensor) and not torch.compiler.is_compiling():
            try:
                counts = self.fused_counts(current)
            except Unfit as error:
                warning = f"{type(self).__name__} runs its plain layers, not the fused kernel: {error}"
                if warning not in self._warned:
                    self._warned.add(warning)
                    warnings.warn(warning, stacklevel=1)
        if counts is None:
            counts = self._counts(current)
            functional.reset_net(self)  # otherwise their graph keeps the activations until the next batch
        return counts
