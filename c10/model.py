"""The CIFAR-10 network: six spiking convolutions and two fully connected layers, 36.7 M weights as published."""

import contextlib
import functools

import torch
from spikingjelly.activation_based import layer
from torch import Tensor, nn

import spiking_kernels
from spiking import BatchNorm2d, Dropout, SpikingNetwork, StepwiseBatchNorm2d, lif
from spiking_kernels import blocks, convolutions, proof
from spiking_kernels.shapes import Shape

CONVOLUTIONS = (1, 4, 8, 11, 14)  # where they stand in Cifar10Net.conv
FREE = proof.SIZES | {"ranks"}  # what the kernels take as it is


def block(width: int) -> tuple[nn.Module, nn.Module, nn.Module]:
    convolution = layer.Conv2d(width, width, kernel_size=3, padding=1, bias=False)
    return convolution, StepwiseBatchNorm2d(width), lif()


class _ChannelsLast(torch.autograd.Function):
    """Copies of some weights of one shape [O, I, H, W] in another dtype, channels-last."""

    @staticmethod
    def forward(ctx, dtype: torch.dtype, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.dtype = weights[0].dtype
        copied = torch.stack(weights).permute(0, 1, 3, 4, 2)  # [layers, O, H, W, I]
        copied = copied.to(dtype, copy=True, memory_format=torch.contiguous_format)
        return copied.permute(0, 1, 4, 2, 3).unbind()

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        stacked = torch.stack(gradients)
        return None, *stacked.to(ctx.dtype, copy=True, memory_format=torch.contiguous_format).unbind()


class Cifar10Net(SpikingNetwork):
    """Maps images [N, 3, 32, 32] to spike counts [N, 10], each the average over ten output neurons.

    Only BatchNorm has biases. A dropout mask is drawn for each batch and used for all its time steps.

    Args:
        T, step_mode: see :class:`spiking.SpikingNetwork`.
        width: number of channels of every convolution; the hidden fully connected layer has 8 x width neurons.
    """

    def __init__(self, T: int = 8, step_mode: str = "m", width: int = 256):
        super().__init__(T, step_mode)
        self.static_conv = nn.Sequential(
            nn.Conv2d(3, width, kernel_size=3, padding=1, bias=False),
            BatchNorm2d(width),
        )
        self.conv = nn.Sequential(
            lif(),
            *block(width),
            *block(width),
            layer.MaxPool2d(2, 2),  # 32x32 -> 16x16
            *block(width),
            *block(width),
            *block(width),
            layer.MaxPool2d(2, 2),  # 16x16 -> 8x8
        )
        self.fc = nn.Sequential(
            layer.Flatten(),
            Dropout(0.5),
            layer.Linear(width * 8 * 8, 8 * width, bias=False),
            lif(),
            layer.Linear(8 * width, 100, bias=False),
            lif(),
        )
        self.boost = nn.AvgPool1d(10)
        self.step_mode = step_mode

    def static(self, images: Tensor) -> Tensor:
        for module in self.static_conv.modules():
            if isinstance(module, BatchNorm2d):
                module.fused = self.fused
        if self.fused:  # the kernels' layout
            images = images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
        return self.static_conv(images)  # [N, width, 32, 32]

    def spiking(self, current: Tensor) -> Tensor:
        return self.fc(self.conv(current))

    def readout(self, counts: Tensor) -> Tensor:
        return self.boost(counts.unsqueeze(1)).squeeze(1)  # AvgPool1d needs a channel axis for an empty batch

    def fused_counts(self, current: Tensor) -> Tensor | None:
        if current.device.type not in ("cpu", "cuda"):
            return None
        self._check_kernels(current)
        T = self.T

        def neurons(name: str, y: Tensor, norm: nn.Module | None = None, **how: bool) -> Tensor:
            counts = None
            if self.spike_counts:
                counts = torch.zeros((*y.shape[2:], y.shape[1]), dtype=torch.int64, device=y.device)
            spikes = blocks.lif_block(y, Shape(T, **how), norm, counts, self.ranks)
            if counts is not None:
                counts = counts.permute(2, 0, 1)  # [C, H, W]
                self.add_spikes({name: counts.flatten() if name.startswith("fc") else counts})
            return spikes.unflatten(0, (T, -1))

        names, layers = zip(*self.conv.named_children(), strict=True)
        spikes = neurons(f"conv.{names[0]}", current, constant=True)  # [T, N, C, H, W] from here on
        filters = self._filters() if current.is_cuda else None
        for i, place in enumerate(CONVOLUTIONS):
            convolution, norm, _, after = layers[place : place + 4]
            pool = isinstance(after, layer.MaxPool2d)
            if filters is None:
                y = self._convolved(f"conv.{names[place]}", convolution, spikes)
            else:
                y = nn.functional.conv2d(spikes.flatten(0, 1), filters[i], padding=1)
            spikes = neurons(f"conv.{names[place + 2]}", y, norm, pool=pool)
        names, (flatten, dropout, hidden, _, output, _) = zip(*self.fc.named_children(), strict=True)
        x = dropout(flatten(spikes))  # [T, N, features]
        for linear, name in ((hidden, names[3]), (output, names[5])):
            x = neurons(f"fc.{name}", linear(x).flatten(0, 1)[:, :, None, None]).flatten(2)
        return self.readout(x.sum(0, dtype=torch.float32))

    def _convolved(self, name: str, convolution: nn.Conv2d, spikes: Tensor) -> Tensor:
        """What a convolution makes of spikes [T, N, C, H, W]: [T N, O, H, W], by a kernel if it takes them."""
        if spikes.is_cpu and convolutions.are_fast():
            images = spikes.flatten(0, 1)
            with contextlib.suppress(spiking_kernels.Unfit):
                y = convolutions.convolution(images, convolution.weight)
                if any(name in counts for counts in self.spike_counts):  # for hooks, which are not called
                    self.add_spikes({name: images.detach().sum(0, dtype=torch.float32).long()})
                return y
        return convolution(spikes).flatten(0, 1)

    def _filters(self) -> tuple[Tensor, ...] | None:
        """The weights of :data:`CONVOLUTIONS` in the layout and the dtype in which a GPU reads them.

        Two kernels make those of all, and two their gradients; by itself, each convolution would have several.
        None where spikes are counted, whose hooks have to be called, or where weights have different shapes.
        """
        weights = [self.conv[place].weight for place in CONVOLUTIONS]
        if self.spike_counts or len({weight.shape for weight in weights}) > 1:
            return None
        dtype = proof.autocast_dtype(weights[0].device.type) or weights[0].dtype
        return _ChannelsLast.apply(dtype, *weights)

    def _check_kernels(self, current: Tensor) -> None:
        """Raises Unfit unless the kernels compute what the layers do, from rest, for this current."""
        proof.check_network(self, Cifar10Net)
        for name in ("conv", "fc"):
            own, like = getattr(self, name), getattr(_like(), name)
            if reason := proof.difference(own, like, name, FREE, self.counts_for):
                raise spiking_kernels.Unfit(reason)
        layers = [*self.conv, *self.fc]
        if len({*map(id, layers)}) < len(layers):
            raise spiking_kernels.Unfit("it has one layer in two places")
        tensors = [*self.conv.parameters(), *self.fc.parameters()]
        tensors += [buffer for buffer in self.conv.buffers() if buffer.is_floating_point()]
        blocks.check_tensors(current, tensors, self.T, proof.autocast_dtype(current.device.type))


@functools.cache
def _like() -> Cifar10Net:
    """The network's layers, of another size, without memory."""
    with torch.device("meta"):
        return Cifar10Net(width=8)
