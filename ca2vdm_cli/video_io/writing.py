"""Writing videos one frame at a time: as files that players read, as folders of images, as archives, into pipes.

Paths are not trusted: FFmpeg gets bytes and private ``file:`` addresses, so a name is never interpreted as a protocol
or a pattern; no symbolic link is followed at a name that this module makes up.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from fractions import Fraction
from pathlib import Path

from ca2vdm_cli.errors import UsageError, UserError

from .archive import Archive
from .encoding import Encoder
from .formats import Output, OutputFormat
from .frames import MAX_RATE, Frame, to_channels, write_errors
from .images import ImageFolder, frame_names
from .movies import MovieFile, MovieStream, is_special


class VideoWriter:
    """Writes frames of one size to a file, a folder or standard output; created by ``open_writer``.

    Nothing is created before the first frame, so a run that fails earlier leaves no trace. An output grows under a name
    of its own, such as ``x.partial.mp4``, and gets its final name when the writer is closed, so an existing output may
    be the one that is being read. ``close`` finishes the output after an error of the caller or Ctrl-C too, so the
    frames written so far can be played. If these are only copies of the input, the output is discarded instead, and an
    existing one is left as it was. If the process is killed, or the disk is full, the partial output stays and can be
    played. A pipe gets each frame as it is written; no flush is needed.

    Attributes:
        name: the output's name in messages.
        frames: number of frames written.
        is_pipe: whether the output is standard output.
    """

    def __init__(
        self,
        name: str,
        kind: OutputFormat,
        fps: Fraction,
        path: Path | None,
        *,
        overwrite: bool = False,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.name, self.frames, self.is_pipe = name, 0, path is None
        self._kind, self._fps, self._path, self._overwrite, self._metadata = kind, fps, path, overwrite, metadata
        self._output: Output | None = None
        self._shape: tuple[int, ...] = ()
        self._failed = self._stopped = self._closed = False
        self._keep = self.is_pipe

    @property
    def partial(self) -> Path | None:
        """The unfinished output, once there is a frame; None before, for pipes, and after the writer is closed."""
        return self._output.partial if self._output and not self._closed else None

    @property
    def failed(self) -> bool:
        """Whether a frame could not be written, or the output not be finished."""
        return self._failed

    def write(self, frame: Frame, *, copied: bool = False) -> None:
        """Append a uint8 frame: (H, W, 3) RGB, or gray as (H, W, 1) or (H, W).

        Args:
            frame: the frame.
            copied: whether it is a copy of a frame of the input.

        Raises:
            UserError: the frame cannot be written; the message says where the frames before it are.
            BrokenPipeError: the reader of standard output has gone.
        """
        frame = to_channels(frame, 3)
        self._shape = self._shape or frame.shape
        closed = self._closed or self._stopped
        if closed or frame.shape != self._shape:
            raise ValueError(f"a frame {frame.shape} for a {'closed ' * closed}video of frames {self._shape}")
        self._stopped = True  # in case of an error or interrupt
        try:
            with write_errors(self.name):
                self._output = self._output or self._open(self._shape[0], self._shape[1])
                self._output.write(frame)
        except UserError as error:
            self._failed = True
            raise self._stop(error) from error
        except BrokenPipeError:
            self._failed = True
            raise
        self._stopped = False
        self.frames += 1
        self._keep = self._keep or not copied

    def close(self) -> None:
        """Finish the output; a second call does nothing. Raises as ``write`` does, unless ``write`` already failed."""
        closed, self._closed = self._closed, True
        if closed or not self._output:
            return
        nothing = not self._keep or (self._failed and not self._output.kept)
        if nothing or not self.frames:
            self._output.discard()
            return
        try:
            if not self._failed:
                with write_errors(self.name):
                    self._finish(self._output)
        except UserError as error:
            self._failed = True
            if not self._output.kept:
                self._output.discard()
            raise self._stop(error) from error
        finally:
            self._output.close()

    def _finish(self, output: Output) -> None:
        try:
            output.finish(overwrite=self._overwrite)
        except FileExistsError as error:
            raise UserError(f"{self.name}: another output has this name by now; choose another name") from error

    def _stop(self, error: UserError) -> UserError:
        """The error, with the place of the frames that are written."""
        kept = self._output.kept if self._output and self._keep else 0
        if not self._output or not kept:
            return error
        frames = "1 finished frame is" if kept == 1 else f"{kept} finished frames are"
        return UserError(f"{error}; the {frames} in {self._shown(self._output.partial)}", error.exit_code)

    def _shown(self, partial: Path | None) -> Path | None:
        """The path of the unfinished output, relative if the output's name is."""
        name = Path(self.name)
        near = [place / partial.name for place in (name.parent, name)] if partial else []
        return next((path for path in near if os.path.realpath(path) == str(partial)), partial)

    def _open(self, height: int, width: int) -> Output:
        if self._path and self._kind is OutputFormat.PNG:
            return ImageFolder(self._path)
        special = self._path is None or is_special(self._path)
        if self._path and not special:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            if self._kind is OutputFormat.NPZ:
                return Archive(self._path, height, width)
        if self._path and not special:  # metadata comes last: partial files of the same frames are the same
            encoder = Encoder(self._kind, self._fps, height, width)
            return MovieFile(self._path, self._kind, encoder, self._metadata)
        return MovieStream(self._path, Encoder(self._kind, self._fps, height, width, self._metadata))

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_writer(
    target: str | Path,
    *,
    format: str | None = None,
    fps: Fraction | float,
    overwrite: bool = False,
    metadata: Mapping[str, str] | None = None,
) -> VideoWriter:
    """Prepare to write a video. Missing parent folders are created with the first frame.

    Args:
        target: a file, whose suffix gives the format; a folder for PNGs (it exists, or the name ends with ``/``); or
            ``-`` for standard output, which takes y4m (the default) and mkv.
        format: an ``OutputFormat`` that overrides the suffix.
        fps: frames per second.
        overwrite: replace an existing output; in a folder, only the frames.
        metadata: ``title``, ``comment``, ``description`` and so on, for mp4 and mkv; mp4 has no place for keys that
            FFmpeg does not know. Other formats hold none.

    Raises:
        UsageError: an unknown format, an impossible rate, or an output that exists already.
    """
    name, rate = str(target), _output_rate(fps)
    kind = _output_format(name, format)
    if kind is OutputFormat.GIF:
        rate = min(rate, Fraction(50))
    if name == "-":
        return VideoWriter("standard output", kind, rate, None)
    path = Path(os.path.realpath(name))
    # A folder, device or named pipe must itself be writable; for a file, its nearest existing parent folder must be.
    places = path.parents if os.path.isfile(path) else (path, *path.parents)
    nearest = next(place for place in places if os.path.exists(place))
    if not os.access(nearest, os.W_OK) or os.path.isfile(nearest):
        raise UsageError(f"{name}: {nearest} is not a folder that you can write to; choose another output")
    if kind is OutputFormat.PNG and os.path.isfile(path):
        raise UsageError(f"{name}: a file, not a folder for PNGs; choose another output")
    if kind is OutputFormat.NPZ and is_special(path):
        raise UsageError(f"{name}: a pipe or device, not a file for an npz; choose another output")
    if (frame_names(path) or os.path.isfile(path)) and not overwrite:
        raise UsageError(f"{name}: exists already; choose another output, or replace it with --overwrite")
    return VideoWriter(name, kind, rate, path, overwrite=overwrite, metadata=metadata)


def _output_rate(fps: Fraction | float) -> Fraction:
    with suppress(ValueError, OverflowError):  # not a number, infinity
        rate = Fraction(fps).limit_denominator(100_000)
        if 0 < rate <= MAX_RATE:
            return rate
    raise UsageError(f"fps: {fps} is not a frame rate; use one above 0 and up to {MAX_RATE}")


def _output_format(name: str, format: str | None) -> OutputFormat:
    """The requested format, or else the one that the name implies, if it can be written to the target."""
    allowed, implied = list(OutputFormat), Path(name).suffix.lower()[1:]
    if name == "-":
        allowed, implied = [OutputFormat.Y4M, OutputFormat.MKV], "y4m"
    elif name.endswith("/") or os.path.isdir(name):
        if implied and not (format or name.endswith("/")) and implied in list(OutputFormat):
            raise UsageError(
                f"{name}: a folder, not a file; choose another output, or end it in / for a folder of PNGs"
            )
        allowed, implied = [OutputFormat.PNG], "png"
    elif implied == "png":
        implied = "a single png"
    for kind in allowed:
        if kind.value == (format or implied):
            return kind
    known = ", ".join(kind.value for kind in allowed)
    raise UsageError(
        f"{name}: cannot be written as {format or implied!r}; use {known} (PNGs go to a folder, ending in /)"
    )
