"""MiniMax H3: video and sound in one row of tokens without a batch axis, text first, then sound, then the picture.

Layout of ``comfy.ldm.minimax.model.MiniMaxH3Model`` as of ComfyUI 0.30. It cannot be followed like other models without a
file, because it runs one example at a time. Training has pictures and clips but no sound. The model always reads some, so
it gets silence (zeros, of the clip's length) mixed with noise as far as sampling would have mixed it at that noise level.
Sound tokens are stored with the text's, and the loss does not look at them. What a LoRA trained so does to the sound of a
real model has not been tried.

Reference pictures are in the row too, between text and sound, and count as text. Keyframes are in the same place; they belong
to a whole picture, and training shows parts of it, so there are none (``hosts/inputs/conditioning``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...data.clip_lengths import ClipLengths
from ...errors import InvalidInputError
from ...model import BlockInfo, CopiedCall, TokenStreams
from .base import REFERENCE_TOKENS, TEXT_TOKENS, FamilyAdapter, JoinedBlockIO, block_info

PICTURES_PER_SECOND, SOUND_PER_SECOND = 24, 40
SOUND_CHANNELS, STEREO = 32, 2
REFERENCES, BLOCKS = "reference_latents", "minimax_refs"  # settings of the host: of all models, and what this one reads


class OneRowBlockIO(JoinedBlockIO):
    """``block(tokens (N, D), t_emb, mod_segments, rope_freqs, ...) -> tokens``; the block overwrites its tokens."""

    def __init__(self) -> None:
        super().__init__(lambda options: options[TEXT_TOKENS] + options.get(REFERENCE_TOKENS, 0))

    def result(self, streams: TokenStreams, args: tuple, kwargs: Mapping[str, Any]) -> Any:
        return super().result(streams, args, kwargs).squeeze(0)

    def copied(self, args: tuple, kwargs: Mapping[str, Any]) -> CopiedCall:
        """Return the call with its tokens copied."""
        tokens = args[0].clone()
        return CopiedCall((tokens, *args[1:]), kwargs, [tokens])

    def _split(self, tokens: Tensor, kwargs: Mapping[str, Any]) -> TokenStreams:
        return super()._split(tokens.unsqueeze(0), kwargs)


class MiniMaxAdapter(FamilyAdapter):
    """MiniMax H3."""

    family = "minimax"
    title = "MiniMax H3"
    stem = ("video_patch_proj", "audio_patch_proj", "condition_proj", "token_refiner", "time_embedder")
    trainable_head = ("final_layer",)
    attention_layers = ("attn.qkv_proj", "attn.out_proj")
    mlp_layers = ("mlp.fc1", "mlp.fc2")
    text_entry = "condition_proj"
    architecture = "minimax-h3"
    base_model_version = "minimax_h3"
    read_by_diffusers = frozenset()
    has_names_of_diffusers = False
    most_rows = 1
    clip_lengths = ClipLengths(shortest=5, shortest_latent=2, step=17, step_latent=5)
    reads_noise_levels = True
    takes_references = True
    reference_argument = "minimax_payload"

    @classmethod
    def matches(cls, diffusion_model: Any) -> bool:
        """Compare names, because ComfyUI before 0.30 has no such module."""
        kind = type(diffusion_model)
        return (kind.__module__, kind.__name__) == ("comfy.ldm.minimax.model", "MiniMaxH3Model")

    def blocks(self) -> Sequence[BlockInfo]:
        return block_info(self._model, "blocks", OneRowBlockIO())

    @property
    def patch_size(self) -> int:
        return self._model.patch_size[-1]

    def references_among(self, arguments: Mapping[str, Any]) -> Sequence[Tensor]:
        return (arguments.get(self.reference_argument) or {}).get("cond_video_latents") or ()

    def as_the_host_reads(self, settings: Mapping[str, Any]) -> Mapping[str, Any]:
        """See the base class.

        Raises:
            InvalidInputError: If a reference cannot be cut into tokens.
        """
        if not settings.get(REFERENCES):
            return settings
        others = {name: value for name, value in settings.items() if name != REFERENCES}
        return {**others, BLOCKS: [self._block(latent) for latent in settings[REFERENCES]]}

    def _block(self, latent: Tensor) -> dict[str, Any]:
        """Return the latent of a picture (1, C, 1, H, W) in the form in which the host's own node gives it."""
        rows, columns = latent.shape[-2:]
        if rows % self.patch_size or columns % self.patch_size:
            raise InvalidInputError(
                f"{self.title} reads references whose latents have even sides, got {columns} x {rows}. Make them with MiniMax "
                "H3 Reference to Video, or scale the pictures to multiples of 32 px."
            )
        return {"kind": "image", "latent_h": rows, "latent_w": columns, "latent": latent.clone()}

    def sound_tokens(self, frames: int) -> int:
        return STEREO * _sound_length(frames)

    def sound(self, frames: int, sigmas: Tensor) -> Tensor:
        """Return silence at the noise level that the sound has when the picture has ``sigmas``, shape (B, 32, 2, T).

        The noise is drawn from the noise level, so an example gets the same sound whenever it is used.
        """
        form = (len(sigmas), SOUND_CHANNELS, STEREO, _sound_length(frames))
        if sigmas.is_meta:
            return torch.empty(form, device=sigmas.device)
        from comfy.ldm.minimax.model import time_shift_sigma  # not in every supported ComfyUI

        levels = sigmas.double().cpu()
        generator = torch.Generator().manual_seed(round(float(levels[0]) * 2**32))
        noise = torch.randn(form, generator=generator)
        of_sound = time_shift_sigma(levels, self._model.sigma_shift_video, self._model.sigma_shift_audio)
        return (of_sound.view(-1, 1, 1, 1).float() * noise).to(sigmas.device)


def _sound_length(frames: int) -> int:
    """Return the number of sound latents that belong to latent frames: 40 a second, as long as the pictures."""
    pictures = MiniMaxAdapter.clip_lengths.pictures(frames)
    return round(pictures / PICTURES_PER_SECOND * SOUND_PER_SECOND)
