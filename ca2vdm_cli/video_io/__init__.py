"""Everything about video files: single frames and their way to the model (``frames``), reading, writing."""

from ca2vdm_cli.options import Aspect

from .frames import (
    EXACT_COLOURS,
    IMAGE_SUFFIXES,
    MAX_PIXELS,
    Frame,
    Geometry,
    Size,
    contact_sheet,
    natural_order,
    to_channels,
    write_image,
)
from .reading import VideoReader, open_reader
from .writing import OutputFormat, VideoWriter, open_writer

__all__ = [
    "EXACT_COLOURS",
    "IMAGE_SUFFIXES",
    "MAX_PIXELS",
    "Aspect",
    "Frame",
    "Geometry",
    "OutputFormat",
    "Size",
    "VideoReader",
    "VideoWriter",
    "contact_sheet",
    "natural_order",
    "open_reader",
    "open_writer",
    "to_channels",
    "write_image",
]
