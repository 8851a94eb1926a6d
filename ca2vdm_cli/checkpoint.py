"""Weights on disk: safetensors files, written with a checksum and checked when they are read. Nothing is unpickled."""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .atomic import replacing
from .errors import UsageError, UserError, first_line

CHECKSUM = "ca2vdm_crc32"
"""Metadata key of the CRC-32 of all tensors and of the other metadata. Files without one are accepted as they are."""
MAX_HEADER = 2**24
"""Size limit of a header in bytes; a model with ten thousand tensors has one of 1 MB."""
UNREAD = ("bov_token", "pos_embed_temporal", "rope.freqs", "rope.inv_freq")
"""Entries of published checkpoints that a model may carry without reading them. They are ignored, and reported."""

CHOOSE_PRESET = "choose the preset these weights were trained with"
_MAGIC = (
    (b"version https://git-lfs", "a git-lfs pointer, not the file itself; fetch it with git lfs pull"),
    (b"PK\x03\x04", "a zip archive, such as PyTorch writes; convert it with ca2vdm import"),
    (b"\x80", "a pickle, such as PyTorch writes; convert it with ca2vdm import"),
    (b"GGUF", "a GGUF file; get the weights as safetensors"),
    (b"\x89HDF", "an HDF5 file; get the weights as safetensors"),
    (b"\x1f\x8b", "compressed with gzip; unpack it"),
    (b"\xfd7zXZ", "compressed with xz; unpack it"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd; unpack it"),
)
"""How files begin that are mistaken for safetensors, and what they are."""


@dataclass(frozen=True)
class KeyReport:
    """How the keys of a state dict match a model."""

    matched: tuple[str, ...]
    missing: tuple[str, ...]
    left_over: tuple[str, ...]
    unread: tuple[str, ...] = ()
    """Entries of published checkpoints that this model does not read (``UNREAD``)."""


# Reading and writing files


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a safetensors file, and its metadata without the checksum.

    Raises:
        UserError: there is no such file, it is not a safetensors file, or it differs from what ``save_tensors`` wrote.
    """
    with _open_safetensors(path) as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        metadata = dict(file.metadata() or {})
    recorded = metadata.pop(CHECKSUM, None)
    if recorded is not None and recorded != _checksum(tensors, metadata):
        raise UserError(
            f"{path}: damaged: its content does not have the checksum that it was written with; "
            "copy it again from an intact one, or use another"
        )
    return tensors, metadata


@contextmanager
def _open_safetensors(path: Path) -> Iterator[Any]:
    if not path.is_file():
        raise UsageError(f"{path}: no such file")
    if not os.access(path, os.R_OK):
        raise UserError(f"{path}: no permission to read it; check its permissions")
    try:
        problem = _problem(path)
        if problem is None:
            with safe_open(path, framework="pt") as file:
                yield file
            return
    except (SafetensorError, OSError, ValueError) as error:
        problem = _truncation(path) or f"its header is damaged ({first_line(error)}); copy or download it again"
    raise UserError(f"{path}: not a readable safetensors file: {problem}")


def what_it_is(path: Path) -> str | None:
    """What a file is that is not safetensors, and what to do, as the end of a sentence; None if that is unknown."""
    with path.open("rb") as file:
        start = file.read(512)
    if not start:
        return "empty; copy or download it again"
    for magic, meaning in _MAGIC:
        if start.startswith(magic) and start[8:9] != b"{":  # a header's length may begin with any byte
            return meaning
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "a web page, not the file itself; download it again, from the page's download link"
    if start[8:9] != b"{" and all(32 <= byte < 127 or byte in b"\t\r\n" for byte in start):
        return f"text ({start[:40].decode().splitlines()[0]!r}), not weights; download it again"
    return None


def _problem(path: Path) -> str | None:
    """Why safetensors could not read a file, or None; it would read a header of any size into memory."""
    size = path.stat().st_size
    if (meaning := what_it_is(path)) is not None:
        return f"it is {meaning}"
    with path.open("rb") as file:
        start = file.read(9)
    header = struct.unpack("<Q", start[:8])[0] if len(start) == 9 else 0
    if len(start) < 9 or header > size - 8 or start[8:] != b"{":
        return "it does not begin with a whole header, so it is damaged or cut off; copy or download it again"
    return None if header <= MAX_HEADER else f"its header has {header} bytes, and at most {MAX_HEADER} are read"


def _truncation(path: Path) -> str | None:
    """That a file is shorter than its header says; None if it is not, or if the header can't be read."""
    with suppress(OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError), path.open("rb") as file:
        length = struct.unpack("<Q", file.read(8))[0]
        entries = json.loads(file.read(length))
        needed = 8 + length + max(e["data_offsets"][1] for name, e in entries.items() if name != "__metadata__")
        size = path.stat().st_size
        if size < needed:
            return f"it is cut off after {size} of {needed} bytes; copy or download it again"
    return None


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file with a checksum, so that a crash leaves either the old file or the new one.

    Raises:
        UserError: the file can't be written.
    """
    tensors = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    metadata = {key: value for key, value in (metadata or {}).items() if key != CHECKSUM}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            save_file(tensors, temporary, {**metadata, CHECKSUM: _checksum(tensors, metadata)})
            temporary.chmod(0o666 & ~_umask())  # safetensors creates files that only their owner can read
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be written ({first_line(error)}); check permissions and free space") from None


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """CRC-32 of everything in a file: metadata, names, dtypes, shapes and bytes.

    It finds any damage within 32 bits, and other damage but for one case in 4·10⁹, at 2 GB/s on one core.
    """
    facts = [(key, str(tensors[key].dtype), tuple(tensors[key].shape)) for key in sorted(tensors)]
    crc = zlib.crc32(json.dumps([sorted(metadata.items()), facts]).encode())
    for key, *_ in facts:
        crc = zlib.crc32(tensors[key].flatten().view(torch.uint8).numpy().data, crc)
    return f"{crc:08x}"


# Weights into a model


def load_weights(
    model: nn.Module, weights: Mapping[str, Tensor], source: str, *, partial: bool = False, extra: bool = False
) -> KeyReport:
    """Load a state dict into a model.

    Args:
        model: any module.
        weights: tensors by the model's key names.
        source: where the weights come from, for errors.
        partial: allow missing keys; the model keeps its values there.
        extra: allow keys that the model does not have.

    Raises:
        UserError: as ``match_weights``.
    """
    report = match_weights(model.state_dict(), weights, source, partial=partial, extra=extra)
    model.load_state_dict({key: weights[key] for key in report.matched}, strict=False)
    return report


def match_weights(
    own: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    source: str,
    *,
    partial: bool = False,
    extra: bool = False,
    advice: str = CHOOSE_PRESET,
) -> KeyReport:
    """Compare a state dict with a model's; the model's tensors may be on the meta device.

    Args:
        own: the model's state dict.
        weights, source, partial, extra: as for ``load_weights``.
        advice: what to do if the model has other layers or sizes.

    Raises:
        UserError: a shape differs (both are named), a key is missing (unless ``partial``) or left over (unless
            ``extra``), no key matches, or a tensor has whole numbers, NaN or infinity in place of weights.
    """
    matched = [key for key in own if key in weights]
    missing = [key for key in own if key not in weights]
    others = [key for key in weights if key not in own]
    unread = [key for key in others if key in UNREAD]
    left_over = [key for key in others if key not in UNREAD]
    for key in matched:
        if own[key].shape != weights[key].shape:
            raise UserError(
                f"{source}: {key} has shape {tuple(weights[key].shape)}, the model needs {tuple(own[key].shape)}; "
                f"{advice}"
            )
    if not matched:
        raise UserError(
            f"{source}: all {len(own)} tensors of the model are missing, the first is {next(iter(own), '')}; these are "
            f"weights of another architecture (the first tensor is {next(iter(weights), 'absent')})"
        )
    if missing and not partial:
        advice = "the checkpoint is incomplete; get a whole one" if _incomplete(missing, matched) else advice
        raise UserError(
            f"{source}: {len(missing)} of {len(own)} tensors are missing, the first is {missing[0]}; {advice}"
        )
    if left_over and not extra:
        parts = {key.partition(".")[0] for key in own} | {"y_embedder"}
        ours = [key for key in left_over if key.partition(".")[0] in parts]
        advice = advice if ours else "leave them out of the file (ca2vdm import does)"
        raise UserError(
            f"{source}: {len(left_over)} tensors are not in the model, the first is {(ours or left_over)[0]}; {advice}"
        )
    for key in matched:
        _check_values(key, weights[key], own[key], source)
    return KeyReport(tuple(matched), tuple(missing), tuple(left_over), tuple(unread))


def _incomplete(missing: Sequence[str], matched: Sequence[str]) -> bool:
    """Whether a layer is there in part, which no preset's model would be."""
    layers = {key.rpartition(".")[0] for key in matched}
    return any(key.rpartition(".")[0] in layers for key in missing if "." in key)


def _check_values(key: str, value: Tensor, own: Tensor, source: str) -> None:
    """Raise ``UserError`` if a tensor, of the right shape, does not hold weights."""
    if value.layout is not torch.strided or value.is_meta or value.is_quantized:
        raise UserError(f"{source}: {key} is not an ordinary tensor; save the weights as dense tensors")
    if value.is_floating_point() != own.is_floating_point():
        name = str(value.dtype).removeprefix("torch.")
        raise UserError(f"{source}: {key} has dtype {name}, which is not a weight's; save the weights as float32")
    check_finite_weights(key, value, source)


def check_finite_weights(key: str, value: Tensor, source: str) -> None:
    """Raise ``UserError`` if a tensor contains NaN or infinity. Costs a tenth of a second per gigabyte."""
    if not value.is_floating_point() or not value.numel():
        return
    value = value.detach().float() if value.dtype.itemsize == 1 else value.detach()
    if not all(limit.isfinite() for limit in value.aminmax()):
        wrong = int((~value.isfinite()).sum())
        raise UserError(
            f"{source}: {key} has {wrong} values of {value.numel()} that are NaN or infinite; use other weights"
        )
