"""What plug-ins can add, one registry per kind: backends, samplers, contexts, autoencoders, readers and metrics.

Built-in entries and those of plug-ins (entry-point group ``ca2vdm``) are registered through the same hooks, see
``hookspecs``. Python code can also register an entry directly: ``ca2vdm_cli.samplers.register(MySampler)``.

Nothing in this module imports torch.
"""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib import metadata
from types import FunctionType, ModuleType
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
"""Selects the best available backend, or the reader that recognizes the data."""
OURS = "ca2vdm itself"
"""Owner of the built-in and reserved names."""
PYTHON = "Python code"
"""Owner of the entries that were added with ``Registry.register``."""

T = TypeVar("T")


@cache
def plugin_manager() -> pluggy.PluginManager:
    """The plug-in manager, with the built-in entries and every installed plug-in.

    Raises:
        UserError: a plug-in cannot be imported, or implements a hook that does not exist or has other arguments.
    """
    manager = pluggy.PluginManager(GROUP)
    manager.add_hookspecs(hookspecs)
    manager.register(builtins, name=OURS)
    for entry_point in metadata.entry_points(group=GROUP):
        distribution = entry_point.dist.name if entry_point.dist else "an unknown distribution"
        owner = f"plug-in {entry_point.name!r} of {distribution}"
        with _blame(owner, "cannot be loaded"):
            manager.register(entry_point.load(), name=owner)
            manager.check_pending()
    return manager


class Registry(Mapping[str, T], Generic[T]):
    """All entries of one kind, by name: built-in ones first, then those of plug-ins and of Python code.

    Built-in names are known without importing torch. Plug-ins are loaded when a name that is not built in, or the list
    of all names, is needed.

    Args:
        kind: what an entry is called, such as ``sampler``; the hook is ``ca2vdm_register_<kind>s``, and entries extend
            the class of that name, ``ca2vdm_cli.Sampler``.
        required: methods that the class does not declare abstract, but that an entry must implement all the same.
        instances: whether entries are objects; otherwise they are classes.
        reserved: names that no entry may have.
    """

    def __init__(self, kind: str, *required: str, instances: bool = False, reserved: tuple[str, ...] = ()) -> None:
        self.kind, self.required, self.instances, self.reserved = kind, required, instances, reserved
        self.hook = f"ca2vdm_register_{kind}s"
        self._added: list[Any] = []
        self.forget()

    def forget(self) -> None:
        """Look for plug-ins again the next time they are needed. Entries registered from Python code stay."""
        self._entries: dict[str, Any] = {}
        self._owners: dict[str, str] = dict.fromkeys(self.reserved, OURS)
        self._complete = False
        getattr(builtins, self.hook)(lambda entry: self._add(entry, OURS))
        for entry in self._added:
            self._add(entry, PYTHON)

    def register(self, entry: T | Lazy) -> None:
        """Add an entry from Python code.

        Raises:
            UserError: the entry lacks something that its kind needs, or its name is taken.
        """
        self._load_plugins()
        self._add(entry, PYTHON)
        self._added.append(entry)

    def unregister(self, name: str) -> None:
        """Remove an entry that was added with ``register``, for example to replace it with a corrected one.

        Raises:
            UsageError: Python code has registered no entry of this name.
        """
        if name not in [entry.name for entry in self._added]:
            raise UsageError(f"{self.kind} {name!r} was not registered from Python")
        self._added = [entry for entry in self._added if entry.name != name]
        self.forget()

    def check(self, name: str, setting: str | None = None) -> None:
        """Raise an error with suggestions if there is no entry of this name.

        Args:
            name: the requested name.
            setting: the setting that named it, such as ``data.format``; the error begins with it.

        Raises:
            UsageError: no such entry.
        """
        if name not in self:
            prefix = f"{setting}: " if setting else ""
            raise UsageError(f"{prefix}there is no {self.kind} {name!r}; {self.suggest(name)}")

    def suggest(self, name: str) -> str:
        """The names closest to a misspelt one, or all names if none is close."""
        names = [*self.reserved, *self]
        close = difflib.get_close_matches(name, names, n=3)
        return f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(names)}"

    def owner(self, name: str) -> str:
        """Who registered an entry: this package, a plug-in of some distribution, or Python code."""
        return self._owners[name]

    def builtin_names(self) -> list[str]:
        """The names that come with ca2vdm, without loading plug-ins."""
        return [name for name in self._entries if self.is_builtin(name)]

    def is_builtin(self, name: str) -> bool:
        """Whether a name comes with ca2vdm."""
        return self._owners.get(name) == OURS

    def __contains__(self, name: object) -> bool:
        if name not in self._entries:
            self._load_plugins()
        return name in self._entries

    def __getitem__(self, name: str) -> T:
        if name not in self:
            raise KeyError(name)
        entry = self._entries[name]
        if isinstance(entry, Lazy):
            owner = self._owners[name]
            with _blame(owner, f"cannot load its {self.kind} {name!r}"):
                entry = self._checked(entry.load(), owner)
            if entry.name != name:
                raise UserError(f"{owner} registers the {self.kind} {name!r}, whose own name is {entry.name!r}")
            self._entries[name] = entry
        loaded: T = entry
        return loaded

    def __iter__(self) -> Iterator[str]:
        self._load_plugins()
        return iter(list(self._entries))

    def __len__(self) -> int:
        self._load_plugins()
        return len(self._entries)

    def _load_plugins(self) -> None:
        """Let every plug-in register its entries, one plug-in at a time so that errors can name it."""
        if self._complete:
            return
        manager = plugin_manager()
        plugins = manager.list_name_plugin()
        try:
            for owner, plugin in plugins:
                if plugin is builtins:
                    continue
                others = [other for _, other in plugins if other is not plugin]
                with _blame(owner, f"cannot register its {self.kind}s"):
                    hook = manager.subset_hook_caller(self.hook, others)
                    hook(register=lambda entry, owner=owner: self._add(entry, owner))
        except UserError:
            self.forget()  # so that the next attempt fails with the same error
            raise
        self._complete = True

    def _add(self, entry: Any, owner: str) -> None:
        if not isinstance(entry, Lazy):
            self._checked(entry, owner)
        name = entry.name
        if name in self._owners:
            raise UserError(
                f"{self.kind} {name!r} is registered by {owner} and by {self._owners[name]}; rename or uninstall one"
            )
        self._owners[name], self._entries[name] = owner, entry

    def _checked(self, entry: Any, owner: str) -> Any:
        """Return the entry if it has all that its kind needs."""
        entry_class: type = entry if isinstance(entry, type) else type(entry)
        title = entry_class.__name__
        if self.instances and isinstance(entry, type):
            raise UserError(f"{owner} registers the class {title}; a {self.kind} must be an instance")
        if not self.instances and not isinstance(entry, type):
            raise UserError(f"{owner} registers an instance of {title}; a {self.kind} must be a class")
        if fault := self._fault(entry, entry_class):
            raise UserError(f"{owner} registers the {self.kind} {title}, {fault}")
        return entry

    def _fault(self, entry: Any, entry_class: type) -> str | None:
        """What is wrong with an entry, if anything."""
        name, parents = self.kind.title(), entry_class.__mro__
        base = next((parent for parent in parents if parent.__name__ == name and _is_ours(parent)), None)
        if base is None:
            return f"which does not extend ca2vdm_cli.{name}"
        for attribute in ("name", "description"):
            if not isinstance(getattr(entry, attribute, None), str):
                return f"whose {attribute} is not a string"
        if not re.fullmatch(r"[^\s,]+", entry.name):
            return f"whose name {entry.name!r} has spaces or commas, or is empty"
        find = inspect.getattr_static
        missing = [method for method in self.required if find(entry_class, method) is find(base, method)]
        if missing := missing or sorted(getattr(entry_class, "__abstractmethods__", ())):
            return f"which does not implement {missing[0]}"
        for method, declared in vars(base).items():
            if isinstance(declared, FunctionType | classmethod) and (
                method == "__init__" or not method.startswith("_")
            ):
                arguments = list(inspect.signature(getattr(base, method)).parameters)
                try:
                    inspect.signature(getattr(entry_class, method)).bind(*arguments)
                except TypeError:
                    return f"whose {method} does not take the arguments {', '.join(arguments)}"
        return None


backends: Registry[Backend] = Registry("backend", "attend", instances=True, reserved=(AUTO,))
"""All attention backends, by name."""
samplers: Registry[Any] = Registry("sampler")
"""All sampler classes, by name."""
contexts: Registry[Any] = Registry("context", "create")
"""All context classes (caches and baselines), by name."""
autoencoders: Registry[Any] = Registry("autoencoder", "encode", "decode", reserved=("none",))
"""All autoencoder classes, by name."""
readers: Registry[Any] = Registry("reader", instances=True, reserved=(AUTO, "moving-digits"))
"""All data set readers, by name."""
metrics: Registry[Any] = Registry("metric", instances=True)
"""All metrics, by name."""
REGISTRIES: tuple[Registry[Any], ...] = (backends, samplers, contexts, autoencoders, readers, metrics)


def forget_plugins() -> None:
    """Look for plug-ins again the next time they are needed."""
    plugin_manager.cache_clear()
    for registry in REGISTRIES:
        registry.forget()


def choose_backend(name: str, device: torch.device, dtype: torch.dtype) -> Backend:
    """The backend called ``name``; ``auto`` means the available backend of highest priority.

    Raises:
        UsageError: there is no such backend, or it is unavailable for this device and dtype.
    """
    if name == AUTO:
        available = [backend for backend in backends.values() if why_unavailable(backend, device, dtype) is None]
        return max(available, key=lambda backend: backend.priority)  # never empty: eager runs everywhere
    backends.check(name, "backend")
    if reason := why_unavailable(backends[name], device, dtype):
        from .runtime import dtype_name  # imports torch

        raise UsageError(f"backend: {name} is unavailable on {device} in {dtype_name(dtype)}: {reason}")
    return backends[name]


def why_unavailable(backend: Backend, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the backend can't run on this device, or None if it can. A check that raises counts as a reason."""
    try:
        return backend.unavailable(device, dtype)
    except Exception as error:  # whatever a third party's check raises
        return one_line(error)


def plugin_failure(error: BaseException) -> UserError | None:
    """The error to show when a plug-in raised ``error`` while it ran; None if no plug-in is involved.

    If several plug-ins are on the call stack, the innermost one is named.
    """
    owners: dict[str, str] = {}
    if plugin_manager.cache_info().currsize:
        for owner, plugin in plugin_manager().list_name_plugin():
            module = plugin.__name__ if isinstance(plugin, ModuleType) else type(plugin).__module__
            owners[module.partition(".")[0]] = owner
    owners.pop(__package__, None)  # the built-in entries
    culprit, trace = None, error.__traceback__
    while trace is not None:
        package = str(trace.tb_frame.f_globals.get("__name__", "")).partition(".")[0]
        culprit = owners.get(package, culprit)
        trace = trace.tb_next
    return None if culprit is None else _failure(culprit, "failed", error)


def _is_ours(definition: Any) -> bool:
    """Whether a class or function is defined in this package."""
    return bool(definition.__module__.partition(".")[0] == __package__)


def _failure(owner: str, what: str, error: BaseException) -> UserError:
    return UserError(f"{owner} {what}: {one_line(error)}; fix or uninstall it")


def one_line(error: BaseException) -> str:
    """An exception's type and message on one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


@contextmanager
def _blame(owner: str, what: str) -> Iterator[None]:
    """Turn any error that a plug-in raises into one line that names the plug-in."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if owner == OURS:
            raise
        raise _failure(owner, what, error) from error
