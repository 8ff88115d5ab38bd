"""The network of a run at its checkpoint: its weights, and what is needed to build it."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from spikingjelly.activation_based import neuron
from torch import Tensor

import measuring
from analysis.experiments import EXPERIMENTS
from spiking import LIFNode, SpikingNetwork
from training.data.dataset import DataSource
from training.defaults import torch_defaults
from training.errors import Refusal
from training.experiment import Experiment
from training.files import checks, storage
from training.files.json_files import nested
from training.files.storage import CHECKPOINT

# of a snapshot, as a file has them beside its state
FIELDS = ("experiment", "dataset", "T", "width", "run", "epoch", "position", "data")
NEURON = ("tau", "v_threshold", "v_reset", "decay_input")


class Unreadable(Refusal, ValueError):
    """A file or folder that is damaged, or not one of this program; the message is one line that names it."""


@dataclass(frozen=True)
class Snapshot:
    """A network at the end of an epoch, or some steps later."""

    experiment: str  # one of analysis.experiments.EXPERIMENTS
    dataset: str
    T: int  # time steps
    width: int  # the size of its layers
    run: str
    epoch: int
    state: dict[str, Tensor]  # the network's state_dict, float32 on the CPU
    position: int = 0  # the steps of the next epoch that it has been trained for
    data: str = ""  # the fingerprint of the data set that it was trained on; empty where that is not known

    @classmethod
    def of(cls, fields: Mapping[str, Any], state: dict[str, Tensor]) -> "Snapshot":
        """Makes a snapshot of fields from a file.

        Older files lack some: the width is the default one then, the position the end of an epoch.

        Raises:
            ValueError: a field is missing, of another type or out of range.
        """
        experiment, dataset = fields.get("experiment"), fields.get("dataset")
        if type(experiment) is not str or experiment not in EXPERIMENTS:
            raise ValueError(f"experiment is {str(experiment)[:100]!r}, not one of {', '.join(EXPERIMENTS)}")
        fields = {"width": EXPERIMENTS[experiment].width, "position": 0, "data": "", **fields}
        datasets = [source.name for source in EXPERIMENTS[experiment].datasets]
        if dataset not in datasets:
            raise ValueError(f"dataset is {str(dataset)[:100]!r}, not one of {', '.join(datasets)}")
        checks.whole_number("T", fields.get("T"), 1, checks.T_LIMIT)
        checks.whole_number("width", fields["width"], 1, checks.WIDTH_LIMIT)
        checks.text("run", fields.get("run"))
        checks.whole_number("epoch", fields.get("epoch"))
        checks.whole_number("position", fields["position"])
        checks.text("data", fields["data"])
        return cls(**{key: fields[key] for key in FIELDS}, state=state)

    @property
    def about(self) -> Experiment:
        return EXPERIMENTS[self.experiment]

    @property
    def source(self) -> DataSource:
        return self.about.dataset(self.dataset)

    def plan(self) -> SpikingNetwork:
        """The network without its tensors, which are on the device meta. Draws no random number."""
        with torch.device("meta"):
            return self.about.network(self.T, width=self.width)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every weight that can be pruned: that of this program's network, whatever a file says."""
        return {name: tuple(weight.shape) for name, weight in measuring.prunable(self.plan()).items()}

    @torch_defaults()
    def network(self) -> SpikingNetwork:
        """The network with this state, in eval mode; it shares the tensors and asks for no gradients.

        Raises:
            ValueError: the state is not one of this experiment's network, or has values that it cannot have.
        """
        network = self.plan()  # nothing to initialise, no random number to draw: every tensor comes from the state
        checks.tensors("the network", self.state, network.state_dict())
        for name, tensor in self.state.items():
            if name.endswith(("running_var", "num_batches_tracked")) and (tensor < 0).any():
                raise ValueError(f"{name} has values below 0")
        network.load_state_dict(self.state, assign=True)
        if missing := [name for name, buffer in network.named_buffers() if buffer.is_meta]:
            raise ValueError(f"{missing[0]} is a buffer that no file holds: make it persistent")
        return network.eval().requires_grad_(False)

    def neuron(self) -> dict[str, Any]:
        """The settings of the network's neurons, which are all alike.

        Raises:
            Refusal: they differ, or are not LIF neurons with a hard reset; an export cannot describe such neurons.
        """
        nodes = [module for module in self.plan().modules() if isinstance(module, neuron.BaseNode)]
        settings = [{key: getattr(node, key, None) for key in NEURON} for node in nodes]
        lif = all(type(node) is LIFNode and node.v_reset is not None for node in nodes)
        if not lif or any(other != settings[0] for other in settings):
            raise Refusal(
                f"{self.experiment} has neurons that exports cannot describe: "
                f"they describe LIF neurons with a hard reset and equal settings, not {settings}"
            )
        return settings[0]


def models_folder(path: Path) -> Path:
    """Where a run's checkpoints are: ``path`` is the run's folder below models, or the one below logs.

    Raises:
        Unreadable: there is no checkpoint.
    """
    real = path.resolve()
    for folder in (path, real.parent.parent / "models" / real.name):
        if storage.is_there(folder / CHECKPOINT):
            return folder
    raise Unreadable(
        f"{path} has no {CHECKPOINT}: a run's folder is <dump-dir>/models/<name> or <dump-dir>/logs/<name>"
    )


def from_run(path: Path) -> tuple[Snapshot, Path]:
    """The network of a run's folder (see :func:`models_folder`), and the checkpoint that has it.

    As in training, that is the one before the last where the last is damaged, which a warning says, or missing.

    Raises:
        Unreadable: there is no intact checkpoint.
    """
    try:
        checkpoint, complaints, source = storage.newest(models_folder(path) / CHECKPOINT)
    except storage.DamagedError as error:
        raise Unreadable(f"{error}") from None
    for complaint in complaints:
        warnings.warn(f"{complaint}; this is the network of {source.name}", stacklevel=3)
    return _of_checkpoint(source, checkpoint), source


def from_checkpoint(path: Path) -> Snapshot:
    """The network in a checkpoint file.

    Raises:
        Unreadable: the file is damaged, or not a checkpoint of this program.
    """
    try:
        checkpoint = storage.read(path)
    except storage.DamagedError as error:
        raise _unreadable(path, error) from None
    return _of_checkpoint(path, checkpoint)


def _of_checkpoint(path: Path, checkpoint: Any) -> Snapshot:
    try:
        arguments, state = (nested(checkpoint, key) for key in ("arguments", "network"))
        if arguments is None or state is None:
            raise ValueError("no arguments" if arguments is None else "no network")
        run = "".join(c if c.isprintable() else "?" for c in path.resolve().parent.name)
        counters = {key: checkpoint[key] for key in ("epoch", "position", "data") if key in checkpoint}
        snapshot = Snapshot.of({**arguments, "run": run, **counters}, dict(state))
        snapshot.network()
    except ValueError as error:
        raise _unreadable(path, error) from None
    return snapshot


def _unreadable(path: Path, error: Exception) -> Unreadable:
    return Unreadable(f"{path} is damaged or not a checkpoint of this program ({checks.reason(error)})")
