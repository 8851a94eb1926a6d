"""``ca2vdm`` and ``python -m ca2vdm_cli``: run a command, and turn errors into one line and an exit code."""

from __future__ import annotations

import atexit
import ctypes
import os
import resource
import signal
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress

from .errors import NO_MEMORY_TO_LOAD, UsageError, UserError, out_of_memory

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""As in glibc's malloc.h; the largest mmap threshold there is 32 MiB."""
SPIN_COUNT = "10000"
"""How often an idle OpenMP thread looks for work before it sleeps. GNU OpenMP's default is 300,000."""
LOADING_BYTES = 850 * 2**20
"""Address space that PyTorch's CPU build and the smallest model need."""
WITHOUT_TORCH = {"presets", "plugins", "--help", "-h", "--version"}
"""Commands and flags that do not load PyTorch."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        0 on success (also if the reader of standard output went away), 1 if the run failed, 2 if the request was
        invalid, 130 on Ctrl-C.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    _open_closed_streams()
    _treat_termination_as_interrupt()
    _keep_freed_memory()
    _shorten_spinning()
    try:
        _check_surroundings(given)
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
        shown = error if isinstance(error, UserError) else out_of_memory(error)
        try:
            shown = shown or _user_error(error)
            from .terminal import print_error

            print_error(shown)
        except (MemoryError, ImportError):  # memory is too short even for that
            shown = shown or UserError("out of memory")
            sys.stderr.write(f"error: {shown}\n")
        return shown.exit_code


def _check_surroundings(arguments: Sequence[str]) -> None:
    """Check what would end the process while PyTorch is loaded, with a message of its libraries.

    Raises:
        UserError: the working directory has been deleted, or the limit of memory is too low.
    """
    try:
        os.getcwd()
    except OSError:
        raise UsageError("the working directory no longer exists; change to another") from None
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    needs_torch = bool(arguments) and not WITHOUT_TORCH.intersection(arguments)
    if needs_torch and limit != resource.RLIM_INFINITY and limit < LOADING_BYTES:
        raise UserError(NO_MEMORY_TO_LOAD)


def _user_error(error: Exception) -> UserError:
    """The error to show for an exception that is neither a ``UserError`` nor a lack of memory."""
    from .plugins import one_line, plugin_failure

    if failure := plugin_failure(error):
        return failure
    if isinstance(error, OSError) and error.strerror:  # a full disk, a file without permission
        place = error.filename if isinstance(error.filename, str) else "output"
        return UserError(f"{place}: {error.strerror}; check permissions and free space")
    return UserError(f"{one_line(error)} (a bug in ca2vdm; --debug shows the traceback, please report it)")


def _open_closed_streams() -> None:
    """Connect standard streams that the shell closed (``>&-``), which Python sets to None, to the null device."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            stream = open(os.devnull, mode, encoding="utf-8")  # noqa: SIM115 - open until Python exits
            atexit.register(stream.close)
            setattr(sys, name, stream)


def _treat_termination_as_interrupt() -> None:
    """Let SIGTERM and a closed terminal act like Ctrl-C, which leaves a playable file of the finished chunks."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # ignored under nohup
            signal.signal(signal.SIGHUP, signal.default_int_handler)


def _keep_freed_memory() -> None:
    """Let glibc's allocator keep freed memory for later allocations, unless the environment configures it.

    By default it returns large tensors to the system after each step, which must then clear every page for the next.
    """
    if any(name.startswith("MALLOC_") for name in os.environ):
        return
    with suppress(OSError, AttributeError, TypeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_TRIM_THRESHOLD, 2**30)
        mallopt(M_MMAP_THRESHOLD, 2**25)


def _shorten_spinning() -> None:
    """Let PyTorch's idle CPU threads give way to other programs soon, unless the environment configures them.

    By default they spin for so long that, if other programs compete for the CPUs, the threads that have work wait for
    those that have none, and everything becomes many times slower. OpenMP reads these variables when PyTorch is loaded.
    """
    if not any(name in os.environ for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")):
        os.environ["GOMP_SPINCOUNT"] = SPIN_COUNT


def _discard_output() -> None:
    """Redirect standard output, which nobody reads any more, so that Python does not complain when it exits."""
    with open(os.devnull, "w", encoding="ascii") as null:
        os.dup2(null.fileno(), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
