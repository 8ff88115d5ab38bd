"""The product of images with weights, which may take less time as that of the transposed matrices."""

import functools
import time
from collections.abc import Callable

import torch
from torch import Tensor

LARGE = 1 << 24  # multiplications: less is not divided among threads in a way that matters
ALIGNED = 64  # bytes, as torch allocates: elsewhere, the order of a sum may differ
ROUNDS = 20  # on a busy machine, fewer do not tell
SECONDS = 0.2  # large products have fewer rounds, but three
CLEARLY = 0.95  # of the time: less is not worth a transposed result


def linear(images: Tensor, weight: Tensor) -> Tensor:
    """images [N, K] times the transposed weight [H, K], on the CPU: [N, H], contiguous as it is or transposed.

    Libraries divide the two products among threads in different ways, and a quarter of the time may lie between them.
    The first call for some sizes tries both, and takes the transposed one only if it has the same numbers.
    """
    n, k, h = *images.shape, len(weight)
    fits = n * k * h >= LARGE and (images.data_ptr() | weight.data_ptr()) % ALIGNED == 0
    if fits and transposed_is_faster(n, k, h, torch.get_num_threads()):
        return (weight @ images.t()).t()
    return torch.nn.functional.linear(images, weight)


@functools.lru_cache(maxsize=64)
def transposed_is_faster(n: int, k: int, h: int, threads: int) -> bool:
    """Whether, for float32 matrices of these sizes, that of the transposed ones is clearly faster, and the same."""
    generator = torch.Generator("cpu").manual_seed(0)
    images, weight = (
        torch.randn(*size, generator=generator, dtype=torch.float32, device="cpu") for size in ((n, k), (h, k))
    )
    with torch.no_grad():
        return clearly_faster(lambda: (weight @ images.t()).t(), lambda: images @ weight.t())


def clearly_faster(one: Callable[[], Tensor], other: Callable[[], Tensor]) -> bool:
    """Whether one function clearly takes less time than the other and returns the same, to the bit."""
    if not torch.equal(one(), other()):
        return False
    seconds = {one: [], other: []}
    for done in range(ROUNDS):
        if done >= 3 and sum(map(sum, seconds.values())) > SECONDS:
            break
        for function, taken in seconds.items():
            start = time.perf_counter()
            function()
            taken.append(time.perf_counter() - start)
    return min(seconds[one]) < CLEARLY * min(seconds[other])
