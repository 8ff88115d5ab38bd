"""The figures of an outcome, as PNG: the accuracy-connectivity plane, and numbers over the epochs."""

import io
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.pictures.drawing import COLOURS, DASHES, MARKERS, STYLE
from analysis.pictures.published import PUBLISHED, as_published
from reproduce.tables import Summary
from training.methods import DEFAULT, METHODS

NEAR = 4  # points of accuracy: what the plane's second panel shows


def _figure(rows: int, columns: int, **settings: Any) -> tuple[Figure, list[list[Axes]]]:
    figure = Figure(figsize=(3.6 * columns + 3, 2.6 * rows + 0.9), layout="constrained", facecolor="white")
    return figure, figure.subplots(rows, columns, squeeze=False, **settings).tolist()


def _png(figure: Figure, heading: str) -> bytes:
    figure.suptitle(heading, fontsize=9, x=0.01, ha="left")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    return buffer.getvalue()


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
    titles = list(dict.fromkeys(title for title, _ in lines))
    looks = {}
    seen: Counter[str] = Counter()
    for title, epochs in lines:
        i = titles.index(title)
        look = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}
        hollow = {"markerfacecolor": "white"} if seen[title] else {}
        looks[title, epochs] = {**look, **hollow, "linestyle": DASHES[seen[title] % len(DASHES)]}
        seen[title] += 1
    return looks


def _draw_plane(axes: Axes, summaries: Sequence[Summary]) -> None:
    lines: dict[tuple[str, int], list[Summary]] = defaultdict(list)
    for summary in sorted(summaries, key=lambda summary: summary.mean("connectivity")):
        lines[summary.line].append(summary)
    for line, look in line_looks(list(dict.fromkeys(summary.line for summary in summaries))).items():
        x, y, x_error, y_error = (
            [100 * statistic(summary, key) for summary in lines[line]]
            for statistic in (Summary.mean, Summary.deviation)
            for key in ("connectivity", "test_accuracy")
        )
        label = "{}, {} epochs".format(*line)
        axes.errorbar(x, y, y_error, x_error, label=label, linewidth=1, capsize=2, **look)
    row = summaries[0].row
    options = row.options
    same = as_published(row.experiment, options.width, options.T)
    for published in PUBLISHED.get((row.experiment, options.dataset), ()) if same else ():
        x, y = 100 * np.array(published.points).T
        look = {"marker": published.marker, "color": "black", "markerfacecolor": "none", "markersize": 10}
        axes.plot(x, y, linestyle="none", label=f"published: {published.label}", **look)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("connectivity (%), logarithmic")


def curves(summaries: Sequence[Summary], heading: str, keys: dict[str, str], shares: bool) -> bytes:
    """Numbers of the results over the epochs: a row of panels for each method, a curve for each of its variants.

    A curve is the mean over the seeds whose epochs are known; methods that do not prune are grey, in every row.

    Args:
        summaries: what to draw, of one number of epochs.
        heading: of the figure; the seeds are added.
        keys: the results' keys, a column each, with the axis's label.
        shares: the numbers are shares, drawn in percent; otherwise counts, on logarithmic axes.
    """
    dense = [summary for summary in summaries if not summary.row.method.prunes]
    rows: dict[str, list[Summary]] = defaultdict(list)
    for summary in summaries:
        if summary.row.method.prunes:
            rows[summary.row.title].append(summary)
    rows = rows or {METHODS[DEFAULT].label: []}
    with matplotlib.rc_context(STYLE):
        figure, panels = _figure(len(rows), len(keys), sharex=True, sharey="col")
        for (title, some), panel_row in zip(rows.items(), panels, strict=True):
            for axes, (key, label) in zip(panel_row, keys.items(), strict=True):
                for i, summary in enumerate([*some, *dense]):
                    runs = [entry.epochs for entry in summary.entries if len(entry.epochs) == entry.row.epochs]
                    look = {"color": COLOURS[i % len(COLOURS)], "label": summary.row.variant}
                    if not summary.row.method.prunes:
                        look = {"color": "#808080", "label": summary.row.method.label, "linestyle": ":"}
                    if runs:
                        values = np.mean([[line[key] for line in run] for run in runs], axis=0)
                        if not shares:
                            values = np.where(values > 0, values, np.nan)  # on the logarithmic axis, 0 is no point
                        axes.plot(range(1, len(values) + 1), (100 if shares else 1) * values, **look)
                axes.set_ylabel(label)
                if not shares:
                    axes.set_yscale("log")
                    axes.yaxis.set_major_formatter("{x:g}")
            panel_row[0].set_title(title)
            if panel_row[-1].lines:
                panel_row[-1].legend(loc="center left", bbox_to_anchor=(1.02, 0.5))
        for axes in panels[-1]:
            axes.set_xlabel("epoch")
            axes.xaxis.get_major_locator().set_params(integer=True)
        seeds = dict.fromkeys(entry.row.seed for summary in summaries for entry in summary.entries if entry.epochs)
        return _png(figure, f"{heading}\nseeds {', '.join(map(str, seeds))}, as far as epochs.csv has them")
