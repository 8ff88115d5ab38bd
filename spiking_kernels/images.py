"""Training images made from those of a data set of one channel."""

import torch
from torch import Tensor

from spiking_kernels import build
from spiking_kernels.tensors import LARGEST, Unfit, check, empty, laid_out, whole


def affine_lookup(images: Tensor, index: Tensor, matrices: Tensor, table: Tensor) -> Tensor:
    """Images picked, moved and normalised in one pass.

    Args:
        images: uint8 [D, 1, H, W], contiguous.
        index: which to pick, int64 [N].
        matrices: their inverse maps in 16.16 fixed point, int32 [N, 6] (see training.data.RandomAffine.inverse).
        table: what a pixel becomes, float32 [256].

    Returns:
        float32 [N, 1, H, W].

    Raises:
        Unfit: a tensor is not accepted, or an index is not one of an image.
    """
    check("index", index, torch.int64, contiguous=False)
    check("matrices", matrices, torch.int32, contiguous=False)
    index, matrices = laid_out(index), laid_out(matrices)
    if index.dim() != 1:
        raise Unfit(f"index has the shape {list(index.shape)}, not [N]")
    check("matrices", matrices, torch.int32, (len(index), 6))
    check("table", table, torch.float32, (256,))
    check("images", images, torch.uint8)
    if images.dim() != 4 or images.shape[1] != 1:
        raise Unfit(f"images has the shape {list(images.shape)}, not [D, 1, H, W]")
    (many, _, height, width), n = images.shape, len(index)
    for name, size in (("N", n), ("H", height), ("W", width), ("H x W", height * width)):
        whole(name, size, 0, LARGEST)
    out = empty(n, 1, height, width)
    tensors = (images, index, matrices, table, out)
    if build.library().affine_lookup(*map(Tensor.data_ptr, tensors), many, n, height, width):
        raise Unfit(f"index must be of images that are there, from 0 to {many - 1}")
    return out
