"""Pictures of what runs record after each epoch: accuracy, connectivity, rewiring, neurons."""

from collections.abc import Sequence

import numpy as np

from analysis.pictures import drawing
from analysis.pictures.drawing import COLOURS, INK, MARKERS, Curve, Picture, percent, short
from analysis.pictures.published import PUBLISHED, TIME_STEPS, as_published
from analysis.runs import SavedRun
from training.files.json_files import number


def accuracy(runs: Sequence[SavedRun], labels: Sequence[str]) -> Picture:
    caption = "Share of the test images that are classified correctly, after each epoch."
    return _shares(_curves(runs, labels, "test_accuracy"), "run", "test accuracy", caption)


def connectivity(runs: Sequence[SavedRun], labels: Sequence[str]) -> Picture:
    caption = "Share of the prunable weights that are connected (w ≠ 0), all layers together, after each epoch."
    return _shares(_curves(runs, labels, "connectivity"), "run", "connectivity", caption)


def layers(run: SavedRun) -> Picture | None:
    curves = _layer_curves(run, "connectivity")
    caption = "Share of each layer's weights that are connected (w ≠ 0), after each epoch."
    return _shares(curves, "layer", "connectivity", caption) if curves else None


def _curves(runs: Sequence[SavedRun], labels: Sequence[str], *keys: str) -> list[Curve]:
    return [(label, *map(run.series, ("epoch", *keys))) for run, label in zip(runs, labels, strict=True)]


def _layer_curves(run: SavedRun, *keys: str) -> list[Curve]:
    epochs, names = run.series("epoch"), run.names_in("layers")
    return [(short(name), epochs, *(run.series("layers", name, key) for key in keys)) for name in names]


def _shares(curves: Sequence[Curve], of: str, what: str, caption: str) -> Picture:
    """Fractions against the epoch, in per cent."""
    in_percent = [(label, epochs, 100 * values) for label, epochs, values in curves]
    figure, (axes,) = drawing.curves(in_percent, height=3.4 if of == "run" else 2.6)
    drawing.percent_axis(axes, what, np.concatenate([values for *_, values in curves]), log=what == "connectivity")
    last = "; ".join(f"{label} {percent(values[-1])}" for label, _, values in curves)
    title = f"{what.capitalize()} {'against epoch' if of == 'run' else 'per layer'}"
    alt = f"{what.capitalize()} of each {of} against epoch. At the end: {last}."
    return drawing.picture(title, alt, caption, figure)


def plane(runs: Sequence[SavedRun], labels: Sequence[str]) -> Picture:
    """Test accuracy and connectivity, a mark per run, beside published results."""
    marks = []  # label, points (connectivity, accuracy), look
    for i, (run, label) in enumerate(zip(runs, labels, strict=True)):
        look = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i // len(COLOURS) % len(MARKERS)]}
        points = [(number(run.last, "connectivity"), number(run.last, "test_accuracy"))]
        marks.append((label, points, {**look, "linestyle": "none", "markersize": 7}))
    same = [as_published(run.experiment[0], run.width, run.arguments.get("T", TIME_STEPS)) for run in runs]
    published = PUBLISHED.get(runs[0].experiment, ()) if any(same) else ()
    for entry in published:
        look = {"color": INK, "marker": entry.marker, "markersize": 9 if entry.marker == "*" else 6}
        look |= {"linestyle": (0, (1, 2)) if len(entry.points) > 1 else "none", "linewidth": 0.8}
        marks.append((f"published: {entry.label}", entry.points, {**look, "markerfacecolor": "none"}))
    labels = [label for label, *_ in marks]
    figure, ((axes,),) = drawing.panels(1, 1, labels, 3.8)
    handles = [axes.plot(*(100 * np.array(points).T), **look)[0] for _, points, look in marks]
    x, y = np.concatenate([points for _, points, _ in marks]).T
    axes.set_xlim(80 * x.min(initial=1, where=x > 0), 125)  # first: a logarithmic axis warns of data that are all 0
    drawing.log_axis(axes.xaxis)
    axes.set_xlabel("connectivity (%), logarithmic")
    drawing.percent_axis(axes, "test accuracy", y)
    figure.legend(handles, labels, loc=drawing.LEGEND)
    said = [f"{label}: {', '.join(f'{percent(b)} at {percent(a)}' for a, b in points)}" for label, points, _ in marks]
    caption = "Test accuracy and connectivity after each run's last finished epoch."
    if published:
        sources = "; ".join(dict.fromkeys(entry.source for entry in published))
        network = "the same network" if all(same) else "the network as published, which not all of the runs have,"
        caption += f" Hollow marks are published results of {network} and data set: {sources}."
    alt = f"The plane of test accuracy and connectivity, one mark per run: accuracy at connectivity. {'; '.join(said)}."
    return drawing.picture("Accuracy and connectivity", alt, caption, figure)


def rewiring(runs: Sequence[SavedRun], labels: Sequence[str]) -> Picture | None:
    return _rewiring(_curves(runs, labels, "pruned", "regrown"), "all layers of each run")


def layer_rewiring(run: SavedRun) -> Picture | None:
    return _rewiring(_layer_curves(run, "pruned", "regrown"), "each layer")


def _rewiring(curves: Sequence[Curve], of_what: str) -> Picture | None:
    """None where nothing was ever pruned or regrown."""
    counts = [values for _, _, *both in curves for values in both]
    if not any(np.nan_to_num(values).any() for values in counts):
        return None
    figure, axes = drawing.curves(curves, sharey=True, titles=("pruned", "regrown"))
    axes[0].set_ylabel("connections per epoch")
    drawing.count_axis(axes[0], float(np.nanmax(np.concatenate(counts))))
    said = "; ".join(f"{label} {np.nansum(p):,.0f} and {np.nansum(r):,.0f}" for label, _, p, r in curves)
    return drawing.picture(
        "Connections pruned and regrown",
        f"Connections pruned (left) and regrown (right) against epoch, {of_what}. Sums over the epochs: {said}.",
        "Connections that were connected one epoch before and are not now (left), and the reverse (right).",
        figure,
    )


def neurons(run: SavedRun) -> Picture | None:
    curves, said = [], []
    for name in run.names_in("neurons"):
        rate, silent = (run.series("neurons", name, what) for what in ("firing_rate", "silent"))
        there = np.isfinite(rate)
        curves.append((short(name), run.series("epoch")[there], rate[there], 100 * silent[there]))
        if there.any():
            said.append(f"{short(name)} {rate[there][-1]:.4f} and {percent(silent[there][-1])}")
    if not curves:
        return None
    figure, axes = drawing.curves(curves)
    for panel, label in zip(axes, ("firing rate (spikes per time step)", "silent neurons (%)"), strict=True):
        panel.set(ylabel=label, ylim=(0, None))
    return drawing.picture(
        "Firing rates and silent neurons",
        f"Mean firing rate (left) and share of silent neurons (right) of each LIF layer against epoch. "
        f"At the last recording: {'; '.join(said)}.",
        "Left: spikes per neuron, image and time step, on the test set. Right: share of the neurons without a spike on "
        "the whole test set. At the epochs with a full recording (-i1).",
        figure,
    )
