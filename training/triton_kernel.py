"""A small Triton kernel, to find out whether this machine can build and start one."""

import torch
import triton
import triton.language as tl


@triton.jit
def _copy(source, target):
    tl.store(target, tl.load(source))


def run(device: torch.device) -> None:
    """Builds the kernel and its launcher, and starts it; raises what Triton raises."""
    _copy[(1,)](torch.ones(1, device=device), torch.empty(1, device=device))
