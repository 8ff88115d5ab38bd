"""How every command fails: with one line and an exit status."""

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
from training.errors import DivergedError, Interrupted, RankLost, Refusal, status_of


def command(main: Callable[..., int]) -> Callable[..., int]:
    """Decorates a script's main function: a failure becomes one line and an exit status.

    The status is 2 for a :class:`Refusal`; 1 for divergence, lack of memory or an error of the operating system;
    128 + the signal's number for a run stopped by a signal. A UserWarning becomes one line too.
    """

    @functools.wraps(main)
    def wrapped(*args: Any) -> int:
        if isinstance(sys.stdout, io.TextIOWrapper):  # a console that cannot print µ or – prints ?
            sys.stdout.reconfigure(errors="replace")
        try:
            with torch_defaults(), _warnings_in_one_line():
                return main(*args)
        except (Refusal, DivergedError, RankLost) as error:
            return _fail(str(error), error.status)
        except BrokenPipeError as error:  # nobody reads the output any more, as after `| head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python writes at its end
            return status_of(error)
        except OSError as error:  # after FileNotFoundError, the run's own files may be missing
            unchanged = "" if isinstance(error, FileNotFoundError) else "; existing files are unchanged"
            return _fail(f"{error}{unchanged}", 1)
        except Interrupted as stop:
            name = signal.Signals(stop.number).name
            print(f"Stopped by {name} {stop}, and saved. Resume with: {shlex.join(['python', *sys.argv])}", flush=True)
            return stop.status
        except KeyboardInterrupt as error:
            return _fail("interrupted; existing files are unchanged", status_of(error))
        except (MemoryError, RuntimeError) as error:
            if (line := _explained(error)) is None:
                raise
            return _fail(line, 2 if "--deterministic" in line else 1)

    return wrapped


def _explained(error: Exception) -> str | None:
    """The line for an error that is not a bug of the program; None for a bug."""
    text = str(error)
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in text:
        return f"out of memory{f' ({text.splitlines()[0]})' if text else ''}; a smaller -b or -T needs less"
    if operation := re.match(r"(\S+) does not have a deterministic implementation", text):
        return f"argument --deterministic: {operation[1]} has no deterministic implementation on this device"
    if "without overflow" in text:  # from Adam's plain step; the fused step yields infinity, which FiniteCheck finds
        return "a step is too large for float32: use a smaller -lr; existing files are unchanged"
    return None


@contextlib.contextmanager
def _warnings_in_one_line() -> Iterator[None]:
    """Prints a UserWarning without its line of code. Other categories are printed as usual."""
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
