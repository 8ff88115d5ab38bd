"""Ranks: the processes of one run, started by torchrun. Each takes its share of every batch.

Together they train the very run of one process, within rounding: batches, augmentation and noise are drawn as a whole
on every rank, batch statistics and gradients are those of the whole batch. The first rank prints, records and saves.
"""

import atexit
import contextlib
import io
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor

from sharding import checksum
from training.errors import DivergedError, Interrupted, RankLost, Refusal, status_of

VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE")  # which torchrun sets, besides the address of the first rank
TIMEOUT = timedelta(minutes=15)  # for a rank that does not answer; that one has ended is known at once
LINGER = timedelta(seconds=20)

Result = TypeVar("Result")


@contextlib.contextmanager
def joined() -> Iterator["Ranks | None"]:
    """The ranks of the run, once all are there; None for a run of one process.

    All but the first are silent. A failure that all ranks have ends them with its exit status; the first one tells it.
    The process of a rank later ends with the status that the run had, 0 unless it failed: see :func:`_end`.

    Raises:
        RankLost: the ranks do not find each other.
        Refusal: the environment says that there are ranks, but not as torchrun does.
    """
    if not all(name in os.environ for name in VARIABLES) or os.environ["WORLD_SIZE"] == "1":
        yield None
        return
    ranks = Ranks(*map(_whole_number, VARIABLES))
    _whole_number("MASTER_PORT")
    if not os.environ.get("MASTER_ADDR"):
        raise Refusal("the environment has RANK and WORLD_SIZE, but no MASTER_ADDR: start the ranks with torchrun")
    import torch.distributed as dist

    nccl = torch.cuda.is_available() and dist.is_nccl_available()
    backend = "cpu:gloo,cuda:nccl" if nccl else "gloo"  # the options refuse a GPU without NCCL
    try:
        with _all_there():
            dist.init_process_group(backend, timeout=TIMEOUT)
        with contextlib.nullcontext() if ranks.first else _silence():
            yield ranks
    except SystemExit as end:  # as --help does, on all ranks
        dist.destroy_process_group()
        atexit.register(_end, end.code or 0)
        raise
    except BaseException as error:
        if not ranks.first and isinstance(error, Refusal | DivergedError | Interrupted):
            ranks.outlast_the_first()
            os._exit(error.status)
        atexit.register(_end, status_of(error))  # once the failure is told
        raise
    dist.destroy_process_group()  # not after a failure: what the group still waits for may never come
    atexit.register(_end, 0)


def _end(status: int) -> None:
    """Ends the process at once, at its end. An orderly end aborts now and then, after a run that went well too.

    Probably where a thread of the process group still waits, or asks for Python's lock once Python is on its way out.
    """
    if status == 0 and hasattr(sys, "last_type"):  # an error of what came after the run
        status = 1
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # nobody reads it any more, or it is closed
            stream.flush()
    os._exit(status)


def _whole_number(name: str) -> int:
    """The value of one of the variables that torchrun sets."""
    text = os.environ.get(name, "")
    if not text.isdecimal():
        raise Refusal(f"the environment has {name}={text!r}, not a whole number: start the ranks with torchrun")
    return int(text)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()) as out, warnings.catch_warnings():
        out.write = len  # keeps nothing
        warnings.simplefilter("ignore", UserWarning)
        yield


@contextlib.contextmanager
def _all_there() -> Iterator[None]:
    """Turns the error of a message between ranks into RankLost."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise RankLost(
            "another rank of the run has ended or does not answer; what is saved is unchanged, and the same command "
            f"goes on from there ({' '.join(str(error).split()):.200})"
        ) from None


@dataclass(frozen=True)
class Ranks:
    """A rank among ``size`` ranks. All must call the same methods in the same order.

    Raises:
        RankLost: in any method, another rank has ended or does not answer.
    """

    rank: int
    local_rank: int  # on its machine
    size: int

    @property
    def first(self) -> bool:
        return self.rank == 0

    def share(self, n: int) -> slice:
        """The rank's share of n things in order."""
        return slice(n * self.rank // self.size, n * (self.rank + 1) // self.size)

    # -- at the start --------------------------------------------------------------------------------

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Waits until all ranks have done the block. If one of them refuses, all of them do."""
        own = None
        try:
            yield
        except Refusal as refusal:
            own = str(refusal)
        for rank, text in enumerate(self._gather(own)):
            if text is not None:
                raise Refusal(f"rank {rank}: {text}" if rank else text)

    def first_then_others(self, function: Callable[[], Result]) -> Result:
        """Calls a function on the first rank, then on the first of each machine, then on the others.

        So the others find what the first one has downloaded. If one refuses, all do.
        """
        turn = 0 if self.first else 1 if self.local_rank == 0 else 2
        for now in range(3):
            with self.together():
                if now == turn:
                    result = function()
        return result

    def check_same(self, what: str, value: Any) -> None:
        """Raises Refusal unless the value is the same on all ranks."""
        values = self._gather(value)
        for rank, other in enumerate(values):
            if other != values[0]:
                raise Refusal(f"{what}: rank {rank} has {other}, rank 0 {values[0]}")

    def from_first(self, value: Result) -> Result:
        """The value that the first rank has."""
        import torch.distributed as dist

        values = [value]
        with _all_there():
            dist.broadcast_object_list(values, device=torch.device("cpu"))
        return values[0]

    def _gather(self, value: Any) -> list[Any]:
        import torch.distributed as dist

        values = [None] * self.size
        with _all_there():
            dist.all_gather_object(values, value)
        return values

    # -- during a step -------------------------------------------------------------------------------

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of all ranks' tensors, bitwise the same on all of them. It replaces the tensor."""
        import torch.distributed as dist

        with _all_there():
            dist.all_reduce(tensor)
        return tensor

    def pooled(self, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and biased variance over equally large shares, from those of each rank's share."""
        mean = mean.double()
        moments = self.sum(torch.stack([mean, variance.double() + mean.square()])) / self.size
        mean, square = moments
        return mean.float(), (square - mean.square()).clamp_(min=0).float()

    def largest(self, *numbers: int) -> list[int]:
        """The largest of the ranks' numbers, one by one. On a GPU, the host does not wait for the device."""
        import torch.distributed as dist

        most = torch.tensor(numbers, dtype=torch.int64, device="cpu")
        with _all_there():
            dist.all_reduce(most, dist.ReduceOp.MAX)
        return most.tolist()

    def check_in_step(self, tensors: Iterable[Tensor]) -> None:
        """Raises DivergedError unless tensors have the same bits on all ranks; compares checksums."""
        checksums = [checksum(tensor) for tensor in tensors]
        most = self.largest(*checksums, *(-number for number in checksums))
        if any(a != -b for a, b in zip(most[: len(checksums)], most[len(checksums) :], strict=True)):
            raise DivergedError("the ranks no longer have the same weights or random numbers; the checkpoint is older")

    # -- at the end ----------------------------------------------------------------------------------

    def outlast_the_first(self) -> None:
        """Waits until the first rank has ended, at most for a while: torchrun ends the others after one has failed."""
        import torch.distributed as dist

        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        with contextlib.suppress(RuntimeError):  # the first one does not answer
            dist.all_reduce(torch.zeros(1, device="cpu"), async_op=True).wait(LINGER)


class Average:
    """Makes the gradients of the ranks' shares those of the whole batch, by one sum over all ranks.

    The gradients of the parameters become views of one buffer.
    """

    def __init__(self, ranks: Ranks, parameters: Sequence[Tensor]):
        self.ranks, self.parameters = ranks, parameters
        sizes = [parameter.numel() for parameter in parameters]
        self.buffer = torch.zeros(sum(sizes) + 2, dtype=parameters[0].dtype, device=parameters[0].device)
        *parts, self.numbers = self.buffer.split([*sizes, 2])
        self.gradients = [part.view(parameter.shape) for part, parameter in zip(parts, parameters, strict=True)]

    @torch.no_grad()
    def __call__(self, loss: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """The loss and the number of correct predictions of the whole batch, from those of the share."""
        both = [(p, mine) for p, mine in zip(self.parameters, self.gradients, strict=True) if p.grad is not None]
        torch._foreach_copy_([mine for _, mine in both], [parameter.grad for parameter, _ in both])
        torch.stack([loss.to(self.numbers), right.to(self.numbers)], out=self.numbers)
        self.ranks.sum(self.buffer)
        self.buffer[:-1] /= self.ranks.size
        for parameter, mine in both:
            parameter.grad = mine
        return self.numbers[0], self.numbers[1].to(right.dtype)
