"""The one error a user may cause. Anything else that reaches the terminal as a traceback is a bug of ours."""


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
