"""A video as a NumPy archive."""

from __future__ import annotations

import io
import shutil
import zipfile
from pathlib import Path

import numpy as np

from .frames import Frame
from .partial import PartialFile


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
        target.open("frames.npy", "w", force_zip64=True) as file,
    ):
        shutil.copyfileobj(source, file, 1 << 20)
