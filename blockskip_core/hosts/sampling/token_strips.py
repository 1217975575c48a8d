"""Run a model of the host on a latent with tokens of two sizes: its forward sees each token once, in a strip.

A wrapper around ``apply_model``: outside it sampler, guidance, previews and masks work on a full-size latent; inside it
the model works on a strip of tokens and gets their positions. Everything else is the host's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import comfy.patcher_extension
from torch import Tensor

from ...errors import InvalidInputError, UnsupportedModelError
from ...ralu.token_grid import MixedGrid, strip_of, tokens_of_strip
from ..families.registry import adapter_for
from ..families.sampled_families import positions_of
from ..inputs.frames import with_frames, without_frames

_WRAPPER = "blockskip_token_strips"
_PICTURES = (
    "ref_latents",
    "reference_latent",
    "context_latents",
    "time_dim_concat",
    "clip_fea",
    "ref_contexts",
    "image_cond",
    "ref_latent",
    "denoise_mask",  # of models that tell each token its own noise level: Wan 2.2 5B and LTX, image to video
)

MASKED_IMAGE_PROMPT = "an image prompt with a mask"
"""How messages call a prompt with an attention mask over tokens of text and picture, as Style Model Apply makes it."""


class TokenStrips:
    """A clone of a MODEL that can be called on tokens of two sizes.

    Attributes:
        patcher: The clone; sample from this one.
        grid: The tokens of the latent; None for an ordinary latent.
        patch: Side of a token in latent cells.

    Args:
        patcher: The MODEL; left unchanged.

    Raises:
        UnsupportedModelError: If the model's family is not known, or cannot be given token positions.
    """

    def __init__(self, patcher: Any) -> None:
        self._positions, self.patch = positions_of(patcher)
        self._model = patcher.model
        self.grid: MixedGrid | None = None
        self.patcher = patcher.clone()
        self._positions.prepare(self.patcher)
        self.patcher.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.APPLY_MODEL, _WRAPPER, self._wrapper)

    def require_texts(self, conditioning: list) -> None:
        """Check that texts come from the model's own text encoder, if its family specifies their width.

        Raises:
            InvalidInputError: If one has another width.
        """
        try:
            adapter = adapter_for(self.patcher)
        except UnsupportedModelError:  # a family that is sampled but not trained
            return
        adapter.require_texts([[entry] for entry in conditioning])

    def _wrapper(
        self,
        executor: Callable[..., Tensor],
        x: Tensor,
        t: Tensor,
        c_concat: Any = None,
        c_crossattn: Any = None,
        control: Any = None,
        transformer_options: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        self._require_own_model(executor)
        require_only_text("Region-adaptive sampling takes", "Use KSampler for these.", c_concat, control, kwargs)
        options = transformer_options or {}
        if self.grid is None:
            return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)
        grid = self.grid = self.grid.to(x.device)
        latent = without_frames(self._model, x)
        strip = with_frames(self._model, strip_of(grid.pick(latent, self.patch)))
        with self._positions.placed(grid.places(len(latent)), options):
            answer = executor(strip, t, c_concat, c_crossattn, control, options, **kwargs)
        tokens = tokens_of_strip(without_frames(self._model, answer), self.patch)
        return with_frames(self._model, grid.spread(tokens))

    def _require_own_model(self, executor: Any) -> None:
        """Refuse a copy of the model, which would silently use the wrong token positions.

        Raises:
            InvalidInputError: If the host samples one.
        """
        if getattr(executor, "class_obj", self._model) is not self._model:
            raise InvalidInputError(
                "Region-adaptive sampling sets the token positions of one model, but ComfyUI samples from a copy of "
                "it: a prompt carries hooks (its own LoRA), or several GPUs share the work. Remove these, or use "
                "KSampler."
            )


def require_only_text(who: str, instead: str, c_concat: Any, control: Any, kwargs: Mapping[str, Any]) -> None:
    """Refuse inputs with their own size, which would have to be cut into the same tokens.

    Args:
        who: What takes text only, at the start of the message.
        instead: What to do, one sentence.
        c_concat, control, kwargs: Of a call of the model.

    Raises:
        InvalidInputError: Naming the inputs that were found.
    """
    found = [name for name in _PICTURES if kwargs.get(name) is not None and len(kwargs[name])]
    mask = kwargs.get("attention_mask")  # a text's own has two axes
    found += [MASKED_IMAGE_PROMPT] if mask is not None and mask.ndim > 2 else []
    found += ["a ControlNet"] if control is not None else []
    found += ["a picture besides the latent (inpainting or image to video)"] if c_concat is not None else []
    if found:
        raise InvalidInputError(f"{who} text conditionings only, got {', '.join(found)}. {instead}")
