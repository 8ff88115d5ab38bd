"""The Markdown tables of an outcome: means over rows that differ only in their seed, and methods at equal cost."""

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from reproduce.entries import Entry
from reproduce.grid import Row
from training.methods import METHODS

FEWER = "†"  # marks an accuracy that a method has at less cost than its column allows
EQUAL = (0.5, 0.25, 0.1, 0.05, 0.03, 0.02, 0.015, 0.01)  # shares at which the methods are compared
COSTS = {  # what these are shares of
    "connectivity": "connections",
    "synapses": "synapses (a weight of a convolution counts at each position of its output)",
    "synops": "SynOps of the dense network, of Grad R's learning rate",
}


@dataclass(frozen=True)
class Summary:
    """The rows that differ in their seed only."""

    entries: tuple[Entry, ...]  # in the grid's order
    dense: tuple[Entry, ...]  # the dense rows of the same learning rate and epochs

    @property
    def row(self) -> Row:
        """The first of them, for what they share."""
        return self.entries[0].row

    @property
    def line(self) -> tuple[str, int]:
        """Title and number of epochs: a line of the plane, a row of the tables at equal connectivity."""
        return self.row.title, self.row.epochs

    def values(self, key: str) -> list[float]:
        """A number of each row: one of :attr:`Entry.numbers`, or ``loss``, the dense accuracy less the row's."""
        if key == "loss":
            return [self.dense_mean("test_accuracy") - accuracy for accuracy in self.values("test_accuracy")]
        return [entry.numbers[key] for entry in self.entries]

    def mean(self, key: str) -> float:
        return statistics.mean(self.values(key))

    def dense_mean(self, key: str) -> float:
        """The mean of the dense rows; NaN without any."""
        return statistics.mean(entry.numbers[key] for entry in self.dense) if self.dense else math.nan

    def deviation(self, key: str) -> float:
        """Standard deviation of the sample, 0 for one row."""
        return statistics.stdev(self.values(key)) if len(self.entries) > 1 else 0.0


def summarise(entries: Sequence[Entry]) -> list[Summary]:
    """The entries by title, setting and number of epochs, in the grid's order, ablations last."""
    groups: dict[tuple, list[Entry]] = defaultdict(list)
    dense: dict[tuple, list[Entry]] = defaultdict(list)
    for entry in entries:
        row = entry.row
        setting = row.name.replace(f"-seed-{row.seed}", "")
        groups[row.epochs, row.ablation, row.title, setting].append(entry)
        if not row.method.prunes:
            dense[row.epochs, row.options.learning_rate].append(entry)
    summaries = []
    for some in groups.values():
        row = some[0].row
        summaries.append(Summary(tuple(some), tuple(dense[row.epochs, row.options.learning_rate])))
    return sorted(summaries, key=lambda summary: summary.row.ablation)


def spread(values: Sequence[float], show: Callable[[float], str]) -> str:
    """Mean ± standard deviation (of the sample), the mean alone for one value, a dash if one is not known."""
    if not values or any(map(math.isnan, values)):
        return "-"
    mean = show(statistics.mean(values))
    return f"{mean} ± {show(statistics.stdev(values))}" if len(values) > 1 else mean


def _points(fraction: float) -> str:
    return f"{100 * fraction:z.2f}"  # z: no -0.00


def _thousands(count: float) -> str:
    return f"{count:,.0f}".replace(",", " ")


TABLE = {  # the column's head, to the number and how it is written
    "test accuracy (%)": ("test_accuracy", _points),
    "loss against dense (points)": ("loss", _points),
    "connectivity (%)": ("connectivity", _points),
    "connections left": ("connected", _thousands),
    "SynOps per image": ("synops", _thousands),
    "MACs per image": ("macs", _thousands),
    "regrown in all": ("regrown_in_all", _thousands),
}


def table(summaries: Sequence[Summary]) -> str:
    """The Markdown table."""
    lines = []
    for summary in summaries:
        title, epochs = summary.line
        cells = [title, f"`{summary.row.variant}`", str(epochs), str(len(summary.entries))]
        cells += [spread(summary.values(key), show) for key, show in TABLE.values()]
        lines.append(cells)
    return _markdown(["method", "options", "epochs", "seeds", *TABLE], lines)


def countings(summaries: Sequence[Summary]) -> str:
    """The Markdown table of all results in each way of counting; docs/comparability.md shows parts of it.

    It has the rows whose grid has dense ones of the same learning rate and epochs; it is empty if none of them is
    pruned. A loss is in points below the mean of the dense ones. Operations are in percent of theirs: SynOps alone, and
    with the MACs of the first layer.
    """
    if not any(summary.row.method.prunes and summary.dense for summary in summaries):
        return ""
    lines = []
    for summary in summaries:
        if not summary.dense:
            continue
        last, best, synops, macs = map(summary.values, ("test_accuracy", "best_accuracy", "synops", "macs"))
        dense_last, dense_best = map(summary.dense_mean, ("test_accuracy", "best_accuracy"))
        dense_synops, dense_macs = map(summary.dense_mean, ("synops", "macs"))
        columns = {
            "last epoch (%)": last,
            "best epoch (%)": best,
            "loss, last against last": [dense_last - accuracy for accuracy in last],
            "last against best": [dense_best - accuracy for accuracy in last],
            "best against last": [dense_last - accuracy for accuracy in best],
            "best against best": [dense_best - accuracy for accuracy in best],
            "connectivity (%)": summary.values("connectivity"),
            "on a path (%)": summary.values("structural_connectivity"),
            "SynOps (% of dense)": [n / dense_synops for n in synops],
            "with the first layer": [
                (n + first) / (dense_synops + dense_macs) for n, first in zip(synops, macs, strict=True)
            ],
        }
        title, epochs = summary.line
        cells = [title, f"`{summary.row.variant}`", str(epochs), str(len(last))]
        lines.append(cells + [spread(values, _points) for values in columns.values()])
    return _markdown(["method", "options", "epochs", "seeds", *columns], lines)


def layers(summaries: Sequence[Summary]) -> str:
    """The Markdown tables of where the connections are, and of how often the neurons fire; empty if no row tells."""
    text = ""
    whole = {"synapses": lambda entry: entry.synapses}
    connectivity = _of_layers(
        summaries, "layers", lambda layer: layer["connected"] / (layer["weights"] or math.nan), whole
    )
    rates = _of_layers(summaries, "neurons", lambda neurons: neurons["firing_rate"], {})
    if connectivity:
        text += f"Connectivity (%) of each layer, and of the network by its {COSTS['synapses']}.\n\n{connectivity}"
    if rates:
        text += f"\nHow often the neurons behind each layer fire: spikes (%) of all time steps.\n\n{rates}"
    return text


def _of_layers(
    summaries: Sequence[Summary],
    which: str,
    share: Callable[[dict[str, float]], float],
    whole: dict[str, Callable[[Entry], float]],
) -> str:
    """A column for each layer, or its neurons, that the entries know, and for what is told of the whole network."""
    names = list(dict.fromkeys(name for summary in summaries for e in summary.entries for name in getattr(e, which)))
    lines = []
    for summary in summaries:
        if known := [entry for entry in summary.entries if getattr(entry, which)]:
            columns = [
                [share(layer) if (layer := getattr(entry, which).get(name)) else math.nan for entry in known]
                for name in names
            ]
            columns += [[of(entry) for entry in known] for of in whole.values()]
            title, epochs = summary.line
            cells = [title, f"`{summary.row.variant}`", str(epochs), str(len(known))]
            lines.append(cells + [spread(values, _points) for values in columns])
    return _markdown(["method", "options", "epochs", "seeds", *names, *whole], lines) if lines else ""


def _markdown(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (head, ["---"] * len(head), *lines))


def front(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of points (cost, accuracy), those that are more accurate than all that cost as little or less."""
    best: list[tuple[float, float]] = []
    for cost, accuracy in sorted(points, key=lambda point: (point[0], -point[1])):
        if cost > 0 and (not best or accuracy > best[-1][1]):
            best.append((cost, accuracy))
    return best


def accuracy_at(points: Iterable[tuple[float, float]], cost: ArrayLike) -> np.ndarray:
    """The accuracy that a method has at most for a ``cost``, such as a connectivity, from its points (cost, accuracy).

    Along their :func:`front`, linear in the logarithm of the cost; NaN below its first point, but for a thousandth, by
    which a run may miss the connectivity that it is given.
    """
    x, y = zip(*front(points) or [(1.0, math.nan)], strict=True)
    cost = np.asarray(cost)
    missed = (cost < x[0]) & (1.001 * cost >= x[0])
    return np.interp(np.log(np.where(missed, x[0], cost)), np.log(x), y, left=math.nan)


def equal(summaries: Sequence[Summary], cost: str) -> str:
    """The Markdown tables of accuracies at an equal cost, one of ``COSTS``: of each line, and Grad R's lead over it.

    A line has the rows of a title and number of epochs, more than one pruned variant of it; of the seeds, those with
    all variants. The lead is over the lines of as many epochs, seed by seed. Empty if no line has a seed. SynOps are
    shares of one dense network's for all lines of as many epochs, that of Grad R's learning rate.
    """
    reference = METHODS["grad"].label
    dense = {one.row.epochs: one.dense_mean("synops") for one in reversed(summaries) if one.row.title == reference}

    def shares(summary: Summary) -> list[float]:
        """What each row costs; NaN where it is not known."""
        if cost == "synapses":
            return [entry.synapses for entry in summary.entries]
        whole = 1.0 if cost == "connectivity" else dense.get(summary.row.epochs, summary.dense_mean(cost))
        return [value / whole for value in summary.values(cost)]

    lines: dict[tuple[str, int], list[Summary]] = defaultdict(list)
    for summary in summaries:
        if summary.row.method.prunes:
            lines[summary.line].append(summary)
    accuracies = {line: _by_seed(some, shares) for line, some in lines.items() if len(some) > 1}
    accuracies = {line: by_seed for line, by_seed in accuracies.items() if by_seed}
    if not accuracies:
        return ""
    leads = {}
    for (title, epochs), by_seed in accuracies.items():
        ahead = accuracies.get((reference, epochs), {})
        if title != reference and (both := by_seed.keys() & ahead.keys()):
            leads[title, epochs] = {seed: ahead[seed] - by_seed[seed] for seed in both}
    densest = {line: np.nanmax([share for one in lines[line] for share in shares(one)]) for line in accuracies}
    text = f"Test accuracy (%) with at most this share of the {COSTS[cost]}.\n"
    text += "Mean ± standard deviation over the seeds that have all rows of the method.\n"
    text += f"{FEWER}: the method's densest row has less; its accuracy stands here. -: its sparsest row has more.\n\n"
    text += _at_each(accuracies, densest)
    if leads:
        densest = {line: min(densest[line], densest[reference, line[1]]) for line in leads}
        text += f"\nHow far {reference} is ahead (points), seed by seed.\n\n" + _at_each(leads, densest)
    return text


def _by_seed(summaries: Sequence[Summary], shares: Callable[[Summary], list[float]]) -> dict[int, np.ndarray]:
    """A method's accuracy at each share of ``EQUAL``, of every seed that has all of its variants."""
    points: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for summary in summaries:
        for entry, share in zip(summary.entries, shares(summary), strict=True):
            if not math.isnan(share):
                points[entry.row.seed].append((share, entry.numbers["test_accuracy"]))
    return {seed: accuracy_at(some, EQUAL) for seed, some in points.items() if len(some) == len(summaries)}


def _at_each(methods: dict[tuple[str, int], dict[int, np.ndarray]], densest: dict[tuple[str, int], float]) -> str:
    lines = []
    for (title, epochs), by_seed in methods.items():
        columns = np.array(list(by_seed.values())).reshape(-1, len(EQUAL)).T
        cells = [spread(column.tolist(), _points) for column in columns]
        for i, share in enumerate(EQUAL):
            if share > 1.1 * densest[title, epochs] and cells[i] != "-":
                cells[i] += f" {FEWER}"
        if set(cells) != {"-"}:
            lines.append([title, str(epochs), str(len(by_seed)), *cells])
    return _markdown(["method", "epochs", "seeds", *(f"{100 * share:g} %" for share in EQUAL)], lines)
