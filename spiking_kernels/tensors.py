"""What a tensor must be before C works on its memory, checked here for every tensor that C gets."""

import torch
from torch import Tensor, nn

CPU = torch.device("cpu")
LARGEST = 1 << 30  # of a size that is an int in C, with room for sums of a few


class Unfit(ValueError):
    """An argument that a kernel cannot take. The text names it; nothing has been changed."""


def flaw(
    tensor: object, dtype: torch.dtype, shape: tuple[int, ...] | None = None, contiguous: bool = True
) -> str | None:
    """Why a kernel cannot work on a tensor's memory, in words that can follow its name; None if it can.

    It can where the memory holds what the tensor means, element by element: a plain tensor on the CPU,
    strided and contiguous, of the dtype, and of the shape unless that is None. With ``contiguous`` False,
    it will be after :func:`laid_out`.
    """
    if type(tensor) not in (Tensor, nn.Parameter):
        return f"is a {type(tensor).__name__}, not a plain tensor"
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return "belongs to a transform of torch.func, and has no memory of its own"
    if not tensor.is_cpu or tensor.layout is not torch.strided:
        return f"is {tensor.layout} on {tensor.device}, not torch.strided on the CPU"
    if tensor.dtype is not dtype:
        return f"is {tensor.dtype}, not {dtype}"
    if shape is not None and tensor.shape != shape:
        return f"has the shape {list(tensor.shape)}, not {list(shape)}"
    if contiguous and not tensor.is_contiguous():
        return "is not contiguous"
    if contiguous and tensor.is_neg():
        return "is the negative of what its memory holds"
    if tensor.numel() and (tensor._is_zerotensor() or not _has_memory(tensor)):
        return "has no memory"
    return None


def _has_memory(tensor: Tensor) -> bool:
    """Whether the storage is as large as the tensor says: it may have been resized."""
    if tensor.is_contiguous():
        reach = tensor.numel()
    else:
        reach = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.untyped_storage().nbytes() >= (tensor.storage_offset() + reach) * tensor.itemsize


def laid_out(tensor: Tensor) -> Tensor:
    """The tensor, or a copy whose memory holds its elements one after the other."""
    return tensor.resolve_neg().contiguous()


def check(tensors: dict[str, tuple[object, tuple[int, ...] | None]], dtype: torch.dtype = torch.float32) -> None:
    """Raises Unfit unless a kernel can work on the memory of all tensors, given with the shapes that they must have."""
    for name, (tensor, shape) in tensors.items():
        if reason := flaw(tensor, dtype, shape):
            raise Unfit(f"{name} {reason}")


def apart(written: dict[str, Tensor], read: dict[str, Tensor]) -> None:
    """Raises Unfit if a tensor that is written shares memory with another one; all are contiguous."""
    spans = sorted(
        (tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes, name)
        for name, tensor in (written | read).items()
        if tensor.nbytes
    )
    reached, owner = 0, ""
    for start, end, name in spans:
        if start < reached and (name in written or owner in written):
            raise Unfit(f"{name} shares memory with {owner}")
        if end > reached:
            reached, owner = end, name


def whole(name: str, value: object, least: int, most: int) -> int:
    """The value; raises Unfit unless it is a whole number from ``least`` to ``most``."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise Unfit(f"{name}={value!r} is not accepted: must be a whole number from {least} to {most}")
    return value


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Memory for a kernel to write to, whatever torch's default dtype and device are."""
    made = torch.empty(shape, dtype=dtype, device=CPU)
    if type(made) is not Tensor:  # a mode of torch's dispatcher is active
        raise Unfit(f"torch.empty makes a {type(made).__name__}, not a plain tensor")
    return made


def pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
