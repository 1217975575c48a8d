"""ComfyUI as the host: the only part of the core that imports ``comfy``.

base            what a family's adapter must say
flux            FLUX.1, FLUX.2, Chroma
qwen_image      Qwen-Image
lumina2         Z-Image, Lumina 2
wan             Wan 2.1 and 2.2, text to video, at one frame
sd3             SD3.5
text_masking    hide the text from some blocks while the host samples
frames          pictures for models of videos
published_sizes full-size models without memory, for counting bytes
hosted_dit      a loaded MODEL as a SkippableDit: run it with blocks replaced, and leave it as it was
token_positions tells a model where the tokens of a strip lie
token_strips    a MODEL called on a latent with tokens of two sizes
sampled_families  which families that works for
early_regions   which regions become fine early
region_adaptive RALU's stages with the host's sampler
conditioning    CONDITIONING -> what the model is called with
identity        content hashes of models, pictures and conditionings
sampling        probe pictures, and their distance
encoding        pictures -> latents
folders         where files are kept
lora_files      LoRA files in ComfyUI's folders
"""

from __future__ import annotations

from ..errors import UnsupportedModelError
from .base import FamilyAdapter
from .flux import ChromaAdapter, Flux2Adapter, FluxAdapter
from .lumina2 import Lumina2Adapter
from .qwen_image import QwenImageAdapter
from .sd3 import Sd3Adapter
from .wan import WanAdapter

ADAPTERS: tuple[type[FamilyAdapter], ...] = (
    FluxAdapter,
    Flux2Adapter,
    QwenImageAdapter,
    Lumina2Adapter,
    WanAdapter,
    ChromaAdapter,
    Sd3Adapter,
)


def adapter_for(patcher) -> FamilyAdapter:
    """Return the adapter of the family that a MODEL belongs to.

    Raises:
        UnsupportedModelError: If there is none, naming those there are.
    """
    diffusion_model = patcher.model.diffusion_model
    for adapter in ADAPTERS:
        if adapter.matches(diffusion_model):
            return adapter(diffusion_model)
    known = ", ".join(adapter.title for adapter in ADAPTERS)
    raise UnsupportedModelError(
        f"Expected a diffusion transformer of a supported family ({known}), got {type(diffusion_model).__name__}. "
        "Load one of these with Load Diffusion Model."
    )
