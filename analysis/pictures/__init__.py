"""The pictures of a report: matplotlib figures as SVG, which stays sharp and small and follows a page's dark theme.

Numbers of epochs come unchanged from ``results.jsonl``, weights from the checkpoint.
"""

from collections.abc import Sequence

import matplotlib
from torch import Tensor

from analysis.pictures import results, weights
from analysis.pictures.drawing import STYLE, Picture, short
from analysis.runs import SavedRun


def overall(runs: Sequence[SavedRun], labels: Sequence[str]) -> list[Picture]:
    """The pictures that compare runs of one experiment and data set; only runs with results count."""
    pairs = [(run, short(label)) for run, label in zip(runs, labels, strict=True) if run.epochs]
    if not pairs:
        return []
    draw = (results.accuracy, results.connectivity, results.plane, results.rewiring)
    with matplotlib.rc_context(STYLE):
        made = [picture(*zip(*pairs, strict=True)) for picture in draw]
    return [picture for picture in made if picture]


def of_run(run: SavedRun, epoch: str, tensors: dict[str, Tensor]) -> list[Picture]:
    """The pictures of one run: of its results, and of its checkpoint's weights after ``epoch``, if any."""
    with matplotlib.rc_context(STYLE):
        draw = (results.layers, results.layer_rewiring, results.neurons, weights.distributions)
        made = [picture(run) for picture in draw]
        made += [weights.connectivity_map(epoch, tensors), weights.receptive_fields(epoch, tensors)]
    return [picture for picture in made if picture]
