"""The loss of several words on one example: their prompts encoded one by one, then one batch through the model.

Both models belong to the user's graph and are run as loaded, in any weight format: nothing is differentiated, no weight
is changed. What other nodes put around sampling (caches, guidance, compilation) is left out, because it would treat
the rows of one step as steps of one picture; LoRAs, hooks and functions inside the model's blocks are followed.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

import comfy.model_management
import comfy.sampler_helpers
import comfy.samplers
import torch
from torch import Tensor

from ...errors import InvalidInputError, UnsupportedModelError
from ...zoodip.examples import Example
from ...zoodip.word import WordLayout
from ..inputs.frames import with_frames
from ..models.residency import drop_cast_buffers, evict_others
from .captions import WordCaptions
from .noise_levels import output_error, sigma_of

logger = logging.getLogger(__name__)

Residency = Literal["auto", "together", "in turns"]
RESIDENCIES: tuple[str, ...] = get_args(Residency)
FOLLOWED_OPTIONS = ("patches", "patches_replace", "optimized_attention_override", "rope_options")
"""Keys of ``transformer_options`` that act inside the model's blocks."""


class WordLosses:
    """Evaluates words; call it inside :meth:`loaded`.

    Args:
        model: The MODEL; left unchanged.
        captions: The captions: one for all pictures, or one for each.
        layout: The word's shape.
        latents: Clean latents in the model's own scale, shape (pictures, C, H, W), on the CPU; if ``mirrored`` examples
            occur, the mirrored ones follow all others.
        pictures: Number of pictures.
        guidance: Distilled guidance of models that take it (FLUX.1-dev), for the losses; other models ignore it.
        residency: "together" keeps text encoder and model loaded; "in turns" unloads one for the other in every step,
            which is slow and needs only memory for the larger one; "auto" decides by the device's memory.

    Attributes:
        forwards: Rows that have gone through the model.

    Raises:
        InvalidInputError: If the residency is not known, or captions and pictures do not go together.
    """

    def __init__(
        self, model: Any, captions: WordCaptions, layout: WordLayout, latents: Tensor, pictures: int, *,
        guidance: float = 1.0, residency: Residency = "auto",
    ) -> None:  # fmt: skip
        if residency not in RESIDENCIES:
            raise InvalidInputError(f"residency must be one of {', '.join(RESIDENCIES)}, got {residency!r}.")
        if len(captions) not in (1, pictures):
            raise InvalidInputError(
                f"There must be one caption for all pictures or one for each of {pictures}, got {len(captions)}."
            )
        self.forwards = 0
        self._patcher, self._captions, self._layout = as_called(model), captions, layout
        self._latents, self._pictures, self._settings = latents, pictures, {"guidance": guidance}
        self._sampling = self._patcher.get_model_object("model_sampling")
        self._clip = captions.clip
        self._residency = residency
        self._together, self._needed = True, 0
        self._lost = False  # whether the models have been left to the host and not been taken back

    @property
    def device(self) -> torch.device:
        """The model's device."""
        return self._patcher.load_device

    @property
    def cell(self) -> int:
        """Pixels along the side of a latent cell."""
        return int(self._patcher.model.latent_format.spacial_downscale_ratio)

    @contextmanager
    def loaded(self, rows: int) -> Iterator[None]:
        """Load both models for the duration of a ``with`` block; afterwards the host may do with them what it likes.

        Args:
            rows: Largest number of words evaluated in one call.
        """
        needed = int(self._patcher.memory_required([rows, *self._model_latent(0).shape[1:]]))
        self._together = self._fit_together(needed) if self._residency == "auto" else self._residency == "together"
        try:
            self._needed = needed
            self._hold()
            yield
        finally:
            self._let_go()

    @contextmanager
    def set_aside(self) -> Iterator[Any]:
        """Leave both models to the host from here on, inside :meth:`loaded`; provide the model for a ``with`` block.

        The next evaluation takes them back, not the end of the block: until then the host may load others for them.
        """
        self._let_go()
        self._lost = True
        if not self._together:
            _make_room(self._patcher)
        yield self._patcher

    def _hold(self) -> None:
        if self._together:
            self._load(self._clip.patcher, self._patcher)
            # The host asks for 1 GiB of room at each load_model, and may unload the model for it, in every step.
            self._clip.load_model = lambda tokens={}: self._clip.patcher  # on our own clone
        self._patcher.pre_run()
        self._lost = False

    def _let_go(self) -> None:
        vars(self._clip).pop("load_model", None)
        self._patcher.cleanup()
        drop_cast_buffers()

    def _load(self, *patchers: Any) -> None:
        comfy.model_management.load_models_gpu(list(patchers), memory_required=self._needed)

    def _fit_together(self, needed: int) -> bool:
        management, device = comfy.model_management, self._patcher.load_device
        if self._clip.patcher.load_device != device or device.type == "cpu" or self._patcher.is_dynamic():
            return True
        weights = self._patcher.model_size() + self._clip.patcher.model_size()
        return weights + needed + management.extra_reserved_memory() < management.get_total_memory(device)

    def __call__(self, words: Tensor, example: Example) -> Tensor:
        """Return the losses of words on an example, shape (words,), float32 on the CPU.

        Args:
            words: Shape (words, layout.numbers), float32.
            example: Picture, noise level and noise.
        """
        conditionings = self._encoded(words, example.picture if len(self._captions) > 1 else 0)
        return self._evaluated(conditionings, example)

    def _evaluated(self, conditionings: Sequence[list], example: Example) -> Tensor:
        """Return the losses of encoded prompts."""
        if not self._together:
            _make_room(self._patcher)
            self._load(self._patcher)
        device = self._patcher.load_device
        clean = self._model_latent(example.picture + self._pictures * example.mirrored).to(device)
        sigma = torch.tensor([sigma_of(self._sampling, example.level)], device=device)
        noisy = self._sampling.noise_scaling(sigma, example.noise(clean.shape).to(device), clean)
        prepared = [self._prepared(conditioning, noisy, clean) for conditioning in conditionings]
        self.forwards += len(conditionings)
        options = {**self._patcher.model_options, "transformer_options": dict(self._options)}
        denoised = comfy.samplers.calc_cond_batch(self._patcher.model, prepared, noisy, sigma, options)
        return torch.stack([output_error(self._sampling, sigma, clean, each) for each in denoised]).cpu()

    def conditioning(self, word: Tensor, caption: int) -> list:
        """Return the CONDITIONING of a caption with a word, as from CLIP Text Encode."""
        return self._encoded(word[None], caption)[0]

    def prompts(self, captions: WordCaptions, word: Tensor, settings: Mapping[str, Any]) -> list[list]:
        """Return the CONDITIONINGs of all of other captions of the same CLIP with a word and settings, such as a guidance."""
        self._make_room_for_text()
        return [self._text(captions, caption, word, settings) for caption in range(len(captions))]

    @property
    def _options(self) -> dict[str, Any]:
        return self._patcher.model_options["transformer_options"]

    def _model_latent(self, index: int) -> Tensor:
        return with_frames(self._patcher.model, self._latents[index : index + 1])

    def _encoded(self, words: Tensor, caption: int) -> list[list]:
        self._make_room_for_text()
        return [self._text(self._captions, caption, word, self._settings) for word in words]

    def _make_room_for_text(self) -> None:
        if self._lost or (self._together and not (_is_loaded(self._clip.patcher) and _is_loaded(self._patcher))):
            self._hold()
        if not self._together:
            _make_room(self._clip.patcher)

    def _text(self, captions: WordCaptions, caption: int, word: Tensor, settings: Mapping[str, Any]) -> list:
        tokens = captions.tokens(caption, self._layout.split(word))
        encoded: list = self._clip.encode_from_tokens_scheduled(tokens, add_dict=dict(settings))
        return encoded

    def _prepared(self, conditioning: Sequence[Any], noisy: Tensor, clean: Tensor) -> list[dict[str, Any]]:
        """Return a conditioning with the model's own arguments, as the host's samplers make them."""
        return comfy.samplers.encode_model_conds(
            self._patcher.model.extra_conds, comfy.sampler_helpers.convert_cond(conditioning), noisy, noisy.device,
            "positive", latent_image=clean, denoise_mask=None, seed=0,
        )  # fmt: skip


def _make_room(patcher: Any) -> None:
    """Unload the other model, with the buffers through which its weights were streamed."""
    evict_others(patcher)
    drop_cast_buffers()


def _is_loaded(patcher: Any) -> bool:
    """Return whether the host has this MODEL or CLIP loaded, with its own patches: not another clone of it."""
    return any(loaded.model is patcher for loaded in comfy.model_management.current_loaded_models)


def as_called(patcher: Any) -> Any:
    """Return a clone of a MODEL without what belongs to sampling; the log names what is left out.

    Raises:
        UnsupportedModelError: If the MODEL has a ControlNet or another model in its blocks.
    """
    options = patcher.model_options["transformer_options"]
    inside = [each for kind in options.get("patches", {}).values() for each in kind]
    if any(hasattr(each, "models") for each in inside):
        raise UnsupportedModelError(
            "A word cannot be learned with another model in the MODEL's blocks. Connect it without."
        )
    clone = patcher.clone()
    kept = {key: options[key] for key in FOLLOWED_OPTIONS if key in options}
    wrappers = {str(key or kind) for kind, keys in patcher.wrappers.items() for key in keys}
    left_out = sorted({*patcher.model_options, *options, *wrappers} - {"transformer_options", *kept})
    if left_out:
        logger.warning(
            "BlockSkip: left out of learning a word, because it belongs to sampling: %s", ", ".join(left_out)
        )
    clone.model_options = {"transformer_options": kept}
    clone.wrappers, clone.additional_models = {}, {}
    return clone
