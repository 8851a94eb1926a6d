"""Everything about video files: single frames and their conversion (``frames``), reading, writing."""

from ca2vdm_cli.options import Aspect

from .arrays import Video, read_video, write_video
from .ffmpeg import Converter, decoder, frame_count, frame_rate, indexed_times, look_ahead, open_stream
from .formats import OutputFormat
from .frames import (
    MAX_PIXELS,
    READABLE_IMAGE_SUFFIXES,
    Frame,
    Geometry,
    Size,
    contact_sheet,
    natural_order,
    read_errors,
    to_channels,
    write_image,
)
from .reading import VideoReader, is_image, open_reader, read_image
from .writing import VideoWriter, open_writer

__all__ = [
    "MAX_PIXELS",
    "READABLE_IMAGE_SUFFIXES",
    "Aspect",
    "Converter",
    "Frame",
    "Geometry",
    "OutputFormat",
    "Size",
    "Video",
    "VideoReader",
    "VideoWriter",
    "contact_sheet",
    "decoder",
    "frame_count",
    "frame_rate",
    "indexed_times",
    "is_image",
    "look_ahead",
    "natural_order",
    "open_reader",
    "open_stream",
    "open_writer",
    "read_errors",
    "read_image",
    "read_video",
    "to_channels",
    "write_image",
    "write_video",
]
