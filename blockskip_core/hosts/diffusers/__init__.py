"""diffusers as the host: LoRAs of its transformers, with its pipelines' encoders, without ComfyUI.

Nothing here imports ComfyUI, nor a module of the other hosts' folders. ``docs/diffusers.md`` has a complete training.
"""

from .diffusers_dit import DiffusersDit
from .experts import noise_range
from .families import FAMILIES
from .inputs import crop_multiple, encode_captions, encode_examples, noise_shift, paper_patches
from .loading import load_pipeline, load_transformer
from .lora_files import save_lora
from .probe_latents import ProbeLatents, ProbeSettings
from .run_files import RunFiles, write_run
from .text_masking import masked_blocks

__all__ = [
    "DiffusersDit",
    "FAMILIES",
    "ProbeLatents",
    "ProbeSettings",
    "RunFiles",
    "crop_multiple",
    "encode_captions",
    "encode_examples",
    "load_pipeline",
    "load_transformer",
    "masked_blocks",
    "noise_range",
    "noise_shift",
    "paper_patches",
    "save_lora",
    "write_run",
]
