"""Long video generation with a causal video diffusion model (Ca2-VDM): the library behind the ``ca2vdm`` command.

The names in ``__all__`` are the Python API. Each is imported when it is first used, so that ``import ca2vdm_cli`` is
instant and does not bring in torch.
"""

from importlib import import_module
from time import perf_counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .errors import UserError
    from .pipeline import Pipeline, VideoChunk
    from .plugins import backends, choose_backend
    from .presets import LoadedPreset, list_presets, load_preset

STARTED = perf_counter()
"""When this process began to use the package: what "seconds since the start" counts from."""

__version__ = "0.1.0"

_HOME = {  # name: the module it lives in
    "LoadedPreset": "presets",
    "Pipeline": "pipeline",
    "UserError": "errors",
    "VideoChunk": "pipeline",
    "backends": "plugins",
    "choose_backend": "plugins",
    "list_presets": "presets",
    "load_preset": "presets",
}
__all__ = [
    "LoadedPreset",
    "Pipeline",
    "UserError",
    "VideoChunk",
    "__version__",
    "backends",
    "choose_backend",
    "list_presets",
    "load_preset",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
