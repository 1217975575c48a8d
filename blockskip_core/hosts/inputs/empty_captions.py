"""The empty caption that some training examples get in place of their own.

A caption's reference latents stay: an edit model without a text still sees the picture that it edits. So captions with
references have one empty caption each, which shares the embedding; all others have one in common.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ...data.caption_dropout import dropped_draws
from ...data.schedule import TrainingSchedule
from ...errors import InvalidInputError
from .conditioning import REFERENCE_METHOD, REFERENCES, flatten_conditionings, references_of


def checked_empty_caption(given: Sequence[Any] | None) -> list | None:
    """Return the single conditioning among what is connected to `empty_caption`, or None if nothing is.

    Raises:
        InvalidInputError: If it is not one text that training can use.
    """
    if given is None:
        return None
    try:
        found = flatten_conditionings(given)
    except InvalidInputError as error:
        raise InvalidInputError(f"`empty_caption` cannot be used. {error}") from None
    if len(found) > 1:
        raise InvalidInputError(f"`empty_caption` must be one conditioning, got {len(found)}. Connect a single text.")
    return found[0]


def require_empty_caption(empty: list | None, share: float) -> None:
    """Check that there is an empty caption if a share of the draws is to have it.

    Raises:
        InvalidInputError: If the share is out of range, or there is none for it.
    """
    if not 0.0 <= share <= 1.0:
        raise InvalidInputError(f"caption_dropout must be between 0 and 1, got {share:g}.")
    if share and empty is None:
        raise InvalidInputError(
            f"caption_dropout is {share:g}, but there is no empty caption. Connect CLIP Text Encode with an empty text "
            "to `empty_caption`, or set caption_dropout to 0."
        )


def with_empty_captions(
    captions: Sequence[list], schedule: TrainingSchedule, empty: list | None, share: float
) -> tuple[Sequence[list], TrainingSchedule, int]:
    """Return captions with the empty ones after them, the schedule that refers to these, and how many of its draws do.

    With a share of 0, or one that no draw comes out at, captions and schedule are those given.

    Args:
        captions: Single conditionings, with their references.
        schedule: The draws.
        empty: The empty caption, or None.
        share: Share of the draws, from 0 to 1.

    Raises:
        InvalidInputError: As :func:`require_empty_caption`.
    """
    require_empty_caption(empty, share)
    dropped = dropped_draws(len(schedule), share, schedule.seed)
    if not dropped or empty is None:
        return captions, schedule, 0
    found, draws, numbers = list(captions), list(schedule), dict[int | None, int]()
    for index in dropped:
        own = draws[index].caption
        of = own if references_of(captions[own]) else None
        if of not in numbers:
            numbers[of] = len(found)
            found.append(_emptied(captions[own], empty))
        draws[index] = replace(draws[index], caption=numbers[of])
    return found, replace(schedule, draws=tuple(draws)), len(dropped)


def _emptied(caption: list, empty: list) -> list:
    """Return the empty caption with a caption's references and how they are placed."""
    [[_, settings]], [[embedding, own]] = caption, empty
    kept = {name: settings[name] for name in (REFERENCES, REFERENCE_METHOD) if settings.get(name)}
    return [[embedding, {**own, **kept}]]
