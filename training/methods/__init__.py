"""The table of methods: whoever adds one writes a file like those beside this one, and lists it here.

The command line, the names of runs, the console, the report and the grids take everything from this table.
"""

from training.methods.deep import DeepR
from training.methods.dense import Dense
from training.methods.grad import GradR
from training.methods.method import Method, Option

METHODS: dict[str, Method] = {method.name: method for method in (GradR(), DeepR(), Dense())}
DEFAULT = Dense.name


def options() -> dict[Option, list[Method]]:
    """The options that belong to methods, each with the methods that take it."""
    found: dict[Option, list[Method]] = {}
    for method in METHODS.values():
        for option in method.options:
            found.setdefault(option, []).append(method)
    return found
