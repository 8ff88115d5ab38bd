"""Training images made from those of a data set: in C on the CPU, for one channel, and in Triton on CUDA."""

import torch
from torch import Tensor

from spiking_kernels import build
from spiking_kernels.tensors import CPU, LARGEST, Unfit, check, empty, laid_out, whole


def affine_lookup(images: Tensor, index: Tensor, matrices: Tensor, table: Tensor) -> Tensor:
    """Images picked, moved and normalised in one pass.

    Args:
        images: uint8 [D, C, H, W], contiguous; C is 1 on the CPU.
        index: which to pick, int64 [N].
        matrices: their inverse maps in 16.16 fixed point, int32 [N, 6] (see training.data.RandomAffine.inverse).
        table: what a pixel becomes, float32 [256 C]: 256 values for each channel.

    Returns:
        float32 [N, C, H, W], channels-last in memory. On CUDA, an index that is none of an image's gives NaN.

    Raises:
        Unfit: a tensor is not accepted, or, on the CPU, an index is not one of an image.
    """
    on_gpu = getattr(getattr(images, "device", CPU), "type", None) == "cuda"
    device = images.device if on_gpu else CPU
    check("index", index, torch.int64, contiguous=False, device=device)
    if index.dim() != 1:
        raise Unfit(f"index has the shape {list(index.shape)}, not [N]")
    check("matrices", matrices, torch.int32, (len(index), 6), contiguous=False, device=device)
    index, matrices = laid_out(index), laid_out(matrices)
    check("images", images, torch.uint8, device=device)
    if images.dim() != 4 or (images.shape[1] != 1 and not on_gpu):
        raise Unfit(f"images has the shape {list(images.shape)}, not [D, {'C' if on_gpu else 1}, H, W]")
    (many, channels, height, width), n = images.shape, len(index)
    check("table", table, torch.float32, (256 * channels,), device=device)
    for name, size in (("N", n), ("H", height), ("W", width), ("H x W", height * width)):
        whole(name, size, 0, LARGEST)
    if on_gpu:
        from spiking_kernels import images_triton

        return images_triton.affine_lookup(images, index, matrices, table)
    out = empty(n, 1, height, width)
    tensors = (images, index, matrices, table, out)
    if build.library().affine_lookup(*map(Tensor.data_ptr, tensors), many, n, height, width):
        raise Unfit(f"index must be of images that are there, from 0 to {many - 1}")
    return out
