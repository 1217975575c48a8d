"""Everything that determines a run's residuals, and how much space they need.

A :class:`ResidualSet` is what the precomputing node passes to the training node: small, and complete enough that a source
can compute whatever is missing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import psutil

from ..data.latents import Latents, total_bytes
from ..data.schedule import TrainingSchedule
from ..errors import CacheError, InvalidInputError
from ..model import SkippableDit
from ..selection.selection import BlockSelection
from ..units import format_bytes
from .back_response import BACK_RESIDUALS, BackResidual, response_bytes
from .cache import CacheIdentity, require_free_space, stored_draws
from .format import RESIDUAL_FORMATS, ResidualShape
from .housekeeping import KEPT_CACHES, remove_old_caches

Storage = Literal["disk", "chunked", "on the fly"]
STORAGES: tuple[str, ...] = get_args(Storage)
_ITEMSIZES = {"torch.float64": 8, "torch.float32": 4}  # bytes per number of a token stream; 2 for all others

PhaseProgress = Callable[[str, int, int], None]  # (phase, done, total); may raise to interrupt


@dataclass(frozen=True, kw_only=True)
class ResidualSet:
    """Everything that determines a run's residuals.

    Attributes:
        schedule: The draws.
        latents: Clean latents of all draws in the model's own scale, each (C, H, W).
        selection: Blocks to be skipped.
        captions: Conditionings, opaque to this module.
        identity: What the residuals are computed from.
        storage: Where they are kept.
        chunk_size: Number of draws that go through the model's blocks together, and that are kept at a time if chunked.
        folder: This set's folder.
        family: The model family.
        back_residual: "constant" is the paper's; "linear" follows the LoRA to first order, see ``back_response``; both
            are ignored on the fly. "exact" requires a selection that freezes its last blocks and skips none of them.
        remarks: Anything odd about the pictures and captions, in sentences for the run's summary.
        dropped: Number of draws whose caption is the empty one.
    """

    schedule: TrainingSchedule
    latents: Latents = field(repr=False)
    selection: BlockSelection
    captions: Sequence[Any] = field(repr=False)
    identity: CacheIdentity
    storage: Storage
    chunk_size: int
    folder: Path
    family: str
    back_residual: BackResidual = "constant"
    remarks: Sequence[str] = ()
    dropped: int = 0

    def __post_init__(self) -> None:
        if self.back_residual not in BACK_RESIDUALS:
            raise InvalidInputError(
                f"back_residual must be one of {', '.join(BACK_RESIDUALS)}, got {self.back_residual!r}."
            )
        if self.back_residual == "exact" and self.selection.back:
            raise InvalidInputError(
                f"An exact back freezes its blocks, but this selection skips {self.selection.back} of them."
            )
        if self.identity.residual_format not in RESIDUAL_FORMATS:
            raise InvalidInputError(
                f"residual_format must be one of {', '.join(RESIDUAL_FORMATS)}, got {self.identity.residual_format!r}."
            )
        if self.storage not in STORAGES:
            raise InvalidInputError(f"storage must be one of {', '.join(STORAGES)}, got {self.storage!r}.")
        if self.chunk_size < 1:
            raise InvalidInputError(f"chunk_size must be at least 1, got {self.chunk_size}.")

    @property
    def on_dropped(self) -> str:
        """How many draws have the empty caption, in words; "" if none have."""
        if not self.dropped:
            return ""
        total = len(self.schedule)
        return f"{self.dropped} of {total} training examples ({self.dropped / total:.1%}) have the empty caption"


def residual_bytes(dit: SkippableDit, residuals: ResidualSet, draws: Sequence[int]) -> int:
    """Return the bytes that the residuals of ``draws`` will take: exact, apart from file headers and latents."""

    def shape(latent: tuple[int, ...], txt_tokens: int) -> ResidualShape:
        channels, rows, columns = latent
        return ResidualShape(
            front=residuals.selection.front > 0,
            back=residuals.selection.back > 0,
            back_has_text=residuals.selection.back_has_text,
            img_tokens=dit.image_tokens(rows, columns, channels),
            txt_tokens=txt_tokens,
            width=dit.width,
            itemsize=_itemsize(residuals),
            form=residuals.identity.residual_format,
        )

    forms = Counter(
        (tuple(residuals.latents[draw].shape), dit.text_tokens(residuals.schedule[draw].caption)) for draw in draws
    )
    stored = sum(shape(*form).num_bytes(count) for form, count in forms.items())
    if not wants_response(residuals):
        return stored
    return stored + response_bytes(len(residuals.schedule), dit.width, _itemsize(residuals))


def _itemsize(residuals: ResidualSet) -> int:
    return _ITEMSIZES.get(residuals.identity.dtype, 2)


def wants_response(residuals: ResidualSet) -> bool:
    """Return whether a linear response is fitted, which needs a skipped back span."""
    return residuals.back_residual == "linear" and residuals.selection.back > 0


def require_room(residuals: ResidualSet, dit: SkippableDit) -> None:
    """Check that there is space for latents and residuals before anything is computed; latents may be on ``meta``.

    Raises:
        InvalidInputError: If not, with predicted and free bytes.
    """
    free = psutil.virtual_memory().available
    needed = 2 * total_bytes(residuals.latents)  # twice, because they are joined in the end
    if needed > free:
        raise InvalidInputError(
            f"The latents of {len(residuals.schedule)} training examples need {format_bytes(needed)} of host memory, "
            f"but {format_bytes(free)} are free. Use fewer training examples."
        )
    if residuals.storage == "chunked":
        require_disk_space(residuals, dit, range(min(residuals.chunk_size, len(residuals.schedule))))
    elif residuals.storage == "disk":
        _require_disk_space_for_all(residuals, dit)


def _require_disk_space_for_all(residuals: ResidualSet, dit: SkippableDit) -> None:
    """Check that the disk has space for the draws that an unfinished cache has not yet; old caches make room if needed."""
    try:
        stored = stored_draws(residuals.folder, residuals.identity)
    except CacheError:
        stored = set()
    draws = [draw for draw in range(len(residuals.schedule)) if draw not in stored]
    try:
        require_disk_space(residuals, dit, draws)
    except InvalidInputError:  # the caches that writing this one would remove may be in its way
        remove_old_caches(residuals.folder.parent, keep=KEPT_CACHES - 1, exclude=residuals.folder.name)
        require_disk_space(residuals, dit, draws)


def require_disk_space(residuals: ResidualSet, dit: SkippableDit, draws: Sequence[int]) -> None:
    """Check that the disk has space for the residuals and latents of ``draws``.

    Raises:
        InvalidInputError: If not, with predicted and free bytes.
    """
    latents = total_bytes([residuals.latents[draw] for draw in draws])
    require_free_space(residuals.folder, residual_bytes(dit, residuals, draws) + latents)
