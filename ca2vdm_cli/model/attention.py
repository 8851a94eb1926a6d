"""The interface of a backend: an attention kernel and, optionally, a way to compile the blocks that use it.

Shape letters: N any leading dimensions, H heads, Q queries, K keys, E head size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Backend:
    """One way to run the model. Subclass it and register an instance (hook ``ca2vdm_register_backends``).

    A backend decides how attention is computed, never what: all backends agree with ``eager`` within rounding.
    """

    name: str
    """The name that selects it, such as ``--backend eager``."""
    description: str
    """One line for ``ca2vdm backends``."""
    priority: int = 0
    """``auto`` selects the available backend of highest priority."""
    writes_scores: bool = False
    """Whether ``attend`` writes out all scores (N, H, Q, K), for the estimate of memory."""

    def unavailable(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why this backend can't run on that device in that dtype, or None if it can."""
        return None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """Scaled dot-product attention.

        Args:
            q: queries (N, H, Q, E).
            k: keys (N, H, K, E).
            v: values (N, H, K, E).
            mask: bool, broadcastable to (N, H, Q, K), True for keys that a query sees; each query sees at least one.

        Returns:
            (N, H, Q, E), softmax(q kᵀ / √E) v over the keys that the mask admits.
        """
        raise NotImplementedError

    def prepare(self, block: nn.Module) -> None:
        """Prepare one transformer block to run, in place (``compile`` compiles it). Does nothing by default."""
