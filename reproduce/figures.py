"""The figures of an outcome, as PNG: the accuracy-connectivity plane, and numbers over the epochs."""

import io
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from analysis.pictures.drawing import COLOURS, DASHES, MARKERS, STYLE
from analysis.pictures.published import PUBLISHED
from reproduce.tables import Summary
from training.methods import DEFAULT, METHODS

NEAR = 4  # points of accuracy: what the plane's second panel shows


def _figure(rows: int, columns: int, **settings: Any) -> tuple[Figure, list[list[Axes]]]:
    figure = Figure(figsize=(3.6 * columns + 3, 2.6 * rows + 0.9), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False, **settings).tolist()


def _png(figure: Figure, heading: str) -> bytes:
    figure.suptitle(heading, fontsize=9, x=0.01, ha="left")
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
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper")
        figure.set_size_inches(12, 4.6)
        return _png(figure, heading)


def line_looks(lines: Sequence[tuple[str, int]]) -> dict[tuple[str, int], dict[str, Any]]:
    """How the plane draws each line (title, epochs), as settings of matplotlib.

    A title has its colour and marker whatever the epochs: filled and solid for the first line, hollow and dashed after.
    """
    looks = {}
    seen: Counter[str] = Counter()
    for title, epochs in lines:
        i = list(seen).index(title) if title in seen else len(seen)
        look = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}
        hollow = {"markerfacecolor": "white"} if title in seen else {}
        looks[title, epochs] = {**look, **hollow, "linestyle": DASHES[seen[title] % len(DASHES)]}
        seen[title] += 1
    return looks


def _draw_plane(axes: Axes, summaries: Sequence[Summary]) -> None:
    lines: dict[tuple[str, int], list[Summary]] = defaultdict(list)
    for summary in sorted(summaries, key=lambda summary: summary.mean("connectivity")):
        lines[summary.line].append(summary)
    for line, look in line_looks(list(dict.fromkeys(summary.line for summary in summaries))).items():
        x, y, x_error, y_error = (
            [100 * getattr(summary, statistic)(key) for summary in lines[line]]
            for statistic in ("mean", "deviation")
            for key in ("connectivity", "test_accuracy")
        )
        label = "{}, {} epochs".format(*line)
        axes.errorbar(x, y, y_error, x_error, label=label, linewidth=1, capsize=2, **look)
    row = summaries[0].row
    for published in PUBLISHED.get((row.experiment, row.options.dataset), ()):
        x, y = 100 * np.array(published.points).T
        look = {"marker": published.marker, "color": "black", "markerfacecolor": "none", "markersize": 10}
        axes.plot(x, y, linestyle="none", label=f"published: {published.label}", **look)
    axes.set_xscale("log")
    _plain(axes.xaxis)
    axes.set_xlabel("connectivity (%), logarithmic")


def curves(summaries: Sequence[Summary], heading: str, keys: dict[str, tuple[str, float]], log: bool) -> bytes:
    """Numbers of the results over the epochs: a row of panels for each method, a curve for each of its variants.

    A curve is the mean over the seeds whose epochs are known; methods that do not prune are grey, in every row.

    Args:
        summaries: what to draw, of one number of epochs.
        heading: of the figure; the seeds are added.
        keys: the results' keys, a column each, with the axis's label and the factor to its unit.
        log: whether the y axes are logarithmic.
    """
    rows: dict[str, list[Summary]] = defaultdict(list)
    for summary in summaries:
        if summary.row.method.prunes:
            rows[summary.row.title].append(summary)
    dense = [summary for summary in summaries if not summary.row.method.prunes]
    rows = rows or {METHODS[DEFAULT].label: []}
    seeds = dict.fromkeys(entry.row.seed for summary in summaries for entry in summary.entries if entry.epochs)
    with matplotlib.rc_context(STYLE):
        figure, panels = _figure(len(rows), len(keys), sharex=True, sharey="col")
        for (title, some), panel_row in zip(rows.items(), panels, strict=True):
            for axes, (key, (label, factor)) in zip(panel_row, keys.items(), strict=True):
                for i, summary in enumerate([*some, *dense]):
                    runs = [entry.epochs for entry in summary.entries if len(entry.epochs) == entry.row.epochs]
                    if not runs:
                        continue
                    values = np.array([[line[key] for line in run] for run in runs]).mean(axis=0)
                    grey = {"color": "#808080", "label": summary.row.method.label, "linestyle": ":"}
                    own = {"color": COLOURS[i % len(COLOURS)], "label": summary.row.variant}
                    axes.plot(range(1, len(values) + 1), factor * values, **(own if i < len(some) else grey))
                axes.set_ylabel(label)
                if log:
                    axes.set_yscale("log")
                    _plain(axes.yaxis)
            panel_row[0].set_title(title)
            if panel_row[-1].lines:
                panel_row[-1].legend(loc="center left", bbox_to_anchor=(1.02, 0.5))
        for axes in panels[-1]:
            axes.set_xlabel("epoch")
        of_seeds = f"{heading}; seeds {', '.join(map(str, seeds))}, as far as epochs.csv has them"
        return _png(figure, of_seeds)
