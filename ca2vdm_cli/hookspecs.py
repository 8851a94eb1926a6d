"""The one hook of ca2vdm.

A plug-in is a module with a function marked ``hookimpl``, named in its distribution's entry-point group ``ca2vdm``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from .attention import Backend

hookspec = pluggy.HookspecMarker("ca2vdm")
hookimpl = pluggy.HookimplMarker("ca2vdm")


@hookspec
def ca2vdm_register_backends(register: Callable[[Backend], None]) -> None:
    """Add attention backends: call ``register`` with an instance of each."""
