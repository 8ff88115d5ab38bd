"""The state from which a run goes on: stored, checked against the run, and put back.

A checkpoint is one dictionary of state_dicts, counters, random-number states and arguments. It is of an
epoch's end, or of a place inside an epoch: then it holds the state from which the epoch's order was drawn.
"""

import contextlib
from argparse import Namespace
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from training import dump_dir, fit
from training.errors import Refusal
from training.files import checks, storage
from training.files.locks import Lock
from training.logs import log_files, log_folder
from training.options import RECORDING_OPTIONS, arguments

FORMAT = 2

LATER_CONTENT = {"schedule": {}}  # what older checkpoints lack, as they would have had it


def folder_of(options: Namespace) -> Path:
    """Where the model of a run is."""
    return options.dump_dir / "models" / options.name


def path_of(folder: Path) -> Path:
    """The newest checkpoint in a model's folder; the one before is beside it (see :func:`storage.write`)."""
    return folder / "checkpoint.pt"


def load(folder: Path) -> dict[str, Any] | None:
    """Loads the newest good checkpoint from a model's folder, on the CPU; None where there is none.

    A line on the console names each file that was passed over.

    Raises:
        Refusal: there are checkpoints but no good one, or the newest is from another program or version.
    """
    try:
        state, complaints = storage.newest(path_of(folder))
    except storage.DamagedError as error:
        raise Refusal(f"{error}; there is no good checkpoint: move the folder away to start anew") from None
    for complaint in complaints:
        print(f"{complaint}; going back to the checkpoint before it.", flush=True)
    if state is None:
        return None
    found = state.get("format") if isinstance(state, dict) else type(state).__name__
    if type(found) is not int or found != FORMAT:
        raise Refusal(f"{path_of(folder)} is of format {found!r:.40}, not {FORMAT}: it was written by another version")
    state = {**LATER_CONTENT, **state}
    with fitting(path_of(folder)):
        fit.check_content(state)
    return state


@contextlib.contextmanager
def fitting(path: Path) -> Iterator[None]:
    """Makes a Refusal of what :mod:`training.fit` finds in the checkpoint ``path``."""
    try:
        yield
    except ValueError as error:
        raise Refusal(f"{path} does not fit: {error}") from None


class Store:
    """The place of a run's checkpoints, kept to this process while it is open (a context manager).

    Attributes:
        saved: the checkpoint to go on from; None for a new run.

    Raises:
        Refusal: another process trains this run; its checkpoints are damaged, of other arguments, of more
            epochs than -N, beside another run's logs, or missing beside existing results; or there are none, and -test
            asks for one.
    """

    def __init__(self, options: Namespace):
        self.options, self.folder = options, folder_of(options)
        self.path = path_of(self.folder)
        self.lock = Lock(self.folder)
        self.writer = storage.Writer(self.path)

    def __enter__(self) -> "Store":
        if not self.options.test:
            self._acquire()
        try:
            if not self.options.test:
                storage.temporary_of(self.path).unlink(missing_ok=True)  # of a process that was killed
            self.saved = self._load()
        except BaseException:
            self.lock.release()
            raise
        return self

    def _acquire(self) -> None:
        try:
            acquired = self.lock.acquire()
        except OSError as error:
            raise Refusal(f"argument --dump-dir: cannot write to {self.folder}: {error.strerror}") from None
        if not acquired:
            raise Refusal(
                f"argument --dump-dir: another process is training in {self.folder}; wait for it, or use another"
            )

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: Any) -> None:
        try:
            if error is None or isinstance(error, Exception):  # after an interrupt nobody wants to wait
                self.writer.wait()
        finally:
            self.lock.release()

    def _load(self) -> dict[str, Any] | None:
        saved, options = load(self.folder), self.options
        if saved is None:
            if options.test:
                raise Refusal(
                    f"argument -test: there is no saved model {self.path}; the same command without -test makes one"
                )
            logs = log_folder(options)
            if log_files(logs):
                raise Refusal(
                    f"{logs} holds results, but {self.folder} holds no checkpoint: move the results away first"
                )
            return None
        _check_arguments(self.folder, saved["arguments"], options)
        _check_logs(log_folder(options), saved["arguments"], options)
        if not options.test and options.epoch < saved["epoch"]:
            raise Refusal(
                f"argument -N/--epoch: the run in {self.folder} has done {saved['epoch']} epochs, "
                f"more than {options.epoch}"
            )
        return saved

    def save(self, state: dict[str, Any], logs: Iterable[Path]) -> None:
        """Has a state written in the background, after the ``logs`` that it counts on.

        Raises:
            OSError: the state before could not be written, or the folder is no longer this run's.
        """
        self.lock.check()
        self.writer.submit(state, logs)

    def wait(self) -> None:
        """Waits until the last state is on the disk; raises OSError if it could not be written."""
        self.writer.wait()


def _check_arguments(folder: Path, saved: dict[str, Any], options: Namespace) -> None:
    """Refuses a checkpoint of another run: every option that names one has to be the same.

    -N is none of them: a run may be prolonged. What changes only what is recorded may change from one start to the
    next. With -test, all that the test depends on is the network and its T; the others still say whose network it is.
    """
    present = arguments(options)
    for key in sorted((present.keys() | saved.keys()) - RECORDING_OPTIONS - {"epoch"}):
        # an older checkpoint lacks the options that were added since; its run was as their defaults are
        was, now = (side.get(key, options.defaults.get(key, "absent")) for side in (saved, present))
        if type(was) is not type(now) or was != now:
            raise Refusal(
                f"argument {options.spellings.get(key, key)}: the run in {folder} was made with {was}, not {now}; "
                "use the same, or another --dump-dir"
            )


def _check_logs(logs: Path, saved: dict[str, Any], options: Namespace) -> None:
    """Refuses the logs of another run, by their run.json: going on would cut them, and mix two runs' results."""
    theirs = dump_dir.run_info(logs).get("arguments")
    if not isinstance(theirs, dict):
        return
    for key in sorted((theirs.keys() & saved.keys()) - RECORDING_OPTIONS - {"epoch"}):
        if theirs[key] != saved[key]:
            found = checks.short(str(theirs[key]), 60)
            raise Refusal(
                f"{logs} has the logs of another run, with {options.spellings.get(key, key)} {found}, "
                f"not {saved[key]}: move them away; the run goes on without its earlier logs, too"
            )


# -- putting it back --------------------------------------------------------------------------------


def load_optimizer(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Loads an optimizer's state, but for the settings that say how it is executed: those stay this machine's."""
    groups = [
        {**saved, **{key: present[key] for key in fit.EXECUTION if key in present}}
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
    """The versions that a run's results depend on."""
    return {name: version(name) for name in ("torch", "spikingjelly")}
