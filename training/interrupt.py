"""Signals: a run stops or saves between two steps, never within a step."""

import contextlib
import signal
import threading
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Any


def known(names: Iterable[str]) -> list[signal.Signals]:
    """The signals among ``names`` that this system has; Windows has no SIGUSR1."""
    return [getattr(signal, name) for name in names if hasattr(signal, name)]


@contextlib.contextmanager
def surviving_requests_to_save() -> Iterator[None]:
    """Ignores SIGUSR1 while there is nothing to save: it would end the process."""
    here = threading.current_thread() is threading.main_thread()  # elsewhere signals cannot be set
    numbers = [number for number in known(["SIGUSR1"]) if here and signal.getsignal(number) is signal.SIG_DFL]
    try:
        for number in numbers:
            signal.signal(number, signal.SIG_IGN)
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


class StopRequested(Exception):
    """Ends the training loop, which then saves the run. Raised by :meth:`Signals.check`."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


class Signals:
    """A context manager that notes signals; the run checks it between two steps.

    SIGTERM and SIGINT mean stop; a second SIGINT raises KeyboardInterrupt at once. SIGUSR1, the usual warning of batch
    systems, means save and continue.

    Attributes:
        stop: the number of the signal that asks to stop, or None.
        save: whether SIGUSR1 has arrived since the run last saved.
    """

    def __init__(self) -> None:
        self.stop: int | None = None
        self.save = False

    def __enter__(self) -> "Signals":
        numbers = known(("SIGTERM", "SIGINT", "SIGUSR1"))
        self._before = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, *exception: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == self.stop == signal.SIGINT:
            raise KeyboardInterrupt
        if number in (signal.SIGTERM, signal.SIGINT):
            self.stop = number
        else:
            self.save = True

    def check(self) -> None:
        """Raises StopRequested if a signal asks to stop."""
        if self.stop is not None:
            raise StopRequested(self.stop)
