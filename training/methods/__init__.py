"""The table of methods. To add a method, write a file in this folder and add it to the table.

The command line, run names, console, report and grids read this table.
"""

from training.methods.deep import DeepR
from training.methods.dense import Dense
from training.methods.grad import GradR
from training.methods.method import Method, Option

METHODS: dict[str, Method] = {method.name: method for method in (GradR(), DeepR(), Dense())}
DEFAULT = Dense.name


def options() -> dict[Option, list[Method]]:
    """The options of all methods, each with the methods that have it."""
    found: dict[Option, list[Method]] = {}
    for method in METHODS.values():
        for option in method.options:
            found.setdefault(option, []).append(method)
    return found
