"""The full test of a network in one pass over the test set: the numbers, to print and to record."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import Tensor

import measuring
from measuring import Connections, energy, neuron_results, paths
from spiking import SpikingNetwork


@dataclass(frozen=True)
class Report:
    """The results of a test. Layers go by their weight's name, those of neurons by their own."""

    epoch: int  # the number of epochs for which the network was trained
    evaluation: measuring.Evaluation  # the confusion matrix of all images
    connected: dict[str, Connections]  # of each layer
    structural: dict[str, Connections]  # those on a path, see measuring.paths; empty where the sizes fit no chain
    rates: dict[str, Tensor]  # of each neuron, in spikes per image and time step
    operations: dict[str, energy.Operations]  # of each layer, see measuring.energy; empty where they can't be counted
    position: int = 0  # the number of steps of the next epoch for which it was trained, too
    left_out: tuple[str, ...] = ()  # what is empty, and why, a line each

    def lines(self) -> list[str]:
        """The report for the console, up to 100 columns wide but for why something is left out."""
        blocks = (self._accuracy_lines(), self._structural_lines(), self._confusion_lines(), self._operation_lines())
        return [line for block in (*blocks, self.left_out) if block for line in ("", *block)][1:]

    def _accuracy_lines(self) -> list[str]:
        seen = self.evaluation
        low, high = measuring.wilson_interval(seen.right, seen.images)
        epochs = "1 epoch" if self.epoch == 1 else f"{self.epoch} epochs"
        lines = [
            f"test accuracy {percent(seen.accuracy)} after {epochs}{beyond(self.position)} "
            f"(95 % interval {percent(low)} to {percent(high)}, {seen.right} of {seen.images} images)"
        ]
        width = max(map(len, self.connected))
        for name, layer in _with_total(self.connected):
            lines.append(
                f"{name:{width}}  sparsity {percent(layer.sparsity):>8}  connectivity {percent(layer.connectivity):>8}"
                f"  {layer.connected} of {layer.weights} connections"
            )
        for name, layer in neuron_results(self.rates).items():
            lines.append(
                f"{name:{width}}  firing rate {layer['firing_rate']:.4f}  silent neurons {percent(layer['silent']):>8}"
                f"  {self.rates[name].numel()} neurons"
            )
        return lines

    def _structural_lines(self) -> list[str]:
        if not self.structural:
            return []
        rows = [["on a path from input to output", "connectivity", "connections", "of the connected"]]
        for (name, layer), (_, connected) in zip(
            _with_total(self.structural), _with_total(self.connected), strict=True
        ):
            share = _share(layer.connected, connected.connected)
            rows.append([name, percent(layer.connectivity), f"{layer.connected:,}", share])
        return _table(rows)

    def _confusion_lines(self) -> list[str]:
        matrix = self.evaluation.confusion.tolist()
        rows = [["true class / predicted", *map(str, range(len(matrix))), "right"]]
        for label, row in enumerate(matrix):
            cells = [str(n) if n or label == predicted else "." for predicted, n in enumerate(row)]
            rows.append([str(label), *cells, _share(row[label], sum(row))])
        return _table(rows)

    def _operation_lines(self) -> list[str]:
        if not self.operations:
            return []
        rows = [["operations per image", "kind", "all connected", "pruned", "of all"]]
        for name, layer in self.operations.items():
            share = _share(layer.pruned, layer.dense)
            per_image = [f"{n / layer.images:,.1f}" for n in (layer.dense, layer.pruned)]
            rows.append([name, f"{layer.kind}s", *per_image, share])
        total = energy.energy_per_image(self.operations.values())
        share = _share(total.pruned, total.dense)
        unit, picojoules = ("µJ", 1e6) if total.dense >= 1e6 else ("nJ", 1e3)
        rows.append(["energy per image", unit, *(f"{e / picojoules:,.3f}" for e in (total.dense, total.pruned)), share])
        return [
            *_table(rows),
            f"{energy.PICOJOULES_PER_MAC:.1f} pJ per MAC, {energy.PICOJOULES_PER_AC:.1f} pJ per SynOp: "
            "arithmetic alone, 32-bit float, 45 nm (Horowitz, ISSCC 2014)",
        ]

    def record(self, record: Callable[..., None]) -> None:
        """Records each number by ``record(key, number)``, and those of a layer with ``layer=name``."""
        seen = self.evaluation
        record("epoch", self.epoch)
        record("position", self.position)
        record("accuracy", seen.accuracy)
        record("accuracy_interval", list(measuring.wilson_interval(seen.right, seen.images)))
        record("right", seen.right)
        record("images", seen.images)
        record("confusion", seen.confusion.tolist())
        measuring.record_connections(record, self.connected)
        if self.structural:
            record("structural_connectivity", measuring.total(self.structural).connectivity)
        for name, layer in self.connected.items():
            record("layer_sparsity", layer.sparsity, layer=name)
        for name, structural in self.structural.items():
            record("structural", structural.connected, layer=name)
            record("structural_connectivity", structural.connectivity, layer=name)
        measuring.record_neurons(record, self.rates)
        for name, layer in self.operations.items():
            record("kind", layer.kind, layer=name)
            record("operations_pruned", layer.pruned / layer.images, layer=name)
            record("operations_dense", layer.dense / layer.images, layer=name)
        if self.operations:
            total = energy.energy_per_image(self.operations.values())
            record("energy_pruned", total.pruned)
            record("energy_dense", total.dense)


def report_on(
    network: SpikingNetwork, batches: Iterable[tuple[Tensor, Tensor]], epoch: int, position: int = 0
) -> Report:
    """Tests a network in eval mode, in one pass over all batches. The report names the epoch and the position in it.

    It leaves out the operations where they cannot be counted, see :class:`measuring.energy.OperationCounter`, and the
    connections on a path where the sizes of the layers do not fit a chain, see :func:`measuring.paths.structural`.
    """
    with energy.OperationCounter(network) as counter:
        evaluation = measuring.evaluate(network, batches)
    masks, left_out = measuring.masks(network), []
    try:
        structural = measuring.count(paths.structural(masks))
    except ValueError as error:
        structural = {}
        left_out.append(f"Connections on a path from input to output are left out: {error}.")
    try:
        operations = counter.operations()
    except ValueError as error:
        operations = {}
        left_out.append(f"Operations per image are left out: {error}.")
    counted, rates = measuring.count(masks), counter.rates()
    return Report(epoch, evaluation, counted, structural, rates, operations, position, tuple(left_out))


def beyond(position: int) -> str:
    """What follows a number of epochs in a text, for so many steps of the next one; empty for none."""
    return f" and {position} step{'' if position == 1 else 's'} of the next" if position else ""


def percent(fraction: float) -> str:
    return f"{100 * fraction:.2f} %"


def _with_total(layers: dict[str, Connections]) -> list[tuple[str, Connections]]:
    return [*layers.items(), ("total", measuring.total(layers))]


def _share(part: float, whole: float) -> str:
    return percent(part / whole) if whole else "-"


def _table(rows: list[list[str]]) -> list[str]:
    """Aligns the first column to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
