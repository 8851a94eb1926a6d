"""``ca2vdm`` and ``python -m ca2vdm_cli``: run a command, and turn what goes wrong into one line and an exit code."""

from __future__ import annotations

import atexit
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress

from .errors import UserError

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""As in glibc's malloc.h; the largest mmap threshold there is 32 MiB."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        0 when it worked (also when the reader of standard output went away), 1 when the run failed, 2 when the request
        was wrong, 130 on Ctrl-C.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    _open_what_is_closed()
    _treat_termination_as_interrupt()
    _keep_freed_memory()
    try:
        from .cli import run

        code = run([argument for argument in given if argument != "--debug"])
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        _discard_output()
        return 0
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if debug:
            raise
        from .terminal import print_error

        if isinstance(error, OSError) and error.strerror:  # a full disk, a file without permission
            where = error.filename if isinstance(error.filename, str) else "output"
            error = UserError(f"{where}: {error.strerror}; check permissions and free space")
        if _is_out_of_memory(error):
            error = UserError("out of memory; take a smaller batch, window or size (ca2vdm plan says what fits)")
        if not isinstance(error, UserError):
            what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            error = UserError(f"{what} (a fault of the program; --debug shows where, please report it)")
        print_error(error)
        return error.exit_code


def _is_out_of_memory(error: Exception) -> bool:
    """PyTorch has a type for a GPU's memory only, and says it in words of the processor's."""
    words = ("not enough memory", "can't allocate memory", "out of memory")
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)
    )


def _open_what_is_closed() -> None:
    """A shell may close standard streams (``>&-``), which Python leaves as None: nothing is read or written there."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            stream = open(os.devnull, mode, encoding="utf-8")  # noqa: SIM115 - for as long as Python runs
            atexit.register(stream.close)
            setattr(sys, name, stream)


def _treat_termination_as_interrupt() -> None:
    """SIGTERM and a terminal that is closed too leave a playable file of the finished chunks."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # not under nohup
            signal.signal(signal.SIGHUP, signal.default_int_handler)


def _keep_freed_memory() -> None:
    """Have glibc's allocator keep freed memory for what is allocated next, unless the user's environment says how.

    By default it gives a step's large tensors back to the system, which then clears every page of the next step's.
    """
    if any(name.startswith("MALLOC_") for name in os.environ):
        return
    with suppress(OSError, AttributeError, TypeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_TRIM_THRESHOLD, 2**30)
        mallopt(M_MMAP_THRESHOLD, 2**25)


def _discard_output() -> None:
    """Nobody reads standard output any more: keep Python from complaining about that when it exits."""
    with open(os.devnull, "w", encoding="ascii") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
