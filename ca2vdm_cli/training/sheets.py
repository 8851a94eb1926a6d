"""Labelled contact sheets: what a model or an autoencoder makes, beside the truth.

Shapes: T frames, H height, W width, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from ca2vdm_cli.video_io import Frame, to_channels

SMALLEST, LARGEST = 64, 160
"""Height in pixels up to which small pictures are enlarged, and width down to which large ones are reduced."""
GAP, MARGIN, LINE = 4, 76, 18
"""Pixels between pictures, left of a row for its label, and per line of text."""
GIVEN = (240, 140, 0)
"""Colour of the frame around given pictures, RGB."""
EMPTY = 225
"""Gray level of a missing picture."""


@dataclass(frozen=True)
class Row:
    """One row of a sheet."""

    label: str
    pictures: Sequence[Frame | None]
    """uint8 (H, W, C) each; None where there is no picture."""
    given: int = 0
    """How many of the first pictures the model was given; they get a coloured frame."""


def labelled_sheet(title: str, columns: Sequence[str], rows: Sequence[Row]) -> Frame:
    """Rows of pictures of one size, with a label on each row and column, under a title: uint8 (H, W, 3) RGB.

    Small pictures are enlarged, large ones reduced.
    """
    first = next(picture for row in rows for picture in row.pictures if picture is not None)
    height, width = _cell(first.shape[0], first.shape[1])
    top = 2 * LINE + 2 * GAP
    right = max(MARGIN + len(columns) * (width + GAP) + GAP, MARGIN + 7 * len(title))
    sheet = np.full((top + len(rows) * (height + GAP) + GAP, right, 3), 255, np.uint8)
    _write(sheet, title, GAP, LINE - 4)
    for index, text in enumerate(columns):
        _write(sheet, text, MARGIN + index * (width + GAP), 2 * LINE)
    for number, row in enumerate(rows):
        y = top + number * (height + GAP)
        _write(sheet, row.label, GAP, y + (height + LINE) // 2 - 4)
        for index, picture in enumerate(row.pictures):
            x = MARGIN + index * (width + GAP)
            if picture is None:
                sheet[y : y + height, x : x + width] = EMPTY
                continue
            enlarge = height > picture.shape[0]
            kernel = cv2.INTER_NEAREST if enlarge else cv2.INTER_AREA
            if index < row.given:
                sheet[y - GAP : y + height + GAP, x - GAP : x + width + GAP] = GIVEN
            sheet[y : y + height, x : x + width] = cv2.resize(
                to_channels(picture, 3), (width, height), interpolation=kernel
            )
    return sheet[: sheet.shape[0] // 2 * 2, : sheet.shape[1] // 2 * 2]  # H.264 needs even sides


def _cell(height: int, width: int) -> tuple[int, int]:
    """Size of a picture on the sheet."""
    if height < SMALLEST and width < LARGEST:
        times = -(-SMALLEST // height)
        return height * times, width * times
    scale = min(1.0, LARGEST / width)
    return max(1, round(height * scale)), max(1, round(width * scale))


def _write(sheet: Frame, text: str, x: int, y: int) -> None:
    cv2.putText(sheet, text, (x, y), cv2.FONT_HERSHEY_SIMPLEX, 0.4, (0, 0, 0), 1, cv2.LINE_AA)
