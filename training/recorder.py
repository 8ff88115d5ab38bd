"""What a run writes while it goes on: TensorBoard's events, and a line of results for each epoch.

The tags are those of the published implementation. Steps count the updates, epochs the finished
epochs, at the time of measuring: train/loss at step 0 is the loss before the first update.
"""

import contextlib
import errno
import json
import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from measuring import Connections, neuron_results, total
from training import files
from training.record import weights_and_theta

RESULTS = "results.jsonl"


def is_log(name: str) -> bool:
    """Whether a file of this name grows while a run goes on: the results and TensorBoard's events."""
    return name == RESULTS or "tfevents" in name


def log_files(folder: Path) -> list[Path]:
    """The files of a log folder that grow while a run goes on.

    Raises:
        OSError: one of them is a link, or no regular file: what is cut and grows must be in the folder.
    """
    paths = [path for path in sorted(folder.glob("*")) if is_log(path.name) and not stat.S_ISDIR(path.lstat().st_mode)]
    for path in paths:
        if not stat.S_ISREG(path.lstat().st_mode):
            raise OSError(errno.EINVAL, "it is a link, or no regular file; move it away", str(path))
    return paths


def _rewind(folder: Path, lengths: dict[str, int]) -> None:
    """Takes back what was logged after a checkpoint that knows these lengths."""
    for path in log_files(folder):
        if path.name not in lengths:
            path.unlink()
        elif path.stat().st_size > lengths[path.name]:
            os.truncate(path, lengths[path.name])
    for name, length in lengths.items():
        path = folder / name
        there = path.stat().st_size if path.exists() else 0
        if there < length:
            print(f"{path} has lost its end ({there} of {length} bytes are left); going on after it.", flush=True)


@contextlib.contextmanager
def _quiet_writer() -> Iterator[None]:
    """Keeps Python from printing an error of TensorBoard's thread: the next call that logs raises it."""
    before = threading.excepthook

    def hook(failure: threading.ExceptHookArgs) -> None:
        if not type(failure.thread).__module__.startswith("tensorboard."):
            before(failure)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = before


class Recorder:
    """Writes a run's TensorBoard log, and its results: a line of JSON for each epoch.

    Args:
        folder: the log folder.
        lengths: of the log files at the checkpoint from which the run goes on, as :meth:`lengths` gave
            them; what an interrupted run logged after it is taken back, to be logged again.

    Raises:
        OSError: as every method, where the folder cannot be written (any more); it names the folder or a file in it.
            TensorBoard writes in a thread: its failure is raised by a later call.
    """

    def __init__(self, folder: Path, lengths: dict[str, int]):
        self.folder = folder
        _rewind(folder, lengths)
        with contextlib.ExitStack() as stack:
            stack.enter_context(_quiet_writer())
            with self._naming():
                self.writer = SummaryWriter(str(folder))
            self._quiet = stack.pop_all()

    @contextlib.contextmanager
    def _naming(self, path: Path | None = None) -> Iterator[None]:
        """Raises an OSError of its body as one that names the file (default: the folder), or says that it is gone."""
        try:
            with files.naming(path or self.folder):
                yield
        except OSError:
            self._check_folder()
            raise

    def _check_folder(self) -> None:
        if not self.folder.is_dir():
            raise FileNotFoundError(errno.ENOENT, "the folder was removed during the run", str(self.folder))

    def lengths(self) -> dict[str, int]:
        """Flushes all that was logged, and gives the length of every log file."""
        with self._naming():
            self.writer.flush()
            self._check_folder()
            return {path.name: path.stat().st_size for path in log_files(self.folder)}

    def results(self, line: dict[str, Any]) -> None:
        """Appends the results of an epoch, in one write: who reads meanwhile sees whole lines, but perhaps the last."""
        rest = (json.dumps(line, allow_nan=False) + "\n").encode()
        path = self.folder / RESULTS
        with self._naming(path), open(path, "ab", buffering=0) as file:
            while rest:  # a disk that becomes full takes a part and refuses the rest
                rest = rest[file.write(rest) :]

    def _scalars(self, values: dict[str, float], step: int) -> None:
        with self._naming():
            for tag, value in values.items():
                self.writer.add_scalar(tag, value, step)

    def training(self, step: int, loss: float, accuracy: float) -> None:
        self._scalars({"train/loss": loss, "train/acc": accuracy}, step)

    def accuracy(self, epoch: int, accuracy: float) -> None:
        self._scalars({"test_acc": accuracy}, epoch)

    def connections(
        self,
        epoch: int,
        layers: dict[str, Connections],
        rewired: dict[str, tuple[int, int]],
        others: int,
    ) -> None:
        """Records sparsity and rewiring; ``others`` is the number of parameters that are never pruned."""
        values: dict[str, float] = {}
        for name, layer in layers.items():
            pruned, regrown = rewired[name]
            values[f"layer sparsity/{name}"] = layer.sparsity
            values[f"prune_cnt/{name}"] = pruned
            values[f"regrow_cnt/{name}"] = regrown
            values[f"prune-regrow/{name}"] = pruned - regrown
        if others:
            values["sparsity/with bn"] = total(layers, others).sparsity
            values["sparsity/without bn"] = total(layers).sparsity
        else:
            values["sparsity"] = total(layers).sparsity
        values["connectivity"] = total(layers).connectivity
        self._scalars(values, epoch)

    def describe(self, command: str, arguments: dict[str, Any]) -> None:
        """Records the command line (the text tab) and the arguments (the hparams tab, beside the last recordings)."""
        known = {key: value for key, value in arguments.items() if value is not None}
        summaries = hparams(known, dict.fromkeys(("test_acc", "connectivity"), 0.0))
        with self._naming():
            self.writer.add_text("command", command)
            for summary in summaries[:2]:  # the third says that the run has ended
                self.writer.file_writer.add_summary(summary)

    def neurons(self, epoch: int, rates: dict[str, Tensor]) -> None:
        """Records, per LIF layer, the mean firing rate and the share of neurons silent on the whole test set."""
        for name, layer in neuron_results(rates).items():
            self._scalars(
                {f"avg_firing_rate/{name}": layer["firing_rate"], f"nonfire_prop/{name}": layer["silent"]}, epoch
            )

    def weights(
        self, epoch: int, network: nn.Module, optimizers: list[Optimizer], names: tuple[str, ...] | None
    ) -> None:
        """Records the distributions of weights and, where the algorithm has it, of theta; all layers, or ``names``."""
        last = self.writer.default_bins[-2]  # TensorBoard fails where all values are beyond its bins
        for name, tensors in weights_and_theta(network, optimizers, names):
            for kind, values in tensors.items():
                with self._naming():
                    self.writer.add_histogram(f"{name}-{kind}", values.clamp(-last, last), epoch)

    def close(self) -> None:
        with self._quiet, self._naming():
            self.writer.close()

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: Any) -> None:
        try:
            self.close()
        except OSError:
            if error is None:
                raise  # else the first failure is the one to tell
