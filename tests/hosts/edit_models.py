"""Families whose models look at reference pictures, with references in their captions.

The arguments that a model's class takes for them are written by hand, as in ``tiny_families``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .followed_families import FOLLOWED
from .tiny_families import FAMILIES, TinyFamily

SIDES = ((4, 6), (8, 4))  # rows and columns of the references in latent cells


def _of(latent_format: str) -> Callable[[Tensor], Tensor]:
    def scale(latent: Tensor) -> Tensor:
        import comfy.latent_formats

        return getattr(comfy.latent_formats, latent_format)().process_in(latent)

    return scale


SCALES: dict[str, Callable[[Tensor], Tensor]] = {
    "flux": lambda latent: (latent - 0.25) * 0.5,
    "flux2": lambda latent: latent,
    "klein": lambda latent: latent,
    "qwen_image": _of("Wan21"),
    "omnigen2": _of("Flux"),
    "boogu": _of("Flux"),
    "mage_flow": _of("Flux2"),
    "krea2": _of("Wan21"),
    "joyimage": _of("Wan21"),
}


def edit_model(name: str, method: str | None = None, sides: Sequence[tuple[int, int]] = SIDES) -> TinyFamily:
    """The family with references in its captions."""
    tiny = next(one for one in (*FAMILIES, *FOLLOWED) if one.name == name)
    axes = (1,) if tiny.frames else ()

    def settings(generator: torch.Generator) -> dict:
        latents = [torch.randn(1, tiny.latent_shape[0], *axes, *side, generator=generator) for side in sides]
        own = {} if method is None else {"reference_latents_method": method}
        return {**tiny.settings(generator), "reference_latents": latents, **own}

    def extra(text: Tensor, rows: Sequence[dict]) -> dict:
        given = zip(*(row["reference_latents"] for row in rows), strict=True)
        own = {} if method is None else {"ref_latents_method": method}
        return {**tiny.extra(text, rows), "ref_latents": [SCALES[name](torch.cat(latents)) for latents in given], **own}

    tokens = sum(-(-rows // patch_of(tiny)) * -(-columns // patch_of(tiny)) for rows, columns in sides)
    return replace(tiny, name=f"{name}_edit", settings=settings, extra=extra, num_text=tiny.num_text + tokens)


def patch_of(tiny: TinyFamily) -> int:
    """Side of a token in latent cells."""
    return 1 if tiny.family in ("flux2", "mageflow") else 2
