"""What the optimizers need to train on several ranks: weights that are sharded, and a check that the ranks agree.

A parameter of torch.distributed.fsdp.fully_shard is a DTensor: it has the shape of the whole weight, and each rank
holds a part. The updates work on that part, with the random numbers and the counts of the whole weight.
"""

import hashlib
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "checksum",
    "default_generator_state",
    "digest",
    "disagreement",
    "draw_like",
    "is_partial",
    "is_sharded",
    "local",
    "several_ranks",
    "sum_of_all",
    "sums",
]

# -- sharded tensors -------------------------------------------------------------------------------


def is_sharded(tensor: Any) -> bool:
    """Whether a tensor is a DTensor."""
    if type(tensor) in (Tensor, nn.Parameter):
        return False
    module = sys.modules.get("torch.distributed.tensor")  # loaded by whoever made one; that takes a second
    return module is not None and isinstance(tensor, module.DTensor)


def is_partial(tensor: Tensor) -> bool:
    """Whether the ranks hold summands of a tensor: an update of each is not one of the sum."""
    return is_sharded(tensor) and any(placement.is_partial() for placement in tensor.placements)


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor, in the same memory."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def draw_like(param: Tensor, dtype: torch.dtype, draw: Callable[[Tensor], Tensor]) -> Tensor:
    """Random numbers for what this rank holds of a parameter.

    Args:
        draw: fills a tensor with them. It gets one of the whole shape, so that each weight gets the same number
            however the parameter is sharded.
    """
    if not is_sharded(param):
        return draw(torch.empty_like(param, dtype=dtype))
    from torch.distributed.tensor import DTensor, Replicate

    whole = draw(torch.empty_strided(param.shape, param.stride(), dtype=dtype, device=param.device))
    mesh = param.device_mesh
    whole = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)  # taking a part sends nothing
    return whole.redistribute(placements=param.placements).to_local().clone()


def sums(of: Tensor, *counts: Tensor) -> tuple[Tensor, ...]:
    """Counts over a whole tensor, from those over what each rank holds of it; by an all-reduce if it is sharded."""
    if not is_sharded(of):
        return counts
    from torch.distributed.tensor import DTensor, Partial, Replicate

    placements = [Replicate() if placement.is_replicate() else Partial() for placement in of.placements]
    return DTensor.from_local(torch.stack(counts), of.device_mesh, placements, run_check=False).full_tensor().unbind()


def sum_of_all(counts: list[Tensor], of: list[Tensor]) -> int:
    """The sum of the counts over some tensors: one all-reduce for all that are sharded alike."""
    alike = defaultdict(list)
    for count, tensor in zip(counts, of, strict=True):
        alike[(tensor.device_mesh, tuple(tensor.placements)) if is_sharded(tensor) else None].append((count, tensor))
    total = 0
    for some in alike.values():
        first, tensor = some[0]
        total += int(sums(tensor, sum(count.to(first.device) for count, _ in some))[0])
    return total


# -- do the ranks agree? ---------------------------------------------------------------------------


def several_ranks() -> bool:
    """Whether a process group of torch.distributed with more than one rank has been initialised."""
    dist = torch.distributed
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def checksum(tensor: Tensor) -> int | str:
    """Of a tensor's bits; of a sharded one how it is sharded, as other ranks have other weights."""
    if is_sharded(tensor):
        return f"{tensor.device_mesh} {tensor.placements}"
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize]
    return int(tensor.detach().view(bits).sum(dtype=torch.int64))


def digest(content: bytes | Tensor) -> str:
    """Of bytes, or of a generator's state."""
    return hashlib.sha256(bytes(content.tolist()) if isinstance(content, Tensor) else content).hexdigest()


def default_generator_state(device: torch.device) -> Tensor:
    return torch.get_rng_state() if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)


_compared: Counter[str] = Counter()  # how often this process has asked, by subject


def disagreement(subject: str, facts: dict[str, dict[str, Any]]) -> tuple[list[int], str, list[str]] | None:
    """Compares this rank with the first one that has come to its own call, of the same number, about the subject.

    That goes through the store of the process group, not through a collective: no rank waits for another, so that none
    hangs if some never call. But the first one hears nothing; the others have to end the run.

    Args:
        subject: ranks with different ones are not compared.
        facts: by kind and name; plain data.

    Returns:
        The two ranks, the first kind of facts that differ, and their names; None if nothing differs.
    """
    key, rank = f"rewiring/{digest(subject.encode())}/{_compared[subject]}", torch.distributed.get_rank()
    _compared[subject] += 1
    own = json.dumps({"rank": rank, "facts": facts})
    try:
        store = torch.distributed.distributed_c10d._get_default_store()
        first = json.loads(store.compare_set(key, "", own))  # sets it if it is new
    except (AttributeError, RuntimeError):  # MPI has no store; or the process that serves it has ended
        return None
    for kind, values in json.loads(own)["facts"].items():
        others = first["facts"][kind]
        if names := [name for name in {**others, **values} if others.get(name) != values.get(name)]:
            return sorted((first["rank"], rank)), kind, names
    return None
