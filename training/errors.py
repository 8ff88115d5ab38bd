"""The failures that a command explains in one line."""


class Refusal(Exception):
    """Something the user asked for that is not accepted; its text is the one line to print."""


class DivergedError(Exception):
    """A run has met numbers that are not finite; its text is the one line to print."""


class Interrupted(Exception):
    """A signal has ended the run, with everything saved; its text is what to print."""

    def __init__(self, number: int, message: str):
        super().__init__(message)
        self.number = number
