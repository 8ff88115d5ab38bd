"""One step of Grad Rewiring or of Deep R on a tensor of weights, and the random numbers that Deep R takes."""

import ctypes
import math
import weakref
from bisect import bisect_right
from typing import Any

import torch
from torch import Tensor

from spiking_kernels import build
from spiking_kernels.tensors import Unfit, apart, check, empty, whole

NOISE_GROUP = 512  # weights that share a sequence of normal numbers
MOST_WEIGHTS, MOST_SEEDS = 1 << 48, 1 << 64


class _Parameter(ctypes.Structure):
    """Parameter of updates.c."""

    TENSORS = ("param", "grad", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "sign", "theta", "step")
    _fields_ = [*((name, ctypes.c_void_p) for name in TENSORS), ("n", ctypes.c_int64), ("moderate", ctypes.c_int64)]


class Settings(ctypes.Structure):
    """Settings of updates.c, from those of the plain update; what is not given is 0."""

    ADAM = ("lr", "beta1", "beta2", "eps", "weight_decay", "direction")
    _fields_ = [(name, ctypes.c_double) for name in (*ADAM, "alpha", "mu", "l1", "T", "max_s", "theta_min")]

    def __init__(self, *, betas: tuple[float, float], maximize: bool, amsgrad: bool, **others: Any):
        beta1, beta2 = betas
        others = {name: float(value) for name, value in others.items() if value is not None}
        super().__init__(
            beta1=beta1, beta2=beta2, direction=-1 if maximize else 1, **{"theta_min": -math.inf, **others}
        )


class Memory:
    """The tensors that the steps of a parameter work on, as long as they stay as they are, and its last gradient.

    All are contiguous and of one shape: float32, the sign int8. The step, float32, has no axes.

    Raises:
        Unfit: a tensor is not accepted, or two share memory.
    """

    def __init__(
        self,
        param: Tensor,
        step: Tensor,
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
        max_exp_avg_sq: Tensor | None = None,
        *,
        sign: Tensor,
        theta: Tensor | None = None,
    ):
        named = dict(param=param, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq, sign=sign, step=step)
        named |= {k: x for k, x in (("max_exp_avg_sq", max_exp_avg_sq), ("theta", theta)) if x is not None}
        for name, tensor in named.items():
            shape = () if name == "step" else getattr(param, "shape", None)
            check(name, tensor, torch.int8 if name == "sign" else torch.float32, shape)
            _check_counted(name, tensor)
        apart(named, named.keys() - {"sign"})
        self.named, self.starts = named, sorted(tensor.data_ptr() for tensor in named.values())
        self.parameter = _Parameter(n=param.numel(), **{name: tensor.data_ptr() for name, tensor in named.items()})
        self.look: tuple[Any, ...] | None = ()  # of the gradient that was taken last
        self.taken: tuple[Any, ...] = ()  # that gradient, and how often it and the parameter had been changed

    def take(self, grad: Tensor) -> Any:
        """A pointer for C to the parameter, with this gradient.

        Raises:
            Unfit: the gradient is not accepted, or shares memory with what is written.
        """
        self.parameter.moderate = False
        if (look := _look(grad)) != self.look:
            check("grad", grad, torch.float32, self.named["param"].shape)
            _check_counted("grad", grad)
            start, size = grad.data_ptr(), grad.nbytes
            near = bisect_right(self.starts, start - size)
            if near < len(self.starts) and self.starts[near] < start + size:  # no tensor is larger than the gradient
                apart({**self.named, "grad": grad}, self.named.keys() - {"sign"})
            self.look, self.parameter.grad = look, start
        param = self.named["param"]
        torch.autograd.graph.increment_version(param)  # or a graph that needs it would not know
        self.taken = weakref.ref(grad), grad._version, param._version
        return ctypes.byref(self.parameter)

    def sums_are_finite(self, param: Tensor) -> bool:
        """Whether the last step saw that no sum of the gradient's or the new weights' elements can overflow.

        False for another parameter than this one, and where it or its gradient has been changed since, as torch counts
        changes: with each operation in place, but not through ``.data``.
        """
        if not self.parameter.moderate or param is not self.named["param"]:
            return False
        (grad, *versions), now = self.taken, param.grad
        return now is not None and grad() is now and versions == [now._version, param._version]


def _check_counted(name: str, tensor: Tensor) -> None:
    if tensor.is_inference():
        raise Unfit(f"{name} was made in inference mode: torch does not count its changes")


def _look(grad: Tensor) -> tuple[Any, ...] | None:
    """All that the checks of a gradient look at; None if it has no memory."""
    try:
        storage = grad.untyped_storage().nbytes()
        look = type(grad), grad.data_ptr(), storage, grad.dtype, grad.device, grad.shape, grad.stride()
        return *look, grad.is_neg(), grad.is_inference()
    except (AttributeError, RuntimeError):
        return None


def grad_rewiring_step(memory: Memory, grad: Tensor, settings: Settings) -> None:
    """One step of Grad Rewiring, in place.

    Raises:
        Unfit: the gradient is not accepted, or there is no theta; nothing has been changed.
    """
    if "theta" not in memory.named:
        raise Unfit("theta is missing")
    build.library().grad_rewiring_step(memory.take(grad), ctypes.byref(settings))


def deep_rewiring_draws(n: int, seed: int, probability: float) -> tuple[Tensor, Tensor]:
    """The random numbers that :func:`deep_rewiring_step` uses for n weights and a seed, in [0, 2^64).

    Returns:
        normal: float32 [n], standard normal. Soft Deep R gives a weight the number at its place; Deep R gives,
            in each group of NOISE_GROUP weights, the j-th active connection the j-th number of the group.
        chosen: bool [n], each True with the probability, in (0, 1]: of the connections to re-activate.

    Raises:
        Unfit: a number is not accepted.
    """
    whole("n", n, 0, MOST_WEIGHTS)
    whole("seed", seed, 0, MOST_SEEDS - 1)
    if not 0 < probability <= 1:
        raise Unfit(f"probability={probability!r} is not accepted: must be in (0, 1]")
    normal, chosen = empty(n), empty(n, dtype=torch.bool)
    build.library().deep_rewiring_draws(normal.data_ptr(), chosen.data_ptr(), n, seed, probability)
    return normal, chosen


def deep_rewiring_step(memory: Memory, grad: Tensor, settings: Settings, seed: int) -> None:
    """One step of Deep R, soft where there is theta, in place.

    With the numbers of :func:`deep_rewiring_draws`, every operation is rounded as in the plain update on a CPU
    with fused multiply-add, but for torch's square root, which is not always the nearest float.

    Args:
        seed: of the step's random numbers, in [0, 2^64).

    Raises:
        Unfit: the gradient or the seed is not accepted; nothing has been changed.
    """
    whole("seed", seed, 0, MOST_SEEDS - 1)
    build.library().deep_rewiring_step(memory.take(grad), ctypes.byref(settings), seed)
