"""Content hashes of weights and other tensors.

Hashing 24 GB of weights would take longer than a short training, so each weight contributes its name, shape, dtype and
256 numbers spread over it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

SAMPLES_PER_TENSOR = 256


def module_identity(module: nn.Module) -> str:
    """Return a content hash of a module's weights."""
    state = module.state_dict()
    own = dict(module.named_parameters())  # some packs give only sizes of packed weights in a state dict
    digest = Digest()
    digest.add({name: own.get(name, state[name]) if state[name].is_meta else state[name] for name in sorted(state)})
    return digest.hexdigest()


def tensors_identity(tensors: Iterable[Tensor]) -> str:
    """Return a content hash of all numbers in some tensors (pictures are small enough for that)."""
    digest = Digest(samples=None)
    digest.add(tensors if isinstance(tensors, Sequence) else list(tensors))
    return digest.hexdigest()


class Digest:
    """Hashes nested containers of tensors, numbers and text.

    Args:
        samples: How many numbers of each tensor count; None for all.
    """

    def __init__(self, samples: int | None = SAMPLES_PER_TENSOR) -> None:
        self._hash = hashlib.blake2b(digest_size=16)
        self._samples = samples

    def hexdigest(self) -> str:
        """Return the hash of everything so far, 32 hexadecimal digits."""
        return self._hash.hexdigest()

    def add(self, *values: Any) -> None:
        """Hash some values."""
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
