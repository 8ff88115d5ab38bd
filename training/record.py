"""What a run tells: TensorBoard, the console, and the files of a test.

The tags are those of the published implementation. Steps count the updates, epochs the finished
epochs, at the time of measuring: train/loss at step 0 is the loss before the first update.
"""

import json
from argparse import Namespace
from pathlib import Path

import numpy as np
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.tensorboard import SummaryWriter

from training.measure import Connections, prunable, total


def folder_of(options: Namespace) -> Path:
    """Where the logs of a run are."""
    return options.dump_dir / "logs" / options.name


class Recorder:
    """Writes a run's TensorBoard log.

    Args:
        folder: the log folder.
        step: the step from which the run goes on; what an interrupted run logged later is hidden.
    """

    def __init__(self, folder: Path, step: int):
        self.writer = SummaryWriter(str(folder), purge_step=step)

    def training(self, step: int, loss: float, accuracy: float) -> None:
        self.writer.add_scalar("train/loss", loss, step)
        self.writer.add_scalar("train/acc", accuracy, step)

    def accuracy(self, epoch: int, accuracy: float) -> None:
        self.writer.add_scalar("test_acc", accuracy, epoch)

    def connections(
        self,
        epoch: int,
        layers: dict[str, Connections],
        rewired: dict[str, tuple[int, int]],
        others: int,
    ) -> None:
        """Records sparsity and rewiring; ``others`` is the number of parameters that are never pruned."""
        add = self.writer.add_scalar
        for name, layer in layers.items():
            pruned, regrown = rewired[name]
            add(f"layer sparsity/{name}", layer.sparsity, epoch)
            add(f"prune_cnt/{name}", pruned, epoch)
            add(f"regrow_cnt/{name}", regrown, epoch)
            add(f"prune-regrow/{name}", pruned - regrown, epoch)
        if others:
            add("sparsity/with bn", total(layers, others).sparsity, epoch)
            add("sparsity/without bn", total(layers).sparsity, epoch)
        else:
            add("sparsity", total(layers).sparsity, epoch)

    def neurons(self, epoch: int, rates: dict[str, Tensor]) -> None:
        """Records, per LIF layer, the mean firing rate and the share of neurons silent on the whole test set."""
        for name, rate in rates.items():
            self.writer.add_scalar(f"avg_firing_rate/{name}", float(rate.mean()), epoch)
            self.writer.add_scalar(f"nonfire_prop/{name}", float((rate == 0).float().mean()), epoch)

    def weights(
        self, epoch: int, network: nn.Module, optimizers: list[Optimizer], names: tuple[str, ...] | None
    ) -> None:
        """Records the distributions of weights and, where the algorithm has it, of theta; all layers, or ``names``."""
        for name, weight in prunable(network).items():
            if names is not None and name not in names:
                continue
            self.writer.add_histogram(f"{name}-w", weight.detach(), epoch)
            for optimizer in optimizers:
                state = optimizer.state.get(weight, {})
                if "theta" in state:
                    self.writer.add_histogram(f"{name}-theta", state["theta"], epoch)

    def flush(self) -> None:
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


def percent(fraction: float) -> str:
    return f"{100 * fraction:.2f} %"


def epoch_line(epoch: int, epochs: int, accuracy: float, best: float, connections: Connections, seconds: float) -> str:
    """The line that the console shows after an epoch."""
    return (
        f"epoch {epoch}/{epochs}  test accuracy {percent(accuracy)}  best {percent(best)}  "
        f"sparsity {percent(connections.sparsity)}  connectivity {percent(connections.connectivity)}  {seconds:.1f} s"
    )


def report_test(
    folder: Path, epoch: int, accuracy: float, layers: dict[str, Connections], rates: dict[str, Tensor]
) -> None:
    """Prints a test's results and stores them: ``test.json``, and ``rate-<LIF>-epoch-<epoch>.npy`` per LIF layer."""
    folder.mkdir(parents=True, exist_ok=True)
    everything = total(layers)
    print(f"test accuracy {percent(accuracy)} after {epoch} epochs")
    width = max(map(len, layers))
    for name, layer in [*layers.items(), ("total", everything)]:
        print(
            f"{name:{width}}  sparsity {percent(layer.sparsity):>8}  connectivity {percent(layer.connectivity):>8}  "
            f"{layer.connected} of {layer.weights} connections"
        )
    for name, rate in rates.items():
        silent = float((rate == 0).float().mean())
        print(f"{name:{width}}  firing rate {float(rate.mean()):.4f}  silent neurons {percent(silent)}")
        np.save(folder / f"rate-{name}-epoch-{epoch}.npy", rate.cpu().numpy())
    result = {
        "epoch": epoch,
        "accuracy": accuracy,
        "sparsity": everything.sparsity,
        "layer_sparsity": {name: layer.sparsity for name, layer in layers.items()},
    }
    (folder / "test.json").write_text(json.dumps(result, indent=2) + "\n")
    print(f"firing rates of every neuron and test.json are in {folder}")
