"""The text encoders in a CLIP: their tokenizers, the vectors of known words, and whether they take embedding files.

The host's CLIP holds one or several pairs of a tokenizer and an encoder, such as CLIP-L and T5, under the same name. A
tokenizer replaces ``embedding:NAME`` by the vectors of a file; those of some encoders (Qwen-Image, Wan) have that
turned off, because their own code compares tokens with numbers. They take vectors as dictionaries, which the host's
encoders pass on.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

import comfy.sd1_clip
import folder_paths
import torch
from torch import Tensor

from ...errors import InvalidInputError, UnsupportedModelError
from ...zoodip.word import WordPart

SAMPLED_WORDS = 2048
"""Words whose vectors are measured for the size of a vocabulary's numbers."""
MOST_VECTORS = 32
COMPARED = ("llama",)
"""Keys of tokenizers that take files although the host then compares their tokens with numbers (HunyuanVideo)."""

Tokens = dict[str, list[list[tuple[Any, ...]]]]


def tokenizers_of(clip: Any) -> dict[str, Any]:
    """Return the tokenizers of a CLIP's text encoders by attribute, those whose encoder is loaded."""
    found = {name: each for name, each in vars(clip.tokenizer).items() if isinstance(each, comfy.sd1_clip.SDTokenizer)}
    return {name: each for name, each in found.items() if encoder_of(clip, name) is not None}


def encoder_of(clip: Any, name: str) -> Any:
    """Return the text encoder that belongs to a tokenizer, or None; Wan's and Chroma's lack the tokenizer's prefix."""
    for attribute in (name, name.removeprefix("clip_")):
        encoder = getattr(clip.cond_stage_model, attribute, None)
        if hasattr(getattr(encoder, "transformer", None), "get_input_embeddings"):
            return encoder
    return None


def attribute_of(key: str, tokenizers: dict[str, Any]) -> str | None:
    """Return the attribute of the tokenizer that made the tokens under a key: "l" is ``clip_l``, "t5xxl" is itself."""
    return next((name for name in (key, f"clip_{key}") if name in tokenizers), None)


def is_vector(token: Any) -> bool:
    """Return whether a token is a vector rather than a number."""
    return isinstance(token, Tensor) or (isinstance(token, dict) and token.get("type") == "embedding")


def vector_of(token: Any) -> Tensor:
    """Return the vector that a token is."""
    return token["data"] if isinstance(token, dict) else token


def takes_embeddings(clip: Any) -> bool:
    """Return whether every tokenizer of a CLIP takes ``embedding:NAME``."""
    return all(
        each.embedding_directory is not None and each.embedding_key not in COMPARED
        for each in tokenizers_of(clip).values()
    )


def accepting_embeddings(clip: Any, directories: Sequence[str], *, before: Sequence[str] = ()) -> Any:
    """Return a clone of a CLIP whose tokenizers all take ``embedding:NAME``; the CLIP's own stay as they are.

    Args:
        clip: The CLIP.
        directories: Where a tokenizer that does not take them so far looks for files.
        before: Where every tokenizer looks first.
    """
    clone = clip.clone()
    clone.tokenizer = copy.copy(clip.tokenizer)
    for name, tokenizer in tokenizers_of(clip).items():
        own = copy.copy(tokenizer)
        if own.embedding_directory is None or own.embedding_key in COMPARED:
            own.tokenize_with_weights = partial(_with_dictionaries, own.tokenize_with_weights)
        if own.embedding_directory is None:
            own.embedding_directory = [*before, *directories]
        elif before:
            known = own.embedding_directory
            own.embedding_directory = [*before, *([known] if isinstance(known, str) else known)]
        setattr(clone.tokenizer, name, own)
    return clone


def taking_embedding_files(clip: Any) -> Any:
    """Return a CLIP itself if it takes embedding files, otherwise a clone that finds those of the host's folders.

    Raises:
        UnsupportedModelError: If it has no encoder whose words can be replaced.
    """
    _require_tokenizers(clip)
    return clip if takes_embeddings(clip) else accepting_embeddings(clip, folder_paths.get_folder_paths("embeddings"))


def _require_tokenizers(clip: Any) -> None:
    if not tokenizers_of(clip):
        raise UnsupportedModelError(
            f"The text encoder must be one whose tokens embedding files can replace, got a {type(clip.tokenizer).__name__}."
        )


def _with_dictionaries(tokenize: Any, *arguments: Any, **options: Any) -> list[list[tuple[Any, ...]]]:
    """Tokenise, and return vectors as dictionaries."""
    rows = tokenize(*arguments, **options)
    return [
        [({"type": "embedding", "data": t[0]}, *t[1:]) if isinstance(t[0], Tensor) else t for t in row] for row in rows
    ]


def known_word(clip: Any, word: str) -> tuple[list[WordPart], dict[str, Tensor]]:
    """Return the shape of a word and its vectors for each encoder: those that the encoders have for a known one.

    The vectors come from the encoder's own look-up, so they are right for quantised vocabularies, and for those whose
    numbers are scaled after it.

    Args:
        clip: The CLIP; it is loaded.
        word: One or several known words; each of their tokens is a vector.

    Returns:
        The parts, and their vectors by key, each (vectors, width), float32 on the CPU.

    Raises:
        InvalidInputError: If the word has no token or too many.
        UnsupportedModelError: If the CLIP has no encoder whose words can be replaced.
    """
    _require_tokenizers(clip)
    clip.load_model(clip.tokenize(word))  # LTX-2 estimates memory from tokens, and fails without any
    parts, vectors = [], {}
    for name, tokenizer in tokenizers_of(clip).items():
        key, lookup = tokenizer.embedding_key, encoder_of(clip, name).transformer.get_input_embeddings()
        ids = _ids(tokenizer, word)
        if not 1 <= len(ids) <= MOST_VECTORS:
            raise InvalidInputError(
                f"like_word must be a word or a few of 1 to {MOST_VECTORS} tokens, but {word!r} has {len(ids)} in {key}."
            )
        places = torch.linspace(0, lookup.weight.shape[0] - 1, min(SAMPLED_WORDS, lookup.weight.shape[0])).long()
        size = _looked_up(lookup, places, clip).square().mean().sqrt().item()
        vectors[key] = _looked_up(lookup, torch.tensor(ids), clip)
        parts.append(WordPart(key, len(ids), vectors[key].shape[1], size))
    return parts, vectors


def _looked_up(lookup: Any, ids: Tensor, clip: Any) -> Tensor:
    """Return the vectors of tokens, shape (tokens, width)."""
    with torch.no_grad():
        found = lookup(ids[None].to(clip.patcher.load_device), out_dtype=torch.float32)
    return found[0].float().cpu().clone()


def _ids(tokenizer: Any, text: str) -> list[int]:
    """Return a text's tokens without the ones that mark its beginning and end."""
    end = -1 if tokenizer.tokenizer_adds_end_token else None
    return list(tokenizer.tokenizer(text)["input_ids"])[tokenizer.tokens_start : end] if text.strip() else []
