"""The video codec: pixels survive the conversion, and frames pass through the autoencoder in order, a few at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ca2vdm_cli import video_codec
from ca2vdm_cli.autoencoder import Autoencoder
from ca2vdm_cli.video_codec import decode_video, encode_video, to_floats, to_uint8


class Identity(Autoencoder):
    """Latents are the frames; remembers how many frames it is given."""

    name, description = "identity", ""

    def __init__(self) -> None:
        torch.nn.Module.__init__(self)
        self.sizes: list[int] = []

    def encode(self, frames: Tensor) -> Tensor:
        self.sizes.append(len(frames))
        return frames

    def decode(self, latents: Tensor) -> Tensor:
        return self.encode(latents)


def test_every_pixel_value_survives() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).view(2, 4, 8, 4, 1)
    floats = to_floats(pixels)
    assert floats.shape == (2, 4, 1, 8, 4) and floats.dtype == torch.float32
    assert (float(floats.min()), float(floats.max())) == (-1, 1)
    assert torch.equal(to_uint8(floats), pixels)
    assert to_uint8(torch.tensor([-1.5, 1.5]).view(2, 1, 1)).flatten().tolist() == [0, 255], "clamped"


def test_videos_are_encoded_and_decoded_a_few_frames_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video_codec, "FRAMES_AT_ONCE", 4)
    pixels = torch.randint(256, (2, 5, 8, 6, 3), dtype=torch.uint8)
    autoencoder = Identity()
    latents = encode_video(autoencoder, to_floats(pixels))
    assert latents.shape == (2, 3, 5, 8, 6)
    assert torch.equal(decode_video(autoencoder, latents), pixels)
    assert autoencoder.sizes == 2 * [4, 4, 2]
