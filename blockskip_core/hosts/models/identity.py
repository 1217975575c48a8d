"""Content hashes, to tell whether residuals were made from this model and these pictures and captions.

How weights are hashed is explained in ``residuals.content_hash``. Patches (a LoRA applied earlier) contribute in the same way,
with their strengths.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import comfyui_version
import torch
from torch import nn

from ...residuals.content_hash import Digest, module_identity
from ...residuals.content_hash import tensors_identity as tensors_identity  # for those who hash the rest of a run
from ..inputs.conditioning import references_of, without_references
from .residency import unload


def model_identity(patcher: Any) -> str:
    """Return a content hash of a MODEL: its diffusion model's weights and their patches.

    The model is unloaded first: while it is loaded, patches may be merged into its weights.
    """
    unload(patcher)
    digest = Digest()
    digest.add(type(patcher.model.diffusion_model).__name__, module_identity(patcher.model.diffusion_model))
    digest.add({key: patcher.patches[key] for key in sorted(patcher.patches)})
    for attached in (patcher.object_patches, patcher.model_options, patcher.wrappers, patcher.weight_wrapper_patches):
        digest.add(_names(attached))
    return digest.hexdigest()


def conditionings_identity(conditionings: Iterable[list]) -> str:
    """Return a content hash of single conditionings, each ``[[tensor, settings]]``."""
    digest = Digest(samples=None)
    digest.add([[embedding, dict(sorted(settings.items()))] for [[embedding, settings]] in conditionings])
    return digest.hexdigest()


def captions_identity(captions: Sequence[list]) -> str:
    """Return a content hash of the captions of a training; what captions share, such as a text, is hashed once.

    Without reference latents it is :func:`conditionings_identity`.
    """
    if not any(map(references_of, captions)):
        return conditionings_identity(captions)
    texts: dict[tuple[Any, ...], str] = {}
    pictures: dict[int, str] = {}
    digest = Digest(samples=None)
    for caption in captions:
        text = without_references(caption)
        [[embedding, settings]] = text
        shared = (id(embedding), *((name, id(settings[name])) for name in sorted(settings)))
        if shared not in texts:
            texts[shared] = conditionings_identity([text])
        for latent in references_of(caption):
            if id(latent) not in pictures:
                pictures[id(latent)] = tensors_identity([latent])
        digest.add([texts[shared], [pictures[id(latent)] for latent in references_of(caption)]])
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
