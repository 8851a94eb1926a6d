"""``train --check-data``: what it counts and what it rejects."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from data_kit import pictures, write_video

from ca2vdm_cli.commands.check_data import run as check_data
from ca2vdm_cli.errors import UsageError, UserError
from ca2vdm_cli.presets import load_preset


def test_check_data_counts_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_video(tmp_path / "a.mp4", pictures(24))
    write_video(tmp_path / "b.mp4", pictures(16, 32, 48))
    write_video(tmp_path / "short.mp4", pictures(3))
    (tmp_path / "bro[ken].mp4").write_bytes(b"nothing")
    window = load_preset("tiny").config.model.window_frames
    check_data("tiny", None, tmp_path, None, [], as_json=True, quiet=False)
    report = json.loads(capsys.readouterr().out)
    assert report["format"] == "videos"
    assert (report["videos"], report["usable_videos"], report["frames"]) == (4, 2, 40)
    assert report["hours"] == pytest.approx(5 / 3600)
    assert report["clips"] == 24 // window + 16 // window
    assert report["start_positions"] == 40 - 2 * (window - 1)
    assert report["resolutions"] == {"16x16": 1, "48x32": 1} and report["frame_rates"] == {"8": 2}
    assert report["rejects"]["short.mp4"] == f"3 frames, a clip has {window}"
    assert report["rejects"].keys() == {"short.mp4", "bro[ken].mp4"}
    check_data("tiny", None, tmp_path, "crop", [], as_json=False, quiet=False)
    text = capsys.readouterr()
    assert "bro[ken].mp4" in text.err and "48x32 (1)" in text.err and not text.out


def test_check_data_counts_a_video_with_many_captions_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_video(tmp_path / "a.mp4", pictures(24))
    lines = [json.dumps({"path": "a.mp4", "text": text}) for text in ("one", "two", "three")]
    (tmp_path / "list.jsonl").write_text("\n".join(lines))
    check_data("tiny", None, tmp_path / "list.jsonl", None, [], as_json=True, quiet=False)
    report = json.loads(capsys.readouterr().out)
    assert (report["usable_videos"], report["captions"], report["frames"]) == (3, 3, 24)
    assert report["hours"] == pytest.approx(3 / 3600)


def test_check_data_without_a_usable_video(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"no usable video \(a\.mp4: cannot be read"):
        check_data("tiny", None, tmp_path, None, [], as_json=True, quiet=False)
    with pytest.raises(UsageError, match="name a data set with --data"):
        check_data("tiny", None, None, None, [], as_json=True, quiet=False)
    with pytest.raises(UsageError, match="moving-digits is synthesized on the fly"):
        check_data("tiny", None, tmp_path, None, ["data.format=moving-digits"], as_json=True, quiet=False)
    with pytest.raises(UsageError, match="works on latents only"):
        check_data("bench-small", None, tmp_path, None, [], as_json=True, quiet=False)
