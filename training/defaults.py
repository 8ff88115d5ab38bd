"""Torch's default dtype and device. A caller may have changed them; this program needs float32 and the CPU."""

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def torch_defaults() -> Iterator[None]:
    """A context manager or decorator: sets torch's defaults to float32 and the CPU, and restores them at the end."""
    dtype = torch.get_default_dtype()
    # a device context slows down every call of torch: enter one only if needed
    other_device = torch.empty(0).device.type != "cpu"  # get_default_device fails in torch 2.6 after one was taken back
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu") if other_device else contextlib.nullcontext():
            yield
    finally:
        torch.set_default_dtype(dtype)
