"""Checks of the Python API's arguments, so that a wrong one is named before anything is computed."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from numbers import Real
from typing import Any

from .errors import UsageError


def whole_number(name: str, value: Any, least: int | None = None) -> int:
    """The number as an int; NumPy's integers are accepted too.

    Raises:
        UsageError: it is not a whole number, or below ``least``.
    """
    try:
        number = operator.index(value)
    except TypeError:
        raise UsageError(f"{name}: {value!r} must be a whole number") from None
    if least is not None and number < least:
        raise UsageError(f"{name}: {number} must be at least {'one' if least == 1 else least}")
    return number


def whole_numbers(name: str, values: Any, least: int | None = None) -> list[int]:
    """At least one whole number, as a list.

    Raises:
        UsageError: it is something else.
    """
    if isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Iterable):
        raise UsageError(f"{name}: {values!r} must be a sequence of whole numbers, such as range(2)")
    numbers = [whole_number(name, value, least) for value in values]
    if not numbers:
        raise UsageError(f"{name}: there must be at least one")
    return numbers


def check_text(name: str, value: Any) -> None:
    """Raise ``UsageError`` if the argument is neither text nor None."""
    if value is not None and not isinstance(value, str):
        raise UsageError(f"{name}: {value!r} must be text")


def check_number(name: str, value: Any) -> None:
    """Raise ``UsageError`` if the argument is neither a finite number nor None."""
    if value is not None and (not isinstance(value, Real) or value - value != 0):
        raise UsageError(f"{name}: {value!r} must be a number")


def check_function(name: str, value: Any) -> None:
    """Raise ``UsageError`` if the argument is neither a function nor None."""
    if value is not None and not isinstance(value, Callable):  # type: ignore[arg-type]
        raise UsageError(f"{name}: {value!r} must be a function")


def check_overrides(overrides: Any) -> None:
    """Raise ``UsageError`` if these are not changes to a preset."""
    if isinstance(overrides, (str, Mapping)):
        return
    if not isinstance(overrides, Sequence) or not all(isinstance(change, str) for change in overrides):
        raise UsageError(
            f"overrides: {overrides!r} must be a mapping such as {{'model.depth': 4}}, or a list such as "
            "['model.depth=4']"
        )


def check_names(options: Iterable[str], known: Sequence[str]) -> None:
    """Raise ``UsageError`` if an option is unknown."""
    for option in options:
        if option not in known:
            near = get_close_matches(option, known, n=1)
            advice = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
            raise UsageError(f"{option}: there is no such option; {advice}")
