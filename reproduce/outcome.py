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
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from analysis.pictures import COLOURS, DASHES, MARKERS, PUBLISHED, STYLE
from analysis.runs import number
from reproduce import runner
from reproduce.grid import RECIPES, Row
from training import storage
from training.options import read

COLUMNS = [
    *("title", "variant", "epochs", "seed", "test_accuracy", "best_accuracy", "connectivity", "connected", "weights"),
    *("structural_connectivity", "synops", "macs", "energy_pj", "pruned_in_all", "regrown_in_all"),
    *("train_seconds", "device", "torch", "commit", "command"),
]


@dataclass(frozen=True)
class Entry:
    """A finished row with what it gave; numbers that are not known are NaN.

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
        """The row's options without those that all rows share and the seed."""
        given = self.options
        if given.mode == "no_prune":
            text = "dense"
        else:
            text = f"-s {given.sparsity:g} -penalty {given.penalty:g}"
            text += f" -temperature {given.temperature:g}" if given.temperature else ""
        return text if given.learning_rate == 1e-3 else f"{text} -lr {given.learning_rate:g}"

    def number(self, *keys: str) -> float:
        """A number of the record, NaN where it is absent."""
        return number(self.record, *keys)

    @property
    def connected(self) -> float:
        return sum(layer["connected"] for layer in self.record["result"].get("layers", {}).values()) or math.nan

    def operations(self, kind: str) -> float:
        """Operations per image of a kind, "SynOp" or "MAC", of all layers."""
        layers = ((self.record.get("test") or {}).get("operations") or {}).values()
        found = [layer["pruned"] for layer in layers if layer["kind"] == kind]
        return sum(found) if found else math.nan

    def sum(self, key: str) -> float:
        return sum(number(line, key) for line in self.epochs) if self.epochs else math.nan

    def cells(self) -> dict[str, Any]:
        """The row of the CSV."""
        weights = sum(layer["weights"] for layer in self.record["result"].get("layers", {}).values())
        return {
            "title": self.row.title,
            "variant": self.variant,
            "epochs": self.row.epochs,
            "seed": self.row.seed,
            "test_accuracy": self.number("result", "test_accuracy"),
            "best_accuracy": self.number("result", "best_accuracy"),
            "connectivity": self.number("result", "connectivity"),
            "connected": self.connected,
            "weights": weights or math.nan,
            "structural_connectivity": self.number("test", "structural_connectivity"),
            "synops": self.operations("SynOp"),
            "macs": self.operations("MAC"),
            "energy_pj": self.number("test", "energy", "pruned"),
            "pruned_in_all": self.sum("pruned"),
            "regrown_in_all": self.sum("regrown"),
            "train_seconds": self.sum("train_seconds"),
            "device": self.record["run"].get("device"),
            "torch": (self.record["run"].get("versions") or {}).get("torch"),
            "commit": self.record["run"].get("commit"),
            "command": self.row.command,
        }


def collect(dump: Path, rows: Sequence[Row]) -> list[Entry]:
    """The finished rows, in the grid's order."""
    entries = []
    for row in rows:
        record = runner.finished(dump, row)
        if record is not None:
            lines = [line for line in runner.state(dump, row).epochs if line["epoch"] <= row.epochs]
            entries.append(Entry(row, read(RECIPES[row.experiment], list(row.argv)), record, lines))
    return entries


@dataclass(frozen=True)
class Summary:
    """The rows that differ in their seed only; every number a list, one value per seed.

    ``loss`` is the dense mean at the same number of epochs and learning rate less the accuracy, as fractions.
    """

    title: str
    variant: str
    epochs: int
    entries: tuple[Entry, ...]
    accuracy: list[float]
    loss: list[float]
    connectivity: list[float]


def summarise(entries: Sequence[Entry]) -> list[Summary]:
    """The entries by title, variant and number of epochs, in the grid's order."""
    groups: dict[tuple, list[Entry]] = defaultdict(list)
    dense: dict[tuple, list[float]] = defaultdict(list)
    for entry in entries:
        groups[entry.row.title, entry.variant, entry.row.epochs].append(entry)
        if entry.options.mode == "no_prune":
            key = entry.row.epochs, entry.options.learning_rate
            dense[key].append(entry.number("result", "test_accuracy"))
    summaries = []
    for (title, variant, epochs), some in groups.items():
        baseline = dense.get((epochs, some[0].options.learning_rate))
        accuracy = [entry.number("result", "test_accuracy") for entry in some]
        loss = [statistics.mean(baseline) - value if baseline else math.nan for value in accuracy]
        connectivity = [entry.number("result", "connectivity") for entry in some]
        summaries.append(Summary(title, variant, epochs, tuple(some), accuracy, loss, connectivity))
    return summaries


def spread(values: Sequence[float], show: Callable[[float], str]) -> str:
    """Mean ± standard deviation (of the sample), the mean alone for one value, a dash for none that is known."""
    values = [value for value in values if not math.isnan(value)]
    if not values:
        return "-"
    mean = show(statistics.mean(values))
    return f"{mean} ± {show(statistics.stdev(values))}" if len(values) > 1 else mean


def table(summaries: Sequence[Summary]) -> str:
    """The Markdown table."""
    head = ["method", "options", "epochs", "seeds", "test accuracy (%)", "loss against dense (points)"]
    head += ["connectivity (%)", "connections left", "SynOps per image", "MACs per image"]
    lines = [head, ["---"] * len(head)]
    for summary in summaries:
        entries = summary.entries
        lines.append(
            [
                summary.title,
                f"`{summary.variant}`" if summary.variant.startswith("-") else summary.variant,
                str(summary.epochs),
                str(len(entries)),
                spread(summary.accuracy, _points),
                "0" if summary.variant.startswith("dense") else spread(summary.loss, _points),
                spread(summary.connectivity, _points),
                spread([entry.connected for entry in entries], _thousands),
                spread([entry.operations("SynOp") for entry in entries], _thousands),
                spread([entry.operations("MAC") for entry in entries], _thousands),
            ]
        )
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _points(fraction: float) -> str:
    return f"{100 * fraction:.2f}"


def _thousands(count: float) -> str:
    return f"{count:,.0f}".replace(",", " ")


def csv_text(entries: Sequence[Entry]) -> str:
    """Every finished row, a line each; what is not known is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for entry in entries:
        cells = entry.cells()
        writer.writerow({key: "" if value is None or value != value else value for key, value in cells.items()})
    return text.getvalue()


# -- figures -------------------------------------------------------------------------------------------


def _figure(panels: int) -> tuple[Figure, list[Any]]:
    figure = Figure(figsize=(5.2 * panels, 3.8), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(1, panels, squeeze=False)[0])


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    return buffer.getvalue()


def _log_connectivity(axis: Any) -> None:
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def plane(summaries: Sequence[Summary], of: str) -> bytes:
    """The accuracy-connectivity plane: means over seeds with their standard deviations, a line per method."""
    with matplotlib.rc_context(STYLE):
        figure, (axes,) = _figure(1)
        titles = list(dict.fromkeys((summary.title, summary.epochs) for summary in summaries))
        for i, (title, epochs) in enumerate(titles):
            some = [summary for summary in summaries if (summary.title, summary.epochs) == (title, epochs)]
            some.sort(key=lambda summary: statistics.mean(summary.connectivity))
            x, y = ([statistics.mean(getattr(s, key)) for s in some] for key in ("connectivity", "accuracy"))
            x_sd, y_sd = (
                [statistics.stdev(v) if len(v) > 1 else 0.0 for v in (getattr(s, key) for s in some)]
                for key in ("connectivity", "accuracy")
            )
            axes.errorbar(
                *(100 * np.array(values) for values in (x, y, y_sd, x_sd)),
                label=title if title.endswith("epochs") else f"{title}, {epochs} epochs",
                color=COLOURS[i % len(COLOURS)],
                marker=MARKERS[i % len(MARKERS)],
                linestyle=DASHES[i // len(COLOURS) % len(DASHES)],
                linewidth=1,
                capsize=2,
            )
        experiment = summaries[0].entries[0].row.experiment
        for published in PUBLISHED.get((experiment, summaries[0].entries[0].options.dataset), ()):
            x, y = zip(*published.points, strict=True)
            axes.plot(
                100 * np.array(x),
                100 * np.array(y),
                linestyle="none",
                marker=published.marker,
                color="black",
                markerfacecolor="none",
                markersize=10,
                label=f"published: {published.label}",
            )
        axes.set_xscale("log")
        _log_connectivity(axes.xaxis)
        axes.set_xlabel("connectivity (%), logarithmic")
        axes.set_ylabel("test accuracy (%)")
        axes.set_title(of)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper")
        figure.set_size_inches(8.6, 4.2)
        return _png(figure)


def curves(summaries: Sequence[Summary], of: str, keys: Sequence[tuple[str, str, float]], log: bool) -> bytes:
    """Numbers of the results over the epochs, a panel for each, a curve for each variant: the mean over its seeds.

    Args:
        summaries: what to draw.
        of: the figure's title.
        keys: of each panel, the results' key, the axis's label, and the factor to its unit.
        log: whether the y axes are logarithmic.
    """
    with matplotlib.rc_context(STYLE):
        figure, panels = _figure(len(keys))
        for axes, (key, label, factor) in zip(panels, keys, strict=True):
            for i, summary in enumerate(summaries):
                runs = [entry.epochs for entry in summary.entries if len(entry.epochs) == summary.epochs]
                if not runs:
                    continue
                values = np.array([[number(line, key) for line in run] for run in runs]).mean(axis=0)
                axes.plot(
                    range(1, summary.epochs + 1),
                    factor * values,
                    label=f"{summary.title}, {summary.variant}",
                    color=COLOURS[i % len(COLOURS)],
                    linestyle=DASHES[i // len(COLOURS) % len(DASHES)],
                )
            axes.set_xlabel("epoch")
            axes.set_ylabel(label)
            if log:
                axes.set_yscale("log")
                _log_connectivity(axes.yaxis)
        figure.suptitle(of, fontsize=9, x=0.01, ha="left")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right upper")
        figure.set_size_inches(5.2 * len(panels) + 2.4, 4.2)
        return _png(figure)


def write(dump: Path, rows: Sequence[Row], folder: Path) -> list[Path]:
    """Writes the outcome of the finished rows to a folder; returns its files.

    ``rows.csv`` has every row; ``table.md`` means and spreads; ``plane.png``, ``epochs.png`` and ``rewiring.png``
    show them; ``commands.md`` says how each was made.
    """
    entries = collect(dump, rows)
    summaries = summarise(entries)
    experiment = rows[0].experiment
    files: dict[str, bytes] = {"rows.csv": csv_text(entries).encode()}
    left = [row for row in rows if row not in [entry.row for entry in entries]]
    caption = f"{len(entries)} of {len(rows)} rows; mean ± standard deviation over the seeds.\n\n"
    files["table.md"] = (caption + table(summaries)).encode()
    if summaries:
        short = min(summary.epochs for summary in summaries)
        main = [summary for summary in summaries if summary.epochs == short]
        files["plane.png"] = plane(summaries, f"{experiment}: accuracy against connectivity")
        some = [summary for summary in main if summary.title in ("dense", "Grad R", "Deep R", "soft Deep R")]
        keys = [("test_accuracy", "test accuracy (%)", 100.0), ("connectivity", "connectivity (%)", 100.0)]
        files["epochs.png"] = curves(some, f"{experiment}: after each epoch, mean over the seeds", keys, log=False)
        keys = [("pruned", "connections pruned per epoch", 1.0), ("regrown", "connections regrown per epoch", 1.0)]
        pruning = [summary for summary in some if summary.title != "dense"]
        files["rewiring.png"] = curves(pruning, f"{experiment}: rewiring, mean over the seeds", keys, log=True)
    files["commands.md"] = _commands(entries, left).encode()
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        storage.write_text(folder / name, content.decode()) if name[-3:] != "png" else _write(folder / name, content)
    return [folder / name for name in files]


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def _commands(entries: Sequence[Entry], left: Sequence[Row]) -> str:
    machines = defaultdict(list)
    for entry in entries:
        run = entry.record["run"]
        versions = ", ".join(f"{name} {version}" for name, version in sorted((run.get("versions") or {}).items()))
        machines[f"{run.get('device')}; {versions}; commit {run.get('commit')}"].append(entry)
    text = "# How the rows were made\n"
    for machine, some in machines.items():
        hours = sum(entry.sum("train_seconds") for entry in some if entry.epochs) / 3600
        text += f"\n{machine}; {hours:.1f} h of training in all, rows that go on from a shorter one counted twice:\n\n"
        text += "".join(f"    {entry.row.command}\n" for entry in some)
    if left:
        text += "\nNot run yet:\n\n" + "".join(f"    {row.command}\n" for row in left)
    return text
