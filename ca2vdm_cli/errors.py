"""Errors that a user can cause. Any other exception that reaches the terminal as a traceback is a bug."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """A request that cannot be carried out: one line that says what is wrong, where, and what to do.

    Args:
        message: the line, without a final period.
        exit_code: 1 for a run that failed, 2 for a request that was invalid before anything ran.
    """

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class UsageError(UserError):
    """An invalid request: a bad value, a missing file, an impossible combination (exit code 2)."""

    def __init__(self, message: str) -> None:
        super().__init__(message, exit_code=2)


def first_line(error: BaseException) -> str:
    """Why something failed: the first line of the operating system's or library's message, or else the error's name."""
    text = getattr(error, "strerror", None) or getattr(error, "err", None) or str(error)
    return next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)


NO_MEMORY_TO_LOAD = "out of memory while loading the program; free some, or allow it more (ulimit -v)"


def out_of_memory(error: BaseException) -> UserError | None:
    """The error to show if memory ran out; None if ``error`` is another.

    PyTorch has an exception type for GPU memory only, and a library that can't be loaded says so in an ImportError.
    """
    words = ("not enough memory", "allocate memory", "out of memory", "failed to map segment")
    if not isinstance(error, MemoryError) and not (
        isinstance(error, (RuntimeError, ImportError, OSError)) and any(word in str(error).lower() for word in words)
    ):
        return None
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_name == "<module>":  # a module is being imported
            return UserError(NO_MEMORY_TO_LOAD)
        trace = trace.tb_next
    return UserError("out of memory; use a smaller batch, window or size (ca2vdm plan says what fits)")


@contextmanager
def as_user_error(failure: str, advice: str = "", errors: tuple[type[Exception], ...] = (OSError,)) -> Iterator[None]:
    """Turn an error in the block into a ``UserError`` of one line: ``failure (reason); advice``.

    A broken pipe passes unchanged: it means that whoever read the output has gone.

    Args:
        failure: what failed, such as ``out.mp4: cannot be written``.
        advice: what to do about it.
        errors: the errors to convert.
    """
    try:
        yield
    except BrokenPipeError:
        raise
    except errors as error:
        raise UserError(f"{failure} ({first_line(error)}){advice and f'; {advice}'}") from error
