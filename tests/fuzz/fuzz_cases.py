"""Hostile input by kind: presets, models, weights files, command lines and short videos.

A case is a command line and the files that it names. Nothing depends on what earlier cases did, so a seed always gives
the same cases.
"""

from __future__ import annotations

from collections.abc import Callable

from fuzz_commands import commands
from fuzz_files import headers, videos
from fuzz_material import Material
from fuzz_presets import models, presets
from fuzz_values import Case
from hypothesis.strategies import SearchStrategy

KINDS: dict[str, Callable[[Material], SearchStrategy[Case]]] = {
    "presets": presets,
    "models": models,
    "headers": headers,
    "commands": commands,
    "videos": videos,
}
"""Strategies by name."""
SHARES = {"presets": 0.3, "models": 0.15, "headers": 0.2, "commands": 0.15, "videos": 0.2}
"""Shares of the cases of a long run."""
