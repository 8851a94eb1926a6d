"""``sample`` and ``extend``: generate chunk by chunk, write each chunk as soon as it is finished, and report."""

from __future__ import annotations

import os
import re
import shutil
import sys
from contextlib import ExitStack
from dataclasses import replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import TypedDict

import numpy as np

from ca2vdm_cli.config import VideoConfig
from ca2vdm_cli.errors import UsageError, as_user_error
from ca2vdm_cli.files import ADVICE, file_sha256
from ca2vdm_cli.pipeline import Pipeline, RunOptions
from ca2vdm_cli.processes import group, launched, share_of
from ca2vdm_cli.runs.record import INPUT_FILE, InputVideo, Request, RunFolder
from ca2vdm_cli.terminal import status
from ca2vdm_cli.video_io import Aspect, Frame, Geometry, Size, open_reader, to_channels

from .generation import FrameMaps, Generation
from .outputs import OutputOptions

BATCH = 4
"""Videos that are generated together. It does not change what they look like."""


class LoadOptions(TypedDict):
    """The flags that determine which model to load, as arguments of ``Pipeline.load``."""

    preset: str | None
    checkpoint: Path | None
    overrides: list[str]
    backend: str
    device: str
    dtype: str
    force: bool


def run_sample(
    *,
    load: LoadOptions,
    options: RunOptions,
    output: OutputOptions,
    frames: int | None,
    num_videos: int,
    first_frame: str | None,
) -> None:
    """``ca2vdm sample``."""
    folder = _new_folder(output.run)
    pipeline, video = _load(load, quiet=output.quiet)
    given = None if first_frame is None else first_frame_of(first_frame, video)
    with ExitStack() as stack:
        targets = output.targets(num_videos, "sample", stack)
        request = _request("sample", pipeline, options, output, frames, num_videos, targets, stack, video.fps)
        if not request.videos:  # all are other processes' share
            Generation(pipeline, request, output).report()
            return
        if first_frame is not None:
            path, from_file = os.path.abspath(first_frame), first_frame != "-"
            digest = file_sha256(Path(path)) if from_file and (folder is not None or output.manifest) else None
            request = replace(request, first_frame=True, first_frame_source=path, first_frame_sha256=digest)
        run = Generation(pipeline, request, output, folder)
        sample = partial(pipeline.sample, request.frames, first_frame=given)
        sample(**run.options)  # rejects an invalid request before anything is written
        if folder is not None:
            stack.enter_context(folder.locked(create=True))
        with run.open_outputs():
            run.begin(None if given is None else given[None])
            run.generate(sample, to_output=lambda frame: frame)
    run.report()


def run_extend(
    *,
    load: LoadOptions,
    options: RunOptions,
    output: OutputOptions,
    frames: int | None,
    num_videos: int,
    source: str,
    only_new: bool,
    aspect: Aspect,
    size: str | None,
) -> None:
    """``ca2vdm extend``."""
    folder = _new_folder(output.run)
    pipeline, video = _load(load, quiet=output.quiet)
    blank = np.zeros((1, video.height, video.width, video.channels), np.uint8)
    with ExitStack() as stack:
        path = source
        if folder is not None:
            stack.enter_context(folder.locked(create=True))
            path = str(_copy_of_standard_input(folder)) if source == "-" else source
        reader = stack.enter_context(open_reader(path))
        maps = frame_maps((reader.height, reader.width), video, aspect, size)
        name = "extended" if source == "-" else f"{Path(source).stem}-extended"
        targets = output.targets(num_videos, name, stack)
        fps = reader.fps or video.fps
        request = _request("extend", pipeline, options, output, frames, num_videos, targets, stack, fps)
        if not request.videos:  # all are other processes' share
            Generation(pipeline, request, output).report()
            return
        pipeline.extend(blank, request.frames, **RunOptions(**request.options))  # type: ignore[typeddict-item]
        if folder is not None or output.manifest:
            if any(target != "-" and _same_file(target, path) for target in targets):
                raise UsageError(f"-o: {source} is the input, which is needed later; name another output")
            input_video = InputVideo(
                source=source,
                path=folder.place(path) if folder else os.path.abspath(path),
                sha256="" if path == "-" else file_sha256(Path(path)),
                height=reader.height,
                width=reader.width,
                only_new=only_new,
                aspect=aspect.value,
                size=size,
            )
            request = replace(request, input=input_video)
        run = Generation(pipeline, request, output, folder)
        with run.open_outputs():
            window = run.read_input(reader, maps, only_new=only_new)
            run.begin(window)
            run.generate(partial(pipeline.extend, window, request.frames), maps.to_output)
    run.report()


def _request(
    command: str,
    pipeline: Pipeline,
    options: RunOptions,
    output: OutputOptions,
    frames: int | None,
    num_videos: int,
    targets: list[str],
    reservations: ExitStack,
    fps: float | Fraction,
) -> Request:
    """This process's share of what was asked for, with the preset's values where the flags give none."""
    sampling = pipeline.config.sampling
    videos = share_of(num_videos)
    if output.path is not None and videos:
        output.reserve(targets[videos[0]], reservations)
    resolved: RunOptions = {
        **options,
        "steps": options.get("steps") or sampling.steps,
        "sampler": options.get("sampler") or sampling.sampler,
        "context_frames": options.get("context_frames") or pipeline.config.model.context_frames,
    }
    return Request(
        command=command,
        options=dict(resolved),
        frames=frames or sampling.frames,
        videos=list(videos),
        batch=BATCH,
        outputs=[targets[k] for k in videos],
        fps=str(fps if output.fps is None else output.fps),
        format=output.format,
    )


def _new_folder(path: Path | None) -> RunFolder | None:
    """The folder of a new run; with several processes each has its own part."""
    if path is None:
        return None
    rank, processes = launched()
    folder = RunFolder(path if processes == 1 else path / f"process-{rank}")
    folder.check_new()
    return folder


def _copy_of_standard_input(folder: RunFolder) -> Path:
    """Copy standard input to the run folder, since it can't be read again."""
    if sys.stdin.isatty():
        raise UsageError("standard input is a terminal; pipe a video into it, or name a file")
    path = folder.path / INPUT_FILE
    with as_user_error(f"{path}: cannot be written", ADVICE), path.open("wb") as file:
        shutil.copyfileobj(sys.stdin.buffer, file, 2**20)
    return path


def _same_file(path: str, other: str) -> bool:
    return os.path.exists(path) and os.path.samefile(path, other)


def _load(load: LoadOptions, *, quiet: bool) -> tuple[Pipeline, VideoConfig]:
    group()  # waits for the other processes
    with status("loading", quiet=quiet):
        pipeline = Pipeline.load(**load)
    if pipeline.config.video is None:
        raise UsageError(f"preset {pipeline.preset.name}: it works on latents only and produces no frames; use bench")
    return pipeline, pipeline.config.video


def first_frame_of(source: str, video: VideoConfig) -> Frame:
    """The image, or the video's first frame, at the model's size."""
    with open_reader(source) as reader:
        geometry = Geometry((reader.height, reader.width), (video.height, video.width), Aspect.STRETCH)
        return to_channels(geometry.to_model(next(reader)), video.channels)


def frame_maps(size: Size, video: VideoConfig, aspect: Aspect, output_size: str | None) -> FrameMaps:
    """How to convert frames between the sizes of the input, the model and the output.

    Args:
        size: the input's.
        video: the model's.
        aspect: what to do if their aspect ratios differ.
        output_size: the flag ``--size``.
    """
    geometry = Geometry(size, (video.height, video.width), aspect)
    if output_size is None:
        return FrameMaps(geometry.to_model, geometry.input_to_output, geometry.from_model)
    if output_size == "model":
        return FrameMaps(geometry.to_model, geometry.to_model, lambda frame: frame)
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", output_size)
    if not match or min(wanted := (int(match[2]), int(match[1]))) < 1:
        raise UsageError(f"--size {output_size}: must be WIDTHxHEIGHT such as 640x360, or model")
    resize = Geometry(geometry.output_size, wanted, Aspect.STRETCH).to_model
    return FrameMaps(
        geometry.to_model,
        lambda frame: resize(geometry.input_to_output(frame)),
        lambda frame: resize(geometry.from_model(frame)),
    )
