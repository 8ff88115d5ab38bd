"""The base class of methods, and the options that several methods share."""

import re
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn

from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from measuring import prunable
from training.command_line import format_number, number
from training.errors import Refusal


def _in_name(value: Any) -> str:
    return format_number(value) if isinstance(value, int | float) else str(value)


@dataclass(frozen=True)
class Option:
    """A command-line option of one or more methods."""

    spellings: str  # on the command line, as in "-s/--sparsity"; the last one gives its name
    type: Callable[[str], Any] | None = None  # converts the text to a value; None for a switch, which is off by default
    metavar: str | None = None  # the placeholder for the value in --help
    default: str = "off"  # as --help shows it
    place: str = "after"  # in a run's name: "first", among the "settings", "after" the method, or "last"
    label: str | None = None  # in a run's name, before the value or alone for a switch; None: the name with dashes
    show: Callable[[Any], str] = _in_name  # formats the value in a run's name
    unnamed: Any = None  # a value that does not appear in a run's name, besides None
    beside: str = ""  # what the option needs besides its method, for a message
    listed: bool = True  # by the console's first line; not if the method's title or explanation says it

    @property
    def name(self) -> str:
        """Its name in the parsed options."""
        return self.spellings.split("/")[-1].lstrip("-").replace("-", "_")

    def refuse(self, text: str) -> NoReturn:
        raise Refusal(f"argument {self.spellings}: {text}")

    def parts(self, options: Namespace) -> list[str]:
        """Its parts of a run's name."""
        value, label = getattr(options, self.name), self.label or self.name.replace("_", "-")
        if self.type is None:
            return [label] if value else []
        if value is None or value == self.unnamed:
            return []
        if re.search(r"[\s/\\:]", shown := self.show(value)):
            self.refuse(f"must be without spaces, / \\ and :, as it becomes part of the run's name, not {shown!r}")
        return [label, shown]


SPARSITY = Option(
    "-s/--sparsity",
    number("from 0 to 1", lambda x: 0 <= x <= 1, share=True),
    "S",
    default="none; required with grad and deep; with --connectivity C it is 1 - C, from 0.55 to 0.9999",
    place="settings",
    label="s",
    show=repr,
    listed=False,
)
PENALTY = Option("-penalty/--penalty", number(">= 0", lambda x: x >= 0), "P", default="1e-3", place="settings")


class Method:
    """A way to train a network. A subclass is an entry in the table of methods."""

    name: ClassVar[str]  # for -m and in run names
    label: ClassVar[str]  # in titles, tables and figures
    about: ClassVar[str]  # in --help
    options: ClassVar[dict[Option, str]] = {}  # each with its help
    prunes: ClassVar[bool] = True  # whether it sets weights to 0
    penalty: ClassVar[str | None] = None  # the key of its parameter groups that is recorded as the penalty

    def check(self, options: Namespace) -> None:
        """Sets the defaults of its options.

        Raises:
            Refusal: an option is missing, not accepted, or contradicts another.
        """

    def title(self, options: Namespace) -> str:
        """The subject of the console's first line."""
        return self.label

    def explain(self, options: Namespace) -> list[str]:
        """Lines on the console that explain the given options."""
        return []

    def optimizer(self, weights: list[Tensor], options: Namespace) -> Optimizer:
        """The optimizer of the prunable weights."""
        raise NotImplementedError

    def build(self, network: nn.Module, options: Namespace) -> list[Optimizer]:
        """The optimizers of a network; all of them step after each backward pass.

        The default is :meth:`optimizer` for the prunable weights and Adam for the other parameters.
        """
        weights = list(prunable(network).values())
        pruned = {id(weight) for weight in weights}
        others = [parameter for parameter in network.parameters() if id(parameter) not in pruned]
        found = [self.optimizer(weights, options)]
        return [*found, Adam(others, lr=options.learning_rate, **execution(options))] if others else found


def execution(options: Namespace) -> dict[str, bool]:
    """How Adam, and the optimizers derived from it, execute a step."""
    # capturable: a CUDA graph captures the step
    return {"fused": options.compile, "capturable": options.compile and options.device.type == "cuda"}
