"""The reference: attention written out as two matrix products and a softmax."""

from __future__ import annotations

from torch import Tensor

from ca2vdm_cli.model.attention import Backend


class EagerBackend(Backend):
    """Plain matmul and softmax; runs everywhere, and what every other backend must agree with."""

    name = "eager"
    description = "plain matmul and softmax, the reference"
    priority = 0
    writes_scores = True

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # (N, H, Q, K)
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        return scores.softmax(dim=-1) @ v


backend = EagerBackend()
