"""Checkpoints: saves the state of a run, and checks it before the run resumes from it.

A checkpoint is one dictionary of state_dicts, counters, random-number states and arguments. It is taken after an epoch
or within one. It holds the random state from which the epoch's order was drawn, so that a resumed epoch has that order.
"""

import contextlib
from argparse import Namespace
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from training import checkpoint_checks
from training.command_line import writing
from training.errors import Refusal
from training.files import checks, storage
from training.files.locks import Lock
from training.logs import info, log_files, log_folder
from training.options import RECORDING_OPTIONS, arguments

FORMAT = 2
TAKEN = "another process is training in"  # reproduce.runner looks for this in the last line of a script


def load(path: Path) -> tuple[dict[str, Any] | None, Path]:
    """Loads the checkpoint ``path`` to the CPU, or the previous one beside it if it is damaged.

    A line on the console names a damaged file. :func:`storage.write` keeps the previous checkpoint.

    Returns:
        The checkpoint, None without any, and the file that has it.

    Raises:
        Refusal: all checkpoints are damaged, or the newest is from another version or not accepted.
    """
    try:
        state, complaints, path = storage.newest(path)
    except storage.DamagedError as error:
        raise Refusal(f"{error}; no intact checkpoint is left: move the folder away and start again") from None
    for complaint in complaints:
        print(f"{complaint}; using the previous checkpoint.", flush=True)
    if state is None:
        return None, path
    found = state.get("format") if isinstance(state, dict) else type(state).__name__
    if type(found) is not int or found != FORMAT:
        raise Refusal(f"{path} is of format {found!r:.40}, not {FORMAT}: it was written by another version")
    state = {"schedule": {}, **state}  # which older checkpoints lack
    with checking(path):
        checkpoint_checks.check_content(state)
    return state, path


@contextlib.contextmanager
def checking(path: Path) -> Iterator[None]:
    """Turns an error of :mod:`training.checkpoint_checks` into a Refusal that names the file ``path``."""
    try:
        yield
    except ValueError as error:
        raise Refusal(f"{path} does not fit: {error}") from None


class Store:
    """A context manager that loads and saves a run's checkpoints, and locks their folder.

    Args:
        writes: whether this process locks the folder, and loads and saves; of several ranks, only the first one does.

    Attributes:
        saved: the checkpoint from which the run resumes; None for a new run.
        source: the file that has it.

    Raises:
        Refusal: another process trains this run; the checkpoints are damaged, have other arguments or more epochs than
            -N; the logs are those of another run; results exist without a checkpoint; or -test finds no checkpoint.
    """

    def __init__(self, options: Namespace, writes: bool = True):
        self.options, self.writes = options, writes
        self.folder = options.dump_dir / "models" / options.name
        self.path = self.source = self.folder / storage.CHECKPOINT
        self.lock = Lock(self.folder)
        self.writer = storage.Writer(self.path)

    def __enter__(self) -> "Store":
        self.saved = None
        if not self.writes:
            return self
        try:
            if not self.options.test:
                with writing("--dump-dir", self.folder):
                    acquired = self.lock.acquire()
                if not acquired:
                    raise Refusal(f"argument --dump-dir: {TAKEN} {self.folder}; wait for it, or use another folder")
                storage.temporary_of(self.path).unlink(missing_ok=True)  # left by a process that was killed
            self.saved = self._load()
        except BaseException:
            self.lock.release()
            raise
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: Any) -> None:
        try:
            if error is None or isinstance(error, Exception):  # do not wait after an interrupt
                self.writer.wait()
        finally:
            self.lock.release()

    def _load(self) -> dict[str, Any] | None:
        options, logs = self.options, log_folder(self.options)
        saved, self.source = load(self.path)
        if saved is None:
            if options.test:
                raise Refusal(f"argument -test: there is no saved model {self.path}; to train it, leave out -test")
            if log_files(logs):
                raise Refusal(f"{logs} holds results, but {self.folder} no checkpoint: move the results away first")
            return None
        if found := _differing(options, saved["arguments"], arguments(options)):
            option, was, now = found
            raise Refusal(
                f"argument {option}: the run in {self.folder} was made with {was}, not {now}; "
                "use the same value, or another --dump-dir"
            )
        logged = info(logs).get("arguments")
        if isinstance(logged, dict) and (found := _differing(options, logged, saved["arguments"])):
            option, theirs, ours = found
            raise Refusal(  # resuming would truncate them and mix the results of two runs
                f"{logs} has the logs of another run, with {option} {theirs}, not {ours}: "
                "move them away; the run can resume without its earlier logs"
            )
        if not options.test and options.epoch < saved["epoch"]:
            raise Refusal(
                f"argument -N/--epoch: must be at least {saved['epoch']}, not {options.epoch}: "
                f"the run in {self.folder} has finished as many epochs"
            )
        self.writer.damaged = self.source != self.path
        return saved

    def save(self, state: dict[str, Any], logs: Iterable[Path]) -> None:
        """Writes a state in the background, after the ``logs`` whose lengths it contains.

        Raises:
            OSError: the previous state could not be written, or the lock on the folder was lost.
        """
        self.check()
        if self.writes:
            self.writer.submit(state, logs)

    def check(self) -> None:
        """Raises FileNotFoundError if the lock on the folder was lost."""
        if self.writes:
            self.lock.check()

    def wait(self) -> None:
        """Waits until the last state is on disk; raises OSError if it could not be written."""
        self.writer.wait()


def _differing(options: Namespace, one: dict[str, Any], other: dict[str, Any]) -> tuple[str, str, Any] | None:
    """The first argument in which a run of ``one`` differs from that of ``other``: its option and both values.

    -N may differ, because a run can be extended, and so may :data:`RECORDING_OPTIONS`. A test depends only on the
    network and its T, but all other options must still be the same, so that the right network is tested.
    """
    for key in sorted((one.keys() | other.keys()) - RECORDING_OPTIONS - {"epoch"}):
        # an older checkpoint lacks newer options: its run had their defaults
        first, second = (side.get(key, options.defaults.get(key, "absent")) for side in (one, other))
        if type(first) is not type(second) or first != second:
            return options.spellings.get(key, key), checks.short(str(first), 60), second
    return None


def load_optimizer(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Loads an optimizer's state, except for how it is executed: that depends on this machine."""
    groups = [
        {**saved, **{key: present[key] for key in checkpoint_checks.EXECUTION if key in present}}
        for saved, present in zip(state["param_groups"], optimizer.param_groups, strict=True)
    ]
    optimizer.load_state_dict({**state, "param_groups": groups})
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, saved in state["state"].items():  # torch casts all but `step` to the parameter's dtype
        loaded = optimizer.state[parameters[index]]
        for key, value in saved.items():
            if isinstance(value, Tensor) and loaded[key].dtype != value.dtype:
                loaded[key] = value.to(loaded[key].device, copy=True)


def versions() -> dict[str, str]:
    """The versions of the packages on which the results depend."""
    return {name: version(name) for name in ("torch", "spikingjelly")}
