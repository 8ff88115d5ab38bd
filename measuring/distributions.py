"""Histograms of a layer's values."""

import math

import torch
from torch import Tensor

BINS = 64


def distribution(values: Tensor) -> dict[str, list]:
    """A histogram from the smallest to the largest value: ``edges``, one more than bins, and ``counts``.

    ``values`` have any shape and dtype; there are up to 64 bins of equal width.

    Raises:
        ValueError: there is no value, or one is not finite.
    """
    values = values.detach().flatten()
    if values.dtype.itemsize < 4:  # float16 and bfloat16 would not tell the bins apart
        values = values.float()
    if not values.numel():
        raise ValueError("values is not accepted: it is empty")
    low, high = (float(end) for end in values.aminmax())
    if not math.isfinite(high - low):
        raise ValueError(f"values is not accepted: its values are from {low} to {high}, and must be finite")
    if low == high:
        return {"edges": [low, high], "counts": [values.numel()]}
    bins = ((values - low) * (BINS / (high - low))).long().clamp_(0, BINS - 1)
    edges = [low + (high - low) * i / BINS for i in range(BINS)]
    return {"edges": [*edges, high], "counts": torch.bincount(bins, minlength=BINS).tolist()}
