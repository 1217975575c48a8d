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
from typing import Literal, get_args

import torch
from torch import Tensor

ResidualFormat = Literal["exact", "int8", "fp8"]
RESIDUAL_FORMATS: tuple[str, ...] = get_args(ResidualFormat)
SCALE_BYTES = 4  # float32, one for each token
SCALE = ".scale"
_LARGEST = {"int8": 127.0, "fp8": 448.0}


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
