"""Find where the tokens of reference pictures are in the calls of a model whose layout is known without them.

The model runs once up to the first block of every list, on two rows that differ in the latent only. Where they differ,
the tokens are the picture's; how many others there are, and on which side, shows where the references are. No block is
loaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ...blocks.stand_ins import PassThrough
from ...blocks.token_places import ListLayout, PlacedBlockIO, References
from ...errors import UnsupportedModelError
from ..families.block_lists import block_lists
from ..families.followed import ModelLayout
from .adapted_dit import AdaptedDit
from .call_layout import ROWS, differing_rows


def place_references(
    dit: AdaptedDit, tree: nn.Module, layout: ModelLayout, latent_shape: Sequence[int], caption: int
) -> ModelLayout:
    """Return the layout with the places of the references.

    Args:
        dit: The model, with ``layout`` as its layout.
        tree: The diffusion model.
        layout: The layout without references.
        latent_shape: (C, H, W) of the latents that will be denoised.
        caption: Index of a caption that carries references.

    Raises:
        UnsupportedModelError: If the model does not look at references, or their place cannot be told.
    """
    counts = {name: len(list(tree.get_submodule(name).children())) for name in block_lists(tree)}
    texts = dit.adapter.text_tokens(dit.text_length(caption))
    num_img = dit.image_tokens(*latent_shape[1:])
    places: dict[str, ListLayout] = {}
    for name, found in layout.lists.items():
        seen = _First()
        passing = {
            f"{other}.{index}": PassThrough(PlacedBlockIO(known, lambda: 0))
            for other, known in layout.lists.items()
            for index in range(counts[other])
        }
        _reach(dit, {**passing, f"{name}.0": seen}, latent_shape, caption)
        tokens = found.img.as_tokens(found.img.entering(seen.args, seen.kwargs))
        others = tokens.shape[1] - num_img - (texts if found.joined else 0)
        expected = dit.text_tokens(caption) - texts
        places[name] = replace(found, references=_place(dit, found, tokens, num_img, others, expected))
    return replace(layout, lists=places)


def overwriting(layout: ModelLayout) -> ModelLayout:
    """Return the layout of a model whose blocks run on copies of their tokens, because they may overwrite them."""
    return replace(layout, lists={name: replace(found, overwrites=True) for name, found in layout.lists.items()})


class _Reached(Exception):
    """The block to be looked at has been called."""


class _First(nn.Module):
    """In the place of a block: keeps what it is given and ends the pass."""

    def __init__(self) -> None:
        super().__init__()
        self.args: tuple = ()
        self.kwargs: Mapping[str, Any] = {}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.args, self.kwargs = args, kwargs
        raise _Reached


def _reach(dit: AdaptedDit, modules: Mapping[str, nn.Module], latent_shape: Sequence[int], caption: int) -> None:
    latents = torch.randn(ROWS, *latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode(False), torch.no_grad(), dit.running(modules) as denoise:
        try:
            denoise(latents.to(dit.device), torch.full((ROWS,), 0.5, device=dit.device), [caption] * ROWS)
        except _Reached:
            pass


def _place(dit: AdaptedDit, layout: ListLayout, tokens: Tensor, num_img: int, others: int, expected: int) -> References:
    """Return where the references are in one list's image tokens (2, N, D)."""
    if not others:
        raise UnsupportedModelError(
            f"{dit.adapter.title} models do not look at the reference pictures that the captions carry. Disconnect the "
            'references, or choose an "Edit Model Reference Method".'
        )
    differ = differing_rows(*tokens)
    first, total = int(differ.int().argmax()), tokens.shape[1]
    if others == expected and differ[first : first + num_img].all() and int(differ.sum()) == num_img:
        if layout.joined == "text first" and first in (total - num_img, total - num_img - others):
            return "" if first == total - num_img else "last"
        if layout.joined == "image first" and first in (0, others):
            return "" if not first else "first"
        if not layout.joined and first in (0, others):
            return "first" if first else "last"
    raise UnsupportedModelError(
        f"The blocks of {dit.adapter.title} get {others} tokens of reference pictures where {expected} were expected, or "
        "not beside those of the picture, so the model cannot be trained with references. Disconnect them."
    )
