"""What a method is, and the options that several methods share."""

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn

from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from measuring import prunable
from training.command_line import format_number, number
from training.errors import Refusal


@dataclass(frozen=True)
class Option:
    """An option of the command line that belongs to one method or several.

    Attributes:
        name: in the parsed options.
        spellings: on the command line.
        type: makes a value of a text; None for a switch, which is off by default.
        metavar: stands for the value in --help.
        default: the default in words, for --help.
        label: in a run's name, before the value; the whole of a switch.
        place: where in a run's name: "first", among the "settings", "after" the method, or "last".
        show: writes a value in a run's name.
        unnamed: a value that a run's name leaves out, beside None.
        beside: what else the option needs, for a message.
    """

    name: str
    spellings: tuple[str, ...]
    label: str
    type: Callable[[str], Any] | None = None
    metavar: str | None = None
    default: str = "off"
    place: str = "after"
    show: Callable[[Any], str] = format_number
    unnamed: Any = None
    beside: str = ""

    def refuse(self, text: str) -> NoReturn:
        raise Refusal(f"argument {'/'.join(self.spellings)}: {text}")

    def parts(self, options: Namespace) -> list[str]:
        """What it adds to a run's name."""
        value = getattr(options, self.name)
        if self.type is None:
            return [self.label] if value else []
        return [] if value is None or value == self.unnamed else [self.label, self.show(value)]


SPARSITY = Option(
    "sparsity",
    ("-s", "--sparsity"),
    "s",
    number("from 0 to 1", lambda x: 0 <= x <= 1, share=True),
    "S",
    default="none; grad and deep require it",
    place="settings",
    show=repr,
)
PENALTY = Option(
    "penalty",
    ("-penalty", "--penalty"),
    "penalty",
    number(">= 0", lambda x: x >= 0),
    "P",
    default="1e-3",
    place="settings",
)


class Method:
    """A way to train a network; a subclass is an entry of the table of methods.

    Attributes:
        name: what -m takes, and the run's name has.
        label: in titles, tables and figures.
        about: for --help.
        options: the options that belong to it, each with its help.
        prunes: whether it makes weights 0.
        penalty: the setting of its optimizer's groups that is recorded as the penalty; None without one.
    """

    name: ClassVar[str]
    label: ClassVar[str]
    about: ClassVar[str]
    options: ClassVar[dict[Option, str]] = {}
    prunes: ClassVar[bool] = True
    penalty: ClassVar[str | None] = None

    def check(self, options: Namespace) -> None:
        """Sets the defaults of its options.

        Raises:
            Refusal: an option is missing, not accepted, or contradicts another.
        """

    def title(self, options: Namespace) -> str:
        """What runs, at the beginning of a sentence."""
        return self.label

    def explain(self, options: Namespace) -> list[str]:
        """What a user should know of the options that were given, a line each."""
        return []

    def optimizer(self, weights: list[Tensor], options: Namespace) -> Optimizer:
        """The optimizer of the weights that can be pruned."""
        raise NotImplementedError

    def build(self, network: nn.Module, options: Namespace) -> list[Optimizer]:
        """The optimizers of a network, which all take a step after every backward pass.

        By default, :meth:`optimizer` for the weights that can be pruned, and Adam for all others.
        """
        weights = list(prunable(network).values())
        pruned = {id(weight) for weight in weights}
        others = [parameter for parameter in network.parameters() if id(parameter) not in pruned]
        found = [self.optimizer(weights, options)]
        return [*found, Adam(others, lr=options.learning_rate, **execution(options))] if others else found


def execution(options: Namespace) -> dict[str, bool]:
    """The settings of Adam, and of the optimizers made from it, that say how a step is executed."""
    # a CUDA graph captures the step
    return {"fused": options.compile, "capturable": options.compile and options.device.type == "cuda"}
