"""Shared by all sections of the configuration."""

from __future__ import annotations

from typing import Annotated

from pydantic import ConfigDict, Field

STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True)

Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]


def require(condition: bool, message: str) -> None:
    """Fail validation with a message that begins with the offending key, relative to its section."""
    if not condition:
        raise ValueError(message)
