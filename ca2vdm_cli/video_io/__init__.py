"""Everything about video files: single frames and their conversion (``frames``), reading, writing."""

from ca2vdm_cli.options import Aspect

from .arrays import Video, read_video, write_video
from .frames import (
    IMAGE_SUFFIXES,
    Frame,
    Geometry,
    Size,
    contact_sheet,
    natural_order,
    read_errors,
    to_channels,
    write_image,
)
from .reading import VideoReader, open_reader, open_stream, to_rgb
from .writing import OutputFormat, VideoWriter, open_writer

__all__ = [
    "IMAGE_SUFFIXES",
    "Aspect",
    "Frame",
    "Geometry",
    "OutputFormat",
    "Size",
    "Video",
    "VideoReader",
    "VideoWriter",
    "contact_sheet",
    "natural_order",
    "open_reader",
    "open_stream",
    "open_writer",
    "read_errors",
    "read_video",
    "to_channels",
    "to_rgb",
    "write_image",
    "write_video",
]
