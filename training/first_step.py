"""The first steps on a GPU: what is compiled or captured has to do what the plain step does."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from training.errors import Refusal

SAMPLES = 1000  # weights of each parameter that are compared
# Sums on a GPU may add in another order each time, and a spike may then come or stay away. A step that is not taken, or
# taken with another learning rate or batch, changes nearly all weights by another amount.
LOSS, CHANGE, SHARE = 1e-2, 1e-2, 0.9

Taken = tuple[Tensor, Tensor]  # what a step returns: the loss, and the number of correct predictions


class Saved:
    """A copy, on the CPU, of all that a training step changes.

    Args:
        tensors: parameters, buffers and counters.
        optimizers: their states are copied as well.
        device: its random numbers, and those of the CPU, continue after :meth:`restore` as they would have here.
    """

    def __init__(self, tensors: Iterable[Tensor], optimizers: list[Optimizer], device: torch.device):
        self.device, self.optimizers = device, optimizers
        self.tensors = [(tensor, _copy(tensor)) for tensor in tensors]
        self.states = [
            {param: {key: _copy(value) for key, value in state.items()} for param, state in optimizer.state.items()}
            for optimizer in optimizers
        ]
        self.random = torch.get_rng_state()
        self.random_on_gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    @torch.no_grad()
    def restore(self) -> None:
        """Puts everything back, into the same tensors: a captured graph may use them."""
        for tensor, copy in self.tensors:
            tensor.copy_(copy)
        for optimizer, states in zip(self.optimizers, self.states, strict=True):
            for param in [param for param in optimizer.state if param not in states]:
                del optimizer.state[param]
            for param, state in states.items():
                present = optimizer.state[param]
                for key in [key for key in present if key not in state]:
                    del present[key]
                for key, value in state.items():
                    if isinstance(present.get(key), Tensor):
                        present[key].copy_(value)
                    else:
                        present[key] = value
        torch.set_rng_state(self.random)
        if self.random_on_gpu is not None:
            torch.cuda.set_rng_state(self.random_on_gpu, self.device)


def try_out(
    plain: Callable[[], Taken], fast: Callable[[], Taken], saved: Saved, weights: list[Tensor]
) -> tuple[Taken, str | None]:
    """Takes a step plainly, takes it back, and takes it by the way that is tried out.

    Returns:
        What the step returned, and None. If ``fast`` fails or does not do the same, the step has been taken plainly,
        and the second value says what is wrong.

    Raises:
        torch.OutOfMemoryError: the plain step would not have room either, with smaller batches both do.
        Refusal: ``fast`` has failed in such a way that no step can be taken after it.
    """
    before = _sample(weights)
    expected, after = _numbers(plain()), _sample(weights)
    saved.restore()
    try:
        taken = fast()
        flaw = difference(expected, _numbers(taken), before, after, _sample(weights))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        flaw = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    if flaw is None:
        return taken, None
    try:
        saved.restore()
        if saved.device.type == "cuda":
            torch.cuda.empty_cache()
        return plain(), flaw
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # before torch 2.10 or so, a capture that CUDA breaks off leaves torch in its midst
        reason = " ".join(str(error).split())[:200]
        raise Refusal(
            f"argument --compile: the fast step failed ({flaw}), and this process cannot train after that ({reason}): "
            "run again with --no-compile"
        ) from None


def difference(
    expected: tuple[float, int], found: tuple[float, int], before: Tensor, after: Tensor, found_after: Tensor
) -> str | None:
    """What a step has done otherwise than the plain one, in words; None if nothing, within rounding.

    Args:
        expected, found: the loss and the number of correct predictions, plainly and by the other way.
        before, after, found_after: the same weights before the step, after the plain one and after the other.
    """
    (loss, _), (found_loss, _) = expected, found
    if not torch.isclose(torch.tensor(found_loss), torch.tensor(loss), rtol=LOSS, atol=0.0, equal_nan=True):
        return f"its loss is {found_loss:.6g}, not {loss:.6g}"
    room = CHANGE * (after - before).abs() + 4 * torch.finfo(torch.float32).eps * after.abs()
    same = ((found_after - after).abs() <= room) | (found_after.isnan() & after.isnan())
    if same.double().mean() < SHARE:
        return f"{float((~same).double().mean()):.0%} of the weights differ".replace("%", " %")
    return None


def _copy(value: Any) -> Any:
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value


def _numbers(taken: Taken) -> tuple[float, int]:
    return float(taken[0]), int(taken[1])


def _sample(weights: list[Tensor]) -> Tensor:
    """Some weights of each parameter, float64 on the CPU."""
    flat = [weight.detach().flatten() for weight in weights]
    return torch.cat([one[:: max(1, one.numel() // SAMPLES)].double().cpu() for one in flat])
