"""How stored residuals are written: as they are, or in eight bits with a scale per token.

    exact   the dtype of the token streams; the replayed front is then the model's own, to the last bit
    int8    q = round(x / s), s = max|x| / 127 over the token's D numbers: an error of at most s / 2 for each number
    fp8     q = e4m3(x / s), s = max|x| / 448: a relative error of at most 1 / 16 for each number, down to the
            smallest normal number of the format, s / 64

Eight bits halve the disk and what is read in each step for models that run in bf16. A token's largest numbers are far
above its usual ones in diffusion transformers, which is why the scale is the token's own. Not in the paper.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

ResidualFormat = Literal["exact", "int8", "fp8"]
RESIDUAL_FORMATS: tuple[str, ...] = get_args(ResidualFormat)
SCALE_BYTES = 4  # float32, one for each token
SCALE = ".scale"
_LARGEST = {"int8": 127.0, "fp8": 448.0}


@dataclass(frozen=True, kw_only=True)
class ResidualShape:
    """What is stored for one draw, as far as its size goes.

    Attributes:
        front, back: Whether a front and a back span are skipped.
        img_tokens: N.
        txt_tokens: L, 0 for families whose text is not part of the stream.
        width: D.
        itemsize: Bytes per number of an exact residual.
        form: How the numbers are written.
    """

    front: bool
    back: bool
    img_tokens: int
    txt_tokens: int
    width: int
    itemsize: int
    form: ResidualFormat = "exact"

    def num_bytes(self, draws: int = 1) -> int:
        """Return the bytes that this many draws take: exact, apart from file headers and latents."""
        tokens = (self.img_tokens + self.txt_tokens) * self.front + self.img_tokens * self.back
        return draws * tokens * (self.width * self.itemsize if self.form == "exact" else self.width + SCALE_BYTES)

    def response_bytes(self) -> int:
        """Return the bytes of the back span's linear response (see ``back_response``), once for all draws."""
        return self.back * self.width**2 * self.itemsize


def packed(tensors: Mapping[str, Tensor], form: ResidualFormat) -> dict[str, Tensor]:
    """Return residual tensors, each (1, tokens, D), as they are stored; eight-bit ones come with their scales.

    Args:
        tensors: Name -> tensor.
        form: The format.
    """
    if form == "exact":
        return dict(tensors)
    stored: dict[str, Tensor] = {}
    for name, x in tensors.items():
        scale = x.float().abs().amax(-1, keepdim=True) / _LARGEST[form]
        scaled = x.float() / torch.where(scale > 0, scale, 1.0)
        stored[name] = scaled.round().to(torch.int8) if form == "int8" else scaled.to(torch.float8_e4m3fn)
        stored[name + SCALE] = scale
    return stored


def unpacked(stored: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return what :func:`packed` stored, eight-bit tensors in ``dtype``."""
    return {
        name: (x.float() * stored[name + SCALE]).to(dtype) if name + SCALE in stored else x
        for name, x in stored.items()
        if not name.endswith(SCALE)
    }
