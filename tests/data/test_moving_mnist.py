"""Moving MNIST, and arrays that hold something else."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from data_kit import source, starts

from ca2vdm_cli.config import DataConfig
from ca2vdm_cli.data import (
    read_layout,
)
from ca2vdm_cli.errors import UserError


@pytest.mark.parametrize("inside", [False, True])
def test_moving_mnist(tmp_path: Path, inside: bool) -> None:
    frames = np.zeros((20, 3, 64, 64), np.uint8)
    frames += (4 * np.arange(20, dtype=np.uint8))[:, None, None, None]
    frames[:, 1] += 80
    frames[:, 2] += 160
    np.save(tmp_path / "mnist_test_seq.npy", frames)
    path = tmp_path if inside else tmp_path / "mnist_test_seq.npy"
    layout = read_layout(path, DataConfig())
    assert layout.format == "moving-mnist"
    assert [video.name for video in layout.videos] == [f"mnist_test_seq.npy[{n}]" for n in range(3)]
    firsts = starts(path, count=30)
    assert firsts <= {*range(17), *range(20, 37), *range(40, 57)} and len(firsts) > 8


def test_arrays_of_another_kind_are_rejected(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "archive", a=np.zeros(3))
    np.save(tmp_path / "float.npy", np.zeros((20, 2, 8, 8), np.float32))
    good = io.BytesIO()
    np.save(good, np.zeros((20, 2, 8, 8), np.uint8))
    contents = {
        "pickle.npy": buffer.getvalue(),
        "zip.npy": (tmp_path / "archive.npz").read_bytes(),
        "float.npy": (tmp_path / "float.npy").read_bytes(),
        "cut.npy": good.getvalue()[:-1],
        "empty.npy": b"",
        "text.npy": b"hello",
        "header.npy": b"\x93NUMPY\x01\x00\x10\x00{'descr': 1+1   \n",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=r"no usable video \(.*cannot be read") as caught:
            source(tmp_path / name)
        assert "\n" not in str(caught.value)
