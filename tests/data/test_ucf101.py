"""UCF-101: class folders and the official lists."""

from __future__ import annotations

from pathlib import Path

import pytest
from data_kit import LENGTH, numbers, pictures, source, starts, write_video

from ca2vdm_cli.config import DataConfig, Split
from ca2vdm_cli.data import (
    read_layout,
)
from ca2vdm_cli.errors import UsageError


def make_ucf101(root: Path) -> None:
    lists = root / "ucfTrainTestlist"
    lists.mkdir(parents=True)
    names = [f"{c}/v_{c}_g{g:02}_c01.avi" for c in ("ApplyEyeMakeup", "YoYo") for g in (1, 8)]
    for place, name in enumerate(names):
        file = root / "UCF-101" / name
        write_video(file.with_suffix(".mkv"), pictures(8, first=10 * place))
        file.with_suffix(".mkv").rename(file)  # FFmpeg looks at the content
    (lists / "classInd.txt").write_text("1 ApplyEyeMakeup\n2 YoYo\n")
    (lists / "trainlist01.txt").write_text(f"{names[1]} 1\r\n{names[3]} 2\r\n../../etc/v_x_g01_c01.avi 1\r\n")
    (lists / "testlist01.txt").write_text(f"{names[0]}\n{names[2]}\n")
    (lists / "trainlist02.txt").write_text(f"{names[0]} 1\nYoYo/v_YoYo_g99_c01.avi 2\n")


def test_ucf101_with_its_lists(tmp_path: Path) -> None:
    make_ucf101(tmp_path)
    layout = read_layout(tmp_path, DataConfig())
    assert layout.format == "ucf101"
    assert [video.name for video in layout.videos] == [
        "ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi",
        "YoYo/v_YoYo_g08_c01.avi",
    ]
    assert layout.rejects == {"trainlist01.txt line 3": "not a line such as Class/v_Class_g01_c01.avi 1"}
    assert starts(tmp_path) <= {*range(10, 15), *range(30, 35)}
    assert starts(tmp_path, split=Split.TEST) <= {*range(5), *range(20, 25)}
    assert {source(tmp_path).clip(index, LENGTH).caption for index in range(12)} == {"Apply Eye Makeup", "Yo Yo"}
    second = source(tmp_path, split_list=2)
    assert numbers(second.clip(0, LENGTH).frames)[0] < 5
    assert second.skipped.keys() == {"YoYo/v_YoYo_g99_c01.avi"}
    with pytest.raises(UsageError, match=r"trainlist03\.txt: no such list"):
        source(tmp_path, split_list=3)
