"""Manifests: a JSON file beside a video that says how it was made, so that it can be made again and compared."""

from __future__ import annotations

import os
import shlex
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from ca2vdm_cli import __version__
from ca2vdm_cli.errors import UserError
from ca2vdm_cli.files import file_sha256, read_json, write_json

from .provenance import Provenance
from .record import Parent, Request

FORMAT = 1
"""Version of a manifest."""


@dataclass(frozen=True)
class Manifest:
    """How one video was made."""

    request: Request
    """With this video only."""
    provenance: Provenance
    command_line: list[str]
    parent: Parent | None
    """The run that it branches off from, whose chunks it begins with."""
    frames: int
    """All frames of the video, copied ones included."""
    frames_sha256: str
    """SHA-256 of the RGB values of all frames, before they were encoded."""
    file_sha256: str | None
    """SHA-256 of the file; None for a folder."""
    seconds: dict[str, float]
    """Time of each part of the run."""


_ADAPTER = TypeAdapter(Manifest)


def manifest_path(output: str) -> Path:
    """The manifest of an output: ``clip.mp4.json`` beside ``clip.mp4``."""
    return Path(f"{output.rstrip('/')}.json")


def write_manifest(output: str, manifest: Manifest) -> None:
    """Write the manifest of an output."""
    write_json(manifest_path(output), {"format": FORMAT, **asdict(manifest)})


def read_manifest(path: Path) -> Manifest:
    """Read a manifest.

    Raises:
        UserError: it is missing, damaged, or of another version.
    """
    content = read_json(path)
    if content.pop("format", None) != FORMAT:
        raise UserError(f"{path}: not a manifest of this version of ca2vdm; --manifest writes them")
    try:
        return _ADAPTER.validate_python(content)
    except ValidationError as error:
        key = ".".join(map(str, error.errors()[0]["loc"]))
        raise UserError(f"{path}: damaged at {key}; restore it from a copy") from None


def output_sha256(output: str) -> str | None:
    """SHA-256 of an output file; None for a folder."""
    return file_sha256(Path(output)) if os.path.isfile(output) else None


def video_metadata(preset: str, settings_sha256: str, request: Request, command_line: list[str]) -> dict[str, str]:
    """Title and comment for the video file of a request."""
    seed = request.options.get("seed", 0)
    title = request.options.get("prompt") or f"{preset}, seed {seed}"
    preset = f"preset {preset} (settings {settings_sha256[:12]})"
    return {"title": title, "comment": f"ca2vdm {__version__}, {preset}, seed {seed}: {shlex.join(command_line)}"}
