"""Embeds captions and prompts with a T5 encoder of the transformers library.

Weights are read from safetensors files only, and no code is loaded with them.

Shape letters: B captions, M text tokens of the model, n real tokens of one caption, E ``model.text_channels``.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .checkpoint import check_finite_weights
from .config import ModelConfig, TextConfig
from .errors import UserError

CACHE_BYTES = 2**28
"""Size of the cache of embeddings, so that a repeated caption is not encoded again."""


class TextEncoder:
    """A frozen T5 encoder with its tokenizer.

    Each caption is encoded alone and without padding, so its embedding depends neither on the rest of the batch nor on
    the number of processes, and only real tokens cost time.

    Args:
        config: names the encoder.
        model: sets the largest number of tokens of a caption and the width of their embeddings.
        device: device of the encoder.
        dtype: dtype of the encoder's weights, float32 or bfloat16 (T5 overflows in float16).

    Raises:
        UserError: the encoder can't be loaded, or does not fit the model.
    """

    def __init__(
        self, config: TextConfig, model: ModelConfig, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> None:
        try:
            from transformers import AutoTokenizer, T5EncoderModel
        except ImportError as error:
            raise UserError(
                "text: transformers is not installed, and captions need it: pip install 'ca2vdm[latent]'"
            ) from error
        try:
            with _silence():
                self.tokenizer: Any = AutoTokenizer.from_pretrained(
                    config.path, subfolder=config.tokenizer_folder, trust_remote_code=False
                )
                self.model, info = T5EncoderModel.from_pretrained(
                    config.path,
                    subfolder=config.encoder_folder,
                    dtype=dtype,
                    use_safetensors=True,
                    output_loading_info=True,
                )
        except MemoryError:
            raise
        except Exception as error:  # a damaged folder can make the library raise anything
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise UserError(f"text.path: no T5 encoder can be loaded from {config.path}: {reason}") from None
        if info["missing_keys"]:
            first = min(info["missing_keys"])
            raise UserError(f"text.path: {config.path} is not a T5 encoder: it has no weights for {first}")
        for key, value in self.model.state_dict().items():
            check_finite_weights(key, value, f"text.path: {config.path}")
        theirs = self.model.config
        if theirs.d_model != model.text_channels:
            raise UserError(
                f"model.text_channels: {model.text_channels} does not fit the text encoder {config.path}, which has "
                f"{theirs.d_model}"
            )
        if len(self.tokenizer) > theirs.vocab_size:
            raise UserError(
                f"text.path: the tokenizer of {config.path} has {len(self.tokenizer)} tokens, its encoder "
                f"{theirs.vocab_size}; they don't belong together"
            )
        self.model.to(device).eval().requires_grad_(False)
        self.device, self.tokens = device, model.text_tokens
        self._cache: OrderedDict[str, Tensor] = OrderedDict()  # least recently used first
        self._cache_bytes = 0

    def __call__(
        self, captions: Sequence[str | None], stored: tuple[Tensor, Tensor], dropped: Sequence[bool] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Embeddings (B, M, E) of captions, and their mask (B, M), True at real tokens.

        Args:
            captions: None and blank captions are replaced by the stored one.
            stored: the model's unconditional caption and its mask, one row per caption (``unconditional_caption``).
            dropped: which captions to replace by the stored one. The mask remains that of the dropped caption, as under
                guidance.
        """
        embeddings, mask = (part.clone() for part in stored)
        for row, caption in enumerate(captions):
            ids = [] if caption is None or not caption.strip() else self._tokenize(caption)
            if caption is None or not ids:
                continue
            mask[row] = torch.arange(self.tokens, device=mask.device) < len(ids)
            if dropped is None or not dropped[row]:
                embeddings[row] = 0
                embeddings[row, : len(ids)] = self._embed(caption, ids).to(embeddings)
        return embeddings, mask

    def _tokenize(self, caption: str) -> list[int]:
        """Token ids, at most M."""
        ids: list[int] = self.tokenizer(caption, truncation=True, max_length=self.tokens)["input_ids"]
        return ids

    @torch.no_grad()
    def _embed(self, caption: str, ids: list[int]) -> Tensor:
        """Embedding of one caption, (n, E)."""
        embedding = self._cache.pop(caption, None)
        if embedding is None:
            embedding = self.model(input_ids=torch.tensor([ids], device=self.device)).last_hidden_state[0]
            self._cache_bytes += embedding.nbytes
        self._cache[caption] = embedding
        while self._cache_bytes > CACHE_BYTES:
            self._cache_bytes -= self._cache.popitem(last=False)[1].nbytes
        return embedding


@contextmanager
def _silence() -> Iterator[None]:
    """Suppress progress bars and reports of the T5 decoder's unused weights."""
    from transformers.utils import logging

    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()
