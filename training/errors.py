"""Failures that a command reports in one line."""


def status_of(error: BaseException) -> int:
    """The exit status of a command that an error ends."""
    if isinstance(error, BrokenPipeError):
        return 128 + 13  # as if SIGPIPE had ended it
    if isinstance(error, KeyboardInterrupt):
        return 128 + 2
    return getattr(error, "status", 1)


class Refusal(Exception):
    """The user asked for something that is not accepted; the text is the line to print."""

    status = 2


class DivergedError(Exception):
    """The training produced numbers that are not finite; the text is the line to print."""

    status = 1


class RankLost(Exception):
    """Another process of the run has ended or does not answer; the text is the line to print."""

    status = 1


class Interrupted(Exception):
    """A signal stopped the run after it was saved; the text says where the run is."""

    def __init__(self, number: int, message: str):
        super().__init__(message)
        self.number, self.status = number, 128 + number
