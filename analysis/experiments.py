"""The table of experiments, from which the report, exports, grids and benchmarks take them. List a new one here."""

from c10 import c10
from mnist import mnist
from training.experiment import Experiment

EXPERIMENTS: dict[str, Experiment] = {experiment.name: experiment for experiment in (mnist.EXPERIMENT, c10.EXPERIMENT)}
