"""IMAGEs of the host -> single pictures, none of them copied that is as it should be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor

from ...data.picture_checks import is_transparent, values_out_of_range
from ...data.remarks import Labels
from ...errors import InvalidInputError

_COLOURS = (3, 4)  # the fourth is alpha


class Pictures(Sequence[Tensor]):
    """Single pictures, each (H, W, 3), float32 in [0, 1] on the CPU.

    A folder of pictures is the largest thing in memory beside the model, and the host keeps it. So a picture is a view of what
    came in. One of another dtype or device, or with values that overshoot, is converted each time that it is asked for.

    Args:
        images: IMAGEs, batches of pictures of equal size.
        names: Their file names, or none.

    Attributes:
        labels: What the pictures are called.
        transparent: Which have transparent parts; those are shown in the colours under them.

    Raises:
        InvalidInputError: If there is no picture, or one is not a picture on the scale from 0 to 1.
    """

    def __init__(self, images: Sequence[Any], names: Sequence[str] = ()) -> None:
        self._given = [picture for batch in _numbered(images) for picture in batch]
        if not self._given:
            raise InvalidInputError("No pictures came in. Connect Load Image or a dataset node to `images`.")
        self.labels = Labels(len(self._given), names)
        self._as_given, self.transparent = [], []
        for index, picture in enumerate(self._given):
            self._as_given.append(_require_picture(self.labels.full(index), picture))
            if picture.shape[-1] > 3 and is_transparent(picture[..., 3]):
                self.transparent.append(index)

    def __len__(self) -> int:
        return len(self._given)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...

    @overload
    def __getitem__(self, index: slice) -> list[Tensor]: ...

    def __getitem__(self, index: int | slice) -> Tensor | list[Tensor]:
        if isinstance(index, slice):
            return [self[one] for one in range(*index.indices(len(self)))]
        picture = self._given[index][..., :3]
        return picture if self._as_given[index] else picture.to("cpu", torch.float32).clamp(0.0, 1.0)

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Height and width of each in pixels."""
        return [(picture.shape[0], picture.shape[1]) for picture in self._given]


def _numbered(images: Sequence[Any]) -> list[Tensor]:
    """Return IMAGEs whose shape is one; the first that is not is named by the number of its first picture."""
    batches: list[Tensor] = []
    for batch in images:
        number = sum(map(len, batches)) + 1
        if not isinstance(batch, Tensor):
            raise InvalidInputError(
                f"Picture {number} is not a picture but a {type(batch).__name__}. Connect Load Image or a dataset node."
            )
        if batch.ndim != 4 or batch.shape[-1] not in _COLOURS or 0 in batch.shape[1:]:
            raise InvalidInputError(
                f"Picture {number} must come in the shape (pictures, rows, columns, 3 colours), got {tuple(batch.shape)}. "
                "Connect Load Image or a dataset node."
            )
        batches.append(batch)
    return batches


def _require_picture(name: str, picture: Tensor) -> bool:
    """Check the values of a picture; return whether they can be used as they are."""
    if not picture.is_floating_point():
        kind = str(picture.dtype).removeprefix("torch.")
        raise InvalidInputError(
            f"{name} holds values of the type {kind}; pictures are floating-point numbers from 0 to 1. "
            "Load it with Load Image or a dataset node."
        )
    colours = picture[..., :3].to("cpu", torch.float32)
    if not torch.isfinite(colours).all():
        raise InvalidInputError(f"{name} contains NaN or Inf. Check the node that made it.")
    found = values_out_of_range(colours)
    if found:
        raise InvalidInputError(
            f"{name} has values from {found[0]:.3g} to {found[1]:.3g}; pictures are 0 to 1. "
            "Check the node that made it, or load it with Load Image."
        )
    low, high = colours.aminmax()
    in_place = picture.dtype == torch.float32 and picture.device.type == "cpu"
    return in_place and bool(low >= 0.0) and bool(high <= 1.0)
