"""The one error a user may cause. Anything else that reaches the terminal as a traceback is a bug of ours."""

from __future__ import annotations


class UserError(Exception):
    """A request that cannot be carried out: one line that says what, where, and what to do.

    Args:
        message: the line, without a trailing period-separated essay.
        exit_code: 1 for a run that failed, 2 for a request that was wrong before anything ran.
    """

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class UsageError(UserError):
    """A wrong request: a bad value, a missing file, an impossible combination (exit code 2)."""

    def __init__(self, message: str) -> None:
        super().__init__(message, exit_code=2)


def first_line(error: BaseException) -> str:
    """The first line of a library's message; the error's name where it has none."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
