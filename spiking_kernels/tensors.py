"""What a tensor must be before C works on its memory. Every tensor that C gets is checked here."""

from collections.abc import Collection
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor

CPU = torch.device("cpu")
PLAIN = (Tensor, nn.Parameter)
LARGEST = 1 << 30  # of a size that is an int in C, with room for sums of a few


class Unfit(ValueError):
    """A kernel cannot take an argument, or does not compute what a network does. The text says why.

    Nothing has been changed.
    """


def flaw(
    tensor: object,
    dtype: torch.dtype,
    shape: tuple[int, ...] | None = None,
    contiguous: bool = True,
    device: torch.device = CPU,
) -> str | None:
    """Why a kernel cannot work on a tensor's memory, in words that can follow its name; None if it can.

    The memory must hold the elements that the tensor shows, one after the other: a plain tensor on the device,
    strided and contiguous, of the dtype, and of the shape unless that is None. With ``contiguous`` False it
    need only be so after :func:`laid_out`.
    """
    if type(tensor) not in PLAIN:
        return f"is a {type(tensor).__name__}, not a plain tensor"
    if is_functorch_wrapped_tensor(tensor):
        return "belongs to a transform of torch.func, and has no memory of its own"
    if tensor.device != device or tensor.layout is not torch.strided:
        place = "the CPU" if device == CPU else device
        return f"is {tensor.layout} on {tensor.device}, not torch.strided on {place}"
    if tensor.dtype is not dtype:
        return f"is {tensor.dtype}, not {dtype}"
    if shape is not None and tensor.shape != shape:
        return f"has the shape {list(tensor.shape)}, not {list(shape)}"
    reach = tensor.numel()
    if not tensor.is_contiguous():
        if contiguous:
            return "is not contiguous"
        reach = reach and 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    if contiguous and tensor.is_neg():
        return "is the negative of what its memory holds"
    if reach and (
        tensor._is_zerotensor()
        or tensor.untyped_storage().nbytes() < (tensor.storage_offset() + reach) * tensor.itemsize  # it was resized
    ):
        return "has no memory"
    return None


def check(
    name: str,
    tensor: object,
    dtype: torch.dtype,
    shape: tuple[int, ...] | None = None,
    contiguous: bool = True,
    device: torch.device = CPU,
) -> None:
    """Raises Unfit, with the tensor's name, for a :func:`flaw`."""
    if reason := flaw(tensor, dtype, shape, contiguous, device):
        raise Unfit(f"{name} {reason}")


def laid_out(tensor: Tensor, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
    """The tensor, or a copy whose memory holds its elements one after the other."""
    return tensor.resolve_neg().contiguous(memory_format=memory_format)


def apart(tensors: dict[str, Tensor], written: Collection[str]) -> None:
    """Raises Unfit if one of the tensors that are written shares memory with another one; all are contiguous."""
    spans = sorted([(tensor.data_ptr(), tensor.nbytes, name) for name, tensor in tensors.items()])
    reached, owner = 0, ""
    for start, size, name in spans:
        if size and start < reached and (name in written or owner in written):
            raise Unfit(f"{name} shares memory with {owner}")
        if start + size > reached:
            reached, owner = start + size, name


def whole(name: str, value: object, least: int, most: int) -> None:
    """Raises Unfit unless a value is a whole number from ``least`` to ``most``."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise Unfit(f"{name}={value!r} is not accepted: must be a whole number from {least} to {most}")


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Memory for a kernel to write to, whatever torch's default dtype and device are."""
    made = torch.empty(shape, dtype=dtype, device=CPU)
    if type(made) is not Tensor:  # a mode of torch's dispatcher is active
        raise Unfit(f"torch.empty makes a {type(made).__name__}, not a plain tensor")
    return made


def scratch(*sizes: int) -> tuple[object, list[int]]:
    """Memory for so many floats each, in one tensor, as each takes time; and where they begin, while that is kept."""
    memory = empty(sum(sizes))
    start = memory.data_ptr()
    return memory, [start + 4 * place for place in accumulate(sizes[:-1], initial=0)]


def pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
