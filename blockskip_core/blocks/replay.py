"""The data replayed in place of skipped blocks: stored per draw, and set before each forward.

Source: arXiv 2603.20755, Sec. 3.3, Eq. 3: ``f'_{i+l} = f'_i + (f_{i+l} - f_i)``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..model import TokenStreams
from .linear_response import LinearResponse


@dataclass(frozen=True)
class Residual:
    """What is replayed for one draw, with batch axis 1.

    Attributes:
        front: Tokens leaving the front span, or None if nothing is skipped there.
        back: Image residual of the back span, or None.
        back_txt: Text residual of the back span, if a kept block after it reads the text.
    """

    front: TokenStreams | None
    back: Tensor | None
    back_txt: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by the names under which they are stored."""
        named = {} if self.front is None else {f"front.{name}": x for name, x in self.front.tensors().items()}
        added = {"back": self.back, "back.txt": self.back_txt}
        return {**named, **{name: x for name, x in added.items() if x is not None}}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Residual:
        """Build a residual from what :meth:`tensors` returned."""
        front = TokenStreams(tensors["front.img"], tensors.get("front.txt")) if "front.img" in tensors else None
        return cls(front, tensors.get("back"), tensors.get("back.txt"))

    @staticmethod
    def cat(residuals: Iterable[Residual]) -> Residual:
        """Return the residuals joined along the batch axis."""
        residuals = list(residuals)
        fronts = [r.front for r in residuals if r.front is not None]
        backs = [r.back for r in residuals if r.back is not None]
        texts = [r.back_txt for r in residuals if r.back_txt is not None]
        return Residual(
            TokenStreams.cat(fronts) if fronts else None,
            torch.cat(backs) if backs else None,
            torch.cat(texts) if texts else None,
        )


@dataclass
class Replay:
    """What the weightless stand-ins write into the stream; set before every forward.

    Attributes:
        front: Tokens leaving the front span, or None if nothing is skipped there.
        back: Residual of the image tokens over the back span, shape (B, N, D), or None.
        back_txt: Residual of the text tokens, shape (B, L, D), or None if nothing reads them afterwards.
        response: The back span's answer to a change of its input, or None if the back residual is a constant.
        bands: The response's band of each row, shape (B,); None without a response.
    """

    front: TokenStreams | None = None
    back: Tensor | None = None
    back_txt: Tensor | None = None
    response: LinearResponse | None = None
    bands: Tensor | None = None
