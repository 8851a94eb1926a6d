"""``reproduce``: make a video again from its manifest, and compare the frames."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

from ca2vdm_cli.config import VideoConfig
from ca2vdm_cli.errors import UserError
from ca2vdm_cli.files import file_sha256
from ca2vdm_cli.runs.manifest import Manifest, read_manifest
from ca2vdm_cli.terminal import note, print_json, status
from ca2vdm_cli.video_io import Aspect, open_reader

from .generate import first_frame_of, frame_maps
from .generation import Generation
from .outputs import OutputOptions


def run(path: Path, *, output: OutputOptions) -> int:
    """``ca2vdm reproduce``; returns the exit code."""
    manifest = read_manifest(path)
    if manifest.parent is not None:
        raise UserError(
            f"{path}: a take that begins with chunks of {manifest.parent.path}, under other settings; reproduce that "
            "run, and branch off again with ca2vdm resume --from-frame"
        )
    with status("loading", quiet=output.quiet):
        pipeline = manifest.provenance.load()
    video = pipeline.config.video
    assert video is not None
    with ExitStack() as stack:
        if output.path is not None:
            output.reserve(output.path, stack)
        request = replace(manifest.request, outputs=[output.path or ""], format=output.format)
        generation = Generation(pipeline, request, replace(output, manifest=True))
        with generation.open_outputs():
            _generate(generation, manifest, video)
    (digest,) = [digest.hexdigest() for digest in generation.digests]
    equal = digest == manifest.frames_sha256
    differences = list(manifest.provenance.differences())
    if output.as_json:
        print_json({"equal": equal, "frames": manifest.frames, "frames_sha256": digest, "differences": differences})
    elif equal:
        note(f"equal: {manifest.frames} frames, sha256 {digest}", quiet=output.quiet)
    if not equal and not output.as_json:
        reason = "; ".join(differences) or "versions, device and threads are the same"
        raise UserError(f"{path}: the frames differ from the recorded ones ({reason})")
    return 0 if equal else 1


def _generate(generation: Generation, manifest: Manifest, video: VideoConfig) -> None:
    request, pipeline, source = manifest.request, generation.pipeline, manifest.request.input
    if source is None:
        given = None
        if request.first_frame_source is not None:
            _check(request.first_frame_source, request.first_frame_sha256)
            given = first_frame_of(request.first_frame_source, video)
        generation.generate(partial(pipeline.sample, request.frames, first_frame=given), lambda frame: frame)
        return
    if source.source == "-":
        raise UserError("the input came from standard input and is not kept; nothing can be reproduced")
    _check(source.path, source.sha256)
    maps = frame_maps((source.height, source.width), video, Aspect(source.aspect), source.size)
    with open_reader(source.path) as reader:
        window = generation.read_input(reader, maps, only_new=source.only_new)
    generation.generate(partial(pipeline.extend, window, request.frames), maps.to_output)


def _check(path: str, sha256: str | None) -> None:
    if not Path(path).exists():
        raise UserError(f"{path}: the input is missing; put it back")
    if file_sha256(Path(path)) != sha256:
        raise UserError(f"{path}: the input has changed; put the old one back")
