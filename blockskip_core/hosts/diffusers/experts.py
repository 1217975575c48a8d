"""Pipelines with two transformers that share the noise levels, such as Wan 2.2 A14B: each is trained on its own share.

The pipeline calls ``transformer`` from its ``boundary_ratio`` upward, and ``transformer_2`` below.
"""

from __future__ import annotations

from typing import Any, Literal

from ...data.schedule import TrainingSchedule
from ...errors import InvalidInputError

Component = Literal["transformer", "transformer_2"]
"""Name of a transformer in a pipeline."""
_ROUNDING = 1e-6  # of noise levels, which are drawn in float32


def noise_range(pipeline: Any, component: Component = "transformer") -> tuple[float, float]:
    """Return the lowest and the highest noise level with which a pipeline calls a transformer, for ``sigma_sampler(within=...)``.

    Raises:
        InvalidInputError: If it has no second transformer, but that is asked for.
    """
    boundary = pipeline.config.get("boundary_ratio")
    if boundary is None and component != "transformer":
        raise InvalidInputError(f"This {type(pipeline).__name__} has one transformer only. Leave out `component`.")
    if boundary is None:
        return 0.0, 1.0
    return (float(boundary), 1.0) if component == "transformer" else (0.0, float(boundary))


def require_in_range(pipeline: Any, component: Component, schedule: TrainingSchedule) -> None:
    """Check that a transformer is trained only on noise levels with which its pipeline calls it.

    Raises:
        InvalidInputError: If a draw has another one.
    """
    low, high = noise_range(pipeline, component)
    outside = next((draw.sigma for draw in schedule if not low - _ROUNDING <= draw.sigma <= high + _ROUNDING), None)
    if outside is not None:
        raise InvalidInputError(
            f"The pipeline calls its {component} with noise levels of {low:g} to {high:g} only, because two transformers share "
            f"them, and the schedule has one of {outside:.3g}. Give within=noise_range(pipeline, {component!r}) to "
            "sigma_sampler, and `component` wherever the other transformer is meant."
        )
