"""The paper's neuron, BatchNorm per time step, and the simulation over time.

Chen et al., "Pruning of Deep Spiking Neural Networks through Gradient Rewiring", IJCAI 2021.
"""

import contextlib
import warnings
from typing import Any, Protocol

import torch
from spikingjelly.activation_based import base, functional, layer, neuron, surrogate
from torch import Tensor, nn

from spiking_kernels import Unfit, blocks
from spiking_kernels.shapes import per_channel, update_running


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


def traced() -> bool:
    """Whether torch records the operations, which would miss what a kernel does."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


class Ranks(Protocol):
    """The processes that train a network together, each with an equal share of every batch, as a layer sees them."""

    size: int

    def share(self, n: int) -> slice:
        """This process's share of n images in order."""

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of all processes' tensors, in place."""

    def pooled(self, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and biased variance of the whole batch, float32, from those of the share."""


class Dropout(layer.Dropout):
    """SpikingJelly's Dropout. Several :class:`Ranks` draw the mask of the whole batch; each takes that of its share."""

    def __init__(self, p: float):
        super().__init__(p)
        self.ranks: Ranks | None = None

    def create_mask(self, x: Tensor) -> Tensor:
        if self.ranks is None:
            return super().create_mask(x)
        whole = super().create_mask(x.new_empty((len(x) * self.ranks.size, *x.shape[1:])))
        return whole[self.ranks.share(len(whole))]


class _Normalise(torch.autograd.Function):
    """Normalises the share x [T, N, C, H, W] of a batch by the statistics [T, C] of the whole one.

    The gradient flows through the statistics too: all ranks add up two numbers per channel and time step.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, mean, variance, eps: float, ranks: Ranks) -> Tensor:
        ctx.save_for_backward(x, weight, mean, variance)
        ctx.eps, ctx.ranks = eps, ranks
        each = zip(x, mean, variance, strict=True)
        return torch.stack([nn.functional.batch_norm(x_t, m, v, weight, bias, eps=eps) for x_t, m, v in each])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, variance = ctx.saved_tensors
        values = x[0].numel() // x.shape[2] * ctx.ranks.size  # of a channel in a time step
        inverse = (variance.double() + ctx.eps).rsqrt()  # [T, C]
        g, centred = grad.float(), x.float() - per_channel(mean)
        own = torch.stack([y.sum((1, 3, 4), dtype=torch.float64) for y in (g, g * centred)])  # [2, T, C]
        mean_g, mean_gx = ctx.ranks.sum(own.clone()) / values
        slope = (mean_gx * inverse.square()).float()
        grad_x = per_channel((weight * inverse).float()) * (
            g - per_channel(mean_g.float()) - centred * per_channel(slope)
        )
        grad_weight, grad_bias = (own[1] * inverse).sum(0), own[0].sum(0)  # summed over the ranks with all gradients
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), grad_bias.to(weight.dtype), None, None, None, None


class BatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d, but the batch statistics of several :class:`Ranks` are those of the whole batch.

    With ``fused``, those of channels-last images on the CPU are sums in float64, see
    :func:`spiking_kernels.blocks.batch_norm`.
    """

    def __init__(self, num_features: int):
        super().__init__(num_features)
        self.ranks: Ranks | None = None
        self.fused = False

    def forward(self, x: Tensor) -> Tensor:
        """Normalises [N, C, H, W]."""
        if self.training and self.ranks is not None:
            return self.over_ranks(x[None])[0]
        if self.training and self.fused and x.is_cpu and not traced():
            with contextlib.suppress(Unfit):
                return blocks.batch_norm(x, self)
        return super().forward(x)

    def over_ranks(self, x: Tensor) -> Tensor:
        """Normalises a share [T, N, C, H, W], each time step by itself; the ranks exchange their sums once."""
        with torch.no_grad():
            own = [torch.var_mean(x_t.float(), (0, 2, 3), correction=0) for x_t in x]
            variance, mean = map(torch.stack, zip(*own, strict=True))
            mean, variance = self.ranks.pooled(mean, variance)
            update_running(self, mean, variance, x[0].numel() // x.shape[2] * self.ranks.size)
            self.num_batches_tracked += len(x)
        return _Normalise.apply(x, self.weight, self.bias, mean, variance, self.eps, self.ranks)


class StepwiseBatchNorm2d(BatchNorm2d, base.StepModule):
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
        if self.training and self.ranks is not None:
            return self.over_ranks(x)
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
        ranks: the processes that train the network, each with its share of every batch; None for one. Its layers
            follow.
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
        self._ranks: Ranks | None = None
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

    @property
    def ranks(self) -> Ranks | None:
        return self._ranks

    @ranks.setter
    def ranks(self, ranks: Ranks | None) -> None:
        self._ranks = ranks
        for module in self.modules():
            if isinstance(module, (BatchNorm2d, Dropout)):
                module.ranks = ranks

    def static(self, images: Tensor) -> Tensor:
        """The first layer: maps images [N, C, H, W] to the input current of the first neurons, [N, …]."""
        raise NotImplementedError

    def spiking(self, current: Tensor) -> Tensor:
        """Maps the input current to output spikes: [N, …] to [N, O] in step mode 's', for one time step; [T, N, …] to
        [T, N, O] in 'm', for all."""
        raise NotImplementedError

    def readout(self, counts: Tensor) -> Tensor:
        """Maps the spike counts of the output neurons, [N, O], to one number per class, [N, classes]."""
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

    def fused_gradients(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor] | None:
        """The loss of training and the number of correct predictions, both without axes, by a kernel if there is one.

        It puts into the parameters' ``grad`` what a backward pass of that loss would (see
        :func:`measuring.loss_function`). It is None, or raises Unfit, where more than that is asked of a step, too: to
        keep gradients from frozen weights, say, or to call hooks. Then :meth:`forward` and autograd take the step, and
        no warning is due, unless the forward pass has one.

        Raises:
            Unfit: as :meth:`fused_counts`.
        """
        return None

    def counts_for(self, hook: Any) -> bool:
        """Whether a hook gets its numbers from :attr:`spike_counts`."""
        return any(getattr(hook, "spike_counts", None) is counts for counts in self.spike_counts)

    def add_spikes(self, spikes: dict[str, Tensor]) -> None:
        for counts in self.spike_counts:
            for name in counts.keys() & spikes.keys():
                counts[name] = counts[name] + spikes[name]

    def _reset(self) -> None:
        """Resets all layers. SpikingJelly's reset_net keeps a list of them, and misses one that replaces another."""
        for module in self.modules():
            if hasattr(type(module), "reset"):
                module.reset()

    def forward(self, images: Tensor) -> Tensor:
        """Maps normalised images [N, C, H, W] to spike counts [N, classes] from T time steps.

        Membrane potentials and dropout masks are reset before and after.
        """
        self._reset()
        current, counts = self.static(images), None
        if self.fused and isinstance(current, Tensor) and not traced():
            try:
                counts = self.fused_counts(current)
            except Unfit as error:
                warning = f"{type(self).__name__} runs its plain layers, not the fused kernel: {error}"
                if warning not in self._warned:
                    self._warned.add(warning)
                    warnings.warn(warning, stacklevel=1)
        if counts is None:
            counts = self._counts(current)
        self._reset()  # otherwise their graph keeps the activations until the next batch
        return counts
