"""Everything that has a name and can be added by a plug-in: one registry a kind.

Built-in entries and those of plug-ins (entry-point group ``ca2vdm``) come through the same hooks, see ``hookspecs``. In
Python, ``ca2vdm_cli.samplers.register(MySampler)`` and its like add an entry without a plug-in package.

Nothing in this module imports torch.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib import metadata
from types import ModuleType
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import pluggy

from . import builtins, hookspecs
from .errors import UsageError, UserError
from .lazy import Lazy

if TYPE_CHECKING:
    import torch

    from .model.attention import Backend

GROUP = "ca2vdm"
"""Entry-point group of plug-ins."""
AUTO = "auto"
"""Selects the best available backend."""
OURS = "ca2vdm itself"
"""The owner of built-in and reserved names, as error messages say it."""

T = TypeVar("T")


@cache
def plugin_manager() -> pluggy.PluginManager:
    """The plug-in manager, with the built-in entries and every installed plug-in.

    Raises:
        UserError: a plug-in does not import, or implements a hook that does not exist or has other arguments.
    """
    manager = pluggy.PluginManager(GROUP)
    manager.add_hookspecs(hookspecs)
    manager.register(builtins, name=OURS)
    for entry_point in metadata.entry_points(group=GROUP):
        distribution = entry_point.dist.name if entry_point.dist else "an unknown distribution"
        origin = f"{entry_point.name!r} of {distribution}"
        with _blame(origin, "cannot be loaded"):
            manager.register(entry_point.load(), name=origin)
            manager.check_pending()
    return manager


class Registry(Mapping[str, T], Generic[T]):
    """All entries of one kind, by name: built-in ones first, then those of plug-ins.

    Built-in names are known without importing torch; plug-ins are loaded once a name is asked for that is not built in,
    or all names are.

    Args:
        kind: what an entry is called, such as ``sampler``; the hook is ``ca2vdm_register_<kind>s``.
        methods: what an entry must have, beside ``name`` and ``description``.
        instances: whether entries are objects; otherwise they are classes.
        reserved: names that no entry can have.
    """

    def __init__(self, kind: str, methods: tuple[str, ...], *, instances: bool, reserved: tuple[str, ...] = ()) -> None:
        self.kind, self.methods, self.instances, self.reserved = kind, methods, instances, reserved
        self.hook = f"ca2vdm_register_{kind}s"
        self._added: list[Any] = []
        self.forget()

    def forget(self) -> None:
        """Look for plug-ins again when a name is next asked for. Entries that Python code registered stay."""
        self._entries: dict[str, Any] = {}
        self._owners: dict[str, str] = dict.fromkeys(self.reserved, OURS)
        self._complete = False
        getattr(builtins, self.hook)(lambda entry: self._add(entry, OURS))
        for entry in self._added:
            self._add(entry, "Python code")

    def register(self, entry: T | Lazy) -> None:
        """Add an entry from Python code.

        Raises:
            UserError: it is not what this kind of entry has to be, or its name is taken.
        """
        self._load_plugins()
        self._add(entry, "Python code")
        self._added.append(entry)

    def unregister(self, name: str) -> None:
        """Take back an entry that Python code has registered, for example to register a corrected one."""
        self._added = [entry for entry in self._added if entry.name != name]
        self.forget()

    def check(self, name: str, setting: str) -> None:
        """See that a name exists.

        Args:
            name: what was asked for.
            setting: where, for the error: a flag or a preset's key.

        Raises:
            UsageError: it does not; the error says what does.
        """
        if name in self._entries:
            return
        self._load_plugins()
        if name not in self._entries:
            raise UsageError(f"{setting}: there is no {self.kind} {name!r}; {self.suggest(name)}")

    def suggest(self, name: str) -> str:
        """What a misspelt name might have meant, else all names."""
        near = difflib.get_close_matches(name, [*self.reserved, *self], n=3)
        return f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join([*self.reserved, *self])}"

    def is_builtin(self, name: str) -> bool:
        """Whether a name comes with ca2vdm."""
        return self._owners.get(name) == OURS

    def __getitem__(self, name: str) -> T:
        if name not in self._entries:
            self._load_plugins()
        entry = self._entries[name]
        if isinstance(entry, Lazy):
            with _blame(self._owners[name], f"cannot load its {self.kind} {name!r}"):
                entry = self._checked(entry.load(), self._owners[name])
            self._entries[name] = entry
        found: T = entry
        return found

    def __iter__(self) -> Iterator[str]:
        self._load_plugins()
        return iter(list(self._entries))

    def __len__(self) -> int:
        self._load_plugins()
        return len(self._entries)

    def _load_plugins(self) -> None:
        if self._complete:
            return
        manager = plugin_manager()
        plugins = [(origin, plugin) for origin, plugin in manager.list_name_plugin() if plugin is not builtins]
        for origin, plugin in plugins:
            others = [other for _, other in manager.list_name_plugin() if other is not plugin]
            with _blame(origin, f"cannot register its {self.kind}s"):
                caller = manager.subset_hook_caller(self.hook, others)
                caller(register=lambda entry, origin=origin: self._add(entry, origin))
        self._complete = True

    def _add(self, entry: Any, origin: str) -> None:
        if not isinstance(entry, Lazy):
            self._checked(entry, origin)
        name = entry.name
        if name in self._owners:
            raise UserError(
                f"{self.kind} {name!r} is registered by plug-in {origin} and by {self._owners[name]}; "
                "uninstall one of them"
            )
        self._owners[name], self._entries[name] = origin, entry

    def _checked(self, entry: Any, origin: str) -> Any:
        """An entry that is what its kind has to be."""
        said = f"plug-in {origin} registers"
        if isinstance(entry, type) and self.instances:
            raise UserError(f"{said} the class {entry.__name__}; it has to be an instance")
        if not isinstance(entry, type) and not self.instances:
            raise UserError(f"{said} {type(entry).__name__} as a {self.kind}; it has to be a class")
        title = entry.__name__ if isinstance(entry, type) else type(entry).__name__
        for attribute in ("name", "description"):
            if not isinstance(getattr(entry, attribute, None), str):
                raise UserError(f"{said} the {self.kind} {title} without a {attribute}; it has to be a string")
        for method in self.methods:
            if not callable(getattr(entry, method, None)):
                raise UserError(f"{said} the {self.kind} {title} without a method {method}()")
        return entry


backends: Registry[Backend] = Registry("backend", ("attend", "unavailable"), instances=True, reserved=(AUTO,))
samplers: Registry[Any] = Registry("sampler", ("step",), instances=False)
contexts: Registry[Any] = Registry("context", ("create", "append", "open_chunk", "predict"), instances=False)
autoencoders: Registry[Any] = Registry("autoencoder", ("encode", "decode"), instances=False, reserved=("none",))
readers: Registry[Any] = Registry("reader", ("recognizes", "read"), instances=True, reserved=(AUTO, "moving-digits"))
metrics: Registry[Any] = Registry("metric", ("measure",), instances=True)
REGISTRIES: tuple[Registry[Any], ...] = (backends, samplers, contexts, autoencoders, readers, metrics)


def forget_plugins() -> None:
    """Look for plug-ins again when they are next needed."""
    plugin_manager.cache_clear()
    for registry in REGISTRIES:
        registry.forget()


def choose_backend(name: str, device: torch.device, dtype: torch.dtype) -> Backend:
    """The backend called ``name``, or with ``auto`` the one of highest priority among those that run there.

    Raises:
        UsageError: there is no such backend, or it is unavailable for this device and number type.
    """
    if name == AUTO:
        available = [backend for backend in backends.values() if why_unavailable(backend, device, dtype) is None]
        return max(available, key=lambda backend: backend.priority)  # never empty: eager runs everywhere
    backends.check(name, "--backend")
    if reason := why_unavailable(backends[name], device, dtype):
        from .runtime import dtype_name  # imports torch

        raise UsageError(f"--backend: {name} is unavailable on {device} in {dtype_name(dtype)}: {reason}")
    return backends[name]


def why_unavailable(backend: Backend, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the backend can't run there; None if it can. One that fails to say so can't."""
    try:
        return backend.unavailable(device, dtype)
    except Exception as error:  # whatever a third party's check raises
        return _reason(error)


def culprit(error: BaseException) -> str | None:
    """The plug-in in whose code an error was raised, by its origin; None if it was raised elsewhere."""
    modules = {}
    for origin, plugin in plugin_manager().list_name_plugin() if plugin_manager.cache_info().currsize else ():
        if isinstance(plugin, ModuleType) and plugin is not builtins:
            modules[plugin.__name__.partition(".")[0]] = origin
    trace, found = error.__traceback__, None
    while trace is not None:
        top = str(trace.tb_frame.f_globals.get("__name__", "")).partition(".")[0]
        found = modules.get(top, found)
        trace = trace.tb_next
    return found


def _reason(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


@contextmanager
def _blame(origin: str, failure: str) -> Iterator[None]:
    """Turn whatever a plug-in raises into one line that names it."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"plug-in {origin} {failure}: {_reason(error)}; repair or uninstall it") from error
