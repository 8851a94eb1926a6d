"""Long video generation with a causal video diffusion model (Ca2-VDM): the library behind the ``ca2vdm`` command.

The names in ``__all__`` are the Python API. Each is imported when it is first used, so that ``import ca2vdm_cli`` is
instant and does not import torch.
"""

from importlib import import_module
from time import perf_counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .autoencoder import Autoencoder
    from .config import Preset
    from .data.readers import Layout, Reader
    from .data.source import ClipSource
    from .errors import UsageError, UserError
    from .generate.context import Context, ContextOptions
    from .generate.samplers import Sampler
    from .hookspecs import hookimpl
    from .model.attention import Backend
    from .pipeline import Pipeline, RunOptions, VideoChunk
    from .plugins import autoencoders, backends, choose_backend, contexts, metrics, readers, samplers
    from .presets import LoadedPreset, list_presets, load_preset
    from .training.callbacks import TrainingCallbacks
    from .training.run import TrainingResult
    from .training.setup import train
    from .video_io import Video, read_video, write_video
    from .video_metrics import Metric

STARTED = perf_counter()
"""When this process imported the package; run times are measured from here."""

__version__ = "0.1.0"
"""The version of this package."""

_HOME = {  # name: the module it lives in
    "Autoencoder": "autoencoder",
    "Backend": "model.attention",
    "ClipSource": "data.source",
    "Context": "generate.context",
    "ContextOptions": "generate.context",
    "Layout": "data.readers",
    "LoadedPreset": "presets",
    "Metric": "video_metrics",
    "Pipeline": "pipeline",
    "Preset": "config",
    "Reader": "data.readers",
    "RunOptions": "pipeline",
    "Sampler": "generate.samplers",
    "TrainingCallbacks": "training.callbacks",
    "TrainingResult": "training.run",
    "UsageError": "errors",
    "UserError": "errors",
    "Video": "video_io.arrays",
    "VideoChunk": "pipeline",
    "autoencoders": "plugins",
    "backends": "plugins",
    "choose_backend": "plugins",
    "contexts": "plugins",
    "hookimpl": "hookspecs",
    "list_presets": "presets",
    "load_preset": "presets",
    "metrics": "plugins",
    "read_video": "video_io.arrays",
    "readers": "plugins",
    "samplers": "plugins",
    "train": "training.setup",
    "write_video": "video_io.arrays",
}
__all__ = [
    "Autoencoder",
    "Backend",
    "ClipSource",
    "Context",
    "ContextOptions",
    "Layout",
    "LoadedPreset",
    "Metric",
    "Pipeline",
    "Preset",
    "Reader",
    "RunOptions",
    "Sampler",
    "TrainingCallbacks",
    "TrainingResult",
    "UsageError",
    "UserError",
    "Video",
    "VideoChunk",
    "__version__",
    "autoencoders",
    "backends",
    "choose_backend",
    "contexts",
    "hookimpl",
    "list_presets",
    "load_preset",
    "metrics",
    "read_video",
    "readers",
    "samplers",
    "train",
    "write_video",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
