"""Captions as tokens, with the learned vectors in the place of the word.

A caption is tokenised once, with ``embedding:`` and a stand-in file of the right widths, and then the stand-in's
vectors are swapped. So blanks and templates are split exactly as in any later prompt with the finished file.
Replacing the tokens of a known word instead would give other tokens with most tokenizers, because they join a word
with the blank before it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import folder_paths
import torch
from safetensors.torch import save_file
from torch import Tensor

from ...errors import InvalidInputError, StorageError
from ...zoodip.word import WordPart
from .encoders import Tokens, accepting_embeddings, attribute_of, is_vector, tokenizers_of, vector_of

PLACE = "{word}"
"""What stands for the word in a caption."""
STAND_IN = "blockskip_stand_in"

_Place = tuple[str, int, int, str, int]  # key of the tokens, row, column, part, vector


def require_place(captions: Sequence[str]) -> None:
    """Raise InvalidInputError if a caption does not contain :data:`PLACE`."""
    for caption in captions:
        if PLACE not in caption:
            raise InvalidInputError(f"Every caption needs {PLACE} where the new word is, got {caption!r}.")


class WordCaptions:
    """Captions in which the word's vectors can be put.

    Args:
        clip: The CLIP; left unchanged.
        captions: The captions, each with :data:`PLACE` in it.
        parts: The word's parts.

    Attributes:
        clip: A clone that takes embedding files, to encode the tokens with.

    Raises:
        InvalidInputError: If a caption does not contain the word, or its tokenizer does not find it.
        StorageError: If the temporary folder cannot be written.
    """

    def __init__(self, clip: Any, captions: Sequence[str], parts: Sequence[WordPart]) -> None:
        require_place(captions)
        names = {name: each.embedding_key for name, each in tokenizers_of(clip).items()}
        markers = _markers(parts)
        with _stand_in(markers) as folder:
            self.clip = accepting_embeddings(clip, [], before=[folder])
            made = [self.clip.tokenize(caption.replace(PLACE, f"embedding:{STAND_IN}")) for caption in captions]
        self._tokens: list[Tokens] = made
        self._places = [list(_found(tokens, names, markers)) for tokens in made]
        for caption, places in zip(captions, self._places, strict=True):
            _require_all(caption, places, parts)

    def __len__(self) -> int:
        return len(self._tokens)

    def tokens(self, caption: int, vectors: Mapping[str, Tensor]) -> Tokens:
        """Return a caption's tokens with a word's vectors.

        Args:
            caption: Index of the caption.
            vectors: Each part's vectors by name, shape (vectors, width).
        """
        tokens = {key: [list(row) for row in rows] for key, rows in self._tokens[caption].items()}
        for key, row, column, part, vector in self._places[caption]:
            before = tokens[key][row][column]
            tensor = vectors[part][vector]
            token = {**before[0], "data": tensor} if isinstance(before[0], dict) else tensor
            tokens[key][row][column] = (token, *before[1:])
        return tokens


def _markers(parts: Sequence[WordPart]) -> dict[str, Tensor]:
    """Return vectors that no other file has, a different one for each vector of the word."""
    generator = torch.Generator().manual_seed(20250319)
    return {part.name: torch.randn(part.vectors, part.width, generator=generator) for part in parts}


def _stand_in(vectors: Mapping[str, Tensor]) -> tempfile.TemporaryDirectory[str]:
    """Return a temporary folder with a file of these vectors."""
    parent = Path(folder_paths.get_temp_directory())
    try:
        parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(prefix="blockskip_", dir=parent)
        save_file(dict(vectors), Path(folder.name) / f"{STAND_IN}.safetensors")
    except OSError as error:
        raise StorageError(f"ComfyUI's temporary folder {parent} cannot be written: {error}.") from error
    return folder


def _found(tokens: Tokens, names: dict[str, str], markers: Mapping[str, Tensor]) -> Iterable[_Place]:
    """Yield where the stand-in's vectors are."""
    for key, rows in tokens.items():
        attribute = attribute_of(key, names)
        if attribute is None:
            continue
        part = names[attribute]
        for number, row in enumerate(rows):
            for column, (token, *_) in enumerate(row):
                if is_vector(token) and vector_of(token).shape[-1:] == markers[part].shape[-1:]:
                    same = (markers[part] == vector_of(token)).all(1).nonzero()
                    if len(same):
                        yield key, number, column, part, int(same[0])


def _require_all(caption: str, places: Sequence[_Place], parts: Sequence[WordPart]) -> None:
    """Refuse a caption in which an encoder has not found all vectors of the word."""
    for part in parts:
        found = sum(place[3] == part.name for place in places)
        wanted = part.vectors * caption.count(PLACE)
        if found != wanted:
            raise InvalidInputError(
                f"{part.name} finds {found} of {wanted} vectors of the word in the caption {caption!r}. Put blanks around "
                f"{PLACE}, or a comma after it; with FLUX.2 another word before it. Shorten a very long caption."
            )
