"""A network as a run left it, without what training needs: its weights, and how to build it from them."""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from spikingjelly.activation_based import neuron
from torch import Tensor, nn

from c10.c10 import RECIPE as C10
from c10.model import Cifar10Net
from mnist.mnist import RECIPE as MNIST
from mnist.model import MnistNet
from spiking import SpikingNetwork
from training import storage
from training.options import Recipe, Refusal

EXPERIMENTS: dict[str, tuple[type[SpikingNetwork], Recipe]] = {
    recipe.name: (network, recipe) for network, recipe in ((MnistNet, MNIST), (Cifar10Net, C10))
}
CHECKPOINT = "checkpoint.pt"


class Unreadable(Refusal, ValueError):
    """A file or folder that is not what it should be, or is damaged; the text is one line that names it."""


def reason(error: BaseException) -> str:
    """The first line of an error's text, for the errors that a damaged file raises in other libraries."""
    if isinstance(error, KeyError):
        return f"no {error}"
    return (str(error) or type(error).__name__).splitlines()[0]


@dataclass(frozen=True)
class Snapshot:
    """A network at the end of an epoch.

    ``state`` is its state_dict, float32 on the CPU; ``T`` the number of time steps; ``experiment`` one of
    :data:`EXPERIMENTS`; ``dataset``, ``run`` and ``epoch`` say where it comes from.
    """

    experiment: str
    dataset: str
    T: int
    run: str
    epoch: int
    state: dict[str, Tensor]

    @property
    def recipe(self) -> Recipe:
        return EXPERIMENTS[self.experiment][1]

    def network(self) -> SpikingNetwork:
        """The network with this state, in eval mode; it shares the tensors, and asks for no gradients.

        Draws no random number.

        Raises:
            ValueError: the state is not one of this experiment's network.
        """
        with torch.device("meta"):  # nothing to initialise: every tensor comes from the state
            network = EXPERIMENTS[self.experiment][0](self.T)
        check_state(network, self.state)
        network.load_state_dict(self.state, assign=True)
        return network.eval().requires_grad_(False)

    def neuron(self) -> dict[str, Any]:
        """The parameters of the network's neurons, which are all alike."""
        with torch.device("meta"):
            network = EXPERIMENTS[self.experiment][0](self.T)
        lif = next(module for module in network.modules() if isinstance(module, neuron.LIFNode))
        return {key: getattr(lif, key) for key in ("tau", "v_threshold", "v_reset", "decay_input")}


def check_state(network: nn.Module, state: dict[str, Tensor]) -> None:
    """Raises ValueError unless a state has the network's tensors, each of its shape and type."""
    expected = network.state_dict()
    for name in sorted(expected.keys() ^ state.keys()):
        raise ValueError(f"{name} is {'missing' if name in expected else 'not a tensor of this network'}")
    for name, tensor in state.items():
        there, wanted = (f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}" for t in (tensor, expected[name]))
        if there != wanted:
            raise ValueError(f"{name} is {there}, not {wanted}")


def batch_norms(network: nn.Module) -> dict[str, str]:
    """The convolutions that BatchNorm follows: the convolution's name to the BatchNorm's."""
    return {
        f"{name}.{first}": f"{name}.{second}"
        for name, sequence in network.named_modules()
        if isinstance(sequence, nn.Sequential)
        for (first, convolution), (second, norm) in pairwise(sequence.named_children())
        if isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)
    }


def models_folder(path: Path) -> Path:
    """Where a run's checkpoint is: ``path`` is the run's folder below models, or the one below logs.

    Raises:
        Unreadable: there is no checkpoint.
    """
    for folder in (path, path.resolve().parent.parent / "models" / path.resolve().name):
        if (folder / CHECKPOINT).is_file():
            return folder
    raise Unreadable(
        f"{path} has no {CHECKPOINT}: a run's folder is <dump-dir>/models/<name> or <dump-dir>/logs/<name>"
    )


def from_checkpoint(path: Path) -> Snapshot:
    """The network in a checkpoint file.

    Raises:
        Unreadable: the file is damaged, or not a checkpoint of this program.
    """
    try:
        checkpoint = storage.read(path)
        if not isinstance(checkpoint, dict):
            raise TypeError(f"a {type(checkpoint).__name__}")
        arguments, state = checkpoint["arguments"], dict(checkpoint["network"])
        names = (arguments["experiment"], arguments["dataset"])
        snapshot = Snapshot(*names, arguments["T"], path.resolve().parent.name, checkpoint["epoch"], state)
        snapshot.network()
    except (storage.DamagedError, KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise Unreadable(f"{path} is damaged or not a checkpoint of this program ({reason(error)})") from None
    return snapshot
