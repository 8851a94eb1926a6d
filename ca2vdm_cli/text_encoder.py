"""Captions and prompts as embeddings, by a T5 encoder of the transformers library.

Weights are read from safetensors only, and no code comes with them.

Shape letters: B captions, M text tokens of the model, n real tokens of one caption, E ``model.text_channels``.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from .config import ModelConfig, TextConfig
from .errors import UserError

KEPT_BYTES = 2**28
"""Embeddings that are kept, so that a caption that comes again need not be encoded again."""


class TextEncoder:
    """A frozen T5 encoder with its tokenizer.

    A caption is encoded on its own and without padding, so its embedding depends neither on the captions beside it nor
    on how many processes there are, and only real tokens cost time.

    Args:
        config: which encoder.
        model: how many tokens a caption has at most, and how wide their embeddings have to be.
        device: where it runs.
        dtype: of its weights. T5 overflows in float16: float32 or bfloat16.

    Raises:
        UserError: it can't be loaded, or does not fit the model.
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
                self.model, found = T5EncoderModel.from_pretrained(
                    config.path,
                    subfolder=config.encoder_folder,
                    dtype=dtype,
                    use_safetensors=True,
                    output_loading_info=True,
                )
        except (OSError, ValueError, RuntimeError, KeyError, ImportError, SafetensorError) as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise UserError(f"text.path: no T5 encoder can be loaded from {config.path}: {reason}") from error
        if found["missing_keys"]:
            first = min(found["missing_keys"])
            raise UserError(f"text.path: {config.path} is no T5 encoder: it has no weights for {first}")
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
        self._kept: OrderedDict[str, Tensor] = OrderedDict()  # the least recently used first
        self._kept_bytes = 0

    def __call__(
        self, captions: Sequence[str | None], stored: tuple[Tensor, Tensor], dropped: Sequence[bool] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Embeddings (B, M, E) of captions, and their mask (B, M), true at real tokens.

        Args:
            captions: None and blank ones become the stored caption.
            stored: the model's unconditional caption and its mask, a row for each (``unconditional_caption``).
            dropped: which of them become the stored caption although there is one; it is seen through the mask of the
                caption that it replaces, as guidance does it.
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
        """Numbers of the tokens, at most M."""
        ids: list[int] = self.tokenizer(caption, truncation=True, max_length=self.tokens)["input_ids"]
        return ids

    @torch.no_grad()
    def _embed(self, caption: str, ids: list[int]) -> Tensor:
        """Embedding of one caption, (n, E)."""
        known = self._kept.pop(caption, None)
        if known is None:
            known = self.model(input_ids=torch.tensor([ids], device=self.device)).last_hidden_state[0]
            self._kept_bytes += known.nbytes
        self._kept[caption] = known
        while self._kept_bytes > KEPT_BYTES:
            self._kept_bytes -= self._kept.popitem(last=False)[1].nbytes
        return known


@contextmanager
def _silence() -> Iterator[None]:
    """Neither progress bars nor reports of what a whole T5 has beside its encoder."""
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
