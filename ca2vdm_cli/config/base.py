"""Shared by all sections of the configuration."""

from __future__ import annotations

from typing import Annotated

from pydantic import ConfigDict, Field

STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True)

# Upper bounds are far above what any model needs. They keep a mistyped number from taking all time or memory before the
# estimate of memory can refuse it.
Count = Annotated[int, Field(ge=1, le=10**9)]
"""How many of something are worked through one after another, such as steps."""
CountOrNone = Annotated[int, Field(ge=0, le=10**9)]
"""The same, where 0 is allowed."""
Size = Annotated[int, Field(ge=1, le=2**16)]
"""A dimension of a tensor: a width, a side, channels, frames of a window, clips of a batch."""
Depth = Annotated[int, Field(ge=1, le=2**10)]
"""How many modules or objects are created."""
Timesteps = Annotated[int, Field(ge=1, le=2**20)]
"""Timesteps of the noise process, or denoising steps; tables have an entry for each."""
Share = Annotated[float, Field(ge=0.0, le=1.0)]


def require(condition: bool, message: str) -> None:
    """Fail validation with a message that begins with the offending key, relative to its section."""
    if not condition:
        raise ValueError(message)
