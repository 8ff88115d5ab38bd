"""The default dtype and device of torch: a caller may have set others, but this program needs these."""

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def torch_defaults() -> Iterator[None]:
    """Sets torch's own defaults, float32 and the CPU, while it is open; also a decorator of functions."""
    dtype = torch.get_default_dtype()
    # a device as the context costs time in every call of torch
    other_device = torch.get_default_device().type != "cpu"
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu") if other_device else contextlib.nullcontext():
            yield
    finally:
        torch.set_default_dtype(dtype)
