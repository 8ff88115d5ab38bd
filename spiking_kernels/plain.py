"""What torch computes in the place of a kernel."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def gradients(
    function: Callable[..., Tensor], inputs: Iterable[Tensor | None], needed: Iterable[bool], grad: Tensor
) -> list[Tensor | None]:
    """The gradients of those inputs of a function that need one, by torch, from that of what it returns.

    The function gets views of the inputs. Autograd calls the inputs' hooks later, for the gradients that this returns;
    asked for the gradients of the inputs themselves, it would call them here, too.
    """
    with torch.enable_grad():
        views = [x if x is None else x.view_as(x) for x in inputs]
        of = function(*views)
    wanted = [x for x, need in zip(views, needed, strict=True) if need]
    found = iter(torch.autograd.grad(of, wanted, grad, create_graph=torch.is_grad_enabled()))
    return [next(found) if need else None for need in needed]
