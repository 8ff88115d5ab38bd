"""The Markdown tables of an outcome: means over rows that differ only in their seed; methods at equal connectivity."""

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

FEWER = "†"  # marks an accuracy that a method has with fewer connections than its column allows
EQUAL = (0.5, 0.25, 0.1, 0.05, 0.03, 0.02, 0.015, 0.01)  # connectivities at which the methods are compared


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
    """The Markdown table of the methods' results in each way of counting; docs/comparability.md reads it.

    It has the pruned rows whose grid has dense ones of the same learning rate and epochs. A loss is in points below the
    mean of these. Operations are in percent of theirs: SynOps alone, and with the MACs of the first layer.
    """
    lines = []
    for summary in summaries:
        row = summary.row
        if row.ablation or not row.method.prunes or not summary.dense:
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
        cells = [title, f"`{row.variant}`", str(epochs), str(len(last))]
        lines.append(cells + [spread(values, _points) for values in columns.values()])
    return _markdown(["method", "options", "epochs", "seeds", *columns], lines) if lines else ""


def _markdown(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (head, ["---"] * len(head), *lines))


def front(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of points (connectivity, accuracy), those that are more accurate than all with as few connections or fewer."""
    best: list[tuple[float, float]] = []
    for connectivity, accuracy in sorted(points, key=lambda point: (point[0], -point[1])):
        if connectivity > 0 and (not best or accuracy > best[-1][1]):
            best.append((connectivity, accuracy))
    return best


def accuracy_at(points: Iterable[tuple[float, float]], connectivity: ArrayLike) -> np.ndarray:
    """The accuracy that a method has with at most ``connectivity``, from its points (connectivity, accuracy).

    Along their :func:`front`, linear in the logarithm of the connectivity; NaN below its first point, but for a
    thousandth, by which a run may miss the connectivity that it is given.
    """
    x, y = zip(*front(points) or [(1.0, math.nan)], strict=True)
    connectivity = np.asarray(connectivity)
    missed = (connectivity < x[0]) & (1.001 * connectivity >= x[0])
    return np.interp(np.log(np.where(missed, x[0], connectivity)), np.log(x), y, left=math.nan)


def equal_connectivity(summaries: Sequence[Summary]) -> str:
    """The Markdown tables of accuracies at equal connectivity: of each line, and how far Grad R is ahead of it.

    A line has the rows of a title and number of epochs, more than one pruned variant of it; of the seeds, those with
    all variants. The lead is over the lines of as many epochs, seed by seed.
    """
    lines: dict[tuple[str, int], list[Summary]] = defaultdict(list)
    for summary in summaries:
        if summary.row.method.prunes:
            lines[summary.line].append(summary)
    accuracies = {line: _by_seed(some) for line, some in lines.items() if len(some) > 1}
    reference, leads = METHODS["grad"].label, {}
    for (title, epochs), by_seed in accuracies.items():
        ahead = accuracies.get((reference, epochs), {})
        if title != reference and (both := by_seed.keys() & ahead.keys()):
            leads[title, epochs] = {seed: ahead[seed] - by_seed[seed] for seed in both}
    densest = {line: max(map(_densest, lines[line])) for line in accuracies}
    text = "Test accuracy (%) with at most so many of the connections; mean ± standard deviation over the seeds.\n"
    text += f"{FEWER}: no row of the method has nearly as many.\n\n"
    text += _at_each(accuracies, densest)
    if leads:
        densest = {line: min(densest[line], densest[reference, line[1]]) for line in leads}
        text += f"\nHow far {reference} is ahead (points), seed by seed.\n\n" + _at_each(leads, densest)
    return text


def _densest(summary: Summary) -> float:
    return max(summary.values("connectivity"))


def _by_seed(summaries: Sequence[Summary]) -> dict[int, np.ndarray]:
    """A method's accuracy at each connectivity of ``EQUAL``, of every seed that has all of its variants."""
    points: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for entry in (entry for summary in summaries for entry in summary.entries):
        points[entry.row.seed].append((entry.numbers["connectivity"], entry.numbers["test_accuracy"]))
    return {seed: accuracy_at(some, EQUAL) for seed, some in points.items() if len(some) == len(summaries)}


def _at_each(methods: dict[tuple[str, int], dict[int, np.ndarray]], densest: dict[tuple[str, int], float]) -> str:
    lines = []
    for (title, epochs), by_seed in methods.items():
        columns = np.array(list(by_seed.values())).reshape(-1, len(EQUAL)).T
        cells = [spread(column.tolist(), _points) for column in columns]
        for i, connectivity in enumerate(EQUAL):
            if connectivity > 1.1 * densest[title, epochs] and cells[i] != "-":
                cells[i] += f" {FEWER}"
        lines.append([title, str(epochs), str(len(by_seed)), *cells])
    return _markdown(["method", "epochs", "seeds", *(f"{100 * connectivity:g} %" for connectivity in EQUAL)], lines)
