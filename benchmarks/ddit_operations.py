"""Operations of coarse steps, counted on FLUX.1-dev at full size, without weights and without a GPU."""

from __future__ import annotations

from typing import Any

from ralu_operations import SIDE, forward

TEXT_TOKENS = 512
RANK, CHANNELS, PATCH = 32, 16, 2
STEPS = 50
PAPER = 2.18  # reported ratio of seconds


def adapter_parameters(scale: int) -> int:
    """Return the parameters of FLUX.1-dev's adapter for a patch size: LoRA on feed-forward layers, embeddings, block."""
    width, ratio, double, single = 3072, 4, 19, 38
    hidden = width * ratio
    of_double = 2 * 2 * RANK * (width + hidden)  # two streams, two layers
    of_single = RANK * (width + 3 * width + hidden) + RANK * (width + hidden + width)
    numbers = CHANNELS * (PATCH * scale) ** 2
    ends = 2 * numbers * width + width + numbers + 256 * (2 * numbers + 3)
    return double * of_double + single * of_single + ends


def coarse(scale: int) -> int:
    """Count a coarse step at 1024 px, with the adapter's own products."""
    tokens = (SIDE // scale) ** 2
    return forward("FLUX.1-dev", tokens, TEXT_TOKENS).total + 2 * adapter_parameters(scale) * (tokens + TEXT_TOKENS)


def rows() -> list[dict[str, Any]]:
    """Return operations of a step by patch size, and how many of 50 steps must be coarse for the paper's ratio."""
    own = forward("FLUX.1-dev", SIDE**2, TEXT_TOKENS).total
    found = [{"what": "a step with the model's own patches", "operations": own, "ratio": 1.0, "tokens": SIDE**2}]
    for scale in (2, 4):
        count = coarse(scale)
        found.append({
            "what": f"a step with patches of {scale}x", "operations": count, "ratio": own / count,
            "tokens": (SIDE // scale) ** 2, "parameters": adapter_parameters(scale),
        })  # fmt: skip
    for scale in (2, 4):
        share = (1.0 - 1.0 / PAPER) / (1.0 - coarse(scale) / own)
        found.append({"what": f"coarse steps of {STEPS} for 1/{PAPER}, all {scale}x", "steps": STEPS * share})
    return found
