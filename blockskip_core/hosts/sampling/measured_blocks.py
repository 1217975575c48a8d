"""How much the text matters in each block of a MODEL: measured with probe pictures, and kept on disk."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ...files import remove_leftovers, write_atomically
from ...locks import lock
from ...selection.text_influence import TextInfluence, measure
from ..files.folders import probe_file
from ..inputs.conditioning import flatten_conditionings
from ..models.identity import conditionings_identity, model_identity, module_identity
from .probe_pictures import PictureMetric, ProbeConfig, ProbePictures, picture_metric

logger = logging.getLogger(__name__)


def text_influence(
    patcher: Any,
    positive: Sequence[Any],
    negative: Sequence[Any] | None,
    probe: ProbeConfig,
    num_blocks: int,
    budget: int,
    *,
    vae: Any = None,
    clip_vision: Any = None,
    with_window: bool = True,
    progress: Callable[[int, int], None],
    waiting: Callable[[], None],
) -> TextInfluence:
    """Return the influence for budgets up to ``budget``; earlier measurements are read from disk.

    If another process is measuring the same, this waits for it.

    Args:
        patcher: The MODEL.
        positive, negative: CONDITIONINGs; the negative is used with guidance only.
        probe: How pictures are sampled.
        num_blocks: Number of blocks in the model.
        budget: Maximum number of blocks to skip.
        vae, clip_vision: For comparing pictures as in the paper; unless both are given, latents are compared.
        with_window: Whether the sliding window is measured as well.
        progress: Called after every sampler step with (done, total); may raise to interrupt.
        waiting: Called repeatedly while waiting for another process; may raise to interrupt.

    Raises:
        InvalidInputError: If a conditioning does not fit the model, or the model makes no usable picture.
        UnsupportedModelError: If the text cannot be hidden from the model's blocks.
        StorageError: If the disk cannot be written.
    """
    prompts, away = _texts(positive, negative)
    metric = picture_metric(vae, clip_vision)
    pictures = ProbePictures(patcher, prompts, away, probe, metric)
    file = _file(patcher, positive, negative, probe, vae, clip_vision)

    def keep(influence: TextInfluence) -> None:
        write_atomically(file, lambda path: path.write_text(influence.to_json(), encoding="utf-8"))

    before = _remembered(file)
    if before is not None and not before.missing(budget, with_window=with_window):
        return before
    with lock(file, waiting):
        remove_leftovers(file.parent, lambda name: name.startswith(file.name), min_age_s=0)
        pictures.require_hidden_text()
        before = _remembered(file) or TextInfluence(num_blocks, metric.name, num_pictures=pictures.count)
        return measure(before, pictures, budget, with_window=with_window, keep=keep, progress=progress)


def stored_influence(
    patcher: Any,
    positive: Sequence[Any],
    negative: Sequence[Any] | None,
    probe: ProbeConfig,
    *,
    vae: Any = None,
    clip_vision: Any = None,
) -> TextInfluence | None:
    """Return what :func:`text_influence` has measured with these arguments so far, or None; nothing is sampled."""
    return _remembered(_file(patcher, positive, negative, probe, vae, clip_vision))


def _texts(positive: Sequence[Any], negative: Sequence[Any] | None) -> tuple[list[list], list | None]:
    away = flatten_conditionings(negative, with_references=True)[0] if negative else None
    return flatten_conditionings(positive, with_references=True), away


def _file(
    patcher: Any,
    positive: Sequence[Any],
    negative: Sequence[Any] | None,
    probe: ProbeConfig,
    vae: Any,
    clip_vision: Any,
) -> Path:
    """Return where a measurement is kept."""
    prompts, away = _texts(positive, negative)
    read = [*prompts, *([away] if away and probe.cfg != 1.0 else [])]
    return probe_file(_key(patcher, read, probe, picture_metric(vae, clip_vision), vae, clip_vision))


def _remembered(file: Path) -> TextInfluence | None:
    if not file.is_file():
        return None
    try:
        return TextInfluence.from_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        logger.warning("BlockSkip: the stored probe %s is damaged (%s); measuring again", file.name, error)
        return None


def _key(
    patcher: Any, conditionings: list[list], probe: ProbeConfig, metric: PictureMetric, vae: Any, clip_vision: Any
) -> str:
    """Return a content hash of everything that a measurement depends on."""
    parts = [
        model_identity(patcher),
        conditionings_identity(conditionings),
        metric.name,
        "" if vae is None else module_identity(vae.first_stage_model),
        "" if clip_vision is None else module_identity(clip_vision.model),
        [probe.size, probe.steps, probe.cfg, probe.seed, probe.num_seeds],
    ]
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()
