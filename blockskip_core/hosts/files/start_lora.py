"""Start adapters from any trainer's LoRA: convert its names and ranks to ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...adapters.lora import LoraAdapters
from ...adapters.low_rank import LowRank, filled_up, joined
from ...errors import LoraFileError
from .applied_lora import HostPatches, listed
from .patch_shapes import weight_of, without_misfits

_INSTEAD = "Apply it to the MODEL with Load LoRA before all BlockSkip nodes, and train a new LoRA on top"


def lora_to_start_from(patcher: Any, lora: Mapping[str, Tensor], adapters: LoraAdapters) -> dict[str, Tensor]:
    """Return a LoRA in any of the host's formats as peft tensors for ``adapters``.

    Layers that other programs split are joined again. A layer of a lower rank is padded with the adapters' own initial
    directions, which have no effect yet.

    Raises:
        LoraFileError: If it has nothing for the model, changes more than is trained here, or needs a higher rank.
    """
    read = HostPatches(patcher, lora)
    if not read.patches:
        raise LoraFileError(
            "The LoRA to start from has nothing for this model: it was trained for another kind of model. "
            f"{read.passed_over()}".rstrip()
        )
    _require_trainable(read, adapters)
    without_misfits(patcher, read.patches)  # its other result is empty: there are only plain LoRAs now
    changes = {name: joined(parts, adapters.up(name).shape[0]) for name, parts in _parts(read).items()}
    for name, change in changes.items():
        if not (torch.isfinite(change.up).all() and torch.isfinite(change.down).all()):
            raise LoraFileError(f"The LoRA to start from is damaged: its numbers for {name} are not all finite.")
    _require_rank(changes, adapters)
    state: dict[str, Tensor] = {}
    for name, change in changes.items():
        filled = filled_up(change, adapters.down(name).detach().cpu())
        state[f"{name}.lora_A.weight"] = filled.down
        state[f"{name}.lora_B.weight"] = filled.up / adapters.scale
    return state


def _require_trainable(read: HostPatches, adapters: LoraAdapters) -> None:
    """Refuse everything that would be lost, with a message for each kind."""
    layers = sorted({_layer(key) for key in read.patches} - set(adapters.names))
    if layers:
        raise LoraFileError(
            f"The LoRA to start from also changes layers that are not trained here ({listed(layers)}). {_INSTEAD}; or "
            "keep more blocks, or choose other targets."
        )
    for key, patch in read.patches.items():
        if kind := _other_kind(patch):
            raise LoraFileError(f"The LoRA to start from is not a plain LoRA: {_layer(key)} has {kind}. {_INSTEAD}.")
    if read.unread:
        raise LoraFileError(
            f"The LoRA to start from has parts that cannot be trained here. {read.passed_over()} {_INSTEAD}."
        )


def _other_kind(patch: Any) -> str:
    """Return a description of a patch that is not just up, down and alpha; otherwise empty."""
    if isinstance(patch, tuple):
        return {"diff": "a full-rank change of its weight", "set": "a replaced weight"}.get(patch[0], f"a {patch[0]}")
    name = getattr(patch, "name", "")
    if name != "lora":
        return {"loha": "a LoHa", "lokr": "a LoKr", "glora": "a GLoRA", "oft": "an OFT", "boft": "a BOFT"}.get(
            name, f"an adapter of the kind {name or type(patch).__name__}"
        )
    middle, magnitude, widened = (*patch.weights[3:], None, None, None)[:3]
    if middle is not None:
        return "a third matrix, as in LoCon"
    if magnitude is not None:
        return "a magnitude vector, as in DoRA"
    return "" if widened is None else "more inputs or outputs than the model"


def _layer(key: Any) -> str:
    """Return the layer that a patch changes; a bias keeps its suffix."""
    return weight_of(key).removeprefix("diffusion_model.").removesuffix(".weight")


def _parts(read: HostPatches) -> dict[str, list[LowRank]]:
    """Return layer -> its changed parts, with the scales folded in."""
    found: dict[str, list[LowRank]] = {}
    for key, patch in read.patches.items():
        up, down, alpha = patch.weights[:3]
        scale = 1.0 if alpha is None else float(alpha) / len(down)
        first_row = 0 if isinstance(key, str) or key[1] is None else key[1][1]
        part = LowRank(up.float().flatten(1) * scale, down.float().flatten(1), first_row)
        found.setdefault(_layer(key), []).append(part)
    return found


def _require_rank(changes: Mapping[str, LowRank], adapters: LoraAdapters) -> None:
    needed = max(change.rank for change in changes.values())
    if all(change.rank <= adapters.rank_of(name) for name, change in changes.items()):
        return
    least = min(change.rank for change in changes.values())
    ranks = f"rank {needed}" if least == needed else f"ranks from {least} to {needed}, as the layers trained here"
    raise LoraFileError(
        f"The LoRA to start from has {ranks}, but rank is {adapters.settings.rank} here. Set rank to {needed} or more."
    )
