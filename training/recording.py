"""Records the numbers of a run: TensorBoard's events, and a line of results for each epoch.

:mod:`training.metrics` lists the numbers and where each is written. The step is the number of updates before the
measurement, so train/loss at step 0 is the loss before the first update. The epoch is the number of finished epochs.
"""

import contextlib
import errno
import functools
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

import measuring
from training import files, metrics
from training.logs import RESULTS, log_files, rewind
from training.metrics import DISTRIBUTION, EPOCH, FULL, STEP, Metric


class Recording:
    """The numbers of one moment. One call records one number: ``record("connected", n, layer=name)``.

    Args:
        moments: the moments whose numbers are due, such as :data:`training.metrics.STEP`.
        write: called with each metric, its value and its layer.
    """

    def __init__(self, *moments: str, write: Callable[[Metric, Any, str | None], None] = lambda *number: None):
        self.moments, self._write = moments, write
        due = [metric for metric in metrics.METRICS if {*metric.when} & {*moments}]
        self.values: dict[Metric, dict[str | None, Any]] = {metric: {} for metric in due}

    def __call__(self, key: str, value: Any, layer: str | None = None) -> None:
        """Records a number, or all values of a distribution.

        Raises:
            ValueError: the table has no such number for this moment, or it is already recorded.
        """
        of = "without a layer" if layer is None else f"of {layer}"
        named = (metric for metric in self.values if metric.key == key and metric.by_layer == (layer is not None))
        if (metric := next(named, None)) is None:
            raise ValueError(f"{key!r} {of} is not in training.metrics.METRICS for {' or '.join(self.moments)}")
        if layer in self.values[metric]:
            raise ValueError(f"{key!r} {of} is recorded twice")
        self.values[metric][layer] = measuring.distribution(value) if metric.unit == DISTRIBUTION else value
        self._write(metric, value, layer)

    def check(self) -> None:
        """Raises ValueError if a number is missing, for all layers or for one of its group's layers."""
        groups: dict[str, set] = {}
        for metric, values in self.values.items():
            groups.setdefault(metric.group, set()).update(values)
        for metric, values in self.values.items():
            if not metric.optional and (not values or values.keys() != groups[metric.group]):
                raise ValueError(f"{metric.key!r} is not recorded" + (" for every layer" if values else ""))

    def content(self) -> dict[str, Any]:
        """The numbers for their JSON file, in the table's order; raises ValueError if one is missing."""
        self.check()
        content: dict[str, Any] = {}
        for metric, values in self.values.items():
            for layer, value in values.items() if metric.path else ():
                *path, key = metric.keys(layer)
                place = content
                for name in path:
                    place = place.setdefault(name, {})
                place[key] = value
        return content

    def words(self) -> str:
        """The numbers that the console shows after an epoch."""
        shown = {metric: values for metric, values in self.values.items() if metric.words is not None}
        return "  ".join(metric.text(value) for metric, values in shown.items() for value in values.values())


def record_distributions(
    record: Recording, network: nn.Module, optimizers: list[Optimizer], names: tuple[str, ...] | None
) -> None:
    """Records the weights and, if the method has it, theta, of all layers or of ``names``."""
    for name, weight in measuring.prunable(network).items():
        if names is None or name in names:
            record("w", weight.detach(), layer=name)
            for optimizer in optimizers:
                if "theta" in optimizer.state.get(weight, {}):
                    record("theta", optimizer.state[weight]["theta"], layer=name)


@contextlib.contextmanager
def _quiet_writer() -> Iterator[None]:
    """Stops Python from printing an error of TensorBoard's thread; the next call that logs raises it."""
    before = threading.excepthook

    def hook(failure: threading.ExceptHookArgs) -> None:
        if not type(failure.thread).__module__.startswith("tensorboard."):
            before(failure)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = before


class SilentRecorder(contextlib.nullcontext):
    """Takes what a Recorder takes, and writes nothing."""

    def lengths(self) -> dict[str, int]:
        return {}

    def describe(self, command: str, arguments: dict[str, Any]) -> None:
        pass

    @contextlib.contextmanager
    def step(self, step: int) -> Iterator[Recording]:
        yield Recording(STEP)

    @contextlib.contextmanager
    def epoch(self, epoch: int, full: bool) -> Iterator[Recording]:
        yield Recording(EPOCH, *((FULL,) if full else ()))

    def __enter__(self) -> "SilentRecorder":
        return self


class Recorder:
    """Writes a run's TensorBoard log, and its results: a line of JSON for each epoch.

    Args:
        folder: the log folder.
        lengths: the lengths of the log files at the checkpoint, from :meth:`lengths`. What an interrupted run logged
            after the checkpoint is removed.
        batch_norm: whether the network has parameters that are never pruned; some tags depend on it.

    Raises:
        OSError: the folder cannot be written; the error names it or a file in it. Every method can raise it.
            TensorBoard writes in a thread, so a later call raises its error.
    """

    def __init__(self, folder: Path, lengths: dict[str, int], batch_norm: bool = False):
        self.folder, self.batch_norm = folder, batch_norm
        rewind(folder, lengths)
        with contextlib.ExitStack() as stack:
            stack.enter_context(_quiet_writer())
            with self._naming():
                self.writer = SummaryWriter(str(folder))
            self._quiet = stack.pop_all()

    @contextlib.contextmanager
    def _naming(self, path: Path | None = None) -> Iterator[None]:
        """Adds the file (default: the folder) to an OSError, or replaces it if the folder is gone."""
        try:
            with files.naming(path or self.folder):
                yield
        except OSError:
            if not self.folder.is_dir():
                removed = "the folder was removed during the run"
                raise FileNotFoundError(errno.ENOENT, removed, str(self.folder)) from None
            raise

    def lengths(self) -> dict[str, int]:
        """Flushes the logs and returns the length of each log file."""
        with self._naming():
            self.writer.flush()
            self.folder.stat()  # an error if it is gone
            return {path.name: path.stat().st_size for path in log_files(self.folder)}

    def results(self, line: dict[str, Any]) -> None:
        """Appends the results of an epoch in one write, so that a reader sees whole lines, except perhaps the last."""
        rest = (json.dumps(line, allow_nan=False) + "\n").encode()
        path = self.folder / RESULTS
        with self._naming(path), open(path, "ab", buffering=0) as file:
            while rest:  # a full disk writes a part; the next write raises OSError
                rest = rest[file.write(rest) :]

    def recording(self, step: int, *moments: str) -> Recording:
        """A recording that sends each number to TensorBoard at once."""
        return Recording(*moments, write=functools.partial(self._log, step))

    @contextlib.contextmanager
    def step(self, step: int) -> Iterator[Recording]:
        """Records the numbers of a training step before its update."""
        record = self.recording(step, STEP)
        yield record
        record.check()

    @contextlib.contextmanager
    def epoch(self, epoch: int, full: bool) -> Iterator[Recording]:
        """Records the numbers after an epoch; at the end, appends their line to the results."""
        record = self.recording(epoch, EPOCH, *((FULL,) if full else ()))
        yield record
        self.results(record.content())

    def _log(self, step: int, metric: Metric, value: Any, layer: str | None) -> None:
        tag = metric.tag_of(layer, self.batch_norm)
        if not tag or value is None:
            return
        with self._naming():
            if metric.unit == DISTRIBUTION:
                last = self.writer.default_bins[-2]  # TensorBoard fails where all values are beyond its bins
                self.writer.add_histogram(tag, value.clamp(-last, last), step)
            else:
                self.writer.add_scalar(tag, value, step)

    def describe(self, command: str, arguments: dict[str, Any]) -> None:
        """Logs the command line (text tab) and the arguments (hparams tab, beside the latest metrics)."""
        known = {key: value for key, value in arguments.items() if value is not None}
        keys = ("test_accuracy", "connectivity")
        tags = [metric.tag for metric in metrics.METRICS if metric.key in keys and metric.tag]
        summaries = hparams(known, dict.fromkeys(tags, 0.0))
        with self._naming():
            self.writer.add_text("command", command)
            for summary in summaries[:2]:  # the third says that the run has ended
                self.writer.file_writer.add_summary(summary)

    def close(self) -> None:
        with self._quiet, self._naming():
            self.writer.close()

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: Any) -> None:
        with contextlib.suppress(OSError) if error else contextlib.nullcontext():  # the first error counts
            self.close()
