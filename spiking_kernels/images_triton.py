"""The kernel of :mod:`spiking_kernels.images` for CUDA, in Triton."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 256  # pixels of a program


@triton.jit
def _lookup(images, index, matrices, table, out, D, H, W, C: tl.constexpr, BLOCK: tl.constexpr):
    """Some pixels of one image, in all channels; in int32, as in torch."""
    n = tl.program_id(0)
    pixel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x, y, exists = pixel % W, pixel // W, pixel < H * W
    matrix, image = matrices + 6 * n, tl.load(index + n + tl.zeros((BLOCK,), tl.int32))  # the same for each pixel
    from_x = (tl.load(matrix) * x + (tl.load(matrix + 1) * y + tl.load(matrix + 2))) >> 16
    from_y = (tl.load(matrix + 3) * x + (tl.load(matrix + 4) * y + tl.load(matrix + 5))) >> 16
    there = (image >= 0) & (image < D)
    inside = exists & there & (from_x >= 0) & (from_x < W) & (from_y >= 0) & (from_y < H)
    for c in tl.static_range(C):
        value = tl.load(images + (image * C + c) * H * W + from_y * W + from_x, inside, other=0)
        made = tl.load(table + 256 * c + value.to(tl.int32))
        to = out + (n.to(tl.int64) * H * W + pixel) * C + c
        tl.store(to, tl.where(there, made, float("nan")), exists)


def affine_lookup(images: Tensor, index: Tensor, matrices: Tensor, table: Tensor) -> Tensor:
    """See :func:`spiking_kernels.affine_lookup`, which has checked the tensors."""
    (many, channels, height, width), n = images.shape, len(index)
    out = torch.empty((n, height, width, channels), dtype=torch.float32, device=images.device)
    grid = n, triton.cdiv(height * width, BLOCK)
    if n and out.numel():
        with torch.cuda.device_of(images):  # Triton launches on the current device
            _lookup[grid](
                images, index, matrices, table, out, many, height, width, channels, BLOCK, enable_fp_fusion=True
            )
    return out.permute(0, 3, 1, 2)
