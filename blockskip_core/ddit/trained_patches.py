"""Trained patch adapters of one model, for one or more patch sizes, and their tensors by name in files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import PatchAdapterError
from .coarse_estimate import CoarseAdapter
from .connection import PatchStatistics
from .error_table import ErrorTable
from .operations import StepOperations
from .patch_adapter import PatchAdapter
from .patch_resizing import PatchResizing, ResizeKind

FILE_VERSION = 1
_STATISTICS = ("mean", "directions", "variances")


@dataclass(frozen=True)
class ModelShape:
    """The model that adapters belong to.

    Attributes:
        family: Name of the family.
        identity: Content hash of its weights.
        patch: p.
        channels: C.
        width: Of a token.
    """

    family: str
    identity: str
    patch: int
    channels: int
    width: int


@dataclass(frozen=True)
class TrainedScale:
    """The adapter of one patch size.

    Attributes:
        coarse: Resizing, statistics and trained tensors.
        lora: Layer -> (A, B with its scale folded in), which act on coarse steps only.
        errors: After the training, on held-out examples.
        fallback: Of a coarse call without any training, on the same examples.
        steps: Training steps.
    """

    coarse: CoarseAdapter
    lora: Mapping[str, tuple[Tensor, Tensor]]
    errors: ErrorTable
    fallback: ErrorTable
    steps: int = 0

    @property
    def num_parameters(self) -> int:
        """Number of trained parameters."""
        patches = [] if self.coarse.patches is None else list(self.coarse.patches.parameters())
        return sum(x.numel() for x in (*patches, *(x for pair in self.lora.values() for x in pair)))

    def on(self, device: torch.device) -> TrainedScale:
        """Return the adapter with copies of its tensors on a device, or these if they are there."""
        lora = {layer: (down.to(device), up.to(device)) for layer, (down, up) in self.lora.items()}
        return replace(self, coarse=self.coarse.on(device), lora=lora)


@dataclass(frozen=True)
class TrainedPatches:
    """The adapters of one model.

    Attributes:
        base: The model.
        scales: Scale -> adapter.
        operations: Of a call of the model, by its number of tokens.
        notes: What else is known about the training, as JSON; shown to users.
    """

    base: ModelShape
    scales: Mapping[int, TrainedScale]
    operations: StepOperations
    notes: Mapping[str, Any] = field(default_factory=dict)

    def operations_of(self, tokens: int) -> dict[int, float]:
        """Return the operations of a step, by scale, for a picture of so many of the model's own tokens."""
        coarse = {s: self.operations.coarse(tokens, s, entry.num_parameters) for s, entry in self.scales.items()}
        return {1: self.operations.own(tokens), **coarse}

    def on(self, device: torch.device) -> TrainedPatches:
        """Return the adapters with copies of their tensors on a device, or these if they are there."""
        return replace(self, scales={scale: trained.on(device) for scale, trained in self.scales.items()})

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors by their names in a file."""
        found: dict[str, Tensor] = {}
        for scale, trained in self.scales.items():
            stem = f"scale_{scale}."
            patches, statistics = trained.coarse.patches, trained.coarse.statistics
            assert patches is not None, "a trained scale has them"
            assert statistics is not None, "a trained scale has them"
            found |= {f"{stem}patches.{name}": tensor for name, tensor in patches.state_dict().items()}
            found |= {f"{stem}statistics.{name}": getattr(statistics, name) for name in _STATISTICS}
            for layer, (down, up) in trained.lora.items():
                found[f"{stem}lora.{layer}.lora_A.weight"] = down
                found[f"{stem}lora.{layer}.lora_B.weight"] = up
        return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in found.items()}

    def description(self) -> dict[str, Any]:
        """Return everything besides the tensors, as JSON."""
        scales = {
            str(scale): {
                "resize": trained.coarse.resizing.kind,
                "sigmas": list(trained.errors.sigmas),
                "errors": list(trained.errors.errors),
                "fallback_errors": list(trained.fallback.errors),
                "steps": trained.steps,
            }
            for scale, trained in self.scales.items()
        }
        about = {"version": FILE_VERSION, **vars(self.base), "scales": scales}
        return {**about, "operations": vars(self.operations), "notes": dict(self.notes)}

    @staticmethod
    def read(tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> TrainedPatches:
        """Return the adapters whose :meth:`tensors` and :meth:`description` these are.

        Raises:
            PatchAdapterError: If they do not fit each other, or are of a later version.
        """
        if about.get("version") != FILE_VERSION:
            raise PatchAdapterError(
                f"Expected patch adapters of version {FILE_VERSION}, got {about.get('version')!r}. Update this pack."
            )
        try:
            base = ModelShape(**{name: about[name] for name in ("family", "identity", "patch", "channels", "width")})
            scales = {int(scale): _scale(tensors, int(scale), base, entry) for scale, entry in about["scales"].items()}
            return TrainedPatches(base, scales, StepOperations(**about["operations"]), _notes(about["notes"]))
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise PatchAdapterError(
                f"The patch adapters are damaged ({type(error).__name__}: {error}). Train or download them again."
            ) from error


def _notes(notes: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what a file says about its training, if the numbers that are used are numbers."""
    for name in ("frames", "image_tokens"):
        value = notes.get(name, 1)
        if type(value) is not int or value < 1:
            raise ValueError(f"{name} is {value!r}")
    if notes.get("frames", 1) > 1 and "image_tokens" not in notes:
        raise ValueError("image_tokens is missing")
    return notes


def _scale(tensors: Mapping[str, Tensor], scale: int, base: ModelShape, entry: Mapping[str, Any]) -> TrainedScale:
    stem = f"scale_{scale}."
    own = {name.removeprefix(stem): tensor for name, tensor in tensors.items() if name.startswith(stem)}
    kind: ResizeKind = entry["resize"]
    resizing = PatchResizing(base.patch, scale, kind)
    patches = PatchAdapter(base.channels * resizing.side**2, base.width)
    prefix = "patches."
    patches.load_state_dict({n.removeprefix(prefix): x for n, x in own.items() if n.startswith(prefix)})
    patches.requires_grad_(False)
    statistics = PatchStatistics(*(own[f"statistics.{name}"] for name in _STATISTICS))
    lora = {}
    for name, down in own.items():
        if name.startswith("lora.") and name.endswith(".lora_A.weight"):
            layer = name.removeprefix("lora.").removesuffix(".lora_A.weight")
            lora[layer] = (down, own[f"lora.{layer}.lora_B.weight"])
    sigmas = tuple(entry["sigmas"])
    errors, fallback = (ErrorTable(sigmas, tuple(entry[name])) for name in ("errors", "fallback_errors"))
    return TrainedScale(CoarseAdapter(resizing, statistics, patches), lora, errors, fallback, int(entry["steps"]))
