"""Generating the videos of one request: chunk by chunk, written as soon as they are finished, and reported."""

from __future__ import annotations

import hashlib
import os
import shlex
import stat
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ca2vdm_cli import STARTED
from ca2vdm_cli.errors import UsageError, UserError
from ca2vdm_cli.interrupts import held_interrupts, released_interrupts
from ca2vdm_cli.pipeline import Pipeline, RunOptions, VideoChunk
from ca2vdm_cli.presets import to_mapping
from ca2vdm_cli.processes import group, launched
from ca2vdm_cli.runs.manifest import Manifest, manifest_path, output_sha256, video_metadata, write_manifest
from ca2vdm_cli.runs.provenance import Provenance, settings_sha256
from ca2vdm_cli.runs.record import Request, RunFolder, RunRecord
from ca2vdm_cli.runtime import dtype_name, peak_memory
from ca2vdm_cli.terminal import ProgressBar, note, print_json, print_run_report, status
from ca2vdm_cli.video_io import Frame, VideoReader, VideoWriter, open_writer, to_channels

from .outcome import merged, with_finished_frames
from .outputs import OutputOptions

FrameMap = Callable[[Frame], Frame]
"""Turns a frame into one of another size."""
TIMED_PARTS = ("input", "denoise", "cache_write", "decode", "encode", "output")
"""Parts of a run that are timed in the report."""


class FrameMaps(NamedTuple):
    """Conversions between sizes."""

    to_model: FrameMap
    """From the input to the model."""
    input_to_output: FrameMap
    to_output: FrameMap
    """From the model to the output."""


class Generation:
    """This process's share of the videos of a run, the files they go to, and the time each part of the run took.

    Args:
        pipeline: the model.
        request: what to generate; its outputs are paths.
        output: the flags about the output.
        folder: the run folder, locked; None if the run need not be resumable.
        record: what the folder says, if the run is resumed.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        request: Request,
        output: OutputOptions,
        folder: RunFolder | None = None,
        record: RunRecord | None = None,
    ) -> None:
        self.pipeline, self.request, self.output, self.folder = pipeline, request, output, folder
        self.record = record
        self.options: RunOptions = request.options  # type: ignore[assignment] # plain values, checked by the pipeline
        self.writers: list[VideoWriter] = []
        self.digests = [hashlib.sha256() for _ in request.videos] if output.manifest else []
        rank, _ = launched()
        self.quiet = output.quiet or rank > 0  # the first process reports, on its own videos
        self.input_frames = self.new_frames = self.resumed_frames = self.context_bytes = 0
        self.first_chunk_seconds: float | None = None
        self.seconds = dict.fromkeys(TIMED_PARTS, 0.0)

    @contextmanager
    def open_outputs(self) -> Iterator[None]:
        """Open the output of each video. After an interrupt or an error, what is finished stays playable."""
        with ExitStack() as stack:
            for target in self.request.outputs:
                self._check_manifest(target)
                writer = self.open_writer(target)
                self.writers.append(stack.enter_context(writer))
            try:
                yield
            except KeyboardInterrupt:
                stack.close()
                self._end_session()
                names = ", ".join(writer.name for writer in self.writers if writer.frames)
                result = f"{self.new_frames} new frames are in {names}" if names else "nothing was compared"
                message = f"interrupted: {result if self.new_frames else 'no new frame was generated'}"
                note(message + self._how_to_resume(), quiet=self.quiet)
                raise
            except BaseException as error:
                group().fail()
                with suppress(UserError, OSError):
                    stack.close()
                self._end_session()
                shown = self._with_what_is_finished(error)
                if shown is error:
                    raise
                raise shown from error
        self._end_session(finished=True)
        if self.output.manifest and self.request.outputs != [""]:
            self._write_manifests()

    def _with_what_is_finished(self, error: BaseException) -> BaseException:
        """The error that ended the run, with the place of its finished frames, and how to go on."""
        shown = error
        if not any(writer.failed for writer in self.writers):  # a failed writer has said where its frames are
            names = [writer.name for writer in self.writers if writer.frames]
            shown = with_finished_frames(error, self.new_frames, names)
        if isinstance(shown, UserError) and not isinstance(shown, UsageError) and self._how_to_resume():
            return UserError(f"{shown}{self._how_to_resume()}", shown.exit_code)
        return shown

    def open_writer(self, target: str) -> VideoWriter:
        """Prepare to write one output; an empty name discards the frames."""
        if not target:
            return _Discarded()  # type: ignore[return-value]
        preset = self.pipeline.preset
        if self.record is None:
            settings = settings_sha256(to_mapping(preset.config))
        else:
            settings = self.record.provenance.settings_sha256
        return open_writer(
            target,
            format=self.request.format,
            fps=_rate(self.request.fps),
            overwrite=self.output.overwrite,
            metadata=video_metadata(preset.name, settings, self.request, self._command_line()),
        )

    def _check_manifest(self, target: str) -> None:
        path = manifest_path(target)
        if self.output.manifest and target and not self.output.overwrite and path.exists():
            raise UsageError(f"{path}: exists already; choose another output, or replace it with --overwrite")

    def begin(self, given: np.ndarray | None) -> None:
        """Write what a resumed run needs to the run folder.

        Args:
            given: the given frames (T, H, W, channels).
        """
        if self.folder is None:
            return
        if given is not None:
            self.folder.write_given(given)
        outputs = [self.folder.place(target) for target in self.request.outputs]
        self.record = RunRecord(
            request=replace(self.request, outputs=outputs),
            provenance=Provenance.of(self.pipeline),
            command_line=self._command_line(),
            input_frames=self.input_frames,
            files=[None] * len(outputs),
        )
        self.folder.write(self.record)

    def read_input(self, reader: VideoReader, maps: FrameMaps, *, only_new: bool) -> np.ndarray:
        """Read the input, and copy it to the outputs.

        Args:
            reader: the input.
            maps: conversions between sizes.
            only_new: do not copy it.

        Returns:
            The last frames that fit the window, at the model's size, (T, H, W, channels).
        """
        video, began = self.pipeline.config.video, time.perf_counter()
        assert video is not None
        window: deque[Frame] = deque(maxlen=self.options["context_frames"])
        with status("reading", quiet=self.quiet):
            for frame in reader:
                self.input_frames += 1
                window.append(to_channels(maps.to_model(frame), video.channels))
                if not only_new:
                    copied = maps.input_to_output(frame)
                    for k in range(len(self.writers)):
                        self._put(k, copied, copied=True)
        self.seconds["input"] = time.perf_counter() - began
        if reader.damage:
            note(f"{reader.name}: {reader.damage}", quiet=self.quiet)
        return np.stack(window)

    def generate(self, run: Callable[..., Iterator[VideoChunk]], to_output: FrameMap) -> None:
        """Generate the videos in batches, and write them. The first interrupt waits for the end of the chunk.

        Args:
            run: generates the chunks of some videos, given ``RunOptions``.
            to_output: converts a generated frame to the output's size.
        """
        request, batch = self.request, self.request.batch
        chunks = -(-request.frames // self.pipeline.config.model.chunk_frames)
        steps = int(self.options["steps"] or 1)
        batches = range(0, len(request.videos), batch)
        # in a pipe the next command shows its own progress, and two bars on one terminal would garble each other
        quiet = self.quiet or (request.outputs == ["-"] and stat.S_ISFIFO(os.fstat(1).st_mode))
        frames = request.frames * len(request.videos)
        with ProgressBar("sampling", chunks * steps * len(batches), frames, quiet=quiet) as bar:
            for number, first in enumerate(batches):
                videos, journal = request.videos[first : first + batch], None
                if self.folder is not None:
                    journal = self.folder.journal(number)
                stream = run(**self.options, videos=videos, journal=journal, on_step=lambda *_: bar.advance())
                with held_interrupts(self._announce) as interrupted:
                    for chunk in stream:
                        self._write(chunk, first, to_output, interrupted)
                        bar.advance(steps=steps if chunk.from_journal else 0, finished=self.new_frames)
                        if interrupted():
                            raise KeyboardInterrupt
                for line in journal.problems if journal else ():
                    note(line, quiet=self.quiet)
                for writer in self.writers[first : first + batch]:
                    writer.close()

    def _announce(self) -> None:
        """Say that Ctrl-C was seen. Called in a signal's handler."""
        if self.quiet:
            return
        erase = "\r\x1b[2K" if sys.stderr.isatty() else ""  # the progress bar
        line = f"{erase}interrupted: finishing this chunk; press Ctrl-C again to stop at once\n"
        try:
            sys.stderr.write(line)
            sys.stderr.flush()
        except RuntimeError:  # in the middle of another write
            os.write(2, line.encode())

    def _put(self, k: int, frame: Frame, *, copied: bool = False) -> None:
        """Write a frame of the k-th of these videos."""
        if copied:
            self.writers[k].write(frame, copied=True)
        else:
            self.writers[k].write(frame)
        if self.digests:
            self.digests[k].update(np.ascontiguousarray(to_channels(frame, 3)).data)

    def _write(self, chunk: VideoChunk, first: int, to_output: FrameMap, interrupted: Callable[[], bool]) -> None:
        began = time.perf_counter()
        for k, video in enumerate(chunk.frames, first):
            for frame in video:
                # hold interrupts so that a frame is written and counted, or neither; but a pipe may block for long
                is_pipe = self.writers[k].is_pipe
                try:
                    with released_interrupts() if is_pipe else held_interrupts() if interrupted() else nullcontext():
                        self._put(k, to_output(frame))
                        self.new_frames += 1
                except BrokenPipeError:
                    if interrupted():  # the reader was interrupted too
                        raise KeyboardInterrupt from None
                    raise
        if chunk.from_journal:
            self.resumed_frames += chunk.frames.shape[0] * chunk.frames.shape[1]
        elif self.first_chunk_seconds is None:
            self.first_chunk_seconds = time.perf_counter() - STARTED
        self.context_bytes = max(self.context_bytes, chunk.context_bytes)
        self.seconds["output"] += time.perf_counter() - began
        self.seconds["denoise"] += chunk.denoise_seconds
        self.seconds["cache_write"] += chunk.write_seconds
        self.seconds["decode"] += chunk.decode_seconds
        self.seconds["encode"] += chunk.encode_seconds

    def _how_to_resume(self) -> str:
        """The end of a message: how to go on, if anything is finished that could be lost."""
        if self.folder is None or self.record is None or not any(self.folder.path.glob("batch-*/chunk-*")):
            return ""
        return f"; continue with: ca2vdm resume {shlex.quote(str(self.folder.path))}"

    def _command_line(self) -> list[str]:
        """The command that began the run."""
        return self.record.command_line if self.record else ["ca2vdm", *sys.argv[1:]]

    def _end_session(self, *, finished: bool = False) -> None:
        """Record how far the run got."""
        if self.folder is None or self.record is None:
            return
        self.record = replace(
            self.record,
            finished=finished,
            seconds=self.record.seconds + time.perf_counter() - STARTED,
            files=[file_facts(target) for target in self.request.outputs],
        )
        with suppress(UserError) if not finished else nullcontext():
            self.folder.write(self.record)

    def _write_manifests(self) -> None:
        """Write how each video was made beside it."""
        record = self.record
        provenance = record.provenance if record else Provenance.of(self.pipeline)
        source, input_video = self.request, self.request.input
        if input_video is not None and self.folder is not None:
            source = replace(source, input=replace(input_video, path=self.folder.located(input_video.path)))
        for k, (output, digest) in enumerate(zip(source.outputs, self.digests, strict=True)):
            manifest = Manifest(
                request=replace(source, videos=[source.videos[k]], outputs=[os.path.abspath(output)]),
                provenance=provenance,
                command_line=self._command_line(),
                parent=record.parent if record else None,
                frames=self.writers[k].frames,
                frames_sha256=digest.hexdigest(),
                file_sha256=output_sha256(output),
                seconds={**self.seconds, "total": time.perf_counter() - STARTED},
            )
            write_manifest(output, manifest)

    def report(self) -> None:
        """Print what was generated and how long it took: as JSON, for people, or not at all."""
        reports = group().gather(self._own_report())
        if self.output.as_json and reports:
            print_json(merged(reports))
        elif not self.quiet and reports:
            print_run_report(merged(reports))

    def _own_report(self) -> dict[str, Any]:
        request, targets = self.request, self.request.outputs
        pipeline, options = self.pipeline, self.options
        seconds = time.perf_counter() - STARTED
        strategy = options.get("strategy") or "cached"
        return {
            "frames": request.frames,
            "input_frames": self.input_frames,
            "num_videos": len(targets),
            "processes": launched()[1],
            "seconds": seconds,
            "first_chunk_seconds": self.first_chunk_seconds,
            "frames_per_second": (self.new_frames - self.resumed_frames) / seconds,
            "peak_memory_bytes": peak_memory(pipeline.model.device),
            "cache_bytes": self.context_bytes if strategy == "cached" else 0,
            "context_bytes": self.context_bytes,
            "weights_bytes": pipeline.weights_bytes,
            "output": targets[0] if len(targets) == launched()[1] == 1 else targets,
            "preset": pipeline.preset.name,
            "backend": pipeline.backend.name,
            "device": str(pipeline.model.device),
            "dtype": dtype_name(pipeline.model.dtype),
            "strategy": strategy,
            "sampler": options["sampler"],
            "steps": options["steps"],
            "seed": options.get("seed", 0),
            "prompt": options.get("prompt"),
            "context_frames": options["context_frames"],
            "run": None if self.folder is None else str(self.folder.path),
            "resumed_frames": self.resumed_frames,
            **{f"{name}_seconds": spent for name, spent in self.seconds.items()},
            "startup_seconds": max(0.0, seconds - sum(self.seconds.values())),
        }


class _Discarded:
    """Takes the place of a writer, if the frames are only compared."""

    name, is_pipe, failed, frames = "", False, False, 0

    def write(self, frame: Frame, *, copied: bool = False) -> None:
        self.frames += 1

    def close(self) -> None: ...

    def __enter__(self) -> _Discarded:
        return self

    def __exit__(self, *_: object) -> None: ...


def _rate(text: str) -> Fraction | float:
    """Frames per second, as a reader or a flag gave them."""
    return float(text) if "." in text or not text[0].isdigit() else Fraction(text)


def file_facts(path: str) -> list[int] | None:
    """Size and modification time (ns) of a file; None for a folder, a pipe, or nothing."""
    if path == "-" or not Path(path).is_file():
        return None
    facts = os.stat(path)
    return [facts.st_size, facts.st_mtime_ns]
