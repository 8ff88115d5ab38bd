"""An experiment: a network, its data sets and its default options."""

from dataclasses import dataclass

from spiking import SpikingNetwork
from training.data.dataset import DataSource


@dataclass(frozen=True)
class Pace:
    """The defaults of -b, -lr and -N, which depend on --recipe."""

    batch_size: int
    learning_rate: float
    epochs: int


@dataclass(frozen=True)
class Experiment:
    """A network, its data sets and its default options."""

    name: str  # of its folder and its script
    label: str  # its name in titles
    network: type[SpikingNetwork]  # called as network(T, width=width)
    width: int  # the default of --width, the size of the network's layers
    width_is: str  # what the width counts, for --help
    datasets: tuple[DataSource, ...]  # what --dataset accepts, the default first
    paper: Pace  # the defaults with each --recipe
    fast: Pace
    interval_test: int  # the default of -i1
    test_batch_size: int  # limits the memory of an evaluation; the result does not depend on it
    histograms: tuple[str, ...] | None = None  # the weights whose distribution is recorded; None: all prunable weights

    def dataset(self, name: str) -> DataSource:
        """The data set with this name."""
        return next(source for source in self.datasets if source.name == name)
