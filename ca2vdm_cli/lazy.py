"""Entries of a registry that are imported on first use."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any


@dataclass(frozen=True)
class Lazy:
    """An entry whose name is known before its module is imported. Plug-ins may use it to keep start-up fast."""

    name: str
    """What users type."""
    path: str
    """Where it is defined, as ``module:attribute``."""

    def load(self) -> Any:
        """Import the module, and return the entry.

        Raises:
            ImportError, AttributeError: no such module or attribute.
        """
        module, _, attribute = self.path.partition(":")
        return getattr(import_module(module), attribute)
