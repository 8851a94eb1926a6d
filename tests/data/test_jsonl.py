"""Lists in JSON Lines, and what cannot be used in them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from data_kit import LENGTH, numbers, pictures, source, write_video

from ca2vdm_cli.errors import UserError


def test_jsonl(tmp_path: Path) -> None:
    write_video(tmp_path / "videos/video0.mp4", pictures(8))
    write_video(tmp_path / "frames/video1", pictures(8, first=20))
    outside = write_video(tmp_path.parent / f"{tmp_path.name}-outside.mp4", pictures(8))
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe.mp4")
    lines = [
        {"path": "videos/video0.mp4", "text": "it brightens", "id": 7},
        {"path": "frames/video1"},
        {"path": f"../{outside.name}"},
        {"path": str(outside)},
        {"path": 3},
        {"path": "videos/absent.mp4", "text": "gone"},
        {"path": "empty"},
        {"path": "videos/video0.mp4", "text": ["a", "b"]},
        {"path": "videos/\0.mp4"},
        [1],
        {"path": "pipe.mp4"},
        {"path": "\ud800.mp4"},
        {"path": "videos/video0.mp4", "text": "half of a \ud83d"},
    ]
    text = "\n".join(map(json.dumps, lines)) + "\n{not json\n\n" + "[" * 100_000
    (tmp_path / "train.jsonl").write_text("\ufeff" + text)
    clips_ = source(tmp_path / "train.jsonl")
    clips_of_20 = [clips_.clip(index, LENGTH) for index in range(20)]
    assert {(numbers(clip.frames)[0] // 20, clip.caption) for clip in clips_of_20} == {(0, "it brightens"), (1, None)}
    reasons = clips_.skipped
    assert reasons["line 3"] == reasons["line 4"] == "path must be relative and stay in the list's folder"
    assert "No such file" in reasons["line 6: videos/absent.mp4"]
    assert reasons["line 7"] == "empty is a folder without images"
    assert {"line 5", "line 8", "line 9", "line 10", "line 11: pipe.mp4", "line 14", "line 16"} <= reasons.keys()
    assert reasons["line 12"] == reasons["line 13"] == "has half a character (a lone surrogate)"
    assert len(reasons) == 13


@pytest.mark.parametrize(("content", "message"), [(b"\xff\xfe\n", "not UTF-8"), (b"x" * 2**21, "longer than")])
def test_a_file_that_is_not_a_list(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=f"line 1 is {message}"):
        source(tmp_path / "a.jsonl")
