"""How stored residuals are written: unchanged, or in eight bits with a scale per token.

    exact   the dtype of the token streams; the replayed front is then bit-identical to the model's own
    int8    q = round(x / s), s = max|x| / 127 over the token's D numbers: an error of at most s / 2 for each number
    fp8     q = e4m3(x / s), s = max|x| / 448: a relative error of at most 1 / 16 for each number, down to the
            smallest normal number of the format, s / 64

For models that run in bf16, eight bits halve the disk space and the bytes read in each step. In diffusion transformers
a token's largest numbers are far above its typical ones, so every token has its own scale. Not in the paper.
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
    """The sizes that determine how many bytes are stored for one draw.

    Attributes:
        front, back: Whether a front and a back span are skipped.
        back_has_text: Whether the back's residual has text tokens too.
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
    back_has_text: bool = False

    def num_bytes(self, draws: int = 1) -> int:
        """Return the bytes of ``draws`` draws: exact, apart from file headers and latents."""
        tokens = (self.img_tokens + self.txt_tokens) * self.front + self.img_tokens * self.back
        tokens += self.txt_tokens * self.back_has_text
        return draws * tokens * (self.width * self.itemsize if self.form == "exact" else self.width + SCALE_BYTES)


def packed(tensors: Mapping[str, Tensor], form: ResidualFormat) -> dict[str, Tensor]:
    """Return residual tensors, each (1, tokens, D), in stored form; eight-bit tensors come with their scales.

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
    """Undo :func:`packed`, returning eight-bit tensors in ``dtype``."""
    return {
        name: (x.float() * stored[name + SCALE]).to(dtype) if name + SCALE in stored else x
        for name, x in stored.items()
        if not name.endswith(SCALE)
    }
