"""What trainers often do to a whole training folder: a trigger word in every caption, and mirrored copies of the pictures."""

from __future__ import annotations

import re
from dataclasses import replace

from torch import Tensor

from .material import TrainingFile
from .training_folder import LoadedFolder


def with_trigger(loaded: LoadedFolder, word: str) -> LoadedFolder:
    """Return the folder with a trigger word in front of every caption that does not contain it as a whole word.

    A picture without a caption gets the word alone. An empty word changes nothing.
    """
    word = " ".join(word.split())
    if not word:
        return loaded
    whole = re.compile(rf"(?<!\w){re.escape(word)}(?!\w)", re.IGNORECASE)
    texts = [text if whole.search(text) else ", ".join(part for part in (word, text) if part) for text in loaded.texts]
    files = [TrainingFile(file.name, text) for file, text in zip(loaded.files, texts, strict=True)]
    return replace(loaded, texts=texts, files=files)


def with_mirrored(loaded: LoadedFolder) -> LoadedFolder:
    """Return the folder with every picture and its references also mirrored left to right; captions stay the same.

    Images are (1, H, W, 3), or (F, H, W, 3) for films, so the width is dimension 2.
    """
    return replace(
        loaded,
        images=[each for image in loaded.images for each in (image, image.flip(2))],
        texts=[text for text in loaded.texts for _ in range(2)],
        files=[each for file in loaded.files for each in (file, replace(file, name=f"{file.name} (mirrored)"))],
        references=_mirrored_with(loaded),
    )


def _mirrored_with(loaded: LoadedFolder) -> list[Tensor]:
    """Return the references with mirrored copies of each picture's after them."""
    each = len(loaded.references) // len(loaded.images)
    pictures = (loaded.references[start : start + each] for start in range(0, len(loaded.references), each or 1))
    return [image for of_one in pictures for image in (*of_one, *(image.flip(2) for image in of_one))]
