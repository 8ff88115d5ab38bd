"""The default dtype and device of torch: a caller may have set others than this program is written for."""

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def torch_defaults() -> Iterator[None]:
    """Float32 and the CPU while it is open, as torch has them by itself; also a decorator of functions."""
    dtype = torch.get_default_dtype()
    # a device as the context costs time in every call of torch
    other_device = torch.get_default_device().type != "cpu"
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu") if other_device else contextlib.nullcontext():
            yield
    finally:
        torch.set_default_dtype(dtype)
