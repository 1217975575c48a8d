"""Training material: pictures, captions and files, checked, with remarks on anything odd."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...data import remarks
from ...data.picture_checks import likeness, only_colour
from ...data.reference_pictures import ReferenceSettings
from ...errors import InvalidInputError
from .clips import Clips
from .conditioning import flatten_conditionings, references_of, same_texts
from .given_latents import LatentRows, are_latents, captions_of_rows
from .pictures import Pictures
from .references import References, given_references


@dataclass(frozen=True)
class TrainingFile:
    """A file of a training folder.

    Attributes:
        name: Readable name of the picture's file.
        caption: The caption, without invisible characters and spaces around it; "" if there is none.
    """

    name: str
    caption: str


@dataclass(frozen=True)
class Material:
    """Pictures or clips that can be trained on, with their captions.

    Attributes:
        pictures: The pictures, or the clips; or latents of either.
        captions: Single conditionings: one for all, or one for each.
        blank: Blank pictures, each with its colour.
        remarks: Anything odd, in sentences.
        references: What an edit model sees beside the captions, if it is not in them already.
    """

    pictures: Pictures | Clips | LatentRows
    captions: list[list]
    blank: Mapping[int, str]
    remarks: list[str]
    references: References | None = None


def checked_material(
    images: Sequence[Any],
    positive: Sequence[Any],
    files: Sequence[Any] | None,
    frames: int = 1,
    references: Sequence[Any] | None = None,
    shown: ReferenceSettings | None = None,
) -> Material:
    """Return the checked inputs, with remarks on them.

    Args:
        images: IMAGEs, or LATENTs of whole pictures.
        positive: CONDITIONINGs.
        files: What Load Training Folder says about the pictures.
        frames: Number of pictures of a clip; with 1, every picture is trained on by itself.
        references: IMAGEs that an edit model sees beside the captions, or None.
        shown: How it sees them; as by default if None.

    Raises:
        InvalidInputError: If a picture or caption cannot be used; the message names it.
    """
    described = _require_files(files or ())
    if are_latents(images):
        return _of_latents(images, positive, references)
    names, captions = [file.name for file in described], flatten_conditionings(positive, with_references=True)
    pictures: Pictures | Clips
    if frames > 1:
        pictures = Clips(images, frames, names)
        captions = pictures.captions_for_each(captions)
        described = [described[film] for film in pictures.films] if len(described) == len(images) else []
    else:
        pictures = Pictures(images, names)
    seen = None if references is None else _seen(references, pictures, captions, shown or ReferenceSettings())
    colours = {index: only_colour(pictures.still(index)) for index in range(len(pictures))}
    blank = {index: colour for index, colour in colours.items() if colour}
    found = [
        remarks.on_blank(blank, pictures.labels),
        remarks.on_transparent(pictures.transparent, pictures.labels),
        _on_captions(captions, pictures, described, edits=seen is not None or any(map(references_of, captions))),
        _on_clips(pictures, frames) if isinstance(pictures, Clips) else None,
        *(() if seen is None else _on_references(seen, pictures)),
    ]
    return Material(pictures, captions, blank, [sentence for sentence in found if sentence], seen)


def _of_latents(given: Sequence[Any], positive: Sequence[Any], references: Sequence[Any] | None) -> Material:
    """Return latents as material. Files do not describe them: nodes that give LATENTs may have changed the order."""
    if references is not None:
        raise InvalidInputError(
            "References are for pictures, and `images` has latents. Connect the pictures themselves, or disconnect `references`."
        )
    rows = LatentRows.of(given)
    captions = flatten_conditionings(captions_of_rows(positive, given), with_references=True)
    zeroed = sum(not embedding.any() for [[embedding, _]] in captions)
    said = ["Latents are trained on whole: patch_min, patch_max, patch_order, patch_shape and frames are not used"]
    said += [remarks.on_zeroed_captions(zeroed, len(captions)) or ""] if zeroed else []
    return Material(rows, captions, {}, said)


def _on_clips(clips: Clips, frames: int) -> str | None:
    """Return a remark on pictures beside clips, and on what is in no clip."""
    unused = remarks.on_unused(clips.unused, len(clips) - clips.stills, frames)
    beside = f"{clips.stills} single pictures are trained beside the clips" if clips.stills else None
    return "; ".join(filter(None, [unused, beside])) or None


def _seen(
    images: Sequence[Any], pictures: Pictures | Clips, captions: Sequence[list], shown: ReferenceSettings
) -> References:
    if isinstance(pictures, Clips):
        raise InvalidInputError("References are for pictures. Set `frames` to 1, or disconnect `references`.")
    return given_references(images, len(pictures), captions, shown)


def _on_references(seen: References, pictures: Pictures | Clips) -> list[str | None]:
    """Return remarks on references with transparent parts, and on those that are the picture itself."""
    same = [
        picture
        for picture in range(len(pictures))
        if any(torch.equal(seen.pictures[index], pictures[picture]) for index in seen.of(picture))
    ]
    return [
        remarks.on_transparent(seen.pictures.transparent, seen.pictures.labels),
        remarks.on_unedited(same, pictures.labels),
    ]


def _on_captions(
    captions: Sequence[list], pictures: Pictures | Clips, files: Sequence[TrainingFile], *, edits: bool
) -> str | None:
    """Return a remark on captions without words or, if there is one caption per picture, on missing or equal ones.

    Clips of one film share its caption, and the captions of edit models may all ask for the same edit, so there equal
    captions are not odd.
    """
    zeroed = sum(not embedding.any() for [[embedding, _]] in captions)
    if zeroed:
        return remarks.on_zeroed_captions(zeroed, len(captions))
    if len(captions) != len(pictures) or len(captions) == 1:
        return None
    empty = remarks.on_empty_captions([file.caption for file in files], pictures.labels)
    if empty or edits or isinstance(pictures, Clips):
        return empty
    return remarks.on_equal_captions(same_texts(captions), [likeness(picture) for picture in pictures])


def _require_files(files: Sequence[Any]) -> list[TrainingFile]:
    described = [file for file in files if isinstance(file, TrainingFile)]
    if len(described) != len(files):
        raise InvalidInputError("`files` must come from Load Training Folder. Connect that node, or nothing.")
    return described
