"""What the pictures share: the style, panels with a legend at their right, axes, curves, a figure as SVG."""

import base64
import io
import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from training.files.json_files import printable

# Okabe and Ito's colours, which colour-blind readers tell apart too; black and yellow replaced for both themes
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#8a6d3b", "#808080")
DASHES = ("-", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (6, 1.5, 1.2, 1.5)), (0, (9, 3)))
MARKERS = ("o", "s", "^", "v", ">")  # a plus is too thin to tell hollow from filled
INK = "#1f2328"  # becomes the colour of the page's text
STYLE = {
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
    "figure.facecolor": "none",
    "grid.color": "#80808040",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "legend.handlelength": 2.6,
    "lines.linewidth": 1.3,
    "lines.markersize": 4,
    "xtick.color": "#808080",
    "xtick.labelcolor": INK,
    "ytick.color": "#808080",
    "ytick.labelcolor": INK,
    "svg.fonttype": "none",
    "svg.hashsalt": "report",  # the same runs give the same page
}
LEGEND = "outside right upper"
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
    rows: int, columns: int, labels: Sequence[str], height: float, sharey: bool = False
) -> tuple[Figure, np.ndarray]:
    """A figure with room for a legend of these labels at its right; its axes [rows, columns]. Sizes in inches."""
    width = 9 + 0.068 * max(map(len, labels), default=0)
    height = max(rows * (height + 0.7), 0.3 + 0.172 * len(labels))
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, sharey="row" if sharey else False, squeeze=False)


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
    figure, (row,) = panels(1, len(curves[0]) - 2, labels, height, sharey)
    lines = []
    for i, (_, epochs, *values) in enumerate(curves):
        for axes, y in zip(row, values, strict=True):
            marker = "o" if np.isfinite(y).sum() <= 40 else None  # a single point has no line
            width = 0.8 if len(epochs) > 100 else None
            lines += axes.plot(epochs, y, marker=marker, markersize=3, linewidth=width, **look(i))
    for axes, title in zip(row, titles or [""] * len(row), strict=True):
        axes.set(title=title, xlabel="epoch")
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 5, 10]))
    figure.legend(lines[:: len(row)], labels, loc=LEGEND)
    return figure, row
