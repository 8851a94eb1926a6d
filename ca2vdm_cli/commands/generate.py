"""``sample`` and ``extend``: generate chunk by chunk, write each as soon as it is there, and report."""

from __future__ import annotations

import os
import re
import stat
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from ca2vdm_cli import STARTED
from ca2vdm_cli.errors import UsageError
from ca2vdm_cli.interrupts import held_interrupts
from ca2vdm_cli.pipeline import Frames, Pipeline, RunOptions, VideoChunk
from ca2vdm_cli.processes import launched, share_of
from ca2vdm_cli.runtime import dtype_name, peak_memory
from ca2vdm_cli.terminal import ProgressBar, note, print_json, print_run_report, status
from ca2vdm_cli.video_io import (
    Aspect,
    Frame,
    Geometry,
    Size,
    VideoReader,
    VideoWriter,
    open_reader,
    open_writer,
    to_channels,
)

Through = Callable[[Frame], Frame]
"""One frame to another."""
BATCH = 4
"""Videos that are generated together; how many does not change what they look like."""


@dataclass(frozen=True)
class Request:
    """The flags that both commands share."""

    preset: str | None
    checkpoint: Path | None
    frames: int | None
    num_videos: int
    seed: int
    steps: int | None
    sampler: str | None
    backend: str
    device: str
    dtype: str
    strategy: str
    context_frames: int | None
    prompt: str | None
    guidance: float | None
    overrides: list[str]
    output: str | None
    format: str | None
    fps: float | None
    as_json: bool
    quiet: bool
    overwrite: bool

    def load(self) -> Pipeline:
        """The pipeline that the flags ask for."""
        with status("loading", quiet=self.quiet):
            return Pipeline.load(
                self.preset,
                checkpoint=self.checkpoint,
                overrides=self.overrides,
                backend=self.backend,
                device=self.device,
                dtype=self.dtype,
            )

    def options(self, videos: list[int], on_step: Callable[[int, int], None]) -> RunOptions:
        """The pipeline's arguments for some of the videos."""
        return RunOptions(
            videos=videos,
            seed=self.seed,
            steps=self.steps,
            sampler=self.sampler,
            strategy=self.strategy,
            context_frames=self.context_frames,
            prompt=self.prompt,
            guidance=self.guidance,
            on_step=on_step,
        )

    def targets(self, default: str) -> list[str]:
        """One output a video. Without ``-o`` a name that is free; several videos are numbered."""
        output = self.output
        if output == "-" and (self.num_videos > 1 or self.as_json):
            other = "--num-videos" if self.num_videos > 1 else "--json"
            raise UsageError(f"-o -: standard output holds one video and nothing else; leave out {other}")
        if output is None and launched()[1] > 1:
            raise UsageError("-o: needed when several processes share the videos; each writes its own")
        if output == "-" and sys.stdout.isatty():
            raise UsageError("-o -: standard output is a terminal; pipe it into a player, or name a file")
        if output is None:
            suffix = "/" if self.format == "png" else f".{self.format or 'mp4'}"
            names = (f"{default}{'' if n == 0 else f'-{n}'}{suffix}" for n in count())
            output = next(n for n in names if not any(Path(p).exists() for p in _numbered(n, self.num_videos)))
        return _numbered(output, self.num_videos)


def _numbered(output: str, videos: int) -> list[str]:
    if videos == 1:
        return [output]
    width = max(2, len(str(videos - 1)))
    if output.endswith("/") or Path(output).is_dir():
        return [f"{output.rstrip('/')}/{k:0{width}d}/" for k in range(videos)]
    path = Path(output)
    return [str(path.with_name(f"{path.stem}-{k:0{width}d}{path.suffix}")) for k in range(videos)]


@dataclass
class _Tally:
    """What has been made so far, and where the time went."""

    frames: int = 0
    input_frames: int = 0
    first_chunk_seconds: float | None = None
    context_bytes: int = 0
    seconds: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("input", "denoise", "cache_write", "decode", "encode", "output"), 0.0)
    )

    def add(self, chunk: VideoChunk, output_seconds: float) -> None:
        """Count a chunk that has been written."""
        if self.first_chunk_seconds is None:
            self.first_chunk_seconds = time.perf_counter() - STARTED
        self.context_bytes = max(self.context_bytes, chunk.context_bytes)
        for name, seconds in (
            ("denoise", chunk.denoise_seconds),
            ("cache_write", chunk.write_seconds),
            ("decode", chunk.decode_seconds),
            ("encode", chunk.encode_seconds),
            ("output", output_seconds),
        ):
            self.seconds[name] += seconds


def run_sample(request: Request, first_frame: str | None) -> None:
    """``ca2vdm sample``."""
    pipeline = request.load()
    frames = request.frames or pipeline.config.sampling.frames
    video = _video(pipeline)
    given = None
    if first_frame is not None:
        with open_reader(first_frame) as reader:
            geometry = Geometry((reader.height, reader.width), (video.height, video.width), Aspect.STRETCH)
            given = to_channels(geometry.to_model(next(reader)), video.channels)
    fps = video.fps if request.fps is None else request.fps
    targets = request.targets("sample")

    def chunks(videos: list[int], on_step: Callable[[int, int], None]) -> Iterator[VideoChunk]:
        return pipeline.sample(frames, first_frame=given, **request.options(videos, on_step))

    _run(request, pipeline, targets, fps, frames, chunks, lambda frame: frame, lambda writers: 0)


def run_extend(request: Request, source: str, *, only_new: bool, aspect: str, size: str | None) -> None:
    """``ca2vdm extend``."""
    pipeline = request.load()
    frames = request.frames or pipeline.config.sampling.frames
    video = _video(pipeline)
    window = request.context_frames or pipeline.config.model.context_frames
    with open_reader(source) as reader:
        to_model, given_out, new_out = _geometry(reader, (video.height, video.width), Aspect(aspect), size)
        fps = reader.fps or video.fps if request.fps is None else request.fps
        name = "extended" if source == "-" else f"{Path(source).stem}-extended"
        last: deque[np.ndarray] = deque(maxlen=window)

        def copy_input(writers: list[VideoWriter]) -> int:
            """Read the input to its end, remembering the last window of it; how many frames it has."""
            blank = np.zeros((1, video.height, video.width, video.channels), np.uint8)
            pipeline.extend(blank, frames, **request.options([0], lambda chunk, step: None))  # refuses before it reads
            read = 0
            for frame in reader:
                read += 1
                last.append(to_channels(to_model(frame), video.channels))
                if not only_new:
                    shown = given_out(frame)
                    for writer in writers:
                        writer.write(shown, copied=True)
            if reader.frame_count and read < 0.98 * reader.frame_count:
                note(f"{source}: {read} of {reader.frame_count} frames could be read", quiet=request.quiet)
            return read

        def chunks(videos: list[int], on_step: Callable[[int, int], None]) -> Iterator[VideoChunk]:
            return pipeline.extend(np.stack(last), frames, **request.options(videos, on_step))

        _run(request, pipeline, request.targets(name), fps, frames, chunks, new_out, copy_input)


def _geometry(reader: VideoReader, model: Size, aspect: Aspect, size: str | None) -> tuple[Through, Through, Through]:
    """How input frames reach the model, how they are shown, and how the model's frames are shown, at ``--size``."""
    geometry = Geometry((reader.height, reader.width), model, aspect)
    if size is None:
        return geometry.to_model, geometry.input_to_output, geometry.from_model
    if size == "model":
        return geometry.to_model, geometry.to_model, lambda frame: frame
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", size)
    if not match or min(wanted := (int(match[2]), int(match[1]))) < 1:
        raise UsageError(f"--size {size}: must be WIDTHxHEIGHT such as 640x360, or model")
    resize = Geometry(geometry.output_size, wanted, Aspect.STRETCH).to_model
    return (
        geometry.to_model,
        lambda frame: resize(geometry.input_to_output(frame)),
        lambda frame: resize(geometry.from_model(frame)),
    )


def _video(pipeline: Pipeline) -> Any:
    if pipeline.config.video is None:
        raise UsageError(f"preset {pipeline.preset.name}: it works on latents only and makes no pictures; use bench")
    return pipeline.config.video


def _run(
    request: Request,
    pipeline: Pipeline,
    targets: list[str],
    fps: Any,
    frames: int,
    chunks: Callable[[list[int], Callable[[int, int], None]], Iterator[VideoChunk]],
    shown: Through,
    begin: Callable[[list[VideoWriter]], int],
) -> None:
    """Generate and write all videos, then report. What was finished stays playable whatever happens."""
    steps = request.steps or pipeline.config.sampling.steps
    per_video = -(-frames // pipeline.config.model.chunk_frames) * steps
    tally = _Tally()
    mine = share_of(request.num_videos)
    targets = [targets[k] for k in mine]
    if not targets:
        return
    if launched()[0]:  # the first process speaks, of its own videos
        request = replace(request, quiet=True, as_json=False)
    with ExitStack() as stack:
        writers = [
            stack.enter_context(open_writer(t, format=request.format, fps=fps, overwrite=request.overwrite))
            for t in targets
        ]
        total = per_video * -(-len(mine) // BATCH)
        try:
            reading = time.perf_counter()
            with status("reading", quiet=request.quiet):
                tally.input_frames = begin(writers)
            tally.seconds["input"] = time.perf_counter() - reading
            # in a pipe the next command shows how far it is, and two bars on one terminal would garble each other
            quiet = request.quiet or (targets == ["-"] and stat.S_ISFIFO(os.fstat(1).st_mode))
            bar = stack.enter_context(ProgressBar("sampling", total, frames * len(mine), quiet=quiet))
            for first in range(0, len(mine), BATCH):
                group = writers[first : first + BATCH]
                for chunk in chunks(list(mine[first : first + BATCH]), lambda _chunk, _step: bar.advance()):
                    _write(chunk, group, shown, tally)
                    bar.advance(steps=0, finished=tally.frames)
                for writer in group:
                    writer.close()
        except KeyboardInterrupt:
            stack.close()
            where = ", ".join(writer.name for writer in writers if writer.frames)
            made = f"{tally.frames} new frames are in {where}" if tally.frames else "before any new frame was made"
            note(f"interrupted: {made}", quiet=request.quiet)
            raise
    _report(request, pipeline, targets, frames, steps, tally)


def _write(chunk: VideoChunk, writers: list[VideoWriter], shown: Through, tally: _Tally) -> None:
    began = time.perf_counter()
    video: Frames
    for writer, video in zip(writers, chunk.frames, strict=True):
        for frame in video:
            # not between a frame and its count; but a pipe may block for as long as nobody reads it
            with nullcontext() if writer.is_pipe else held_interrupts():
                writer.write(shown(frame))
                tally.frames += 1
    tally.add(chunk, time.perf_counter() - began)


def _report(request: Request, pipeline: Pipeline, targets: list[str], frames: int, steps: int, tally: _Tally) -> None:
    seconds = time.perf_counter() - STARTED
    report = {
        "frames": frames,
        "input_frames": tally.input_frames,
        "num_videos": len(targets),
        "processes": launched()[1],
        "seconds": seconds,
        "first_chunk_seconds": tally.first_chunk_seconds,
        "frames_per_second": tally.frames / seconds,
        "peak_memory_bytes": peak_memory(pipeline.model.device),
        "cache_bytes": tally.context_bytes if request.strategy == "cached" else 0,
        "context_bytes": tally.context_bytes,
        "weights_bytes": pipeline.weights_bytes,
        "output": targets[0] if request.num_videos == 1 else targets,
        "preset": pipeline.preset.name,
        "backend": pipeline.backend.name,
        "device": str(pipeline.model.device),
        "dtype": dtype_name(pipeline.model.dtype),
        "strategy": request.strategy,
        "sampler": request.sampler or pipeline.config.sampling.sampler,
        "steps": steps,
        "seed": request.seed,
        "prompt": request.prompt,
        "context_frames": request.context_frames or pipeline.config.model.context_frames,
        **{f"{name}_seconds": spent for name, spent in tally.seconds.items()},
        "startup_seconds": max(0.0, seconds - sum(tally.seconds.values())),
    }
    if request.as_json:
        print_json(report)
    elif not request.quiet:
        print_run_report(report)
