"""Give the tokens of a strip their real positions for one call; one class per way in which models store positions.

A strip is a latent that is one token high (``ralu.token_grid``). A model would treat its tokens as one row of a
picture. Where positions are rotated into queries and keys, a hook on the module that computes the rotations passes it
other coordinates; where they come from a table that is added once, an object patch of the MODEL selects other rows.
Nothing else in the model is touched, and outside :meth:`TokenPositions.placed` it is unchanged.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...ralu.token_grid import TokenPlaces

Rewrite = Callable[[Tensor, TokenPlaces], Tensor]


class TokenPositions(ABC):
    """How a family's tokens get their positions."""

    def prepare(self, patcher: Any) -> None:  # noqa: B027  most families need nothing
        """Put object patches onto a clone of the MODEL, before it is loaded."""

    @abstractmethod
    def placed(self, places: TokenPlaces, options: Mapping[str, Any]) -> Any:
        """Return a context in which the model's image tokens are at ``places``.

        Args:
            places: Places of the tokens, in the order in which the model sees them.
            options: transformer_options of the call; a change of scale by another node is kept.
        """


class RotaryPositions(TokenPositions):
    """Positions that a module turns into rotations.

    Args:
        embedder: That module; its first argument holds coordinates, shape (1 or B, tokens, axes).
        rewrite: (coordinates, places) -> coordinates, for every call of the module.
        stretched: Whether the family reads the host's options for stretching and shifting positions.
    """

    def __init__(self, embedder: nn.Module, rewrite: Rewrite, *, stretched: bool) -> None:
        self._embedder = embedder
        self._rewrite = rewrite
        self._stretched = stretched

    @contextmanager
    def placed(self, places: TokenPlaces, options: Mapping[str, Any]) -> Iterator[None]:
        if self._stretched:
            places = _scaled(places, options.get("rope_options") or {})

        def hook(_: nn.Module, args: tuple) -> tuple:
            # In float32: some families compute coordinates in the model's dtype, which may not represent half steps.
            return (self._rewrite(args[0].to(torch.float32), places), *args[1:])

        handle = self._embedder.register_forward_pre_hook(hook)
        try:
            yield
        finally:
            handle.remove()


def _scaled(places: TokenPlaces, rope: Mapping[str, float]) -> TokenPlaces:
    """Return places with the host's options for stretching and shifting applied."""
    rows = places.rows * rope.get("scale_y", 1.0) + rope.get("shift_y", 0.0)
    columns = places.columns * rope.get("scale_x", 1.0) + rope.get("shift_x", 0.0)
    return TokenPlaces(rows, columns, places.grid)


def last_tokens(coordinates: Tensor, places: TokenPlaces) -> Tensor:
    """Put the image tokens, the last ones, at ``places``; a :data:`Rewrite` for text and image in one call."""
    return _put(coordinates, places, coordinates.shape[1] - places.rows.shape[1])


def first_tokens(coordinates: Tensor, places: TokenPlaces) -> Tensor:
    """Like :func:`last_tokens`, for families that put the image first."""
    return _put(coordinates, places, 0)


def _put(coordinates: Tensor, places: TokenPlaces, first: int) -> Tensor:
    """Return coordinates with ``places`` from token ``first`` on."""
    coordinates = _for_samples(coordinates, places)
    row = min(1, coordinates.shape[-1] - 2)  # after the time axis, if there is one
    tokens = slice(first, first + places.rows.shape[1])
    coordinates[:, tokens, row] = places.rows.to(coordinates.device)
    coordinates[:, tokens, row + 1] = places.columns.to(coordinates.device)
    return coordinates


def centred_tokens(coordinates: Tensor, places: TokenPlaces) -> Tensor:
    """Like :func:`last_tokens`, for coordinates counted from the picture's centre, with the text beyond its border."""
    height, width = places.grid
    centred = TokenPlaces(places.rows - height // 2, places.columns - width // 2, places.grid)
    coordinates = last_tokens(coordinates, centred)
    num_text = coordinates.shape[1] - places.rows.shape[1]
    border = max(height // 2, width // 2)
    text = torch.arange(border, border + num_text, device=coordinates.device, dtype=coordinates.dtype)
    coordinates[:, :num_text] = text[:, None]
    return coordinates


def last_tokens_around_middle(coordinates: Tensor, places: TokenPlaces) -> Tensor:
    """Like :func:`last_tokens`, for coordinates counted from the picture's middle, the larger half of an odd side first."""
    return last_tokens(coordinates, _around_middle(places))


def first_tokens_around_middle(coordinates: Tensor, places: TokenPlaces) -> Tensor:
    """Like :func:`last_tokens_around_middle`, for the image first and the text after it, beyond the picture's border."""
    coordinates = first_tokens(coordinates, _around_middle(places))
    num_img = places.rows.shape[1]
    border = max(length // 2 for length in places.grid)
    text = torch.arange(border, border + coordinates.shape[1] - num_img, device=coordinates.device)
    coordinates[:, num_img:] = text[:, None].to(coordinates)
    return coordinates


def _around_middle(places: TokenPlaces) -> TokenPlaces:
    height, width = (length - length // 2 for length in places.grid)
    return TokenPlaces(places.rows - height, places.columns - width, places.grid)


def first_tokens_of_image(coordinates: Tensor, places: TokenPlaces) -> Tensor:
    """Put the image tokens, the first ones of their call, at ``places``; leave the call for text unchanged.

    For families that place text and image in two calls and pad both at the end. On the first axis text tokens count up,
    while all tokens of an image have the same coordinate.
    """
    is_text = coordinates.shape[1] < places.rows.shape[1] or bool((coordinates[0, 0] != coordinates[0, 1])[0])
    return _for_samples(coordinates, places) if is_text else first_tokens(coordinates, places)


def _for_samples(coordinates: Tensor, places: TokenPlaces) -> Tensor:
    """Return a copy, with one row per sample if samples differ."""
    if len(coordinates) == 1 < len(places.rows):
        return coordinates.repeat(len(places.rows), 1, 1)
    return coordinates.clone()


class TablePositions(TokenPositions):
    """Positions that are rows of a table, added to the tokens once.

    Args:
        method: Path below the model (a BaseModel) of the method that returns the rows for a latent:
            ``method((H, W), device=) -> (1, tokens, width)``, a crop from the middle of the table.
        patch: Side of a token in latent cells.
        side: Side of the table in tokens.
    """

    def __init__(self, method: str, patch: int, side: int) -> None:
        self._method, self._patch, self._side = method, patch, side
        self._places: TokenPlaces | None = None

    def prepare(self, patcher: Any) -> None:
        crop = patcher.get_model_object(self._method)

        def rows(hw: tuple[int, int], device: torch.device | None = None) -> Tensor:
            return crop(hw, device=device) if self._places is None else self._between(crop, self._places, device)

        patcher.add_object_patch(self._method, rows)

    @contextmanager
    def placed(self, places: TokenPlaces, options: Mapping[str, Any]) -> Iterator[None]:
        self._places = places
        try:
            yield
        finally:
            self._places = None

    def _between(self, crop: Callable[..., Tensor], places: TokenPlaces, device: torch.device | None) -> Tensor:
        """Return the table interpolated linearly between its rows, using one row beyond the picture if it exists."""
        border = 1 if max(places.grid) + 2 <= self._side else 0
        height, width = (length + 2 * border for length in places.grid)
        table = crop((height * self._patch, width * self._patch), device=device)[0].to(torch.float32)
        rows, columns = (x.to(table.device) + border for x in (places.rows, places.columns))
        found = torch.zeros(*rows.shape, table.shape[-1], device=table.device)
        for row, share in _neighbours(rows, height):
            for column, other in _neighbours(columns, width):
                found += (share * other)[..., None] * table[row * width + column]
        return found


class AddedTablePositions(TablePositions):
    """Positions as in :class:`TablePositions`, of a method that adds the rows itself.

    Args:
        method: Path below the model of the method: ``method(tokens, H, W) -> tokens``.
        patch: Side of a token in latent cells.
        side: Side of the table in tokens.
        width: Width of a token.
    """

    def __init__(self, method: str, patch: int, side: int, width: int) -> None:
        super().__init__(method, patch, side)
        self._width = width

    def prepare(self, patcher: Any) -> None:
        add = patcher.get_model_object(self._method)

        def crop(hw: tuple[int, int], device: torch.device | None = None) -> Tensor:
            count = math.prod(length // self._patch for length in hw)
            return add(torch.zeros(1, count, self._width, device=device), *hw)

        def added(tokens: Tensor, height: int, width: int) -> Tensor:
            if self._places is None:
                return add(tokens, height, width)
            return tokens + self._between(crop, self._places, tokens.device).to(tokens)

        patcher.add_object_patch(self._method, added)


def _neighbours(coordinates: Tensor, length: int) -> list[tuple[Tensor, Tensor]]:
    """Return the integer coordinates below and above, within the table, with their weights."""
    below = coordinates.floor()
    above_share = coordinates - below
    below = below.long()
    return [(below, 1.0 - above_share), ((below + 1).clamp(max=length - 1), above_share)]
