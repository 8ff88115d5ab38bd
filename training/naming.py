"""The name of a run: every option that changes its result."""

import argparse

from training import methods
from training.command_line.types import format_number


def run_name(options: argparse.Namespace) -> str:
    """The run's name. With the paper's recipe it omits the number of epochs, so that a run can be extended."""

    def of_method(place: str) -> list[str]:
        return [part for option in methods.options() if option.place == place for part in option.parts(options)]

    def unless_default(name: str, *label: str) -> list[str]:
        value = getattr(options, name)
        return [] if value == options.defaults[name] else [*label, str(value)]

    paces = ["lr", format_number(options.learning_rate), "b", str(options.batch_size), "T", str(options.T)]
    parts = [*of_method("first"), *paces, *of_method("settings"), options.mode]
    if options.recipe != "paper":
        parts += [options.recipe, "N", str(options.epoch)]  # its schedules depend on N
    parts += [*of_method("after"), *unless_default("seed", "seed"), *of_method("last")]
    parts += [*unless_default("precision"), *unless_default("dataset"), *unless_default("width", "width")]
    return "-".join(parts)
