"""The demo's words behind ComfyUI's own tokenizer class, so that ``embedding:NAME`` works in its prompts too."""

from __future__ import annotations

from types import SimpleNamespace

import comfy.sd1_clip
import torch
from torch import Tensor

from .words import PAD_ID, Tokens, WordEncoder, WordTokenizer

KEY = "blockskip_demo"
"""The key of this encoder's vectors in embedding files."""


class _Words(comfy.sd1_clip.SDTokenizer):
    """ComfyUI's handling of embeddings around the demo's own words; every attribute is one of its class."""

    def __init__(self, words: WordTokenizer, width: int, embedding_directory: list[str] | None) -> None:
        self.tokenizer = lambda text: {"input_ids": words.plain_ids(text)}
        self.tokens_start, self.tokenizer_adds_end_token = 0, False
        self.start_token = self.end_token = None
        self.pad_token, self.pad_left, self.pad_to_max_length = PAD_ID, False, True
        self.max_length, self.min_length, self.min_padding = words.length, None, None
        self.max_word_length, self.disable_weights = 8, True
        self.embedding_directory, self.embedding_identifier = embedding_directory, "embedding:"
        self.embedding_size, self.embedding_key = width, KEY


class TokenizerWithEmbeddings(WordTokenizer):
    """The demo's tokenizer with the vectors of embedding files."""

    def __init__(
        self, embedding_directory: list[str] | None = None, tokenizer_data: dict | None = None
    ) -> None:
        super().__init__(embedding_directory, tokenizer_data)
        self.clip_words = _Words(self, tokenizer_data["width"], embedding_directory)

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **_: object) -> Tokens:
        """Ids and vectors with weight 1, in the form that ComfyUI passes to the encoder."""
        rows = self.clip_words.tokenize_with_weights(text, return_word_ids)
        if len(rows) > 1:
            raise ValueError(f"The demo world reads at most {self.length} words, commas and vectors.")
        return {"words": rows}


class EncoderWithEmbeddings(WordEncoder):
    """The demo's encoder with its vocabulary where ComfyUI's encoders have it."""

    @property
    def clip_words(self) -> SimpleNamespace:
        """The encoder's vocabulary: ``transformer.get_input_embeddings()(ids, out_dtype=)``."""
        return SimpleNamespace(
            transformer=SimpleNamespace(get_input_embeddings=lambda: _Lookup(self.word_vectors))
        )


class _Lookup:
    def __init__(self, table: Tensor) -> None:
        self.weight = table

    def __call__(self, ids: Tensor, out_dtype: torch.dtype = torch.float32) -> Tensor:
        return self.weight[ids.to(self.weight.device)].to(out_dtype)
