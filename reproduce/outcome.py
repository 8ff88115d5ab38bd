"""What the finished rows of a grid give together: tables (CSV, Markdown), figures (PNG), and how they were made."""

import csv
import io
import math
import statistics
from argparse import Namespace
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from analysis.pictures import COLOURS, DASHES, MARKERS, PUBLISHED, STYLE
from analysis.runs import number
from reproduce import runner
from reproduce.grid import RECIPES, Row
from training import storage
from training.options import format_number, read

NEAR = 4  # points of accuracy: what the plane's second panel shows


@dataclass(frozen=True)
class Entry:
    """A finished row with what it gave.

    Attributes:
        row: of the grid.
        options: of the row's command line.
        record: written by the runner.
        epochs: the lines of the run's results, up to the row's last epoch; empty where they are gone.
    """

    row: Row
    options: Namespace
    record: dict[str, Any]
    epochs: list[dict[str, Any]]

    @property
    def variant(self) -> str:
        """What tells the row from others of its title, but for the seed and the number of epochs."""
        given, texts = self.options, []
        if given.mode != "no_prune":
            texts += ["--connectivity", format_number(given.connectivity)] if given.connectivity is not None else []
            texts += ["-s", f"{given.sparsity:g}"]
            texts += ["-penalty", format_number(given.penalty)] if given.penalty is not None else []
            texts += ["-temperature", format_number(given.temperature)] if given.temperature else []
        return " ".join([*texts, "-lr", format_number(given.learning_rate)])

    def numbers(self) -> dict[str, float]:
        """What the row gave; NaN where it is not known."""
        layers = (self.record["result"].get("layers") or {}).values()
        operations = ((self.record.get("test") or {}).get("operations") or {}).values()

        def of_layers(key: str) -> float:
            return sum(layer[key] for layer in layers) if layers else math.nan

        def of_operations(kind: str) -> float:
            found = [layer["pruned"] for layer in operations if layer["kind"] == kind]
            return sum(found) if found else math.nan

        def of_epochs(key: str) -> float:
            return sum(number(line, key) for line in self.epochs) if self.epochs else math.nan

        return {
            "test_accuracy": number(self.record, "result", "test_accuracy"),
            "best_accuracy": number(self.record, "result", "best_accuracy"),
            "connectivity": number(self.record, "result", "connectivity"),
            "connected": of_layers("connected"),
            "weights": of_layers("weights"),
            "structural_connectivity": number(self.record, "test", "structural_connectivity"),
            "synops": of_operations("SynOp"),
            "macs": of_operations("MAC"),
            "energy_pj": number(self.record, "test", "energy", "pruned"),
            "pruned_in_all": of_epochs("pruned"),
            "regrown_in_all": of_epochs("regrown"),
            "train_seconds": of_epochs("train_seconds"),
        }


@dataclass(frozen=True)
class Summary:
    """The rows that differ in their seed only.

    Attributes:
        title, variant, epochs: that they share.
        ablation: whether their group is one.
        entries: the rows, in the grid's order.
        dense: mean test accuracy of the dense rows of the same learning rate and epochs; NaN without any.
    """

    title: str
    variant: str
    epochs: int
    ablation: bool
    entries: tuple[Entry, ...]
    dense: float

    def values(self, key: str) -> list[float]:
        """A number of each row: one of :meth:`Entry.numbers`, or ``loss``, the dense accuracy less the row's."""
        if key == "loss":
            return [self.dense - accuracy for accuracy in self.values("test_accuracy")]
        return [entry.numbers()[key] for entry in self.entries]

    def mean(self, key: str) -> float:
        return statistics.mean(self.values(key))

    def deviation(self, key: str) -> float:
        """Standard deviation of the sample, 0 for one row."""
        return statistics.stdev(self.values(key)) if len(self.entries) > 1 else 0.0


def collect(dump: Path, rows: Sequence[Row]) -> list[Entry]:
    """The finished rows, in the grid's order."""
    entries = []
    for row in rows:
        record = runner.finished(dump, row)
        if record is not None:
            lines = [line for line in runner.state(dump, row).epochs if line["epoch"] <= row.epochs]
            entries.append(Entry(row, read(RECIPES[row.experiment], list(row.argv)), record, lines))
    return entries


def summarise(entries: Sequence[Entry]) -> list[Summary]:
    """The entries by title, variant and number of epochs, in the grid's order, ablations last."""
    groups: dict[tuple, list[Entry]] = defaultdict(list)
    dense: dict[tuple, list[float]] = defaultdict(list)
    for entry in entries:
        groups[entry.row.epochs, entry.row.ablation, entry.row.title, entry.variant].append(entry)
        if entry.options.mode == "no_prune":
            key = entry.row.epochs, entry.options.learning_rate
            dense[key].append(entry.numbers()["test_accuracy"])
    summaries = []
    for (epochs, ablation, title, variant), some in groups.items():
        baseline = dense.get((epochs, some[0].options.learning_rate))
        mean = statistics.mean(baseline) if baseline else math.nan
        summaries.append(Summary(title, variant, epochs, ablation, tuple(some), mean))
    return sorted(summaries, key=lambda summary: summary.ablation)  # in the grid's order otherwise


# -- tables --------------------------------------------------------------------------------------------


def spread(values: Sequence[float], show: Callable[[float], str]) -> str:
    """Mean ± standard deviation (of the sample), the mean alone for one value, a dash for none that is known."""
    values = [value for value in values if not math.isnan(value)]
    if not values:
        return "-"
    mean = show(statistics.mean(values))
    return f"{mean} ± {show(statistics.stdev(values))}" if len(values) > 1 else mean


def _points(fraction: float) -> str:
    return f"{100 * fraction:.2f}"


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
    head = ["method", "options", "epochs", "seeds", *TABLE]
    lines = [head, ["---"] * len(head)]
    for summary in summaries:
        cells = [summary.title, f"`{summary.variant}`", str(summary.epochs), str(len(summary.entries))]
        cells += [spread(summary.values(key), show) for key, show in TABLE.values()]
        lines.append(cells)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def csv_text(entries: Sequence[Entry]) -> str:
    """Every finished row, a line each; what is not known is empty."""
    lines = []
    for entry in entries:
        row, run = entry.row, entry.record["run"]
        about = {"title": row.title, "variant": entry.variant, "epochs": row.epochs, "seed": row.seed}
        made = {"cpu": run.get("cpu"), "device": run.get("device"), "torch": (run.get("versions") or {}).get("torch")}
        made |= {"git_commit": run.get("git_commit"), "command": row.command}
        known = {key: value for key, value in entry.numbers().items() if not math.isnan(value)}
        lines.append({**about, **dict.fromkeys(entry.numbers()), **known, **made})
    text = io.StringIO()
    writer = csv.DictWriter(text, list(lines[0]) if lines else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


# -- figures -------------------------------------------------------------------------------------------


def _figure(rows: int, columns: int, **settings: Any) -> tuple[Figure, list[list[Axes]]]:
    figure = Figure(figsize=(3.6 * columns + 3, 2.6 * rows + 0.9), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False, **settings).tolist()


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    return buffer.getvalue()


def _plain(axis: Axis) -> None:
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def plane(summaries: Sequence[Summary], heading: str) -> bytes:
    """The accuracy-connectivity plane, whole and near the best accuracy.

    Means over seeds with their standard deviations, a line per title and number of epochs.
    """
    with matplotlib.rc_context(STYLE):
        figure, (panels,) = _figure(1, 2)
        for axes in panels:
            _draw_plane(axes, summaries)
        best = 100 * max(summary.mean("test_accuracy") for summary in summaries)
        panels[1].set_ylim(best - NEAR, best + NEAR / 4)
        panels[1].set_title(f"within {NEAR} points of the best")
        panels[0].set_ylabel("test accuracy (%)")
        figure.suptitle(heading, fontsize=9, x=0.01, ha="left")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper")
        figure.set_size_inches(12, 4.6)
        return _png(figure)


def _draw_plane(axes: Axes, summaries: Sequence[Summary]) -> None:
    lines: dict[tuple[str, int], list[Summary]] = defaultdict(list)
    for summary in summaries:
        lines[summary.title, summary.epochs].append(summary)
    for i, ((title, epochs), some) in enumerate(lines.items()):
        some.sort(key=lambda summary: summary.mean("connectivity"))
        axes.errorbar(
            [100 * summary.mean("connectivity") for summary in some],
            [100 * summary.mean("test_accuracy") for summary in some],
            yerr=[100 * summary.deviation("test_accuracy") for summary in some],
            xerr=[100 * summary.deviation("connectivity") for summary in some],
            label=f"{title}, {epochs} epochs",
            color=COLOURS[i % len(COLOURS)],
            marker=MARKERS[i % len(MARKERS)],
            linestyle=DASHES[i // len(COLOURS) % len(DASHES)],
            linewidth=1,
            capsize=2,
        )
    entry = summaries[0].entries[0]
    for published in PUBLISHED.get((entry.row.experiment, entry.options.dataset), ()):
        x, y = 100 * np.array(published.points).T
        look = {"marker": published.marker, "color": "black", "markerfacecolor": "none", "markersize": 10}
        axes.plot(x, y, linestyle="none", label=f"published: {published.label}", **look)
    axes.set_xscale("log")
    _plain(axes.xaxis)
    axes.set_xlabel("connectivity (%), logarithmic")


def curves(summaries: Sequence[Summary], heading: str, keys: dict[str, tuple[str, float]], log: bool) -> bytes:
    """Numbers of the results over the epochs: a row of panels for each method, a curve for each of its variants.

    A curve is the mean over the seeds; that of the dense network, if among ``summaries``, is grey in every row.

    Args:
        summaries: what to draw, of one number of epochs.
        heading: of the figure.
        keys: the results' keys, a column each, with the axis's label and the factor to its unit.
        log: whether the y axes are logarithmic.
    """
    dense = [summary for summary in summaries if summary.title == "dense"]
    titles = list(dict.fromkeys(summary.title for summary in summaries if summary not in dense)) or ["dense"]
    with matplotlib.rc_context(STYLE):
        figure, panels = _figure(len(titles), len(keys), sharex=True, sharey="col")
        for title, panel_row in zip(titles, panels, strict=True):
            some = [summary for summary in summaries if summary.title == title and summary not in dense]
            for axes, (key, (label, factor)) in zip(panel_row, keys.items(), strict=True):
                for i, summary in enumerate([*some, *dense]):
                    runs = [entry.epochs for entry in summary.entries if len(entry.epochs) == summary.epochs]
                    if not runs:
                        continue
                    values = np.array([[number(line, key) for line in run] for run in runs]).mean(axis=0)
                    grey = {"color": "#808080", "label": "dense", "linestyle": ":"}
                    own = {"color": COLOURS[i % len(COLOURS)], "label": summary.variant}
                    look = grey if summary in dense else own
                    axes.plot(range(1, summary.epochs + 1), factor * values, **look)
                axes.set_ylabel(label)
                if log:
                    axes.set_yscale("log")
                    _plain(axes.yaxis)
            panel_row[0].set_title(title)
            panel_row[-1].legend(loc="center left", bbox_to_anchor=(1.02, 0.5))
        for axes in panels[-1]:
            axes.set_xlabel("epoch")
        figure.suptitle(heading, fontsize=9, x=0.01, ha="left")
        return _png(figure)


# -- all of it -----------------------------------------------------------------------------------------


def write(dump: Path, rows: Sequence[Row], folder: Path) -> list[Path]:
    """Writes the outcome of the finished rows to a folder; returns its files.

    ``rows.csv`` has every row; ``table.md`` means and spreads; ``plane.png`` and ``ablations.png`` show them,
    ``epochs.png`` and ``rewiring.png`` how they came about; ``commands.md`` says how each was made. There is no picture
    of nothing.
    """
    entries = collect(dump, rows)
    summaries = summarise(entries)
    done = {entry.row for entry in entries}
    caption = f"{len(entries)} of {len(rows)} rows; mean ± standard deviation over the seeds.\n\n"
    files: dict[str, str | bytes] = {
        "rows.csv": csv_text(entries),
        "table.md": caption + table(summaries),
        "commands.md": _commands(entries, [row for row in rows if row not in done]),
    }
    name = rows[0].experiment
    main = [summary for summary in summaries if not summary.ablation]
    if main:
        files["plane.png"] = plane(main, f"{name}: accuracy against connectivity")
        short = [summary for summary in main if summary.epochs == rows[0].epochs]
        keys = {"test_accuracy": ("test accuracy (%)", 100.0), "connectivity": ("connectivity (%)", 100.0)}
        files["epochs.png"] = curves(short, f"{name}: after each epoch, mean over the seeds", keys, log=False)
        keys = {"pruned": ("pruned per epoch", 1.0), "regrown": ("regrown per epoch", 1.0)}
        pruning = [summary for summary in short if summary.title != "dense"]
        if pruning:
            heading = f"{name}: connections pruned and regrown in each epoch, mean over the seeds"
            files["rewiring.png"] = curves(pruning, heading, keys, log=True)
        if any(summary.ablation for summary in summaries):
            some = [s for s in summaries if s.ablation or (s in short and s.title in ("dense", "Grad R", "Deep R"))]
            files["ablations.png"] = plane(some, f"{name}: ablations of Grad R and Deep R")
    for file, content in files.items():
        storage.write_whole(folder / file, content)
    return [folder / file for file in files]


def _commands(entries: Sequence[Entry], left: Sequence[Row]) -> str:
    machines = defaultdict(list)
    for entry in entries:
        run = entry.record["run"]
        versions = ", ".join(f"{name} {version}" for name, version in sorted((run.get("versions") or {}).items()))
        machine = f"{run.get('cpu')}; {run.get('device')}; {versions}; commit {run.get('git_commit')}"
        machines[machine].append(entry)
    text = "# How the rows were made\n"
    for machine, some in machines.items():
        hours = sum(entry.numbers()["train_seconds"] for entry in some if entry.epochs) / 3600
        text += f"\n{machine}; {hours:.1f} h of training in all, rows that go on from a shorter one counted twice:\n\n"
        text += "".join(f"    {entry.row.command}\n" for entry in some)
    if left:
        text += "\nNot run yet:\n\n" + "".join(f"    {row.command}\n" for row in left)
    return text
