"""The name of a run, after all options that change its outcome."""

import argparse
from decimal import Decimal

from training.experiment import Experiment


def format_number(value: float) -> str:
    """Writes a number as run names do, shortest digits in powers of ten: 0.001 is 1e-3, 0.00025 is 2.5e-4."""
    if value == 0:
        return "0"
    exponent = Decimal(repr(value)).adjusted()
    mantissa = Decimal(repr(value)).scaleb(-exponent).normalize()
    return f"{mantissa:f}e{exponent}"


def run_name(options: argparse.Namespace, experiment: Experiment) -> str:
    """Names a run after every option that changes its outcome, but the number of epochs of the paper's recipe."""
    parts = ["soft"] if options.soft else []
    parts += ["lr", format_number(options.learning_rate), "b", str(options.batch_size), "T", str(options.T)]
    if options.connectivity is not None:
        parts += ["connectivity", format_number(options.connectivity)]
    if options.penalty is not None:
        parts += ["penalty", format_number(options.penalty)]
    if options.sparsity is not None:
        parts += ["s", repr(options.sparsity)]
    parts += [options.mode]
    if options.recipe != "paper":
        parts += [options.recipe, "N", str(options.epoch)]  # the schedule is that of the number of epochs
    if options.plain_gradient:
        parts += ["plain-gradient"]
    if options.seed != 2020:
        parts += ["seed", str(options.seed)]
    if options.temperature:
        parts += ["temperature", format_number(options.temperature)]
    if options.precision:
        parts += [options.precision]
    if options.dataset != experiment.datasets[0]:
        parts += [options.dataset]
    return "-".join(parts)
