"""One training step: forward, loss, backward, optimizers. On a GPU it runs as a CUDA graph."""

import contextlib

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer

import measuring
from spiking import SpikingNetwork
from training.divergence import FiniteCheck
from training.errors import Refusal


def set_precision(precision: str, device: torch.device) -> None:
    """Turns TensorFloat-32 on a GPU off for fp32 and on otherwise; for bf16, use :func:`autocast` as well."""
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = precision != "fp32"
        torch.backends.cudnn.allow_tf32 = precision != "fp32"


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager:
    """The context of a forward pass: with bf16, products use bfloat16; all state stays float32."""
    if precision == "bf16":
        return torch.autocast(device.type, torch.bfloat16)
    return contextlib.nullcontext()


class TrainingStep:
    """Trains on one batch; returns the loss and the number of correct predictions, both on the device.

    With ``graph``, on a GPU, the first :attr:`WARMUP` steps run eagerly. Then the step is captured as a CUDA graph and
    replayed on copies of the batches, so the host no longer launches each kernel. Each replay draws new dropout masks
    and noise, because the graph advances the default generator. The optimizers must be capturable. New settings of an
    optimizer take effect only after :meth:`drop_graph`.

    The next step overwrites the returned tensors: copy them to keep them.

    Attributes:
        finite: finds the first loss, gradient or parameter that is not finite.

    Raises:
        Refusal: an optimizer needs the gradient several times in one step.
    """

    WARMUP = 3

    def __init__(
        self, network: SpikingNetwork, optimizers: list[Optimizer], precision: str, device: torch.device, graph: bool
    ):
        for optimizer in optimizers:
            if isinstance(optimizer, LBFGS):
                name = type(optimizer).__name__
                raise Refusal(f"a method with {name} cannot train: a step has one gradient, {name} needs several")
        self.network, self.optimizers, self.precision, self.device = network, optimizers, precision, device
        self.parameters = list(network.parameters())
        self.finite = FiniteCheck(network, device)
        self.use_graph = graph and device.type == "cuda"
        self.graph: torch.cuda.CUDAGraph | None = None
        self.calls = 0

    def drop_graph(self) -> None:
        """Drops the captured graph; the next step runs eagerly, then the graph is captured again."""
        self.graph = None
        # the eager step builds the kernels that new settings may need; a capture cannot build them
        self.calls = min(self.calls, self.WARMUP - 1)

    def _eager(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        for parameter in self.parameters:
            parameter.grad = None
        with autocast(self.precision, self.device):
            counts = self.network(images)
        loss = measuring.loss_function(counts, labels, self.network.T)
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
        self.finite.update(loss)
        return loss.detach(), measuring.correct(counts.detach(), labels)

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        if not self.use_graph:
            return self._eager(images, labels)
        if self.graph is None:
            if self.calls < self.WARMUP:
                self.calls += 1
                return self._warm_up(images, labels)
            self._capture(images, labels)
        self.images.copy_(images)
        self.labels.copy_(labels)
        self.graph.replay()
        return self.outputs

    def _warm_up(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """An eager step before a capture, on a side stream: builds the kernels and the optimizers' state."""
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            outputs = self._eager(images, labels)
        torch.cuda.current_stream(self.device).wait_stream(stream)
        return outputs

    def _capture(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images.clone(), labels.clone()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.outputs = self._eager(self.images, self.labels)
        self.graph = graph
