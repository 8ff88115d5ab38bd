"""Pictures of the weights: their distributions over time, fan-in and fan-out, receptive fields."""

import math
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator
from torch import Tensor

import measuring
from analysis.pictures import drawing
from analysis.pictures.drawing import COLOURS, Picture, percent, short
from analysis.runs import SavedRun
from training.files.json_files import nested

SYMBOLS = {"w": "w", "theta": "θ"}  # of what is recorded
MOST_EDGES = 4097  # of a recorded distribution; a run records 65
ROWS, COLUMNS = 4, 8  # of the hidden neurons whose receptive fields are shown


def _histogram(entry: Any, what: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Edges [n + 1] and probability density [n], NaN where it is 0, of a recorded distribution; None without one."""
    entry = nested(entry, what) or {}
    try:
        edges, counts = (np.asarray(entry.get(key), dtype=np.float64) for key in ("edges", "counts"))
    except (TypeError, ValueError, OverflowError):
        return None
    if counts.ndim != 1 or edges.shape != (len(counts) + 1,) or len(edges) > MOST_EDGES:
        return None
    if not (np.isfinite(edges).all() and np.isfinite(counts).all() and counts.sum() > 0 and (np.diff(edges) > 0).all()):
        return None
    with np.errstate(all="ignore"):  # of edges and counts near the largest floats
        density = counts / (counts.sum() * np.diff(edges))
    return edges, np.where((density > 0) & np.isfinite(density), density, np.nan)


def distributions(run: SavedRun) -> Picture | None:
    """The recordings that are kept, from the first to the last, drawn over each other."""
    chosen = [epoch for epoch in run.epochs if nested(epoch, "distributions")]
    names = run.names_in("distributions")
    recorded = {what for epoch in chosen for name in names for what in nested(epoch, "distributions", name) or ()}
    columns = {what: symbol for what, symbol in SYMBOLS.items() if what in recorded}
    if not columns:
        return None
    labels = [f"epoch {epoch['epoch']}" for epoch in chosen]
    figure, grid = drawing.panels(len(names), len(columns), labels, 1.7)
    colours = matplotlib.colormaps["plasma"](np.linspace(0.28, 0.88, len(chosen)))
    for row, name in zip(grid, names, strict=True):
        for axes, (what, symbol) in zip(row, columns.items(), strict=True):
            for epoch, colour in zip(chosen, colours, strict=True):
                if histogram := _histogram(nested(epoch, "distributions", name), what):
                    edges, density = histogram
                    axes.plot(np.repeat(edges, 2)[1:-1], np.repeat(density, 2), color=colour, linewidth=1)
            axes.set(title=f"{short(name)}, {symbol}", xlabel=symbol, ylabel=f"density (per unit of {symbol})")
            axes.set_yscale("log")
            axes.xaxis.set_major_locator(MaxNLocator(6))
            axes.yaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    figure.legend([Line2D([], [], color=colour) for colour in colours], labels, loc=drawing.LEGEND)
    return drawing.picture(
        f"Distributions of {' and '.join(columns.values())} over time",
        f"Probability densities of the values of {' and '.join(columns)} in {', '.join(map(short, names))}, "
        f"at {', '.join(labels)}.",
        "Probability density of the values in a layer, logarithmic, at recorded epochs, early (dark) to late (bright). "
        + ("Where θ ≤ 0 the connection is pruned, w = 0." if "theta" in columns else ""),
        figure,
    )


def fan_in(mask: Tensor) -> np.ndarray:
    """Connected weights of every output, int64 [out], of a mask [out, in] or, of a convolution, [out, in, kH, kW]."""
    return np.count_nonzero(mask.flatten(1).numpy(), axis=1)  # NumPy counts ten times as fast as torch


def fan_out(mask: Tensor) -> np.ndarray:
    """Connected weights of every input, int64 [in], of the same mask."""
    return fan_in(mask.transpose(0, 1))


def connectivity_map(epoch: str, weights: dict[str, Tensor]) -> Picture | None:
    if not weights:
        return None
    figure, grid = drawing.panels(len(weights), 2, (), 1.4)
    said = []
    for row, (name, weight) in zip(grid, weights.items(), strict=True):
        kind, mask = "channel" if weight.dim() > 2 else "neuron", measuring.connected(weight)
        fans = {"in": (fan_in(mask), "output", COLOURS[0]), "out": (fan_out(mask), "input", COLOURS[2])}
        for axes, (what, (counts, of, colour)) in zip(row, fans.items(), strict=True):
            _bars(axes, counts, colour)
            title = f"{short(name)}: fan-{what}, mean {counts.mean():.1f} of {mask.numel() // len(counts):,}"
            axes.set(title=title, xlabel=f"connected weights per {of} {kind}", ylabel=f"{of} {kind}s")
        means = (f"mean fan-{what} {counts.mean():.1f}" for what, (counts, *_) in fans.items())
        said.append(f"{short(name)} {', '.join(means)}")
    return drawing.picture(
        "Connectivity map",
        f"Histograms of fan-in (left) and fan-out (right) of each layer after epoch {epoch}: {'; '.join(said)}.",
        f"How many connected weights (w ≠ 0) lead to each output (fan-in) and from each input (fan-out) of a layer: "
        f"neurons of a linear layer, channels of a convolution. From the checkpoint of epoch {epoch}.",
        figure,
    )


def _bars(axes: Axes, counts: np.ndarray, colour: str) -> None:
    low, high = int(counts.min()), int(counts.max())
    step = math.ceil((high - low + 1) / min(40, math.ceil(2 * math.sqrt(len(counts)))))
    edges = np.arange(low, high + step + 1, step) - 0.5
    axes.stairs(np.histogram(counts, edges)[0], edges, fill=True, color=colour)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    axes.set_ylim(bottom=0)


def receptive_fields(epoch: str, weights: dict[str, Tensor]) -> Picture | None:
    """Of a first layer [hidden, 784], whose inputs are the pixels of 28x28 images, row by row."""
    name, weight = next(iter(weights.items()), ("", None))
    if weight is None or weight.shape[1:] != (784,):
        return None
    hidden = len(weight)
    share = 100 * (fan_out(measuring.connected(weight)) / hidden).reshape(28, 28)
    neurons = weight[: ROWS * COLUMNS].float().view(-1, 28, 28).numpy()
    fields = np.full((ROWS * COLUMNS, 29, 29), np.nan)  # with a line between them
    fields[: len(neurons), :28, :28] = neurons
    grid = fields.reshape(ROWS, COLUMNS, 29, 29).swapaxes(1, 2).reshape(29 * ROWS, 29 * COLUMNS)[:-1, :-1]
    limit = float(np.abs(grid[np.isfinite(grid)]).max(initial=0)) or 1.0  # a run that diverged has NaN
    figure = Figure(figsize=(9.6, 3), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 2))
    _image(left, share, (0, max(share.max(), 1e-9)), "viridis", "connected hidden neurons (%)")
    _image(right, grid, (-limit, limit), "RdBu_r", "weight w")
    left.set(title=f"share of the {hidden} hidden neurons", xlabel="pixel column", ylabel="pixel row")
    right.set(title=f"weights of hidden neurons 0 to {len(neurons) - 1}, row by row", xticks=[], yticks=[])
    least, most = (percent(float(value) / 100) for value in (share.min(), share.max()))
    return drawing.picture(
        "Receptive fields of the first layer",
        f"Left: a 28 by 28 image of the share of hidden neurons connected to each pixel after epoch {epoch}, from "
        f"{least} to {most}. Right: the weights of {len(neurons)} hidden neurons, each as a 28 by 28 image.",
        f"{short(name)}, from the checkpoint of epoch {epoch}. Left: connections from each pixel, of as many as there "
        "are hidden neurons. Right: single neurons; white is w = 0.",
        figure,
    )


def _image(axes: Axes, values: np.ndarray, limits: tuple[float, float], colours: str, label: str) -> None:
    """An image with its colour bar."""
    image = axes.imshow(values, vmin=limits[0], vmax=limits[1], cmap=colours, interpolation="none")
    bar = axes.figure.colorbar(image, ax=axes, label=label)
    bar.solids.set_rasterized(True)  # as an image; otherwise it would be hundreds of paths
    axes.spines[:].set_visible(False)
    axes.grid(False)
