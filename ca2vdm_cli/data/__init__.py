"""Clips to learn from: what a clip source is, the sources there are, and how their batches are made ahead.

A reader (``readers``) turns a path into ``Video`` entries; ``VideoClips`` (``clips``) draws clips from entries of any
kind (``videos``); ``MovingDigits`` (``digits``) makes clips on the fly; ``LatentClips`` (``latents``) draws from a
cache of encoded videos; ``ClipLoader`` (``loader``) makes batches of any of them in worker processes.
"""

from .clips import Clips, VideoClips
from .digits import TILE, MovingDigits, digit_images
from .latents import CacheReport, LatentClips, cache_latents
from .loader import Batch, ClipLoader
from .readers import Layout, open_clips, read_layout
from .source import ClipSource
from .videos import Look, Video

__all__ = [
    "TILE",
    "Batch",
    "CacheReport",
    "ClipLoader",
    "ClipSource",
    "Clips",
    "LatentClips",
    "Layout",
    "Look",
    "MovingDigits",
    "Video",
    "VideoClips",
    "cache_latents",
    "digit_images",
    "open_clips",
    "read_layout",
]
