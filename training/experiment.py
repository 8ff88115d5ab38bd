"""What an experiment is: a network, the data sets that it takes, and its defaults for the options."""

from dataclasses import dataclass

from spiking import SpikingNetwork
from training.data.dataset import DataSource


@dataclass(frozen=True)
class Pace:
    """The defaults of the options that --recipe decides on."""

    batch_size: int
    learning_rate: float
    epochs: int


@dataclass(frozen=True)
class Experiment:
    """A network, the data sets that it takes, and its defaults for the options.

    Attributes:
        name: of its folder and its script.
        label: in titles.
        network: made by ``network(T, width=width)``.
        width: default of --width, the size of the network's layers.
        width_is: what the width counts, for --help.
        datasets: what --dataset accepts, its default first.
        paper, fast: the defaults with either --recipe.
        interval_test: default of -i1.
        test_batch_size: bounds the memory of an evaluation; has no influence on its result.
        histograms: the weights whose distribution is recorded; None for all that are pruned.
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
        """One of :attr:`datasets`, by its name."""
        return next(source for source in self.datasets if source.name == name)
