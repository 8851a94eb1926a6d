"""Training data: sources of clips, and batches of clips.

A reader (``readers``) lists the videos in a path as ``Video`` objects (``videos``). ``VideoClips`` (``clips``) draws
clips from them, ``LatentClips`` (``latents``) draws clips from a cache of encoded videos, and ``MovingDigits``
(``digits``) synthesizes clips. ``ClipLoader`` (``loader``) makes batches of any ``ClipSource`` (``source``), ahead of
time in worker processes.
"""

from .clips import Clips, VideoClips
from .digits import TILE, MovingDigits, digit_images
from .latents import CacheReport, LatentClips, cache_latents, check_cacheable
from .loader import Batch, ClipLoader
from .readers import Layout, Reader, open_clips, read_layout
from .source import Clip, ClipSource
from .videos import ImageFolder, Look, Video, VideoFile

__all__ = [
    "TILE",
    "Batch",
    "CacheReport",
    "Clip",
    "ClipLoader",
    "ClipSource",
    "Clips",
    "ImageFolder",
    "LatentClips",
    "Layout",
    "Look",
    "MovingDigits",
    "Reader",
    "Video",
    "VideoClips",
    "VideoFile",
    "cache_latents",
    "check_cacheable",
    "digit_images",
    "open_clips",
    "read_layout",
]
