"""What the attention kernels compute, held against float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ca2vdm_backends import sdpa

MASKS = {
    "none": None,
    "full": torch.ones(5, 7, dtype=torch.bool),
    "causal": torch.ones(5, 7, dtype=torch.bool).tril(2),
    "by sequence": (torch.arange(7) < torch.tensor([1, 4, 7])[:, None])[:, None, None],
}


def exact(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    scores = q.double() @ k.double().transpose(-2, -1) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return scores.softmax(-1) @ v.double()


@pytest.mark.parametrize("block", [1, 40, 150, 10**6])  # a query, some, a sequence and more, everything
@pytest.mark.parametrize("mask", MASKS)
def test_blocks_are_the_whole(mask: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16 on a processor that multiplies it: sequences and queries are taken a few at a time."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False, raising=False)
    monkeypatch.setattr(sdpa, "BLOCK", block)
    monkeypatch.setattr(sdpa.F, "scaled_dot_product_attention", None)  # not called
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, frames, 2, 8, generator=generator).bfloat16().transpose(1, 2) for frames in (5, 7, 7))
    out = sdpa.SdpaBackend().attend(q, k, v, MASKS[mask])
    assert out.dtype is torch.bfloat16 and out.stride() == q.stride(), "heads come side by side without a copy"
    assert (out.double() - exact(q, k, v, MASKS[mask])).abs().max() < 0.02
