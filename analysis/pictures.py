"""The pictures of a report: matplotlib figures as SVG, which stays sharp and small and follows a page's dark theme.

Numbers of epochs come as they are from ``results.jsonl``; those of weights from the checkpoint, by training.measure.
"""

import functools
import io
import math
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, SymmetricalLogLocator
from torch import Tensor

import measuring
from analysis.runs import Run, fan_in, fan_out
from training.files.json_files import nested, number, printable

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
MOST_EDGES = 4097  # of a recorded distribution; a run records 65
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


@dataclass(frozen=True)
class Published:
    """A published result: (connectivity, test accuracy) as fractions, and where it is published."""

    label: str
    source: str
    points: tuple[tuple[float, float], ...]
    marker: str


GRAD_R = "Chen et al., Pruning of deep spiking neural networks through gradient rewiring, IJCAI 2021"
STDS = (
    "Chen et al., State transition of dendritic spines improves learning of sparse spiking neural networks, ICML 2022"
)
PUBLISHED = {  # by experiment and data set
    ("mnist", "mnist"): (Published("dense baseline, IJCAI 2021", GRAD_R, ((1.0, 0.9892),), "*"),),
    ("c10", "cifar10"): (
        Published("dense baseline, IJCAI 2021", GRAD_R, ((1.0, 0.9284),), "*"),
        # its loss of accuracy is published as about 3.5 points
        Published("Grad R (about), IJCAI 2021", GRAD_R, ((0.0073, 0.9284 - 0.035),), "D"),
        Published(
            "STDS, ICML 2022",
            STDS,
            ((0.046, 0.9249), (0.022, 0.9249), (0.014, 0.9164), (0.01, 0.9106), (0.0075, 0.9021)),
            "X",
        ),
    ),
}


def _label(text: str, most: int = 48) -> str:
    text = printable(text)
    text = text if len(text) <= most else f"{text[: most - 12]}…{text[-11:]}"
    return f"\u2009{text}" if text.startswith("_") else text  # matplotlib leaves out labels that start with _


def _look(i: int) -> dict[str, Any]:
    return {"color": COLOURS[i % len(COLOURS)], "linestyle": DASHES[i // len(COLOURS) % len(DASHES)]}


def _percent(fraction: float) -> str:
    return "unknown" if math.isnan(fraction) else f"{100 * fraction:.2f} %"


def _panels(
    rows: int,
    columns: int,
    legend: Sequence[str] = (),
    height: float = 2.6,
    sharey: bool = False,
    titles: bool = False,
) -> tuple[Figure, np.ndarray]:
    """A figure with room for a legend of these labels at its right; its axes [rows, columns]. Sizes in inches.

    The next call for a figure of the same form gives the same one, emptied: half of matplotlib's time goes into new
    axes and their ticks.
    """
    room = 0.45 + 0.068 * max(map(len, legend), default=0) if legend else 0.0
    figure, grid = _blank(rows, columns, height, sharey, titles, room, 0.3 + 0.172 * len(legend))
    for legend in list(figure.legends):
        legend.remove()
    for axes in grid.flat:
        for artist in (*axes.lines, *axes.patches):
            artist.remove()
        axes.relim()
        axes.set_xscale("linear")  # puts back locators and formatters too
        axes.set_yscale("linear")
        axes.autoscale(True)
    return figure, grid


@functools.lru_cache(maxsize=16)
def _blank(
    rows: int, columns: int, height: float, sharey: bool, titles: bool, room: float, least_height: float
) -> tuple[Figure, np.ndarray]:
    right, top, bottom, between = 0.15, 0.3 if titles else 0.12, 0.5, 0.9
    total_width = LEFT + WIDTH + right + room
    row = top + height + bottom
    total_height = max(rows * row, least_height)
    figure = Figure(figsize=(total_width, total_height))
    FigureCanvasSVG(figure)
    one = (WIDTH - between * (columns - 1)) / columns
    grid = np.empty((rows, columns), dtype=object)
    for r in range(rows):
        for c in range(columns):
            box = (
                (LEFT + c * (one + between)) / total_width,
                (total_height - r * row - top - height) / total_height,
                one / total_width,
                height / total_height,
            )
            grid[r, c] = figure.add_axes(box, sharey=grid[r, 0] if sharey and c else None)
            # fixed, so that they align, and matplotlib need not measure the tick labels
            grid[r, c].xaxis.set_label_coords(0.5, -0.25 / height)
            grid[r, c].yaxis.set_label_coords(-0.6 / one, 0.5)
    return figure, grid


def _legend(figure: Figure, handles: Sequence[Line2D], labels: Sequence[str]) -> None:
    anchor = ((LEFT + WIDTH + 0.1) / figure.get_figwidth(), 1 - 0.12 / figure.get_figheight())
    figure.legend(handles, labels, loc="upper left", bbox_to_anchor=anchor, borderaxespad=0, handlelength=2.6)


def _picture(title: str, alt: str, caption: str, figure: Figure) -> Picture:
    buffer = io.StringIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the browser has the glyph
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), text)  # hundredths of a point
    text = text.replace(INK, "currentColor")
    start = text.index(">") + 1
    svg = text[:start] + THEME + text[start:]
    return Picture(title, alt, caption, svg, round(PIXELS_PER_INCH * figure.get_figwidth()))


def _epoch_axis(axes: Axes, epochs: Iterable[float]) -> None:
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


def _percent_axis(axes: Axes, what: str, fractions: np.ndarray, log: bool = False) -> None:
    """The y axis in per cent, which what is drawn of these fractions is in already.

    With ``log`` it is logarithmic where the smallest is below 10 % and less than a fifth of the largest.
    """
    axes.set_ylabel(f"{what} (%)")
    percents = fractions[np.isfinite(fractions)] * 100
    positive = percents[percents > 0]
    if log and len(positive) and positive.min() < 10 and positive.max() / positive.min() > 5:
        axes.set_yscale("log")
        _log_ticks(axes.yaxis, positive.min(), positive.max())
    elif len(percents):
        low, high = percents.min(), percents.max()
        margin = 0.05 * (high - low) or 1.0
        axes.set_ylim(max(low - margin, -1) if high > low else 0, min(high + margin, 101))
    axes.yaxis.set_major_formatter(FuncFormatter(_plain))


def _log_ticks(axis: Any, low: float, high: float) -> None:
    decades = math.log10(high / low)
    subs = range(1, 10) if decades < 1 else (1, 2, 5) if decades < 3 else (1,)
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_minor_locator(matplotlib.ticker.NullLocator())
    axis.set_major_formatter(FuncFormatter(_plain))


def _count_axis(axes: Axes, largest: float) -> None:
    """The y axis for counts that reach from 0 over decades."""
    if largest > 20:
        axes.set_yscale("symlog", linthresh=1, linscale=0.4)
        axes.yaxis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=1))
        axes.yaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.yaxis.set_major_formatter(FuncFormatter(_plain))
    axes.set_ylim(bottom=0, top=max(1, largest) * 1.3)


def _curve(axes: Axes, x: np.ndarray, y: np.ndarray, look: dict[str, Any]) -> Line2D:
    marker = "o" if np.isfinite(y).sum() <= 40 else None  # a single point has no line
    (line,) = axes.plot(x, y, marker=marker, markersize=3, **look)
    return line


# -- all runs ----------------------------------------------------------------------------------------


def overall(runs: Sequence[Run], labels: Sequence[str]) -> list[Picture]:
    """The pictures that compare runs of one experiment and data set; only runs with results count."""
    pairs = [(run, _label(label)) for run, label in zip(runs, labels, strict=True) if run.epochs]
    if not pairs:
        return []
    runs, labels = zip(*pairs, strict=True)
    with matplotlib.rc_context(STYLE):
        made = [
            _compare(
                runs,
                labels,
                "test_accuracy",
                "Test accuracy against epoch",
                "test accuracy",
                "Share of the test images that are classified correctly, after each epoch.",
            ),
            _compare(
                runs,
                labels,
                "connectivity",
                "Connectivity against epoch",
                "connectivity",
                "Share of the prunable weights that are connected (w ≠ 0), all layers together, after each epoch.",
                log=True,
            ),
            _plane(runs, labels),
            _rewiring(
                [(label, run.series("epoch"), run.series("pruned"), run.series("regrown")) for run, label in pairs],
                "all layers of each run",
            ),
        ]
        return [picture for picture in made if picture]


def _compare(
    runs: Sequence[Run], labels: Sequence[str], key: str, title: str, what: str, caption: str, log: bool = False
) -> Picture:
    figure, ((axes,),) = _panels(1, 1, labels, 3.4)
    values = [run.series(key) for run in runs]
    lines = [
        _curve(axes, run.series("epoch"), 100 * y, _look(i))
        for i, (run, y) in enumerate(zip(runs, values, strict=True))
    ]
    _epoch_axis(axes, np.concatenate([run.series("epoch") for run in runs]))
    _percent_axis(axes, what, np.concatenate(values), log)
    _legend(figure, lines, labels)
    last = "; ".join(f"{label} {_percent(y[-1])}" for label, y in zip(labels, values, strict=True))
    return _picture(title, f"{title}, one curve per run. At the end: {last}.", caption, figure)


def _plane(runs: Sequence[Run], labels: Sequence[str]) -> Picture:
    published = PUBLISHED.get(runs[0].experiment, ())
    names = [*labels, *(f"published: {entry.label}" for entry in published)]
    figure, ((axes,),) = _panels(1, 1, names, 3.8)
    handles, x_all, y_all, said = [], [1.0], [], []
    for i, (run, label) in enumerate(zip(runs, labels, strict=True)):
        x, y = number(run.last, "connectivity"), number(run.last, "test_accuracy")
        marker = MARKERS[i // len(COLOURS) % len(MARKERS)]
        (handle,) = axes.plot(
            100 * x, 100 * y, linestyle="none", marker=marker, color=COLOURS[i % len(COLOURS)], markersize=7
        )
        handles.append(handle)
        x_all.append(x)
        y_all.append(y)
        said.append(f"{label}: {_percent(x)}, {_percent(y)}")
    for entry in published:
        x, y = zip(*entry.points, strict=True)
        (handle,) = axes.plot(
            100 * np.array(x),
            100 * np.array(y),
            linestyle=(0, (1, 2)) if len(x) > 1 else "none",
            linewidth=0.8,
            marker=entry.marker,
            color=INK,
            markerfacecolor="none",
            markersize=9 if entry.marker == "*" else 6,
        )
        handles.append(handle)
        x_all += x
        y_all += y
        said.append(
            f"published, {entry.label}: " + ", ".join(f"{_percent(a)} at {_percent(b)}" for b, a in entry.points)
        )
    positive = [100 * x for x in x_all if x > 0]
    axes.set_xscale("log")
    margin = max(1.1, (100 / min(positive)) ** 0.06)
    axes.set_xlim(min(positive) / margin, 100 * margin)
    _log_ticks(axes.xaxis, min(positive), 100)
    axes.set_xlabel("connectivity (%), logarithmic")
    _percent_axis(axes, "test accuracy", np.array(y_all))
    _legend(figure, handles, names)
    caption = "Test accuracy and connectivity after each run's last finished epoch."
    if published:
        sources = "; ".join(dict.fromkeys(entry.source for entry in published))
        caption += f" Hollow marks are published results of the same network and data set: {sources}."
    return _picture(
        "Accuracy and connectivity",
        "The plane of test accuracy and connectivity, one mark per run. " + "; ".join(said) + ".",
        caption,
        figure,
    )


# -- one run -----------------------------------------------------------------------------------------


def of_run(run: Run, weights_epoch: int, weights: dict[str, Tensor]) -> list[Picture]:
    """The pictures of one run: of its results and of its checkpoint's weights, as far as there are any."""
    with matplotlib.rc_context(STYLE):
        pictures = []
        if run.epochs:
            pictures += [_layers(run), _layer_rewiring(run), _neurons(run), _distributions(run)]
        if weights:
            masks = {name: measuring.connected(weight) for name, weight in weights.items()}
            pictures.append(_connectivity_map(weights_epoch, masks))
            pictures += [
                _receptive_fields(name, weights_epoch, weight)
                for name, weight in weights.items()
                if name == "static_fc.1.weight" and weight.shape[1:] == (784,)
            ]
        return [picture for picture in pictures if picture]


def _layers(run: Run) -> Picture | None:
    names = run.names_in("layers")
    if not names:
        return None
    labels = list(map(_label, names))
    figure, ((axes,),) = _panels(1, 1, labels)
    epochs, values = run.series("epoch"), [run.series("layers", name, "connectivity") for name in names]
    lines = [_curve(axes, epochs, 100 * y, _look(i)) for i, y in enumerate(values)]
    _epoch_axis(axes, epochs)
    _percent_axis(axes, "connectivity", np.concatenate(values), log=True)
    _legend(figure, lines, labels)
    last = "; ".join(f"{label} {_percent(y[-1])}" for label, y in zip(labels, values, strict=True))
    return _picture(
        "Connectivity per layer",
        f"Connectivity of each layer against epoch. At the end: {last}.",
        "Share of each layer's weights that are connected (w ≠ 0), after each epoch.",
        figure,
    )


def _layer_rewiring(run: Run) -> Picture | None:
    curves = [
        (_label(name), run.series("epoch"), *(run.series("layers", name, what) for what in ("pruned", "regrown")))
        for name in run.names_in("layers")
    ]
    return _rewiring(curves, "each layer")


def _rewiring(curves: Sequence[tuple[str, np.ndarray, np.ndarray, np.ndarray]], of_what: str) -> Picture | None:
    """Curves are (label, epochs, pruned, regrown); None where nothing was ever pruned or regrown."""
    if not any(np.nansum(counts) for _, _, *both in curves for counts in both):
        return None
    labels = [label for label, *_ in curves]
    figure, ((left, right),) = _panels(1, 2, labels, sharey=True, titles=True)
    lines = []
    for i, (_, epochs, pruned, regrown) in enumerate(curves):
        look = _look(i) | {"linewidth": 0.8 if len(epochs) > 100 else 1.3}
        lines.append(_curve(left, epochs, pruned, look))
        _curve(right, epochs, regrown, look)
    for axes, what in ((left, "pruned"), (right, "regrown")):
        _epoch_axis(axes, np.concatenate([epochs for _, epochs, *_ in curves]))
        axes.set_title(what)
    left.set_ylabel("connections per epoch")
    largest = np.concatenate([np.concatenate(counts) for _, _, *counts in curves])
    _count_axis(left, float(np.nanmax(largest)) if np.isfinite(largest).any() else 0.0)
    _legend(figure, lines, labels)
    said = "; ".join(f"{label} {np.nansum(p):,.0f} and {np.nansum(r):,.0f}" for label, _, p, r in curves)
    return _picture(
        "Connections pruned and regrown",
        f"Connections pruned (left) and regrown (right) against epoch, {of_what}. Sums over the epochs: {said}.",
        "Connections that were connected one epoch before and are not now (left), and the reverse (right).",
        figure,
    )


def _neurons(run: Run) -> Picture | None:
    names = run.names_in("neurons")
    if not names:
        return None
    labels = list(map(_label, names))
    figure, ((left, right),) = _panels(1, 2, labels)
    epochs = run.series("epoch")
    lines, said, silent_all = [], [], []
    for i, (name, label) in enumerate(zip(names, labels, strict=True)):
        rate, silent = (run.series("neurons", name, what) for what in ("firing_rate", "silent"))
        there = np.isfinite(rate)
        lines.append(_curve(left, epochs[there], rate[there], _look(i)))
        _curve(right, epochs[there], 100 * silent[there], _look(i))
        silent_all.append(silent[there])
        if there.any():
            said.append(f"{label} {rate[there][-1]:.4f} and {_percent(silent[there][-1])}")
    for axes in (left, right):
        _epoch_axis(axes, epochs)
        axes.set_ylim(bottom=0)
    left.set_ylabel("firing rate (spikes per time step)")
    right.set_ylabel("silent neurons (%)")
    _legend(figure, lines, labels)
    return _picture(
        "Firing rates and silent neurons",
        f"Mean firing rate (left) and share of silent neurons (right) of each LIF layer against epoch. "
        f"At the last recording: {'; '.join(said)}.",
        "Left: spikes per neuron, image and time step, on the test set. Right: share of the neurons without a spike on "
        "the whole test set. At the epochs with a full recording (-i1).",
        figure,
    )


def _histogram(entry: Any, what: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Edges [n + 1] and probability density [n], NaN where it is 0, of a recorded distribution; None without one."""
    entry = nested(entry, what)
    try:
        edges, counts = (np.asarray(entry[key], dtype=np.float64) for key in ("edges", "counts"))
    except (TypeError, KeyError, ValueError, OverflowError):
        return None
    if counts.ndim != 1 or edges.shape != (len(counts) + 1,) or len(edges) > MOST_EDGES:
        return None
    if not (np.isfinite(edges).all() and np.isfinite(counts).all() and counts.sum() > 0 and (np.diff(edges) > 0).all()):
        return None
    with np.errstate(all="ignore"):  # of edges and counts near the largest floats
        density = counts / (counts.sum() * np.diff(edges))
    return edges, np.where((density > 0) & np.isfinite(density), density, np.nan)


def _distributions(run: Run) -> Picture | None:
    """The recordings that are kept, from the first to the last, drawn over each other."""
    chosen = [epoch for epoch in run.epochs if nested(epoch, "distributions")]
    names = run.names_in("distributions")
    columns = [
        what for what in ("w", "theta") if any(nested(e, "distributions", n, what) for e in chosen for n in names)
    ]
    if not columns:
        return None
    labels = [f"epoch {epoch['epoch']}" for epoch in chosen]
    figure, grid = _panels(len(names), len(columns), labels, 1.7, titles=True)
    colours = matplotlib.colormaps["plasma"](np.linspace(0.28, 0.88, len(chosen)))
    for row, name in zip(grid, names, strict=True):
        for axes, what in zip(row, columns, strict=True):
            for epoch, colour in zip(chosen, colours, strict=True):
                histogram = _histogram(nested(epoch, "distributions", name), what)
                if histogram:
                    edges, density = histogram
                    axes.plot(np.repeat(edges, 2)[1:-1], np.repeat(density, 2), color=colour, linewidth=1)
            symbol = "θ" if what == "theta" else what
            axes.set_title(f"{_label(name)}, {symbol}")
            axes.set_xlabel(symbol)
            axes.xaxis.set_major_locator(MaxNLocator(6))
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(numticks=6))
            axes.yaxis.set_minor_locator(matplotlib.ticker.NullLocator())
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.set_ylabel(f"density (per unit of {symbol})")
    _legend(figure, [Line2D([], [], color=colour) for colour in colours], labels)
    return _picture(
        "Distributions of w" + (" and θ" if "theta" in columns else "") + " over time",
        f"Probability densities of the values of {' and '.join(columns)} in {', '.join(map(_label, names))}, "
        f"at {', '.join(labels)}.",
        "Probability density of the values in a layer, logarithmic, at recorded epochs, early (dark) to late (bright). "
        + ("Where θ ≤ 0 the connection is pruned, w = 0." if "theta" in columns else ""),
        figure,
    )


def _bars(axes: Axes, counts: np.ndarray, colour: str) -> None:
    low, high = int(counts.min()), int(counts.max())
    most = min(40, math.ceil(2 * math.sqrt(len(counts))))
    step = max(1, math.ceil((high - low + 1) / most))
    edges = np.arange(low, high + step + 1, step) - 0.5
    axes.stairs(np.histogram(counts, edges)[0], edges, fill=True, color=colour)
    margin = max(1.0, 0.03 * (high - low))
    axes.set_xlim(edges[0] - margin, edges[-1] + margin)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    axes.set_ylim(bottom=0)


def _connectivity_map(epoch: int, masks: dict[str, Tensor]) -> Picture:
    figure, grid = _panels(len(masks), 2, (), 1.4, titles=True)
    said = []
    for (left, right), (name, mask) in zip(grid, masks.items(), strict=True):
        kind = "channel" if mask.dim() > 2 else "neuron"
        label, into, out = _label(name), fan_in(mask), fan_out(mask)
        for axes, counts, what, of, colour in (
            (left, into, "in", "output", COLOURS[0]),
            (right, out, "out", "input", COLOURS[2]),
        ):
            _bars(axes, counts, colour)
            axes.set_title(f"{label}: fan-{what}, mean {counts.mean():.1f} of {mask.numel() // len(counts):,}")
            axes.set_xlabel(f"connected weights per {of} {kind}")
            axes.set_ylabel(f"{of} {kind}s")
        said.append(f"{label} mean fan-in {into.mean():.1f}, mean fan-out {out.mean():.1f}")
    return _picture(
        "Connectivity map",
        f"Histograms of fan-in (left) and fan-out (right) of each layer after epoch {epoch}: {'; '.join(said)}.",
        f"How many connected weights (w ≠ 0) lead to each output (fan-in) and from each input (fan-out) of a layer: "
        f"neurons of a linear layer, channels of a convolution. From the checkpoint of epoch {epoch}.",
        figure,
    )


def _receptive_fields(name: str, epoch: int, weight: Tensor, rows: int = 4, columns: int = 8) -> Picture:
    """weight: [hidden, 784], its inputs the pixels of 28x28 images, row by row."""
    hidden = len(weight)
    share = (fan_out(measuring.connected(weight)) / hidden).reshape(28, 28)
    grid = np.full((rows * 29 - 1, columns * 29 - 1), np.nan)
    fields = weight[: rows * columns].float().view(-1, 28, 28).numpy()  # [neurons, 28, 28]
    for i, field in enumerate(fields):
        y, x = 29 * (i // columns), 29 * (i % columns)
        grid[y : y + 28, x : x + 28] = field
    limit = float(np.abs(grid[np.isfinite(grid)]).max(initial=0)) or 1.0  # a run that diverged has NaN
    figure = Figure(figsize=(9.6, 3.6))
    FigureCanvasSVG(figure)
    left = figure.add_axes((0.0625, 0.14, 0.27, 0.76))
    _image(
        figure, left, 100 * share, Normalize(0, max(100 * share.max(), 1e-9)), "viridis", "connected hidden neurons (%)"
    )
    left.set_title(f"share of the {hidden} hidden neurons")
    left.set_xlabel("pixel column")
    left.set_ylabel("pixel row")
    right = figure.add_axes((0.47, 0.07, 0.44, 0.83))
    _image(figure, right, grid, Normalize(-limit, limit), "RdBu_r", "weight w")
    right.set_title(f"weights of hidden neurons 0 to {len(fields) - 1}, row by row")
    right.set_xticks([])
    right.set_yticks([])
    return _picture(
        "Receptive fields of the first layer",
        f"Left: a 28 by 28 image of the share of hidden neurons connected to each pixel after epoch {epoch}, from "
        f"{_percent(float(share.min()))} to {_percent(float(share.max()))}. Right: the weights of {len(fields)} hidden "
        "neurons, each as a 28 by 28 image.",
        f"{_label(name)}, from the checkpoint of epoch {epoch}. Left: connections from each pixel, of as many as there "
        "are hidden neurons. Right: single neurons; white is w = 0.",
        figure,
    )


def _image(figure: Figure, axes: Axes, values: np.ndarray, norm: Normalize, colours: str, label: str) -> None:
    """An image with its own colour bar, which is an image too: matplotlib's would be hundreds of paths."""
    axes.set_anchor("N")
    axes.imshow(values, norm=norm, cmap=colours, interpolation="none")
    axes.grid(False)
    axes.spines[:].set_visible(False)
    box = axes.get_position()
    bar = figure.add_axes((box.x1 + 0.012, box.y0, 0.012, box.height))
    bar.imshow(
        np.linspace(norm.vmin, norm.vmax, 64)[:, None],
        norm=norm,
        cmap=colours,
        aspect="auto",
        origin="lower",
        extent=(0, 1, norm.vmin, norm.vmax),
    )
    bar.grid(False)
    bar.set_xticks([])
    bar.yaxis.tick_right()
    bar.yaxis.set_label_position("right")
    bar.set_ylabel(label)
