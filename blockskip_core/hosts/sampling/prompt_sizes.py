"""Prompts with a size of their own: an area is sampled as a picture of its own, which coarse patches must cut too."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import comfy.samplers
import torch
from torch import Tensor

from ...errors import InvalidInputError
from .token_strips import MASKED_IMAGE_PROMPT

_RANGE = ("start_percent", "end_percent")


def require_fitting_prompts(conds: Mapping[str, list], noise: Tensor, side: int, cells: int) -> None:
    """Check the prompts of a run before its first step.

    Those with a range of steps are left to these steps, which may all have the model's own patches.

    Args:
        conds: Of the host's guider, before it prepares them: prompts by kind.
        noise: Of the run.
        side: Of the largest patches, in latent cells.
        cells: Pixels of a cell's side.

    Raises:
        InvalidInputError: If an area is not cut into whole patches, or a prompt has a mask over the picture's tokens.
    """
    prompts = [own for kind in conds.values() for own in kind if not any(name in own for name in _RANGE)]
    if any(own.get("attention_mask_img_shape") is not None for own in prompts):
        raise InvalidInputError(
            f"Coarse steps take text conditionings only, got {MASKED_IMAGE_PROMPT}. Give Style Model Apply the strength "
            "type multiply, or set the mode to off."
        )
    for size in _areas(prompts, noise.shape[2:]):
        require_fitting_area(size, side, cells)


def require_fitting_area(size: Sequence[int], side: int, cells: int) -> None:
    """Check that the part of a latent that a prompt acts on is cut into whole patches.

    Args:
        size: Its rows and columns in cells.
        side, cells: See :func:`require_fitting_prompts`.

    Raises:
        InvalidInputError: If it is not.
    """
    height, width = (length * cells for length in size)
    if height % (side * cells) or width % (side * cells):
        raise InvalidInputError(
            f"Expected the area of a prompt to have a width and a height that are multiples of {side * cells} px, because "
            f"coarse patches are that large, got {width} x {height}. Change the area or the mask whose bounds it is, or "
            "set the mode to off."
        )


def _areas(prompts: Sequence[dict[str, Any]], dims: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield rows and columns of every prompt's area, found by the host's own code; it changes only the list."""
    found = list(prompts)
    comfy.samplers.resolve_areas_and_cond_masks_multidim(found, torch.Size(dims), torch.device("cpu"))
    for own in found:
        if "area" in own:
            area = comfy.samplers.add_area_dims(list(own["area"]), len(dims))
            sizes, starts = area[: len(dims)], area[len(area) // 2 :]
            rows, columns = [
                min(size, length - start) for size, length, start in zip(sizes, dims, starts, strict=False)
            ][-2:]
            yield rows, columns
