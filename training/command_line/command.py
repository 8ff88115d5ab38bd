"""What every command does with a failure: one line, and an exit status."""

import contextlib
import functools
import io
import os
import re
import shlex
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from training.defaults import torch_defaults
from training.errors import DivergedError, Interrupted, Refusal


def command(main: Callable[..., int]) -> Callable[..., int]:
    """Decorates a script's main: a failure becomes one line, with status 2 when the user can fix it.

    A :class:`Refusal` gives status 2; a run that diverges, too little memory or an error of the operating
    system 1; a signal that stops a run 128 and its number. A UserWarning becomes one line too.
    """

    @functools.wraps(main)
    def wrapped(*args: Any) -> int:
        if isinstance(sys.stdout, io.TextIOWrapper):  # a console without µ or – shows ?
            sys.stdout.reconfigure(errors="replace")
        try:
            with torch_defaults(), _warnings_in_one_line():
                return main(*args)
        except Refusal as refusal:
            return _fail(str(refusal), 2)
        except DivergedError as error:
            return _fail(str(error), 1)
        except FileNotFoundError as error:  # perhaps what was saved before is what was not found
            return _fail(str(error), 1)
        except BrokenPipeError:  # nobody reads the output any more, as after `| head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python writes at its end
            return 128 + 13  # as if SIGPIPE had ended it
        except OSError as error:
            return _fail(f"{error}; what was saved before is unchanged", 1)
        except Interrupted as stop:
            name = signal.Signals(stop.number).name
            print(f"Stopped by {name} {stop}, and saved. To go on: {shlex.join(['python', *sys.argv])}", flush=True)
            return 128 + stop.number
        except KeyboardInterrupt:
            return _fail("interrupted; what was saved before is unchanged", 130)
        except (MemoryError, RuntimeError) as error:
            line = _explained(error)
            if line is None:
                raise
            return _fail(line, 2 if "--deterministic" in line else 1)

    return wrapped


def _explained(error: Exception) -> str | None:
    """The line for an error of torch that is not a fault of the program; None for all others."""
    text = str(error)
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in text:
        return f"out of memory ({text.splitlines()[0] if text else 'no more is known'}); a smaller -b or -T takes less"
    if operation := re.match(r"(\S+) does not have a deterministic implementation", text):
        return f"argument --deterministic: {operation[1]} has no deterministic implementation on this device"
    if "without overflow" in text:  # Adam's plain step; the fused one goes on with infinity, which is found
        return "a step is too large for float32: -lr is too large; what was saved before is unchanged"
    return None


@contextlib.contextmanager
def _warnings_in_one_line() -> Iterator[None]:
    """Prints a UserWarning without the line of code that gives it; other categories stay as they are."""
    usual = warnings.formatwarning

    def one_line(message: Warning | str, category: type[Warning], *place: Any) -> str:
        if category is not UserWarning:
            return usual(message, category, *place)
        return f"{Path(sys.argv[0]).name}: warning: {' '.join(str(message).split())}\n"

    warnings.formatwarning = one_line
    try:
        yield
    finally:
        warnings.formatwarning = usual


def _fail(message: str, status: int) -> int:
    script = Path(sys.argv[0])
    name = script.parent.name if script.name == "__main__.py" else script.name
    print(f"{name}: error: {' '.join(message.split())}", file=sys.stderr)
    return status
