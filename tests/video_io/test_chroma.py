"""Colour stays where it is: 4:2:0 samples are read and written at the places that the file says they have."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.filter import Graph
from av.video.stream import VideoStream
from video_kit import load, save

from ca2vdm_cli.video_io import Frame

CENTRE = (96.0, 64.0)


def disc() -> Frame:
    """A coloured disc around ``CENTRE`` whose brightness is that of the background, so that only colour shows it."""
    y, x = np.mgrid[0:128, 0:192]
    inside = np.clip(40 - np.hypot(x - CENTRE[0], y - CENTRE[1]), 0, 1)[..., None]
    return np.round(128 * (1 - inside) + np.array([210, 105, 70]) * inside).astype(np.uint8)


def centre(frame: Frame) -> tuple[float, float]:
    """The centre of what is coloured."""
    levels = frame.astype(float)
    colour = levels.max(-1) - levels.min(-1)
    colour *= colour > 30
    y, x = np.mgrid[0 : frame.shape[0], 0 : frame.shape[1]]
    return float((colour * x).sum() / colour.sum()), float((colour * y).sum() / colour.sum())


def write_as(path: Path, muxer: str, encoder: str, place: str | None, tag: str | None) -> None:
    """Write the disc as another program would, with colour samples at a place, and say so or not."""
    graph = Graph()
    source = graph.add_buffer(width=192, height=128, format=av.VideoFormat("rgb24"), time_base=Fraction(1, 25))
    scale = graph.add("scale", f"flags=bicubic+accurate_rnd:out_range=limited:out_chroma_loc={place}")
    graph.link_nodes(source, scale, graph.add("format", "yuv420p"), graph.add("buffersink")).configure()
    picture = av.VideoFrame.from_ndarray(disc(), format="rgb24")
    picture.pts, picture.time_base = 0, Fraction(1, 25)
    graph.push(picture)
    with av.open(str(path), "w", format=muxer) as container:
        options = {"chroma_sample_location": tag} if tag else {}
        stream = container.add_stream(encoder, rate=25, options=options)
        assert isinstance(stream, VideoStream)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 192, 128, "yuv420p", 20_000_000
        container.mux(stream.encode(graph.vpull()))
        container.mux(stream.encode(None))


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv", "clip.y4m", "clip.gif", "clip.npz", "clip/"])
def test_colour_stays_in_place_after_six_passes(tmp_path: Path, name: str) -> None:
    frames = [disc()] * 2
    for turn in range(6):
        save(f"{tmp_path}/{turn}-{name}", frames)
        frames = load(tmp_path / f"{turn}-{name}")
    assert centre(disc()) == pytest.approx(CENTRE, abs=0.01)
    assert centre(frames[0]) == pytest.approx(CENTRE, abs=0.1)


@pytest.mark.parametrize(
    ("muxer", "encoder"),
    [("mp4", "libx264"), ("matroska", "libx264"), ("mpegts", "libx264"), ("matroska", "ffv1"), ("webm", "libvpx-vp9")],
)
@pytest.mark.parametrize("place", ["left", "center", "topleft"])
def test_colour_is_read_where_the_file_says(tmp_path: Path, muxer: str, encoder: str, place: str) -> None:
    write_as(tmp_path / "clip", muxer, encoder, place, place)
    assert centre(load(tmp_path / "clip")[0]) == pytest.approx(CENTRE, abs=0.1)


@pytest.mark.parametrize(
    ("muxer", "encoder", "place"),
    [
        ("mp4", "libx264", "left"),
        ("mp4", "mpeg4", "left"),
        ("matroska", "mpeg2video", "left"),
        ("mpeg", "mpeg1video", "center"),
        ("webm", "libvpx-vp9", "center"),
    ],
)
def test_without_a_word_the_codec_s_own_place_holds(tmp_path: Path, muxer: str, encoder: str, place: str) -> None:
    write_as(tmp_path / "clip", muxer, encoder, place, None)
    assert centre(load(tmp_path / "clip")[0]) == pytest.approx(CENTRE, abs=0.1)


def test_y4m_says_where_its_colour_samples_are(tmp_path: Path) -> None:
    save(tmp_path / "clip.y4m", [disc()])
    assert b" C420mpeg2" in (tmp_path / "clip.y4m").read_bytes()[:100]
