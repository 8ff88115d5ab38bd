"""Fused kernels for the networks and the rewiring optimizers: in C, compiled at first use, called through ctypes.

For GPUs there are kernels in Triton of the CIFAR-10 network's blocks and of the training images (docs/kernels.md).

They compute what the modules of SpikingJelly and torch compute, within rounding, in a fraction of the time
(benchmarks/RESULTS.md). Where there is no C compiler, :func:`unavailable` says so and the modules run. They work on
bare memory: they refuse what they cannot take with :class:`Unfit`, a ValueError, before anything is changed.

A file for each thing computed holds its interface, and beside it lies its C code: ``neurons``, ``images``, ``updates``,
``blocks``, ``convolutions``. To add a kernel, add such a pair; :data:`build.ARGUMENTS` names the C functions.
``products`` has no C: it chooses between two ways to multiply in torch.
"""

from spiking_kernels.build import Unavailable, unavailable
from spiking_kernels.images import affine_lookup
from spiking_kernels.neurons import MAX_T, lif_linear_lif, lif_linear_lif_learn
from spiking_kernels.tensors import Unfit
from spiking_kernels.updates import (
    NOISE_GROUP,
    Memory,
    Settings,
    deep_rewiring_draws,
    deep_rewiring_step,
    grad_rewiring_step,
)
