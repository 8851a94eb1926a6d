"""``resume``: continue a run of ``sample`` or ``extend``, or branch off another take."""

from __future__ import annotations

import os
import shutil
import sys
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ca2vdm_cli.config import VideoConfig
from ca2vdm_cli.errors import UsageError, UserError
from ca2vdm_cli.files import file_sha256
from ca2vdm_cli.generate.journal import share_chunks
from ca2vdm_cli.pipeline import Pipeline
from ca2vdm_cli.processes import launched
from ca2vdm_cli.runs.record import INPUT_FILE, InputVideo, Parent, RunFolder, RunRecord
from ca2vdm_cli.terminal import note, print_json, status
from ca2vdm_cli.video_io import Aspect, open_reader

from .generate import frame_maps
from .generation import Generation, file_facts
from .outputs import OutputOptions


@dataclass(frozen=True, kw_only=True)
class TakeOptions:
    """The flags that say how another take differs."""

    from_frame: int | None
    """The first new frame, as numbered in the output; None to continue the same take."""
    frames: int | None
    seed: int | None
    prompt: str | None
    guidance: float | None


def run(
    path: Path, *, output: OutputOptions, take: TakeOptions, backend: str | None = None, device: str | None = None
) -> None:
    """``ca2vdm resume``. ``output.run`` is the folder of another take."""
    rank, processes = launched()
    parts = sorted(path.glob("process-*"))
    if processes > 1:
        path = path / f"process-{rank}"
    elif parts and not RunFolder(path).exists:
        raise UsageError(
            f"{path}: {len(parts)} processes share this run; launch as many with torchrun, or continue one part after "
            f"another, beginning with {parts[0]}"
        )
    folder = RunFolder(path)
    record = folder.read()
    with ExitStack() as stack:
        if take.from_frame is not None:
            folder, record = _branch(folder, record, take, output, stack)
        elif output.run is not None or take.seed is not None or take.prompt is not None or take.guidance is not None:
            raise UsageError("--from-frame: another take needs the frame from which it differs, and --run its folder")
        else:
            stack.enter_context(folder.locked())
            record = folder.read()  # another process may have written it meanwhile
            record = _with_output(folder, record, output, take.frames)
        targets = [folder.located(target) for target in record.request.outputs]
        if record.finished and all(map(_unchanged, targets, record.files)):
            if output.as_json:
                print_json({"run": str(folder.path), "output": targets[0] if len(targets) == 1 else targets})
            else:
                note(f"finished already: {', '.join(targets)}", quiet=output.quiet)
            return
        overwrite = output.overwrite or (take.from_frame is None and output.path is None)
        for target, facts in zip(targets, record.files, strict=True):
            if facts and not output.overwrite and file_facts(target) not in (None, facts):
                raise UsageError(
                    f"{target}: changed since this run wrote it; name another output with -o, or use --overwrite"
                )
        if os.path.isabs(record.request.outputs[0]):
            output.reserve(targets[0], stack)
        with status("loading", quiet=output.quiet):
            pipeline = record.provenance.load(backend=backend, device=device)
        for difference in record.provenance.differences():
            note(f"{difference}: new frames may differ from those of the interrupted run", quiet=output.quiet)
        request = replace(record.request, outputs=targets)
        generation = Generation(pipeline, request, replace(output, overwrite=overwrite), folder, record)
        _generate(generation, pipeline, folder, record)
    generation.report()


def _generate(generation: Generation, pipeline: Pipeline, folder: RunFolder, record: RunRecord) -> None:
    """Write the output anew: the input's frames, the finished chunks, which are only decoded, and new ones."""
    request, video = record.request, pipeline.config.video
    assert video is not None
    with generation.open_outputs():
        if request.input is not None:
            maps = _read_input(generation, folder, request.input, video)
            generation.input_frames = record.input_frames
            generation.generate(partial(pipeline.extend, folder.read_given(), request.frames), maps.to_output)
            return
        given = folder.read_given()[0] if request.first_frame else None
        generation.generate(partial(pipeline.sample, request.frames, first_frame=given), to_output=lambda frame: frame)


def _read_input(generation: Generation, folder: RunFolder, source: InputVideo, video: VideoConfig) -> Any:
    """Copy the input's frames to the output again, if they belong there; returns how to convert frames."""
    maps = frame_maps((source.height, source.width), video, Aspect(source.aspect), source.size)
    if source.only_new:
        return maps
    path = Path(folder.located(source.path))
    if not path.exists():
        raise UserError(f"{path}: the input is missing; put it back")
    if file_sha256(path) != source.sha256:
        raise UserError(f"{path}: the input has changed since the run began; put the old one back")
    with open_reader(path) as reader:
        generation.read_input(reader, maps, only_new=False)
    return maps


def _with_output(folder: RunFolder, record: RunRecord, output: OutputOptions, frames: int | None) -> RunRecord:
    """The record with another output or more frames, if the flags say so."""
    request = record.request
    if frames is not None and frames < request.frames:
        raise UsageError(f"frames: the run has {request.frames}; ask for at least as many")
    if frames is not None and frames > request.frames:
        request, record = replace(request, frames=frames), replace(record, finished=False)
    if output.path is not None or output.format is not None:
        request = replace(request, outputs=_outputs(folder, record, output), format=output.format)
        record = replace(record, files=[None] * len(request.outputs), finished=False)
    return replace(record, request=request)


def _outputs(folder: RunFolder, record: RunRecord, output: OutputOptions) -> list[str]:
    request = record.request
    default = "sample" if request.input is None else f"{Path(request.input.source).stem}-extended"
    default = "extended" if request.input and request.input.source == "-" else default
    with ExitStack() as none:
        targets = replace(output, run=folder.path).targets(len(request.videos), default, none)
    return [folder.place(target) for target in targets]


def _unchanged(target: str, facts: list[int] | None) -> bool:
    if facts is None:
        return target != "-" and os.path.isdir(target)
    return file_facts(target) == facts


def _branch(
    folder: RunFolder, record: RunRecord, take: TakeOptions, output: OutputOptions, stack: ExitStack
) -> tuple[RunFolder, RunRecord]:
    """Begin another take in a new folder, with the chunks before its first own frame."""
    if output.run is None:
        raise UsageError("--run: name a folder for the new take")
    new = RunFolder(output.run)
    new.check_new()
    request, old = record.request, record.request.options
    changes: dict[str, Any] = {"seed": take.seed, "prompt": take.prompt, "guidance": take.guidance}
    options = {**old, **{name: value for name, value in changes.items() if value is not None}}
    if options == old:
        raise UsageError("--from-frame: give another --seed, --prompt or --guidance; the take would be the same")
    chunks, frame = _boundary(folder, record, take.from_frame or 0, output)
    stack.enter_context(new.locked(create=True))
    same_context = all(options.get(name) == old.get(name) for name in ("prompt", "guidance"))
    for number in range(-(-len(request.videos) // request.batch)):
        share_chunks(folder.journal(number).folder, new.journal(number).folder, chunks, snapshots=same_context)
    source = request.input
    if request.first_frame or source is not None:
        new.write_given(folder.read_given())
    if source is not None and source.path == INPUT_FILE:
        shutil.copyfile(folder.path / INPUT_FILE, new.path / INPUT_FILE)
    elif source is not None:
        source = replace(source, path=new.place(folder.located(source.path)))
    parent = Parent(record.id, os.path.abspath(folder.path), chunks, frame)
    request = replace(
        request, options=options, frames=take.frames or request.frames, input=source, format=output.format
    )
    child = RunRecord(
        request, record.provenance, ["ca2vdm", *sys.argv[1:]], parent=parent, input_frames=record.input_frames
    )
    outputs = _outputs(new, child, output)
    child = replace(child, request=replace(request, outputs=outputs), files=[None] * len(outputs))
    new.write(child)
    return new, child


def _boundary(folder: RunFolder, record: RunRecord, frame: int, output: OutputOptions) -> tuple[int, int]:
    """The number of chunks before a frame of the output, and the first frame after them."""
    request, length = record.request, int(record.provenance.settings["model"]["chunk_frames"])
    copied = record.input_frames if request.input is not None and not request.input.only_new else 0
    start = copied + int(request.first_frame)
    batches = range(-(-len(request.videos) // request.batch))
    finished = min(_finished(folder, number) for number in batches)
    chunks = (frame - start) // length
    if not 0 < chunks <= finished:
        limits = f"from {start + length} to {start + finished * length}" if finished else "after the first chunk"
        raise UsageError(f"--from-frame: {frame} must be {limits}, where a finished chunk ends")
    boundary = start + chunks * length
    if boundary != frame:
        note(f"chunks begin every {length} frames: the take begins at frame {boundary}", quiet=output.quiet)
    return chunks, boundary


def _finished(folder: RunFolder, number: int) -> int:
    """Number of finished chunks in a journal."""
    journal, count = folder.journal(number), 0
    while journal.chunk_path(count).exists():
        count += 1
    return count
