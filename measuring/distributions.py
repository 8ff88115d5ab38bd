"""Histograms of a layer's values."""

import torch
from torch import Tensor

BINS = 64


def distribution(values: Tensor) -> dict[str, list]:
    """A histogram from the smallest to the largest value: ``edges``, one more than bins, and ``counts``."""
    values = values.detach().flatten()
    low, high = (float(end) for end in values.aminmax())
    if low == high:
        return {"edges": [low, high], "counts": [values.numel()]}
    bins = ((values - low) * (BINS / (high - low))).long().clamp_(0, BINS - 1)
    edges = [low + (high - low) * i / BINS for i in range(BINS)]
    return {"edges": [*edges, high], "counts": torch.bincount(bins, minlength=BINS).tolist()}
