"""Fused CPU kernels for the MNIST network and the rewiring optimizers: compiled at first use, called through ctypes.

They compute what the modules of SpikingJelly and torch compute, within rounding, in a fraction of the
time (benchmarks/RESULTS.md); where there is no C compiler, :func:`available` says so and the modules run.
``cpu.c`` explains how they work. They work on bare memory: what they cannot take is refused with
:class:`Unfit`, a ValueError, before anything is changed.
"""

from spiking_kernels.build import Unavailable as Unavailable
from spiking_kernels.build import available as available
from spiking_kernels.images import affine_lookup as affine_lookup
from spiking_kernels.neurons import MAX_T as MAX_T
from spiking_kernels.neurons import lif_linear_lif as lif_linear_lif
from spiking_kernels.tensors import Unfit as Unfit
from spiking_kernels.updates import NOISE_GROUP as NOISE_GROUP
from spiking_kernels.updates import deep_rewiring_draws as deep_rewiring_draws
from spiking_kernels.updates import deep_rewiring_step as deep_rewiring_step
from spiking_kernels.updates import grad_rewiring_step as grad_rewiring_step
