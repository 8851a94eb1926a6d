"""Finds backends: the built-in ones, then those of plug-ins (entry-point group ``ca2vdm``), and picks one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import metadata
from typing import TYPE_CHECKING

import pluggy

from . import hookspecs
from .errors import UsageError, UserError

if TYPE_CHECKING:
    import torch

    from .attention import Backend

GROUP = "ca2vdm"
"""Entry-point group of plug-ins."""
AUTO = "auto"
"""Not a backend but the wish for the best available one."""


@cache
def plugin_manager() -> pluggy.PluginManager:
    """The plug-in manager, with the built-in backends and every installed plug-in registered.

    Raises:
        UserError: a plug-in does not import, or implements a hook that does not exist or has other arguments.
    """
    from ca2vdm_backends import compile, eager, sdpa

    manager = pluggy.PluginManager(GROUP)
    manager.add_hookspecs(hookspecs)
    for module in (eager, sdpa, compile):
        manager.register(module)
    for entry_point in metadata.entry_points(group=GROUP):
        distribution = entry_point.dist.name if entry_point.dist else "an unknown distribution"
        origin = f"{entry_point.name!r} of {distribution}"
        with _blame(origin, "cannot be loaded"):
            manager.register(entry_point.load(), name=origin)
            manager.check_pending()
    return manager


@cache
def backends() -> dict[str, Backend]:
    """Every backend by name, built-in ones first.

    Raises:
        UserError: a plug-in is broken, or two plug-ins register the same name.
    """
    manager = plugin_manager()
    plugins = manager.list_name_plugin()
    found: dict[str, Backend] = {}
    owners: dict[str, str] = {AUTO: "ca2vdm itself"}
    for origin, plugin in plugins:

        def register(backend: Backend, origin: str = origin) -> None:
            if isinstance(backend, type):
                raise UserError(f"plug-in {origin} registers the class {backend.__name__}; it has to be an instance")
            if backend.name in owners:
                raise UserError(
                    f"backend {backend.name!r} is registered by plug-in {origin} and by {owners[backend.name]}; "
                    "uninstall one of them"
                )
            owners[backend.name] = origin
            found[backend.name] = backend

        others = [other for _, other in plugins if other is not plugin]
        with _blame(origin, "cannot register its backends"):
            manager.subset_hook_caller("ca2vdm_register_backends", others)(register=register)
    return found


def choose_backend(name: str, device: torch.device, dtype: torch.dtype) -> Backend:
    """The backend called ``name``, or with ``auto`` the one of highest priority among those that run there.

    Raises:
        UsageError: there is no such backend, or it is unavailable for this device and number type.
    """
    known = backends()
    if name == AUTO:
        available = [backend for backend in known.values() if why_unavailable(backend, device, dtype) is None]
        return max(available, key=lambda backend: backend.priority)  # never empty: eager runs everywhere
    if name not in known:
        raise UsageError(f"--backend: there is no backend {name!r}; known: {AUTO}, {', '.join(known)}")
    if reason := why_unavailable(known[name], device, dtype):
        raise UsageError(
            f"--backend: {name} is unavailable on {device} in {str(dtype).removeprefix('torch.')}: {reason}"
        )
    return known[name]


def why_unavailable(backend: Backend, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the backend can't run there; None if it can. One that fails to say so can't."""
    try:
        return backend.unavailable(device, dtype)
    except Exception as error:  # whatever a third party's check raises
        return " ".join(f"{type(error).__name__}: {error}".split())


@contextmanager
def _blame(origin: str, failure: str) -> Iterator[None]:
    """Turn whatever a plug-in raises into one line that names it."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"plug-in {origin} {failure}: {reason}; repair or uninstall it") from error
