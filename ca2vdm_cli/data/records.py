"""TFRecord files and the ``tf.Example`` messages in them, read without TensorFlow.

A record is its length, the length's checksum, its bytes, and their checksum. A message is a protocol buffer.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

RECORD_BYTES = 2**28
"""Largest record. One that claims to be larger is damaged."""


def find_records(path: Path, smallest: int = 0) -> tuple[list[tuple[int, int]], str]:
    """Offset and length of each complete record of a TFRecord file, and why reading stopped ("" at the file's end).

    Only the checksums of the lengths are verified. Records of less than ``smallest`` bytes are left out and counted.
    Raises OSError if the file cannot be read.
    """
    records: list[tuple[int, int]] = []
    problem, place, small = "", 0, 0
    with path.open("rb") as file:
        size = file.seek(0, 2)
        while place < size and not problem:
            file.seek(place)
            head = file.read(12)
            if len(head) < 12:
                problem = "it is truncated"
                break
            length, check = struct.unpack("<QI", head)
            if _masked_crc(head[:8]) != check:
                problem = "the checksum of a length is wrong"
            elif length > min(RECORD_BYTES, size - place - 16):
                problem = "it is truncated"
            elif length < smallest:
                small += 1
            else:
                records.append((place + 12, length))
            place += 16 + length
    problems = [f"{problem} after {len(records)} complete records"] if problem else []
    if small:
        problems.append(f"{small} records are too small to hold a frame")
    return records, "; ".join(problems)


def _crc_table() -> list[int]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)  # Castagnoli's polynomial, bits reversed
        table.append(value)
    return table


_CRC_TABLE = _crc_table()


def _masked_crc(data: bytes) -> int:
    """CRC-32C as TFRecord files store it: rotated, and a constant added."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _CRC_TABLE[(crc ^ byte) & 0xFF]
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def parse_example(record: bytes) -> dict[str, memoryview]:
    """The bytes features of a serialized ``tf.Example``, by name: the first value of each. Other kinds are left out.

    Raises:
        ValueError: it is not a valid message.
    """
    features: dict[str, memoryview] = {}
    for number, example in _fields(memoryview(record)):
        if number != 1 or isinstance(example, int):
            continue
        for _, entry in _fields(example):
            key, value = "", None
            for field, content in _fields(_message(entry)):
                if field == 1:
                    key = str(_message(content), "utf-8")
                elif field == 2:
                    value = next((v for inner, v in _fields(_message(content)) if inner == 1), None)
            if value is not None:
                first = next((v for field, v in _fields(_message(value)) if field == 1), None)
                if first is not None:
                    features[key] = _message(first)
    return features


def _message(value: memoryview | int) -> memoryview:
    if isinstance(value, int):
        raise ValueError("an integer in place of bytes in a tf.Example")
    return value


def _fields(data: memoryview) -> Iterator[tuple[int, memoryview | int]]:
    """The fields of a protocol buffer message: field number, and bytes or an integer (0 for fixed-size fields)."""
    place = 0

    def varint() -> int:
        nonlocal place
        value = 0
        for shift in range(0, 70, 7):
            if place >= len(data):
                raise ValueError("a message is truncated")
            byte = data[place]
            place += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
        raise ValueError("an integer of more than ten bytes in a message")

    while place < len(data):
        tag = varint()
        wire_type = tag & 7
        if wire_type == 0:
            yield tag >> 3, varint()
            continue
        length = {1: 8, 5: 4}.get(wire_type) if wire_type != 2 else varint()
        if length is None:
            raise ValueError(f"a field of the unknown wire type {wire_type} in a message")
        if length > len(data) - place:
            raise ValueError("a message is truncated")
        yield tag >> 3, data[place : place + length] if wire_type == 2 else 0
        place += length
