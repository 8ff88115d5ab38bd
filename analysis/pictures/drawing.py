"""What the pictures share: the style, panels with a legend at their right, axes, curves, a figure as SVG."""

import base64
import io
import math
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from training.files.json_files import printable

# Okabe and Ito's colours, which colour-blind readers tell apart too; black and yellow replaced for both themes
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#8a6d3b", "#808080")
DASHES = ("-", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (6, 1.5, 1.2, 1.5)), (0, (9, 3)))
MARKERS = ("o", "s", "^", "v", ">")  # a plus is too thin to tell hollow from filled
INK = "#1f2328"  # becomes the colour of the page's text
STYLE = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "text.color": INK,
    "text.parse_math": False,  # names may hold a $
    "axes.labelcolor": INK,
    "axes.edgecolor": "#808080",
    "axes.facecolor": "none",
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.titley": 1.02,  # fixed: finding a free place takes a tenth of the time
    "figure.facecolor": "none",
    "grid.color": "#80808040",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.3,
    "lines.markersize": 4,
    "xtick.color": "#808080",
    "xtick.labelcolor": INK,
    "ytick.color": "#808080",
    "ytick.labelcolor": INK,
    "svg.fonttype": "none",
    "svg.hashsalt": "report",  # the same runs give the same page
}
LEFT, WIDTH = 0.9, 8.0  # inches: where the axes begin, how far they reach; the legend is at their right
PIXELS_PER_INCH = 100  # text of 9 points is 12.5 pixels high then
THEME = (
    "<style>svg{color:#1f2328}image{image-rendering:pixelated}"
    "@media(prefers-color-scheme:dark){svg{color:#e6edf3}}</style>"
)


@dataclass(frozen=True)
class Picture:
    """A picture with its heading, what it shows in words (for those who do not see it), and how to read it."""

    title: str
    alt: str
    caption: str
    svg: str
    width: int  # in pixels, at the text size that all pictures share

    @property
    def data_uri(self) -> str:
        return "data:image/svg+xml;base64," + base64.b64encode(self.svg.encode()).decode()


Curve = tuple[str, np.ndarray, *tuple[np.ndarray, ...]]  # its label, the epochs, and its values in each panel


def short(text: str, most: int = 48) -> str:
    """A label as matplotlib can show it."""
    text = printable(text)
    text = text if len(text) <= most else f"{text[: most - 12]}…{text[-11:]}"
    return f"\u2009{text}" if text.startswith("_") else text  # matplotlib leaves out labels that start with _


def look(i: int) -> dict[str, Any]:
    return {"color": COLOURS[i % len(COLOURS)], "linestyle": DASHES[i // len(COLOURS) % len(DASHES)]}


def percent(fraction: float) -> str:
    return "unknown" if math.isnan(fraction) else f"{100 * fraction:.2f} %"


def panels(
    rows: int, columns: int, labels: Sequence[str], height: float, sharey: bool = False, titles: bool = False
) -> tuple[Figure, np.ndarray]:
    """A figure with room for a legend of these labels at its right; its axes [rows, columns]. Sizes in inches."""
    top, bottom, between = 0.3 if titles else 0.12, 0.5, 0.9
    total_width = LEFT + WIDTH + 0.15 + (0.45 + 0.068 * max(map(len, labels)) if labels else 0)
    total_height = max(rows * (top + height + bottom), 0.3 + 0.172 * len(labels))
    one = (WIDTH - between * (columns - 1)) / columns
    places = {
        "left": LEFT / total_width,
        "right": (LEFT + WIDTH) / total_width,
        "top": 1 - top / total_height,
        "bottom": 1 - (rows * (top + height + bottom) - bottom) / total_height,
        "hspace": (top + bottom) / height,
        "wspace": between / one,
    }
    figure = Figure(figsize=(total_width, total_height))
    grid = figure.subplots(rows, columns, sharey="row" if sharey else False, squeeze=False, gridspec_kw=places)
    for axes in grid.flat:  # labels at fixed places, so that they align
        axes.xaxis.set_label_coords(0.5, -0.25 / height)
        axes.yaxis.set_label_coords(-0.6 / one, 0.5)
    return figure, grid


def legend(figure: Figure, handles: Sequence[Line2D], labels: Sequence[str]) -> None:
    anchor = ((LEFT + WIDTH + 0.1) / figure.get_figwidth(), 1 - 0.12 / figure.get_figheight())
    figure.legend(handles, labels, loc="upper left", bbox_to_anchor=anchor, borderaxespad=0, handlelength=2.6)


def picture(title: str, alt: str, caption: str, figure: Figure) -> Picture:
    buffer = io.StringIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the browser has the glyph
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), text)  # hundredths of a point
    svg = text.replace(INK, "currentColor").replace(">", f">{THEME}", 1)
    return Picture(title, alt, caption, svg, round(PIXELS_PER_INCH * figure.get_figwidth()))


def epoch_axis(axes: Axes, epochs: Iterable[float]) -> None:
    epochs = list(epochs) or [1]
    low, high = min(epochs), max(epochs)
    margin = max(0.5, 0.02 * (high - low))
    axes.set_xlim(low - margin, high + margin)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 5, 10]))
    axes.set_xlabel("epoch")


def _plain(value: float, _: int = 0) -> str:
    if abs(value) >= 1e6:
        return f"{value / 1e6:g} M"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:g}"


def percent_axis(axes: Axes, what: str, fractions: np.ndarray, log: bool = False) -> None:
    """The y axis in per cent, of curves that were drawn in per cent; ``fractions`` are their values.

    With ``log`` it is logarithmic where the smallest is below 10 % and less than a fifth of the largest.
    """
    axes.set_ylabel(f"{what} (%)")
    positive = fractions[fractions > 0]
    if log and len(positive) and positive.min() < 0.1 and positive.min() < positive.max() / 5:
        log_axis(axes.yaxis)
    axes.set_ylim(top=min(axes.get_ylim()[1], 101))
    axes.yaxis.set_major_formatter(FuncFormatter(_plain))


def log_axis(axis: Axis) -> None:
    """A logarithmic axis of percentages."""
    getattr(axis.axes, f"set_{axis.axis_name}scale")("log")
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(_plain))


def count_axis(axes: Axes, largest: float) -> None:
    """The y axis for counts that reach from 0 over decades."""
    if largest > 20:
        axes.set_yscale("symlog", linthresh=1, linscale=0.4)
    else:
        axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.yaxis.set_major_formatter(FuncFormatter(_plain))
    axes.set_ylim(bottom=0, top=max(1, largest) * 1.3)


def curves(
    curves: Sequence[Curve], height: float = 2.6, titles: Sequence[str] = (), sharey: bool = False
) -> tuple[Figure, np.ndarray]:
    """A figure with curves against the epoch in panels of this height, in inches, and its axes [panels]."""
    labels = [label for label, *_ in curves]
    figure, (row,) = panels(1, len(curves[0]) - 2, labels, height, sharey, bool(titles))
    lines = []
    for i, (_, epochs, *values) in enumerate(curves):
        for axes, y in zip(row, values, strict=True):
            marker = "o" if np.isfinite(y).sum() <= 40 else None  # a single point has no line
            width = 0.8 if len(epochs) > 100 else None
            lines += axes.plot(epochs, y, marker=marker, markersize=3, linewidth=width, **look(i))
    for axes in row:
        epoch_axis(axes, np.concatenate([epochs for _, epochs, *_ in curves]))
    for axes, title in zip(row, titles, strict=False):
        axes.set_title(title)
    legend(figure, lines[:: len(row)], labels)
    return figure, row
