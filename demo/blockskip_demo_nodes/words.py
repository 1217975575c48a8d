"""A text encoder with a closed vocabulary: fixed, orthogonal vectors for words and for positions in the sentence.

A FLUX model does not give its text tokens positions, so the order of the words is part of their vectors.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

PAD_ID = 0
SAME_WORD = {"center": "centre", "middle": "centre", "an": "a", "the": "a"}
Tokens = dict[str, list[list[tuple[int | Tensor, float]]]]


class WordTokenizer:
    """Converts plain words and commas to ids, always ``length`` of them; a tokenizer for ``comfy.sd.CLIP``."""

    def __init__(self, embedding_directory: str | None = None, tokenizer_data: dict | None = None) -> None:
        self.words: tuple[str, ...] = tuple(tokenizer_data["words"])
        self.length: int = tokenizer_data["length"]
        self.ids = {word: i for i, word in enumerate(self.words)}

    def word_ids(self, text: str) -> list[int]:
        """Ids of a sentence, padded to ``length``; an unknown word or a sentence that is too long raises."""
        ids = self.plain_ids(text)
        return ids + [PAD_ID] * (self.length - len(ids))

    def plain_ids(self, text: str) -> list[int]:
        """Ids of a sentence without padding; an unknown word or a sentence that is too long raises."""
        words = [SAME_WORD.get(word, word) for word in re.findall(r"[^\s,.]+|,", text.lower())]
        for word in words:
            if self.ids.get(word, PAD_ID) == PAD_ID:
                allowed = ", ".join(known for known in self.words[PAD_ID + 1 :] if known != ",")
                raise ValueError(
                    f"The demo world does not know {word!r}; it knows commas and these words: {allowed}."
                )
        if len(words) > self.length:
            raise ValueError(
                f"The demo world reads at most {self.length} words and commas, not {len(words)}."
            )
        return [self.ids[word] for word in words]

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **_: object) -> Tokens:
        """Ids with weight 1, in the form that ComfyUI passes to the encoder."""
        return {"words": [[(token, 1.0) for token in self.word_ids(text)]]}

    def state_dict(self) -> dict[str, Tensor]:
        """Nothing to save."""
        return {}


class WordEncoder(nn.Module):
    """Word vectors ``[V, C]``, position vectors ``[L, C]`` and a projection ``[C, P]`` for the pooled vector."""

    def __init__(
        self, dtype: torch.dtype | None = None, device: object = None, model_options: object = None
    ) -> None:
        super().__init__()
        self.dtypes = {torch.float32}
        for name in ("word_vectors", "place_vectors", "projection"):
            self.register_parameter(name, nn.Parameter(torch.zeros(0, 0), requires_grad=False))

    def reset_clip_options(self) -> None:
        """This encoder has no options."""

    def set_clip_options(self, options: dict) -> None:
        """This encoder has no options."""

    def load_sd(self, state: dict[str, Tensor]) -> tuple[list[str], list[str]]:
        """Load the three tables; return missing and unexpected names."""
        for name, parameter in self.named_parameters():
            parameter.data = state[name].float()
        return [], []

    def encode_ids(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Ids ``[B, L]`` to context ``[B, L, C]`` and pooled ``[B, P]``; padding adds only its position."""
        said = (ids != PAD_ID).unsqueeze(-1).float()
        return self._encode_vectors(self.word_vectors.float()[ids] * said)

    def _encode_vectors(self, words: Tensor) -> tuple[Tensor, Tensor]:
        return words + self.place_vectors.float(), words.sum(dim=1) @ self.projection.float()

    def encode_token_weights(self, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """Return context and pooled on the CPU; called by ``comfy.sd.CLIP``."""
        vectors = torch.stack(
            [torch.stack([self._vector(token) for token, *_ in row]) for row in tokens["words"]]
        )
        context, pooled = self._encode_vectors(vectors)
        return context.cpu(), pooled.cpu()

    def _vector(self, token: int | Tensor) -> Tensor:
        """The vector of a word, of padding, or of an embedding file."""
        if isinstance(token, Tensor):
            return token.to(self.word_vectors.device, torch.float32)
        return self.word_vectors[token].float() * (token != PAD_ID)


def read_text_file(path: Path | str) -> tuple[dict[str, Tensor], dict]:
    """Return the tables of a text file and the tokenizer's data (``words``, ``length``).

    Raises:
        ValueError: If the file is damaged or another kind of file.
    """
    name = Path(path).name
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tables = {key: file.get_tensor(key) for key in file.keys()}
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{name} cannot be read ({error}). Copy it again from the pack's demo/assets."
        ) from error
    if "words" not in metadata:
        raise ValueError(
            f"{name} is not a text file of the BlockSkip demo world: choose blockskip_world_text.safetensors."
        )
    length, width = tables["place_vectors"].shape
    return tables, {"words": json.loads(metadata["words"]), "length": length, "width": width}
