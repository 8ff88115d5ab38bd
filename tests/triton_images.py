"""Triton's kernel for training images without a GPU, in a process of its own: run by its interpreter, or compiled.

python triton_images.py values              with TRITON_INTERPRET=1: compare with torch's operations
python triton_images.py compile CAPABILITY...  compile for compute capabilities such as 90
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from spiking_kernels import images_triton
from training import data

FAR = data.RandomAffine(90, (0.5, 0.5), (0.3, 1.2))  # much of the image leaves the picture
CASES = [  # channels, height, width, augmentation
    (3, 32, 32, data.RandomCropFlip(4)),
    (1, 28, 28, data.RandomAffine(15, (0.1, 0.1), (0.8, 1.2))),
    (2, 17, 23, FAR),
    (3, 5, 7, data.RandomCropFlip(9)),
    (1, 1, 1, data.RandomCropFlip(1)),
]


def values():
    for channels, height, width, augmentation in CASES:
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (20, channels, height, width), generator=generator, dtype=torch.uint8)
        mean, std = (0.3, 0.4, 0.5)[:channels], (0.2, 0.21, 0.25)[:channels]
        normalisation = data.Normalisation(mean, std, torch.device("cpu"))
        index, drawn = torch.randperm(20, generator=generator)[:9], augmentation.draw(images[:9], generator)
        expected = normalisation(augmentation.apply(images[index], drawn))
        matrices = augmentation.matrices(drawn, width)
        made = images_triton.affine_lookup(images, index, matrices, normalisation.table())
        assert torch.equal(made, expected)
        assert made.is_contiguous(memory_format=torch.channels_last)
        index[2], index[3] = 20, -1  # of no image
        made = images_triton.affine_lookup(images, index, matrices, normalisation.table())
        assert made[2:4].isnan().all()
        assert torch.equal(made[4:], expected[4:])


def compile_all(capability):
    types = {"images": "*u8", "index": "*i64", "matrices": "*i32", "table": "*fp32", "out": "*fp32"}
    for channels in (1, 3):
        constants = dict(C=channels, BLOCK=images_triton.BLOCK)
        names = [parameter.name for parameter in images_triton._lookup.params]
        signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
        source = ASTSource(images_triton._lookup, signature, constants)
        built = triton.compile(source, target=GPUTarget("cuda", capability, 32))
        assert built.asm["cubin"]
        assert f".target sm_{capability}" in built.asm["ptx"]


if __name__ == "__main__":
    what, *which = sys.argv[1:]
    if what == "values":
        values()
    else:
        for capability in which:
            compile_all(int(capability))
