"""The hooks of ca2vdm: what a plug-in can add.

A plug-in is a module with functions marked ``hookimpl``. Its distribution names it in the entry-point group ``ca2vdm``.
Each hook is called with ``register``, a function that adds one entry. Every entry has a ``name``, which users type, and
a one-line ``description``. ``docs/plugins.md`` has a working example of each kind.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pluggy

hookspec = pluggy.HookspecMarker("ca2vdm")
hookimpl = pluggy.HookimplMarker("ca2vdm")
"""Marks a function of a plug-in as the implementation of the hook that it is named after."""

Register = Callable[[Any], None]
"""Adds one entry."""


@hookspec
def ca2vdm_register_backends(register: Register) -> None:
    """Add attention backends: instances of ``model.attention.Backend``."""


@hookspec
def ca2vdm_register_samplers(register: Register) -> None:
    """Add samplers: subclasses of ``generate.samplers.Sampler``."""


@hookspec
def ca2vdm_register_contexts(register: Register) -> None:
    """Add contexts (caches): subclasses of ``generate.context.Context``."""


@hookspec
def ca2vdm_register_autoencoders(register: Register) -> None:
    """Add autoencoders: subclasses of ``autoencoder.Autoencoder``."""


@hookspec
def ca2vdm_register_readers(register: Register) -> None:
    """Add data set readers: instances of ``data.readers.Reader``."""


@hookspec
def ca2vdm_register_metrics(register: Register) -> None:
    """Add metrics: instances of ``video_metrics.Metric``."""
