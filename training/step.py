"""One training step: forward, loss, backward, optimizers. On a GPU it runs as a CUDA graph."""

import contextlib
import operator
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer

import measuring
from rewiring import RewiringOptimizer
from spiking import SpikingNetwork
from spiking_kernels import Unfit
from training.divergence import FiniteCheck
from training.errors import Refusal
from training.first_step import Saved, Taken, try_out
from training.ranks import Average, Ranks


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


class GraphSettings:
    """The settings of optimizers under a captured graph.

    Those that a schedule changes are numbers in the groups at all times but during a captured step: that one gets
    tensors on the device, so that the graph reads at each replay what :meth:`write` has put there.

    An optimizer that loads a state has other groups than before: they are looked up at each use.

    Args:
        changing: their names, in the groups of the optimizers that have them.
    """

    def __init__(self, optimizers: list[Optimizer], changing: Sequence[str], device: torch.device):
        self.optimizers, self.changing = optimizers, changing
        self._tensors: list[tuple[Optimizer, int, str, Tensor]] = []  # with the group's number
        for optimizer in optimizers:
            # torch's fused Adam reads a float32; in float64, a rewiring optimizer computes as with a number
            dtype = torch.float64 if isinstance(optimizer, RewiringOptimizer) else torch.float32
            for number, group in enumerate(optimizer.param_groups):
                for key in changing:
                    if key in group and not isinstance(group[key], Tensor):
                        self._tensors.append((optimizer, number, key, torch.zeros((), dtype=dtype, device=device)))
        self._written: list[Any] = [None] * len(self._tensors)
        self.keep()

    @property
    def groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    @property
    def lent(self) -> list[tuple[dict[str, Any], str, Tensor]]:
        """Groups as they are now, the settings that change, and their tensors."""
        return [(optimizer.param_groups[number], key, tensor) for optimizer, number, key, tensor in self._tensors]

    def write(self) -> None:
        """Takes the numbers in the groups to the device, where they have changed; waits for nothing."""
        for i, (group, key, tensor) in enumerate(self.lent):
            if group[key] != self._written[i]:
                self._written[i] = group[key]
                tensor.fill_(group[key])

    def keep(self) -> None:
        """Notes what a graph which has just been captured cannot follow: the other settings, and the groups' state."""
        self._fixed, self._groups = self._others(), self.groups

    def changed(self) -> bool:
        """Whether a setting has changed since, or a state was loaded."""
        groups = self.groups
        same = len(groups) == len(self._groups) and all(map(operator.is_, groups, self._groups))
        return not same or self._others() != self._fixed

    def _others(self) -> list[dict[str, Any]]:
        return [
            {
                key: id(value) if isinstance(value, Tensor) else value
                for key, value in group.items()
                if key != "params" and key not in self.changing
            }
            for group in self.groups
        ]

    @contextlib.contextmanager
    def on_device(self) -> Iterator[None]:
        """The groups have tensors instead of the numbers."""
        lent = self.lent
        numbers = [group[key] for group, key, _ in lent]
        for group, key, tensor in lent:
            group[key] = tensor
        try:
            yield
        finally:
            for (group, key, _), number in zip(lent, numbers, strict=True):
                group[key] = number


class TrainingStep:
    """Trains on one batch; returns the loss and the number of correct predictions, both on the device.

    With ``graph``, on a GPU, the first :attr:`WARMUP` steps run eagerly. Then the step is captured as a CUDA graph and
    replayed on copies of the batches, so the host no longer launches each kernel. Each replay draws new dropout masks
    and noise, because the graph advances the default generator. The optimizers must be capturable. A replay reads the
    settings that are ``changing``; when others change, the step is captured anew.

    The first eager step and the first replay are compared with a plain step, from the same state and with the same
    random numbers. If one fails or differs, a line says so, and all steps are plain from then on.

    The next step overwrites the returned tensors: copy them to keep them.

    Args:
        changing: names of settings in the optimizers' groups that a schedule changes.
        make: makes images and labels of what the step is called with; a graph has this in it.
        ranks: the processes of the run, each with its share of the batch: they average the gradients. Without a graph.

    Attributes:
        finite: finds the first loss, gradient or parameter that is not finite.

    Raises:
        Refusal: an optimizer needs the gradient several times in one step.
    """

    WARMUP = 3

    def __init__(
        self,
        network: SpikingNetwork,
        optimizers: list[Optimizer],
        precision: str,
        device: torch.device,
        graph: bool,
        changing: Sequence[str] = (),
        make: Callable[..., tuple[Tensor, Tensor]] = lambda images, labels: (images, labels),
        ranks: Ranks | None = None,
    ):
        for optimizer in optimizers:
            if isinstance(optimizer, LBFGS):
                name = type(optimizer).__name__
                raise Refusal(f"a method with {name} cannot train: a step has one gradient, {name} needs several")
        self.network, self.optimizers, self.precision, self.device = network, optimizers, precision, device
        self.make, self.parameters = make, list(network.parameters())
        self.finite = FiniteCheck(network, device)
        self.settings = GraphSettings(optimizers, changing, device)
        self.average = None if ranks is None else Average(ranks, self.parameters)
        self.use_graph = graph and device.type == "cuda" and ranks is None
        self.graph: torch.cuda.CUDAGraph | None = None
        self.stream: torch.cuda.Stream | None = None
        self.calls = 0  # until the next capture

    def __call__(self, *batch: Tensor) -> Taken:
        if not self.use_graph:
            return self._eager(*batch)
        self.settings.write()
        if self.graph is not None and self.settings.changed():
            # the eager step builds the kernels that new settings may need; a capture cannot build them
            self.graph, self.calls = None, self.WARMUP - 1
        if self.graph is not None:
            return self._replay(*batch)
        self.calls += 1
        if self.calls == 1:
            return self._tried_out(self._warm_up, *batch)
        if self.calls <= self.WARMUP:
            return self._warm_up(*batch)
        return self._tried_out(self._first_replay, *batch)

    def _eager(self, *batch: Tensor) -> Taken:
        images, labels = self.make(*batch)
        for parameter in self.parameters:
            parameter.grad = None
        loss, right = self._gradients(images, labels)
        if self.average is not None:
            loss, right = self.average(loss, right)
        for optimizer in self.optimizers:
            optimizer.step()
        rewiring = (optimizer for optimizer in self.optimizers if isinstance(optimizer, RewiringOptimizer))
        self.finite.update(loss, [parameter for optimizer in rewiring for parameter in optimizer.seen_finite()])
        return loss, right

    def _gradients(self, images: Tensor, labels: Tensor) -> Taken:
        """The loss and the number of correct predictions; the gradients are in the parameters."""
        with autocast(self.precision, self.device):
            found = None
            with contextlib.suppress(Unfit):
                found = self.network.fused_gradients(images, labels) if self.network.fused else None
            if found is not None:
                return found
            counts = self.network(images)
        loss = measuring.loss_function(counts, labels, self.network.T)
        loss.backward()
        return loss.detach(), measuring.correct(counts.detach(), labels)

    # -- on a GPU ------------------------------------------------------------------------------------

    def _tried_out(self, way: Callable[..., Taken], *batch: Tensor) -> Taken:
        """Takes a step in a way that is used for the first time; goes back to plain steps if it is no good."""
        counters = (self.finite.first, self.finite.steps)
        saved = Saved([*self.parameters, *self.network.buffers(), *counters], self.optimizers, self.device)
        plain, fast = (partial(take, *batch) for take in (self._plain, way))
        taken, flaw = try_out(plain, fast, saved, self.parameters)
        if flaw is not None:
            what = "compiled" if self.calls == 1 else "captured"
            print(f"The {what} step is not used ({flaw}): training as with --no-compile.", flush=True)
            self.use_graph, self.graph, self.network.fused = False, None, False
            for optimizer in self.optimizers:
                for group in optimizer.param_groups:
                    group.update({"fused": False} if group.get("fused") else {})
        return taken

    @contextlib.contextmanager
    def _aside(self) -> Iterator[None]:
        """On the stream of the capture: the allocator keeps the memory of each stream for that stream alone."""
        if self.stream is None:
            self.stream = torch.cuda.Stream(self.device)
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            yield
        current.wait_stream(self.stream)

    def _plain(self, *batch: Tensor) -> Taken:
        """A step whose optimizers are not compiled. (A network compares its kernels with its layers itself.)"""
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups if group.get("fused")]
        for group in groups:
            group["fused"] = False
        try:
            with self._aside():
                return self._eager(*batch)
        finally:
            for group in groups:
                group["fused"] = True

    def _warm_up(self, *batch: Tensor) -> Taken:
        """An eager step before a capture: builds the kernels and the optimizers' state."""
        with self._aside(), self.settings.on_device():
            return self._eager(*batch)

    def _first_replay(self, *batch: Tensor) -> Taken:
        self._capture(*batch)
        return self._replay(*batch)

    def _capture(self, *batch: Tensor) -> None:
        for parameter in self.parameters:  # the graph has memory of its own for the gradients
            parameter.grad = None
        self.batch = [tensor.clone() for tensor in batch]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream), self.settings.on_device():
            self.outputs = self._eager(*self.batch)
        self.graph = graph
        self.settings.keep()

    def _replay(self, *batch: Tensor) -> Taken:
        for place, tensor in zip(self.batch, batch, strict=True):
            place.copy_(tensor)
        self.graph.replay()
        return self.outputs
