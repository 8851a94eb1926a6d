"""Videos as NumPy archives (.npz), read and written one frame at a time: the array may be larger than the memory."""

from __future__ import annotations

import io
import shutil
import zipfile
from collections.abc import Generator
from contextlib import ExitStack
from math import prod
from pathlib import Path
from typing import IO

import numpy as np
from numpy.lib import format as npy

from .frames import ADVICE, MAX_PIXELS, Frame, read_errors, to_channels, too_large
from .partial import PartialFile
from .source import Source

ARRAY = "frames.npy"
MAX_FRAMES = 10**6
"""Longest video in an archive; an hour of 24 frames per second has 86400."""


def open_archive(name: str, path: Path) -> Source:
    """Open an archive. Nothing in it is unpickled.

    Raises:
        ValueError: it has no array ``frames`` (uint8; T, H, W[, 1 or 3]).
    """
    with ExitStack() as stack:
        try:
            archive = stack.enter_context(zipfile.ZipFile(path))
            member = stack.enter_context(archive.open(ARRAY))
            shape, fortran_order, dtype = _header(member)
        except Exception as error:  # NumPy and zipfile do not document what they raise for a damaged file
            raise ValueError(f"no array called frames could be loaded from it: {error}") from error
        if dtype != np.uint8 or len(shape) not in (3, 4) or shape[3:] not in ((), (1,), (3,)):
            raise ValueError(f"frames is {dtype} {shape}, not uint8 (T, H, W[, 1 or 3])")
        if fortran_order:
            raise ValueError("frames is in Fortran order; save np.ascontiguousarray(frames)")
        if shape[1] * shape[2] > MAX_PIXELS:
            raise ValueError(too_large(shape[1], shape[2]))
        if shape[0] > MAX_FRAMES:
            raise ValueError(f"frames has {shape[0]} frames; at most {MAX_FRAMES}")
        if prod(shape) > archive.getinfo(ARRAY).file_size:
            raise ValueError(f"frames is {shape}, but the file ends before")
        return Source(_read(name, member, shape, stack.pop_all()), shape[0])


def _header(member: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[np.generic]]:
    version = npy.read_magic(member)
    readers = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
    if version not in readers:
        raise ValueError(f"version {version} of the .npy format")
    shape, fortran_order, dtype = readers[version](member)
    return shape, fortran_order, dtype


def _read(name: str, member: IO[bytes], shape: tuple[int, ...], stack: ExitStack) -> Generator[Frame, None, None]:
    size = prod(shape[1:])
    with stack, read_errors(name, ADVICE):
        for index in range(shape[0] if size else 0):
            try:
                data = member.read(size)
            except Exception as error:  # see above
                raise ValueError(f"damaged after frame {index}: {error}") from error
            if len(data) < size:
                raise ValueError(f"it ends after frame {index} of {shape[0]}")
            yield to_channels(np.frombuffer(data, np.uint8).reshape(shape[1:]), 3)


class Archive:
    """Writes an .npz. Until it is finished, the frames are a plain array: x.partial.npy, which ``numpy.load`` reads.

    Args:
        path: the archive.
        height, width: size of the frames.
    """

    def __init__(self, path: Path, height: int, width: int) -> None:
        self._shape, self.kept = (height, width, 3), 0
        header = self._header()
        self._file = PartialFile(path, ".npy", header=len(header))
        self.partial: Path | None = self._file.path
        try:
            self._file.append(header)
        except OSError:
            self.discard()
            raise

    def write(self, frame: Frame) -> None:
        self._file.append(np.ascontiguousarray(frame).data)
        self.kept += 1
        self._file.rewrite(self._header())

    def finish(self, *, overwrite: bool) -> None:
        self._file.finish(overwrite=overwrite, convert=_to_archive)

    def close(self) -> None:
        self._file.close()

    def discard(self) -> None:
        self._file.discard()

    def _header(self) -> bytes:
        """The array's header for the number of frames so far. NumPy leaves room in it, so its length is the same."""
        header = io.BytesIO()
        content = {"descr": "|u1", "fortran_order": False, "shape": (self.kept, *self._shape)}
        np.lib.format.write_array_header_1_0(header, content)
        return header.getvalue()


def _to_archive(array: Path, archive: Path) -> None:
    with (
        array.open("rb") as source,
        zipfile.ZipFile(archive, "w") as target,
        target.open(ARRAY, "w", force_zip64=True) as file,
    ):
        shutil.copyfileobj(source, file, 1 << 20)
