"""Published results, which the accuracy-connectivity plane shows beside those of runs."""

from dataclasses import dataclass

from analysis.experiments import EXPERIMENTS


@dataclass(frozen=True)
class Published:
    label: str
    source: str
    points: tuple[tuple[float, float], ...]  # connectivity and test accuracy, as fractions
    marker: str


GRAD_R = "Chen et al., Pruning of deep spiking neural networks through gradient rewiring, IJCAI 2021"
STDS = (
    "Chen et al., State transition of dendritic spines improves learning of sparse spiking neural networks, ICML 2022"
)
STDS_POINTS = ((0.046, 0.9249), (0.022, 0.9249), (0.014, 0.9164), (0.01, 0.9106), (0.0075, 0.9021))
TIME_STEPS = 8  # of all networks with published results
PUBLISHED = {  # by experiment and data set
    ("mnist", "mnist"): (Published("dense baseline, IJCAI 2021", GRAD_R, ((1.0, 0.9892),), "*"),),
    ("c10", "cifar10"): (
        Published("dense baseline, IJCAI 2021", GRAD_R, ((1.0, 0.9284),), "*"),
        # its loss of accuracy is published as about 3.5 points
        Published("Grad R (about), IJCAI 2021", GRAD_R, ((0.0073, 0.9284 - 0.035),), "D"),
        Published("STDS, ICML 2022", STDS, STDS_POINTS, "X"),
    ),
}


def as_published(experiment: str, width: object, T: object) -> bool:
    """Whether an experiment's network has the size and the time steps of the published one."""
    return experiment in EXPERIMENTS and (width, T) == (EXPERIMENTS[experiment].width, TIME_STEPS)
