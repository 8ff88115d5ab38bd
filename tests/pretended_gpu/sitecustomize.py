"""Python runs this at the start of each process on the pretended GPU (PYTHONPATH leads here; see pretended_runs.py).

Kernels do nothing there, so whatever would make sense of their results is patched: it still waits for the device and
launches what it launches, but gets made-up numbers. The calls to the driver are counted from one moment to the next,
each a period with a name: "start", "step 0", "step 1", ..., "evaluation", "after evaluation".
"""

import atexit
import ctypes
import functools
import itertools
import json
import os
import sys
import traceback
from pathlib import Path

LOGS = Path(os.environ["PRETENDED_LOGS"])  # a file of each process with what its driver reports
IMAGES = int(os.environ["PRETENDED_IMAGES"])  # to train on; there are TEST_IMAGES to test on
TEST_IMAGES = 50
os.environ["FAKE_LOG"] = str(LOGS / f"{os.getpid()}.log")  # the driver reads it when it has something to say
os.environ["FAKE_EAGER"] = "1"  # it reports kernels by their names, too


class Periods:
    """Has the driver report at the end of each period."""

    def __init__(self) -> None:
        self.driver, self.title = ctypes.CDLL("libcuda.so.1"), "start"
        self.driver.fake_reset()

    def begin(self, title: str) -> None:
        self.driver.fake_report(self.title.encode())
        self.driver.fake_reset()
        self.title = title


def pretend_operations() -> None:
    """Operations that need cuDNN, or a kernel's result: they launch as much, and wait for it, but make something up.

    Convolutions give tensors of the right sizes in cuDNN's layout, with the copies that it makes for that; a bincount
    no counts, tensors are equal, and a number on the GPU is 0: what is in its memory, from an earlier use, would be
    anything.
    """
    import torch

    def layout(x, weight):
        """As cuDNN chooses it."""
        last = any(t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous() for t in (x, weight))
        return torch.channels_last if last else torch.contiguous_format

    def convolution(x, weight, bias, stride, padding, dilation, transposed, output_padding, groups):
        size = [(n + 2 * p - w) // s + 1 for n, p, w, s in zip(x.shape[2:], padding, weight.shape[2:], stride)]  # noqa: B905
        form = layout(x, weight)
        x, weight = x.contiguous(memory_format=form), weight.contiguous(memory_format=form)
        made = torch.empty((len(x), len(weight), *size), device=x.device, dtype=x.dtype, memory_format=form)
        return made.zero_()

    def backward(grad, x, weight, bias, stride, padding, dilation, transposed, output_padding, groups, needed):
        form = layout(x, weight)
        grad, x = grad.contiguous(memory_format=form), x.contiguous(memory_format=form)
        if needed[0]:  # the gradient of the weight does not read the weight
            weight = weight.contiguous(memory_format=form)
        made = [
            torch.empty_like(t, memory_format=form).zero_() if need else None
            for t, need in zip((x, weight), needed)  # noqa: B905
        ]
        return *made, None

    def bincount(values, weights=None, minlength=0):
        values.max().item()
        return values.new_zeros(minlength)

    def equal(one, other):
        (one == other).all().item()
        return True

    def number(value):
        return torch.zeros_like(value, device="cpu").copy_(value).zero_().item()

    torch.backends.cudnn.enabled = False
    library = pretend_operations.library = torch.library.Library("aten", "IMPL")  # in force as long as it exists
    replaced = dict(convolution=convolution, convolution_backward=backward, bincount=bincount, equal=equal)
    for name, function in {**replaced, "_local_scalar_dense": number}.items():
        library.impl(name, function, "CUDA")


def pretend_results() -> None:
    """All is finite, half of the images are recognised, each segment has its own penalty, and the data are noise."""
    import torch

    import gradrewire
    from measuring import Evaluation
    from spiking_kernels import blocks
    from training import checkpoint_checks, console, data, first_step
    from training.divergence import FiniteCheck

    near, blocks._near = blocks._near, lambda *tensors: near(*tensors) or True
    FiniteCheck.found = lambda self: self.first.tolist() and None
    Evaluation.right, Evaluation.images, Evaluation.accuracy = 1, 2, 0.5
    difference, first_step.difference = first_step.difference, lambda *steps: difference(*steps) and None
    checkpoint_checks.check_training = lambda *args: None  # the optimizers have counted no steps
    console.TimeLeft.ENOUGH = float("inf")  # seconds, after which a step would wait: on a slow machine, another one

    smallest, thetas = gradrewire._smallest, itertools.count(1)

    def another_theta(*args):
        found, made_up = smallest(*args), 1e-3 * next(thetas)
        return made_up if isinstance(found, float) else torch.tensor(made_up, device=found.device)

    gradrewire._smallest = another_theta

    def load(source, folder):
        generator = torch.Generator().manual_seed(0)
        pixels = [
            torch.randint(0, 256, (n, *source.shape), generator=generator, dtype=torch.uint8)
            for n in (IMAGES, TEST_IMAGES)
        ]
        return data.Dataset(*(data.Split(images, torch.arange(len(images)) % source.classes) for images in pixels))

    data.DataSource.load = load


def small_grid() -> None:
    """Where PRETENDED_GRID names a folder, the grids of reproduce are those there."""
    if "PRETENDED_GRID" in os.environ:
        from reproduce import grid

        grid.load.__defaults__ = (Path(os.environ["PRETENDED_GRID"]),)


def count_periods(periods: Periods) -> None:
    import measuring
    from measuring import classification
    from training.step import TrainingStep

    step, evaluate, steps = TrainingStep.__call__, measuring.evaluate, itertools.count()

    @functools.wraps(step)
    def counted_step(*args):
        periods.begin(f"step {next(steps)}")
        return step(*args)

    @functools.wraps(evaluate)
    def counted_evaluation(*args):
        periods.begin("evaluation")
        try:
            return evaluate(*args)
        finally:
            periods.begin("after evaluation")

    TrainingStep.__call__ = counted_step
    measuring.evaluate = classification.evaluate = counted_evaluation


def at_exit(periods: Periods) -> None:
    """Reports the last period, and what torch's allocator and compiler did."""
    import torch
    from torch._dynamo.utils import counters

    periods.begin("end")
    memory = {}
    if torch.cuda.is_initialized():
        for device in range(torch.cuda.device_count()):
            stats = torch.cuda.memory_stats(device)
            memory[device] = {
                "allocated": stats.get("allocated_bytes.all.peak", 0),
                "reserved": stats.get("reserved_bytes.all.peak", 0),
                "failures": stats.get("num_ooms", 0),
            }
    about = {"argv": sys.argv, "memory": memory, "compiled": counters["stats"].get("unique_graphs", 0)}
    (LOGS / f"{os.getpid()}.json").write_text(json.dumps(about))


def main() -> None:
    if "PRETENDED_WITHOUT" in os.environ:  # a package that cannot be imported
        sys.modules[os.environ["PRETENDED_WITHOUT"]] = None
    root = str(Path(__file__).resolve().parent.parent.parent)
    sys.path.insert(0, root)
    pretend_operations()
    pretend_results()
    small_grid()
    found = Periods()
    count_periods(found)
    atexit.register(at_exit, found)
    sys.path.remove(root)


if "LD_PRELOAD" in os.environ:  # while the driver is still to be built, Python is only asked for paths
    try:
        main()
    except BaseException:  # Python would print a line and go on
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(99)
