"""What a run will need, told before its first step."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from ...blockskip_core.hosts.models.counted_run import UncountableError, counting, room_on
from ...blockskip_core.hosts.words.captions import WordCaptions
from ...blockskip_core.hosts.words.counted_words import word_needs
from ...blockskip_core.units import format_bytes
from ...blockskip_core.zoodip.settings import WordSettings
from ...blockskip_core.zoodip.word import WordLayout
from ..page.progress import NodeProgress

logger = logging.getLogger(__name__)


def counted_memory(
    model: Any, captions: WordCaptions, layout: WordLayout, latent_shape: Sequence[int], settings: WordSettings,
    guidance: float, progress: NodeProgress,
) -> str:  # fmt: skip
    """Return what the run needs and what the device has, as a sentence; nothing on the CPU, where memory is shared.

    Args:
        model, captions, layout, guidance: Of the run.
        latent_shape: (C, H, W).
        settings: The settings.
        progress: Shows the sentence.
    """
    if model.load_device.type == "cpu":
        return ""
    progress("memory counted", 0, 1)
    try:
        with counting():
            needs = word_needs(model, captions, layout, latent_shape, settings.passes_per_step, guidance=guidance)
    except UncountableError as error:
        logger.exception("BlockSkip: memory could not be counted")
        return f"The memory of this run could not be counted ({error})."
    free, place = room_on(model.load_device)
    told = (
        f"Counted before the first step: {format_bytes(needs.together)} with text encoder and model loaded together, "
        f"{format_bytes(needs.in_turns)} in turns, all words of a step at once; {place} has {format_bytes(free)} free."
    )
    progress.say(told)
    return told
