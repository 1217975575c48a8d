"""Splits the host's IMAGEs into single pictures, and copies only those that must be converted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...data.on_access import OnAccess
from ...data.picture_checks import is_transparent, values_out_of_range
from ...data.remarks import Labels
from ...errors import InvalidInputError

_COLOURS = (3, 4)  # the fourth is alpha


class Pictures(OnAccess):
    """Single pictures, each (H, W, 3), float32 in [0, 1] on the CPU.

    After the model, a folder of pictures is the largest thing in memory, and the host keeps it. So each picture is a
    view of the input. A picture of another dtype or device, or with overshooting values, is converted on each access.

    Args:
        images: IMAGEs, batches of pictures of equal size.
        names: Their file names; empty if unknown.
        kind: What they are called in messages.
        input_name: The input that they came in by.

    Attributes:
        labels: The pictures' names.
        transparent: Pictures with transparent parts, of which the colours under the transparency are used.

    Raises:
        InvalidInputError: If there is no picture, or one is not on the scale from 0 to 1.
    """

    def __init__(
        self, images: Sequence[Any], names: Sequence[str] = (), kind: str = "Picture", input_name: str = "images"
    ) -> None:
        self._given = [picture for batch in _numbered(images, kind) for picture in batch]
        if not self._given:
            raise InvalidInputError(
                f"No pictures came in. Connect Load Training Folder or Load Image to `{input_name}`."
            )
        self.labels = Labels(len(self._given), names, kind)
        self._as_given, self.transparent = [], []
        for index, picture in enumerate(self._given):
            self._as_given.append(_require_picture(self.labels.full(index), picture))
            if picture.shape[-1] > 3 and is_transparent(picture[..., 3]):
                self.transparent.append(index)

    def __len__(self) -> int:
        return len(self._given)

    def one(self, index: int) -> Tensor:
        """Return a picture, converted if it must be."""
        picture = self._given[index][..., :3]
        return picture if self._as_given[index] else picture.to("cpu", torch.float32).clamp(0.0, 1.0)

    def is_view(self, index: int) -> bool:
        """Return whether a picture is used as it was given."""
        return self._as_given[index]

    def still(self, index: int) -> Tensor:
        """Return the picture itself; see ``Clips.still``."""
        return self.one(index)

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Height and width of each in pixels."""
        return [(picture.shape[0], picture.shape[1]) for picture in self._given]


def _numbered(images: Sequence[Any], kind: str) -> list[Tensor]:
    """Return the IMAGEs after checking their shapes; an error gives the number of the batch's first picture."""
    batches: list[Tensor] = []
    for batch in images:
        number = sum(map(len, batches)) + 1
        if not isinstance(batch, Tensor):
            raise InvalidInputError(
                f"{kind} {number} is not a picture but a {type(batch).__name__}. Connect Load Training Folder or Load Image."
            )
        if batch.ndim != 4 or batch.shape[-1] not in _COLOURS or 0 in batch.shape[1:]:
            raise InvalidInputError(
                f"{kind} {number} must come in the shape (pictures, rows, columns, 3 colours), got {tuple(batch.shape)}. "
                "Connect Load Training Folder or Load Image."
            )
        batches.append(batch)
    return batches


def _require_picture(name: str, picture: Tensor) -> bool:
    """Check the values of a picture; return whether they can be used without conversion."""
    if not picture.is_floating_point():
        kind = str(picture.dtype).removeprefix("torch.")
        raise InvalidInputError(
            f"{name} holds values of the type {kind}; pictures are floating-point numbers from 0 to 1. "
            "Load the file with Load Training Folder or Load Image."
        )
    colours = picture[..., :3].to("cpu", torch.float32)
    if not torch.isfinite(colours).all():
        raise InvalidInputError(f"{name} contains NaN or Inf. Check the node that made it.")
    found = values_out_of_range(colours)
    if found:
        raise InvalidInputError(
            f"{name} has values from {found[0]:.3g} to {found[1]:.3g}; pictures are 0 to 1. "
            "Bring it into that range, or load the file with Load Training Folder or Load Image."
        )
    low, high = colours.aminmax()
    in_place = picture.dtype == torch.float32 and picture.device.type == "cpu"
    return in_place and bool(low >= 0.0) and bool(high <= 1.0)
