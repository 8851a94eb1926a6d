"""BAIR robot pushing: TFRecords and images, whole and damaged."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from data_kit import LENGTH, numbers, pictures, source, starts

from ca2vdm_cli.config import DataConfig, Split
from ca2vdm_cli.data import (
    read_layout,
    records,
)
from ca2vdm_cli.video_io import write_image


def varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def field(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


def example(frames: Sequence[np.ndarray], view: str = "image_aux1") -> bytes:
    """A ``tf.Example`` as in the real data set, with an action after each frame."""
    features = b""
    for t, frame in enumerate(frames):
        image = field(1, field(1, frame.tobytes()))  # Feature.bytes_list.value
        action = field(2, field(1, struct.pack("<4f", 1, 2, 3, 4)))  # Feature.float_list.value, packed
        for key, feature in ((f"{t}/{view}/encoded", image), (f"{t}/action", action)):
            features += field(1, field(1, key.encode()) + field(2, feature))
    return field(1, features)


def record(data: bytes) -> bytes:
    length = struct.pack("<Q", len(data))
    return length + struct.pack("<I", records._masked_crc(length)) + data + struct.pack("<I", records._masked_crc(b""))


def test_checksum_of_tfrecords() -> None:
    crc = (records._masked_crc(b"123456789") - 0xA282EAD8) & 0xFFFFFFFF
    assert (crc << 15 | crc >> 17) & 0xFFFFFFFF == 0xE3069283  # the published check value of CRC-32C


def test_bair_records(tmp_path: Path) -> None:
    train = tmp_path / "softmotion30_44k" / "train"
    test = train.with_name("test")
    for folder in (train, test):
        folder.mkdir(parents=True)
    videos = [example(pictures(8, 64, 64, first=first)) for first in (0, 20)]
    (train / "traj_0_to_255.tfrecords").write_bytes(b"".join(map(record, videos)))
    (test / "traj_0_to_255.tfrecords").write_bytes(record(example(pictures(8, 64, 64, first=40), "image_main")))
    layout = read_layout(tmp_path, DataConfig())
    assert layout.format == "bair" and not layout.rejects
    assert [video.name for video in layout.videos] == [
        f"softmotion30_44k/train/traj_0_to_255.tfrecords[{n}]" for n in (0, 1)
    ]
    assert starts(tmp_path) <= {*range(5), *range(20, 25)}
    assert starts(tmp_path, split=Split.TEST) <= set(range(40, 45))


def test_bair_as_images(tmp_path: Path) -> None:
    for part, number, first in (("train", 0, 0), ("train", 1, 20), ("test", 0, 40)):
        folder = tmp_path / "processed_data" / part / "traj_0_to_255" / str(number)
        folder.mkdir(parents=True)
        for t, picture in enumerate(pictures(11, 64, 64, first=first)):
            write_image(folder / f"{t}.png", picture)
    assert starts(tmp_path) <= {*range(8), *range(20, 28)}
    assert starts(tmp_path, split=Split.TEST) <= set(range(40, 48))


def test_damaged_records(tmp_path: Path) -> None:
    good = record(example(pictures(8, 64, 64)))
    (tmp_path / "cut.tfrecords").write_bytes(good + good[:-9])
    (tmp_path / "wrong.tfrecords").write_bytes(good + b"\xff" * 30)
    (tmp_path / "huge.tfrecords").write_bytes(struct.pack("<QI", 2**62, records._masked_crc(struct.pack("<Q", 2**62))))
    (tmp_path / "stub.tfrecords").write_bytes(b"12345")
    other = field(1, field(1, field(1, b"0/image_aux1/encoded") + field(2, field(1, field(1, b"jpeg")))))
    messages = [b"", other, b"\x0a\xff\x01ab", b"\x0a\xff" + b"\xff" * 20, field(1, field(1, varint(1 << 3) + b"\x05"))]
    large = field(9, bytes(64 * 64 * 3))
    (tmp_path / "messages.tfrecords").write_bytes(b"".join(record(large + message) for message in messages))
    (tmp_path / "small.tfrecords").write_bytes(good + record(other) * 1000)
    clips_ = source(tmp_path)
    reasons = clips_.skipped
    assert reasons["cut.tfrecords"] == "it is truncated after 1 complete records"
    assert reasons["wrong.tfrecords"] == "the checksum of a length is wrong after 1 complete records"
    assert reasons["huge.tfrecords"] == reasons["stub.tfrecords"] == "it is truncated after 0 complete records"
    assert {numbers(clips_.clip(index, LENGTH).frames)[0] for index in range(40)} == set(range(5))
    assert len([name for name in reasons if name.startswith("messages")]) == len(messages)
    assert reasons["small.tfrecords"] == "1000 records are too small to hold a frame"
    assert "has 4 bytes, not a raw 64x64 frame" in reasons["messages.tfrecords[1]"]
