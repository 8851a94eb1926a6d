"""What a video was made with: preset, weights, versions and machine; and loading the same again."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ca2vdm_cli import __version__
from ca2vdm_cli.errors import UserError
from ca2vdm_cli.files import file_sha256
from ca2vdm_cli.pipeline import Pipeline
from ca2vdm_cli.presets import LoadedPreset, load_preset, preset_from_mapping, preset_names, to_mapping
from ca2vdm_cli.runtime import device_name, dtype_name


@dataclass(frozen=True)
class WeightsFile:
    """A file of weights."""

    path: str
    sha256: str

    @classmethod
    def of(cls, path: Path | None) -> WeightsFile | None:
        """The file's facts; None without a file."""
        return None if path is None else cls(str(path.resolve()), file_sha256(path))


@dataclass(frozen=True)
class Provenance:
    """What determines frames beside the request."""

    preset: str
    """Its name."""
    preset_path: str
    settings: dict[str, Any]
    """All settings of the preset."""
    settings_sha256: str
    weights: WeightsFile | None
    autoencoder: WeightsFile | None
    versions: dict[str, str]
    """Of ca2vdm, the libraries that compute frames, and Python."""
    backend: str
    device: str
    device_name: str
    """Name of the CPU or GPU."""
    dtype: str
    threads: int
    """CPU threads; another number may round differently."""

    @classmethod
    def of(cls, pipeline: Pipeline) -> Provenance:
        """That of a loaded pipeline."""
        preset, settings = pipeline.preset, to_mapping(pipeline.config)
        device = pipeline.model.device
        return cls(
            preset=preset.name,
            preset_path=str(preset.path.resolve()),
            settings=settings,
            settings_sha256=settings_sha256(settings),
            weights=WeightsFile.of(preset.weights_path),
            autoencoder=WeightsFile.of(preset.autoencoder_weights_path),
            versions=versions(),
            backend=pipeline.backend.name,
            device=str(device),
            device_name=device_name(device),
            dtype=dtype_name(pipeline.model.dtype),
            threads=torch.get_num_threads(),
        )

    def load(self, *, backend: str | None = None, device: str | None = None) -> Pipeline:
        """Load the same preset and weights, and use as many threads.

        Args:
            backend: another backend.
            device: another device.

        Raises:
            UserError: the weights are missing or have changed.
        """
        torch.set_num_threads(self.threads)
        config = preset_from_mapping(self.settings, f"{self.preset_path} as recorded")
        builtin = load_preset(self.preset) if self.preset in preset_names() else None
        weights = _present(self.weights, builtin.weights_path if builtin else None)
        autoencoder = _present(self.autoencoder, builtin.autoencoder_weights_path if builtin else None)
        config = replace(config, weights=weights, autoencoder_weights=autoencoder)
        preset = LoadedPreset(self.preset, Path(self.preset_path), config, None, None)
        return Pipeline.load(preset, backend=backend or self.backend, device=device or self.device, dtype=self.dtype)

    def differences(self) -> Iterator[str]:
        """How this machine differs from the recorded one, as far as it may change frames."""
        for name, version in versions().items():
            if self.versions.get(name) != version:
                yield f"{name} {version} instead of {self.versions.get(name)}"
        if torch.get_num_threads() != self.threads:
            yield f"{torch.get_num_threads()} threads instead of {self.threads}"
        device = torch.device(self.device)
        if device.type != "cuda" or torch.cuda.is_available():
            name = device_name(device)
            if name != self.device_name:
                yield f"{name} instead of {self.device_name}"


def _present(file: WeightsFile | None, builtin: Path | None) -> str | None:
    """The path of recorded weights. Those of a built-in preset may have moved with the package."""
    if file is None:
        return None
    path = Path(file.path)
    if not path.is_file() and builtin is not None:
        path = builtin
    if not path.is_file():
        raise UserError(f"{path}: no such file; put the weights that this was made with there")
    if file_sha256(path) != file.sha256:
        raise UserError(f"{path}: changed since (its SHA-256 is not {file.sha256[:12]}…); put the old weights there")
    return str(path)


def settings_sha256(settings: dict[str, Any]) -> str:
    """SHA-256 of a preset's settings, whatever their order."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def versions() -> dict[str, str]:
    """Versions of ca2vdm, the libraries that compute frames, and Python."""
    libraries = {name: importlib.metadata.version(name) for name in ("torch", "numpy", "opencv-python-headless", "av")}
    return {"ca2vdm": __version__, **libraries, "python": platform.python_version(), "system": platform.platform()}
