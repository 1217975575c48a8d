"""Content hashes, to tell whether residuals were made from this model and these pictures and captions.

Hashing 24 GB of weights would take longer than a short training, so each weight contributes its name, shape, dtype and
256 numbers spread over it. Patches (a LoRA applied earlier) contribute in the same way, with their strengths.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import comfyui_version
import torch
from torch import Tensor, nn

from .residency import unload

SAMPLES_PER_TENSOR = 256


def model_identity(patcher: Any) -> str:
    """Return a content hash of a MODEL: its diffusion model's weights and their patches.

    The model is unloaded first: while it is loaded, patches may be merged into its weights.
    """
    unload(patcher)
    digest = _Digest()
    digest.add(type(patcher.model.diffusion_model).__name__, module_identity(patcher.model.diffusion_model))
    digest.add({key: patcher.patches[key] for key in sorted(patcher.patches)})
    for attached in (patcher.object_patches, patcher.model_options, patcher.wrappers, patcher.weight_wrapper_patches):
        digest.add(_names(attached))
    return digest.hexdigest()


def module_identity(module: nn.Module) -> str:
    """Return a content hash of a module's weights."""
    state = module.state_dict()
    own = dict(module.named_parameters())  # some packs give only sizes of packed weights in a state dict
    digest = _Digest()
    digest.add({name: own.get(name, state[name]) if state[name].is_meta else state[name] for name in sorted(state)})
    return digest.hexdigest()


def tensors_identity(tensors: Iterable[Tensor]) -> str:
    """Return a content hash of all numbers in some tensors (pictures are small enough for that)."""
    digest = _Digest(samples=None)
    digest.add(tensors if isinstance(tensors, Sequence) else list(tensors))
    return digest.hexdigest()


def conditionings_identity(conditionings: Iterable[list]) -> str:
    """Return a content hash of single conditionings, each ``[[tensor, settings]]``."""
    digest = _Digest(samples=None)
    digest.add([[embedding, dict(sorted(settings.items()))] for [[embedding, settings]] in conditionings])
    return digest.hexdigest()


def host_identity() -> str:
    """Return the versions of host and torch, because other versions may compute slightly different numbers."""
    return f"ComfyUI {comfyui_version.__version__}, torch {torch.__version__}"


def _names(value: Any) -> Any:
    """Return a nested container with functions and objects replaced by where they are defined, modules by numbers."""
    if isinstance(value, Mapping):
        return {str(key): _names(value[key]) for key in sorted(value, key=str)}
    if isinstance(value, (list, tuple, set)):
        return [_names(item) for item in value]
    if isinstance(value, (str, int, float, bool, type(None))):
        return value
    if isinstance(value, torch.dtype):
        return str(value)
    if isinstance(value, nn.Module):  # a schedule or a layer: include its numbers
        return [_place(value), _names({key: x for key, x in vars(value).items() if isinstance(x, (str, int, float))}),
                module_identity(value)]  # fmt: skip
    return _place(value)


def _place(value: Any) -> str:
    """Return where a function or a class is defined."""
    place = value if hasattr(value, "__qualname__") else type(value)
    return f"{place.__module__}.{place.__qualname__}"


class _Digest:
    """Hashes nested containers of tensors, numbers and text."""

    def __init__(self, samples: int | None = SAMPLES_PER_TENSOR) -> None:
        self._hash = hashlib.blake2b(digest_size=16)
        self._samples = samples

    def hexdigest(self) -> str:
        return self._hash.hexdigest()

    def add(self, *values: Any) -> None:
        for value in values:
            self._add(value)

    def _add(self, value: Any) -> None:
        if isinstance(value, Tensor):
            self._text(f"{tuple(value.shape)} {value.dtype}")
            self._hash.update(self._sampled(value))
        elif isinstance(value, Mapping):
            for key, item in value.items():
                self._text(str(key))
                self._add(item)
        elif isinstance(value, (str, int, float, bool, bytes, type(None))):
            self._text(repr(value))
        elif isinstance(value, Sequence):  # including one that creates its items on demand
            self._text(f"{len(value)} items")
            for item in value:
                self._add(item)
        else:  # e.g. the host's weight adapters: class and tensors
            self._text(type(value).__name__)
            self._add(getattr(value, "weights", None))

    def _text(self, text: str) -> None:
        self._hash.update(text.encode() + b"\0")

    def _sampled(self, tensor: Tensor) -> bytes:
        # Not detached: a weight that ComfyUI has moved outside inference mode has no version counter, and so no views; `data` has.
        flat = tensor.data.as_subclass(Tensor).reshape(-1)
        if flat.is_meta:
            return b""
        if self._samples is not None and flat.numel() > self._samples:
            places = torch.linspace(0, flat.numel() - 1, self._samples, dtype=torch.float64).long()
            flat = flat[places.to(flat.device)]
        return flat.cpu().contiguous().view(torch.uint8).numpy().tobytes() if flat.numel() else b""
