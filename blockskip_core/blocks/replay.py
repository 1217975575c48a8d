"""What is replayed in the place of skipped blocks: stored for one draw, and set for one forward.

Source: arXiv 2603.20755, Sec. 3.3, Eq. 3: ``f'_{i+l} = f'_i + (f_{i+l} - f_i)``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..model import TokenStreams


@dataclass(frozen=True)
class Residual:
    """What is replayed for one draw, with batch axis 1.

    Attributes:
        front: Tokens leaving the front span, or None if nothing is skipped there.
        back: Image residual of the back span, or None.
    """

    front: TokenStreams | None
    back: Tensor | None

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by the names under which they are stored."""
        named = {} if self.front is None else {f"front.{name}": x for name, x in self.front.tensors().items()}
        return named if self.back is None else {**named, "back": self.back}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Residual:
        """Build a residual from what :meth:`tensors` returned."""
        front = TokenStreams(tensors["front.img"], tensors.get("front.txt")) if "front.img" in tensors else None
        return cls(front, tensors.get("back"))

    @staticmethod
    def cat(residuals: Iterable[Residual]) -> Residual:
        """Return the residuals joined along the batch axis."""
        residuals = list(residuals)
        front = None if residuals[0].front is None else TokenStreams.cat([r.front for r in residuals])
        back = None if residuals[0].back is None else torch.cat([r.back for r in residuals])
        return Residual(front, back)


@dataclass
class Replay:
    """What the weightless stand-ins put into the stream; set before every forward.

    Attributes:
        front: Tokens leaving the front span, or None if nothing is skipped there.
        back: Residual of the image tokens over the back span, shape (B, N, D), or None.
        response: J of ``back_response``, shape (D, D), or None if the back residual is a constant.
    """

    front: TokenStreams | None = None
    back: Tensor | None = None
    response: Tensor | None = None
