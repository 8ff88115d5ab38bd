"""The name of a run: every option that changes its result."""

import argparse

from training import methods
from training.command_line.types import format_number


def run_name(options: argparse.Namespace) -> str:
    """The run's name. With the paper's recipe it omits the number of epochs, so that a run can be extended."""

    def of_method(place: str) -> list[str]:
        return [part for option in methods.options() if option.place == place for part in option.parts(options)]

    parts = of_method("first")
    parts += ["lr", format_number(options.learning_rate), "b", str(options.batch_size), "T", str(options.T)]
    parts += of_method("settings")
    parts += [options.mode]
    if options.recipe != "paper":
        parts += [options.recipe, "N", str(options.epoch)]  # its schedules depend on N
    parts += of_method("after")
    if options.seed != options.defaults["seed"]:
        parts += ["seed", str(options.seed)]
    parts += of_method("last")
    if options.precision:
        parts += [options.precision]
    if options.dataset != options.defaults["dataset"]:
        parts += [options.dataset]
    if options.width != options.defaults["width"]:
        parts += ["width", str(options.width)]
    return "-".join(parts)
