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
    """A network, its data sets and its default options.

    Attributes:
        name: the name of its folder and its script.
        label: its name in titles.
        network: the class; called as ``network(T, width=width)``.
        width: the default of --width, the size of the network's layers.
        width_is: what the width counts, for --help.
        datasets: what --dataset accepts, the default first.
        paper, fast: the defaults with each --recipe.
        interval_test: the default of -i1.
        test_batch_size: limits the memory of an evaluation; the result does not depend on it.
        histograms: the weights whose distribution is recorded; None for all prunable weights.
    """

    name: str
    label: str
    network: type[SpikingNetwork]
    width: int
    width_is: str
    datasets: tuple[DataSource, ...]
    paper: Pace
    fast: Pace
    interval_test: int
    test_batch_size: int
    histograms: tuple[str, ...] | None = None

    def dataset(self, name: str) -> DataSource:
        """The data set with this name."""
        return next(source for source in self.datasets if source.name == name)
