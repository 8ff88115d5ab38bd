"""The table of experiments: whoever adds one lists it here, and the report, exports, grids and benchmarks know it."""

from c10 import c10
from mnist import mnist
from training.experiment import Experiment

EXPERIMENTS: dict[str, Experiment] = {experiment.name: experiment for experiment in (mnist.EXPERIMENT, c10.EXPERIMENT)}
