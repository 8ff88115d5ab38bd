"""What a training run prints: its settings, a line after each epoch, the remaining time."""

import statistics
import time
from argparse import Namespace
from collections import deque
from collections.abc import Callable
from pathlib import Path

from training import device
from training.command_line import either
from training.methods import METHODS
from training.naming import format_number

UNITS = (  # of durations: name, length in seconds, and the number from which the next unit is used
    ("second", 1.0, 100),
    ("minute", 60.0, 100),
    ("hour", 3600.0, 48),
    ("day", 86400.0, 400),
    ("year", 365.25 * 86400, float("inf")),
)
LONG = 86400.0  # seconds; for a longer run, a line says how to shorten it


def first_lines(options: Namespace, logs: Path, model: Path) -> list[str]:
    """The lines at the start: the method and its settings, the device, the folders."""
    method = METHODS[options.mode]
    settings = [" ".join(parts) for option in method.options if option.listed and (parts := option.parts(options))]
    settings += [f"learning rate {format_number(options.learning_rate)}", f"batches of {options.batch_size}"]
    settings += [counted(options.T, "time step"), counted(options.epoch, "epoch"), f"seed {options.seed}"]
    where = f"{options.ranks} ranks, each on " if options.ranks > 1 else ""
    where += device.name(options.device)
    recipe = " with the fast recipe" if options.recipe == "fast" else ""
    return [
        f"{method.title(options)} on {options.dataset}{recipe}: {', '.join(settings)}.",
        f"On {where}, in {options.precision_used}; logs go to {logs}, the model to {model}.",
        *method.explain(options),
    ]


def duration(seconds: float) -> str:
    """Writes a duration in a suitable unit: 45 seconds, 12 minutes, 3.5 hours, 13 days, 1.4 years."""
    for unit, length, most in UNITS:
        value = seconds / length
        text = f"{value:.0f}" if unit == "second" or value >= 9.95 else f"{value:.1f}".removesuffix(".0")
        if float(text) < most:
            break
    return counted(float(text), unit)


def counted(number: float, noun: str) -> str:
    """A number with its noun: 1 epoch, 2 epochs."""
    return f"{number:,.10g} {noun}{'' if number == 1 else 's'}"


class TimeLeft:
    """Estimates the remaining time of a run from the speed of this process. Training and tests are timed separately.

    Args:
        epochs: number of epochs of the whole run.
        batches: number of steps in an epoch.
        interval: epochs between full tests, which take longer; the first epoch has one, too.
        wait: waits for the device; called before the clock is read.
    """

    WARM_UP = 4, 10.0  # the first steps, or seconds, are timed separately: kernels are built, a CUDA graph is captured
    ENOUGH = 5.0  # seconds of training after the warm-up until the speed counts as known

    def __init__(self, epochs: int, batches: int, interval: int, wait: Callable[[], object]):
        self.epochs, self.batches, self.interval, self.wait = epochs, batches, interval, wait
        self.steps = 0  # of this process
        self.warm = False
        self.warming: list[float] = []  # seconds per step
        self.laps: deque[float] = deque(maxlen=5)
        self.after: dict[bool, float] = {}  # seconds from an epoch's last step to its end, by whether its test is full

    def start(self) -> None:
        """To be called when the training of an epoch begins or resumes."""
        self._look()
        self.lap, self.begun = 0, self.now

    def step(self) -> bool:
        """Counts a step. Returns True once: when the speed becomes known within the first epoch of this process."""
        self.steps += 1
        self.lap += 1
        passed, (most_steps, most_seconds) = time.perf_counter() - self.begun, self.WARM_UP
        if not self.warm and (self.steps == most_steps or passed >= most_seconds):
            self.trained()
            self.warm = True
            self.start()
        elif self.warm and not self.laps and passed >= self.ENOUGH:
            self.trained()
            return True
        return False

    def trained(self) -> None:
        """To be called when the training of an epoch ends."""
        self._look()
        if self.lap:
            (self.laps if self.warm else self.warming).append((self.now - self.begun) / self.lap)

    def tested(self, full: bool) -> None:
        """To be called when the test and the checkpoint after an epoch are done."""
        trained = self.now
        self._look()
        self.after[full] = self.now - trained

    def _look(self) -> None:
        self.wait()
        self.now = time.perf_counter()

    @property
    def per_epoch(self) -> float | None:
        """Seconds of training per epoch; None before the first measurement."""
        laps = self.laps or self.warming
        return statistics.median(laps) * self.batches if laps else None

    def left(self, epoch: int, position: int = 0) -> float | None:
        """Seconds that remain after ``epoch`` epochs and ``position`` batches; includes tests once one was measured."""
        if self.per_epoch is None:
            return None
        full = self.epochs // self.interval - epoch // self.interval + (epoch == 0 and self.interval > 1)
        plain = self.epochs - epoch - full
        known = list(self.after.values()) or [0.0]
        after = full * self.after.get(True, known[0]) + plain * self.after.get(False, known[0])
        return self.per_epoch * (self.epochs - epoch - position / self.batches) + after

    def line(self, epoch: int, position: int, options: Namespace) -> str:
        """The line to print when the speed is known."""
        left = self.left(epoch, position)
        line = f"An epoch trains for about {duration(self.per_epoch)}; {duration(left)} remain in all, without tests"
        if left < LONG:
            return f"{line}."
        ways = ["a GPU"] if options.device.type == "cpu" else []
        ways += ["--recipe fast"] if options.recipe == "paper" else []
        return f"{line}. To shorten it: {either([*ways, 'a smaller -N'])}."
