"""The state from which a run goes on: stored, checked against the run, and put back.

A checkpoint is one dictionary of state_dicts, counters, random-number states and arguments. It is of an
epoch's end, or of a place inside an epoch: then it holds the state from which the epoch's order was drawn.
"""

from argparse import Namespace
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rewiring import RewiringOptimizer
from training import record, storage
from training.locks import Lock
from training.measure import prunable
from training.options import OPTION_NAMES, Refusal, arguments

FORMAT = 2

# What a checkpoint holds, with the type of each; dictionaries and lists are looked into by check_fit.
CONTENT = {
    "format": int,
    "arguments": dict,
    "versions": dict,
    "data": str,  # the data set's fingerprint
    "epoch": int,  # finished epochs
    "step": int,  # updates in all
    "position": int,  # batches done of the epoch begun
    "best_accuracy": float,
    "epoch_loss": float,  # sums over the batches done of the epoch begun
    "epoch_right": int,
    "seconds": dict,  # spent in the epoch begun, by what they were spent on
    "masks": dict,  # the connections at the end of the epoch before, a bit each
    "network": dict,
    "optimizers": list,
    "random": dict,
    "schedule": dict,  # training.schedule's
    "files": dict,  # the lengths of the log files
}
EXECUTION = ("foreach", "fused", "capturable", "differentiable")
# Options that older checkpoints lack, with the value that their runs had; optimizers have settings of the same names.
LATER_OPTIONS = {"plain_gradient": False, "recipe": "paper", "connectivity": None}
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
        Refusal: there are checkpoints, but no good one, or it was written by another program or version.
    """
    try:
        state, complaints = storage.newest(path_of(folder))
    except storage.DamagedError as error:
        raise Refusal(f"{error}; there is no good checkpoint: move the folder away to start the run afresh") from None
    for complaint in complaints:
        print(f"{complaint}; going back to the checkpoint before it.", flush=True)
    if state is None:
        return None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        found = state.get("format") if isinstance(state, dict) else type(state).__name__
        raise Refusal(f"{path_of(folder)} is of format {found}, not {FORMAT}: it was written by another version")
    state = {**LATER_CONTENT, **state}
    _check_keys(path_of(folder), "checkpoint", state, CONTENT)
    for key, kind in CONTENT.items():
        if type(state[key]) is not kind:
            raise Refusal(f"{path_of(folder)} does not fit: {key} is {type(state[key]).__name__}, not {kind.__name__}")
    return state


class Store:
    """The place of a run's checkpoints, kept to this process while it is open (a context manager).

    Attributes:
        saved: the checkpoint to go on from; None for a new run.

    Raises:
        Refusal: another process trains this run; its checkpoints are damaged, of other arguments, of more
            epochs than -N, or missing beside existing results; or there are none, and -test asks for one.
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
            if error is None or isinstance(error, Exception):  # who interrupts does not want to wait
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
            logs = record.folder_of(options)
            if record.log_files(logs):
                raise Refusal(f"{logs} holds results, but {self.folder} no checkpoint: move the results away first")
            return None
        _check_arguments(self.folder, saved["arguments"], options)
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
    present = arguments(options)
    for key in sorted(present.keys() | saved.keys()):
        was, now = (side.get(key, LATER_OPTIONS.get(key, "absent")) for side in (saved, present))
        if was != now and key != "epoch":  # -N may change: a run can be prolonged
            raise Refusal(
                f"argument {OPTION_NAMES.get(key, key)}: the run in {folder} was made with {was}, not {now}; "
                "use the same, or another --dump-dir"
            )


# -- does it fit ------------------------------------------------------------------------------------


def _check_keys(path: Path, where: str, saved: Iterable, present: Iterable) -> None:
    differences = {"unknown": set(saved) - set(present), "missing": set(present) - set(saved)}
    named = [f"{what} {', '.join(sorted(map(str, keys)))}" for what, keys in differences.items() if keys]
    if named:
        raise Refusal(f"{path} does not fit: {where} has {' and '.join(named)}")


def _check_tensor(path: Path, where: str, saved: Any, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if not isinstance(saved, Tensor):
        raise Refusal(f"{path} does not fit: {where} is not a tensor")
    if saved.shape != shape or saved.dtype != dtype:
        was, now = f"{tuple(saved.shape)} {saved.dtype}", f"{tuple(shape)} {dtype}"
        raise Refusal(f"{path} does not fit: {where} is {was}, not {now}".replace("torch.", ""))


def check_fit(path: Path, saved: dict[str, Any], network: nn.Module, optimizers: list[Optimizer], batches: int) -> None:
    """Checks keys, shapes, dtypes, settings and counters of a checkpoint before any of it is applied.

    Args:
        path: the checkpoint's, for the message.
        saved: what :func:`load` gave.
        network: of this run.
        optimizers: of this run, in its order.
        batches: how many an epoch has.

    Raises:
        Refusal: something does not fit; the message names it.
    """
    present = network.state_dict()
    _check_keys(path, "the network", saved["network"], present)
    for name, tensor in present.items():
        _check_tensor(path, name, saved["network"][name], tensor.shape, tensor.dtype)
    if len(saved["optimizers"]) != len(optimizers):
        raise Refusal(f"{path} does not fit: it has {len(saved['optimizers'])} optimizers, not {len(optimizers)}")
    for state, optimizer in zip(saved["optimizers"], optimizers, strict=True):
        _check_optimizer(path, state, optimizer, stepped=saved["step"] > 0)
    for name, accepted in (("epoch", range(2**62)), ("step", range(2**62)), ("position", range(batches + 1))):
        if saved[name] not in accepted:
            raise Refusal(f"{path} does not fit: {name} is {saved[name]}")
    if saved["step"] != saved["epoch"] * batches + saved["position"]:
        raise Refusal(f"{path} does not fit: {saved['step']} steps after {saved['epoch']} epochs of {batches}")
    weights = prunable(network)
    _check_keys(path, "masks", saved["masks"], weights)
    for name, weight in weights.items():
        _check_tensor(path, f"the mask of {name}", saved["masks"][name], ((weight.numel() + 7) // 8,), torch.uint8)
    _check_keys(path, "random", set(saved["random"]) - {"cuda"}, {"python", "numpy", "torch", "data"})
    for name in saved["random"].keys() - {"python", "numpy"}:
        if not isinstance(saved["random"][name], Tensor) or saved["random"][name].dtype != torch.uint8:
            raise Refusal(f"{path} does not fit: the state of the random numbers {name} is not a tensor of bytes")


def _check_optimizer(path: Path, saved: dict[str, Any], optimizer: Optimizer, stepped: bool) -> None:
    kind, present = type(optimizer).__name__, optimizer.state_dict()
    _check_keys(path, kind, saved, present)
    if len(saved["param_groups"]) != len(present["param_groups"]):
        raise Refusal(f"{path} does not fit: {kind} has {len(saved['param_groups'])} parameter groups")
    parameters = []
    for old, new, group in zip(saved["param_groups"], present["param_groups"], optimizer.param_groups, strict=True):
        old = {**{key: value for key, value in LATER_OPTIONS.items() if key in new}, **old}
        _check_keys(path, kind, old, new)
        for key in new.keys() - set(EXECUTION):
            if old[key] != new[key]:
                raise Refusal(f"{path} does not fit: {kind}'s {key} is {old[key]}, not {new[key]}")
        parameters += [(parameter, group) for parameter in group["params"]]
    _check_keys(path, f"{kind}'s state", saved["state"], range(len(parameters)) if stepped else ())
    for index, state in saved["state"].items():
        parameter, group = parameters[index]
        names = {"step", "exp_avg", "exp_avg_sq"} | ({"max_exp_avg_sq"} if group["amsgrad"] else set())
        if isinstance(optimizer, RewiringOptimizer):
            names |= optimizer.own_state(group)
        _check_keys(path, f"{kind}'s state {index}", state, names)
        for name, tensor in state.items():
            shape = () if name == "step" else parameter.shape
            dtype = {"step": torch.float32, "sign": torch.int8}.get(name, parameter.dtype)
            _check_tensor(path, f"{kind}'s {name} {index}", tensor, shape, dtype)


# -- putting it back --------------------------------------------------------------------------------


def load_optimizer(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Loads an optimizer's state, but for the settings that say how it is executed: those stay this machine's."""
    groups = [
        {**saved, **{key: present[key] for key in EXECUTION if key in present}}
        for saved, present in zip(state["param_groups"], optimizer.param_groups, strict=True)
    ]
    optimizer.load_state_dict({**state, "param_groups": groups})


def versions() -> dict[str, str]:
    """The versions that a run's results depend on."""
    return {name: version(name) for name in ("torch", "spikingjelly")}


def pack(mask: Tensor) -> Tensor:
    """A bool tensor as bits, uint8 [(n + 7) // 8], on the CPU."""
    return torch.from_numpy(np.packbits(mask.flatten().cpu().numpy()))


def unpack(bits: Tensor, like: Tensor) -> Tensor:
    """The bool tensor of the shape and on the device of ``like`` that was packed."""
    mask = np.unpackbits(bits.numpy(), count=like.numel()).astype(bool)
    return torch.from_numpy(mask).view(like.shape).to(like.device)
