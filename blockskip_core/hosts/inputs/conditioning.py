"""CONDITIONING of the host -> the keyword arguments that a model is called with."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import comfy.sampler_helpers
import comfy.samplers
import torch
from torch import Tensor

from ...errors import InvalidInputError

# Settings of a CONDITIONING that a training crop cannot follow. All others describe the text itself (pooled_output,
# attention_mask, guidance, ...) and are passed to the model as when sampling.
_OF_A_PART = ("area", "mask", "set_area_to_bounds", "mask_strength", "gligen")
_OF_SAMPLING = ("hooks", "default", "clip_start_percent", "clip_end_percent")
_OF_OTHER_MEDIA = (
    "control", "reference_latents_text_embeds", "concat_latent_image", "concat_mask",
    "clip_vision_output", "clip_vision_outputs", "clip_vision_output_ref", "unclip_conditioning", "control_video",
    "vace_frames", "camera_conditions", "audio_embed", "ref_audio", "reference_motion", "face_video_pixels",
    "pose_video_latent", "context_latents", "keyframe_idxs", "time_dim_concat", "time_dim_replace",
)  # fmt: skip
REFERENCES = "reference_latents"
"""The setting of a CONDITIONING that holds reference latents: a list of what the VAE makes."""
REFERENCE_METHOD = "reference_latents_method"
"""The setting of a CONDITIONING that says where their tokens are placed."""
_KEYFRAMES, _REFERENCE_BLOCKS = "minimax_keyframes", "minimax_refs"
"""Settings of MiniMax H3: pictures that a clip begins or ends with; references, which may be pictures, clips or sounds."""
_NOT_FOR_TRAINING = (*_OF_A_PART, *_OF_SAMPLING, *_OF_OTHER_MEDIA)
_NEUTRAL = {"strength": 1.0, "start_percent": 0.0, "end_percent": 1.0}
"""Settings that have no effect at this value, and that training cannot follow at any other. The strength of a single text
also cancels out when sampling, because it is a weight relative to other texts."""


def flatten_conditionings(positive: Sequence[Any], *, with_references: bool = False) -> list[list]:
    """Return single conditionings, each ``[[tensor, settings]]``, from a list of CONDITIONINGs with one text each.

    Args:
        positive: CONDITIONINGs.
        with_references: Whether they may carry reference latents, as edit models take them.

    Raises:
        InvalidInputError: If there are none, or one is not one text, is not finite, or carries settings that training
            cannot follow.
    """
    given = [conditioning for conditioning in positive if _is_list(conditioning) and conditioning]
    if not given:
        raise InvalidInputError("No conditioning came in. Connect CLIP Text Encode or a dataset node to `positive`.")
    singles = []
    for number, conditioning in enumerate(given, 1):
        if len(conditioning) > 1:
            raise InvalidInputError(
                f"Conditioning {number} combines {len(conditioning)} texts, and training takes one text at a time. "
                "Leave out Conditioning (Combine), or write both into one text."
            )
        _require_reference_pictures(number, _parts(conditioning[0])[1])
        entry = _with_references(conditioning[0])
        _require_trainable(number, entry, with_references)
        singles.append([entry])
    return singles


def same_texts(captions: Sequence[list]) -> list[str]:
    """Return a key for each single conditioning; equal texts have equal keys."""
    return [_text_key(embedding, settings) for [[embedding, settings]] in captions]


def _text_key(embedding: Tensor, settings: Mapping[str, Any]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for tensor in (embedding, settings.get("pooled_output")):
        if tensor is not None:
            digest.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def references_of(conditioning: list) -> Sequence[Tensor]:
    """Return the reference latents that a single conditioning carries, as the VAE makes them."""
    return conditioning[0][1].get(REFERENCES) or ()


def without_references(conditioning: list) -> list:
    """Return a single conditioning without its reference latents."""
    [[embedding, settings]] = conditioning
    return [[embedding, {name: value for name, value in settings.items() if name != REFERENCES}]]


def number_of_texts(captions: Sequence[list]) -> int:
    """Return how many texts captions are made of; with references, several captions may share a text."""
    if not any(map(references_of, captions)):
        return len(captions)
    return len({id(embedding) for [[embedding, _]] in captions})


def _with_references(entry: Sequence[Any]) -> Sequence[Any]:
    """Return an entry with MiniMax H3's reference pictures among its reference latents, where all other models' are."""
    embedding, settings = _parts(entry)
    if not settings.get(_REFERENCE_BLOCKS):
        return entry
    others = {name: value for name, value in settings.items() if name != _REFERENCE_BLOCKS}
    latents = [block["latent"] for block in settings[_REFERENCE_BLOCKS]]
    return [embedding, {**others, REFERENCES: [*(settings.get(REFERENCES) or ()), *latents]}]


def _require_trainable(number: int, entry: Any, with_references: bool) -> None:
    embedding, settings = _require_text(number, entry)
    refused = [name for name in _NOT_FOR_TRAINING if settings.get(name) is not None]
    if settings.get(REFERENCES) is not None and not with_references:
        refused.append(REFERENCES)
    refused += [name for name, neutral in _NEUTRAL.items() if not _has_no_effect(settings.get(name), neutral)]
    if refused:
        raise _cannot_follow(number, refused)
    _require_references(number, settings)
    tensors = [embedding, *(value for value in settings.values() if isinstance(value, Tensor))]
    if not all(torch.isfinite(tensor).all() for tensor in tensors):
        raise InvalidInputError(f"Conditioning {number} contains NaN or Inf. Check the text encoder.")


def _cannot_follow(number: int, names: Sequence[str]) -> InvalidInputError:
    return InvalidInputError(
        f"Conditioning {number} carries {', '.join(names)}, which training cannot follow. "
        "Connect a plain text conditioning."
    )


def _require_reference_pictures(number: int, settings: Mapping[str, Any]) -> None:
    """Refuse what MiniMax H3 can look at besides text and reference pictures."""
    keyframes, blocks = settings.get(_KEYFRAMES), settings.get(_REFERENCE_BLOCKS)
    if keyframes is not None and not (_is_list(keyframes) and not keyframes):
        raise InvalidInputError(
            f"Conditioning {number} carries keyframes. They belong to a whole picture, and training shows parts of it, so it "
            "cannot follow them. Disconnect `first_frame` and `last_frame` from MiniMax H3 Image to Video."
        )
    if blocks is None:
        return
    if not _is_list(blocks) or not all(
        isinstance(block, Mapping) and {"kind", "latent"} <= block.keys() for block in blocks
    ):
        raise _cannot_follow(number, [_REFERENCE_BLOCKS])
    if any(block["kind"] != "image" for block in blocks):
        raise InvalidInputError(
            f"Conditioning {number} carries reference clips or sounds, and training takes reference pictures only. "
            "Disconnect them from MiniMax H3 Reference to Video."
        )


def _require_references(number: int, settings: Mapping[str, Any]) -> None:
    """Check the form of reference latents and of their method, if there are any."""
    latents, method = settings.get(REFERENCES), settings.get(REFERENCE_METHOD)
    if method is not None and not isinstance(method, str):
        raise InvalidInputError(
            f"Conditioning {number} carries a {type(method).__name__} as the method of its reference latents, expected "
            "a text. Set it with Edit Model Reference Method."
        )
    if latents is None:
        return
    if not _is_list(latents) or not all(map(_is_latent, latents)):
        raise InvalidInputError(
            f"Conditioning {number} carries reference latents that are not single pictures. Connect VAE Encode of one "
            "picture to each ReferenceLatent."
        )
    if not all(torch.isfinite(latent).all() for latent in latents):
        raise InvalidInputError(f"Conditioning {number} carries reference latents with NaN or Inf. Check the VAE.")


def _is_latent(value: Any) -> bool:
    """Return whether a value may be the latent of one picture, (1, C, H, W) or (1, C, frames, H, W)."""
    return (
        isinstance(value, Tensor)
        and value.is_floating_point()
        and value.ndim in (4, 5)
        and len(value) == 1
        and 0 not in value.shape
    )


def _has_no_effect(value: Any, neutral: float) -> bool:
    return value is None or (isinstance(value, (int, float)) and value == neutral)


def require_sampleable(conditioning: Any, name: str) -> None:
    """Check that a sampler can use a CONDITIONING; its settings are left to the sampler.

    Raises:
        InvalidInputError: If there is none, or an entry holds no text, or numbers that are not finite.
    """
    if not _is_list(conditioning) or not conditioning:
        raise InvalidInputError(f"No conditioning came in for `{name}`. Connect CLIP Text Encode.")
    for number, entry in enumerate(conditioning, 1):
        embedding, settings = _parts(entry)
        if embedding is None:
            raise InvalidInputError(f"Conditioning {number} of `{name}` holds no text. Connect CLIP Text Encode.")
        form, pooled = tuple(embedding.shape), settings.get("pooled_output")
        if len(form) != 3 or 0 in form or not embedding.is_floating_point():
            raise InvalidInputError(
                f"Conditioning {number} of `{name}` must have shape (batch, tokens, width), got {form} of "
                f"{embedding.dtype}. Connect CLIP Text Encode."
            )
        if pooled is not None and (not isinstance(pooled, Tensor) or pooled.ndim != 2 or 0 in pooled.shape):
            what = tuple(pooled.shape) if isinstance(pooled, Tensor) else type(pooled).__name__
            raise InvalidInputError(
                f"The pooled output of conditioning {number} must have shape (batch, width), got {what}."
            )
        if not embedding.isfinite().all() or (pooled is not None and not pooled.isfinite().all()):
            raise InvalidInputError(f"Conditioning {number} of `{name}` contains NaN or Inf. Check the text encoder.")


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple))


def _parts(entry: Any) -> tuple[Tensor | None, Mapping[str, Any]]:
    """Return the embedding and the settings of a CONDITIONING's entry; None as embedding if it has none."""
    embedding, settings = entry if _is_list(entry) and len(entry) == 2 else (None, None)
    return (embedding, settings) if isinstance(embedding, Tensor) and isinstance(settings, Mapping) else (None, {})


def _require_text(number: int, entry: Any) -> tuple[Tensor, Mapping[str, Any]]:
    """Return embedding and settings of a CONDITIONING's entry, which must be one text."""
    embedding, settings = _parts(entry)
    if embedding is None:
        raise InvalidInputError(f"Conditioning {number} holds no text. Connect CLIP Text Encode or a dataset node.")
    form = tuple(embedding.shape)
    if len(form) != 3 or form[0] != 1 or 0 in form or not embedding.is_floating_point():
        raise InvalidInputError(
            f"Conditioning {number} must be one text of shape (1, tokens, width), got {form} of {embedding.dtype}. "
            "Connect each text as a separate conditioning."
        )
    pooled = settings.get("pooled_output")
    if pooled is not None and (not isinstance(pooled, Tensor) or pooled.ndim != 2 or len(pooled) != 1):
        what = tuple(pooled.shape) if isinstance(pooled, Tensor) else type(pooled).__name__
        raise InvalidInputError(f"The pooled output of conditioning {number} must have shape (1, width), got {what}.")
    return embedding, settings


def model_arguments(
    model: Any, conditioning: list, latent: Tensor, device: torch.device, sound: Tensor | None = None
) -> dict[str, Any]:
    """Return the arguments of ``model.apply_model`` for one conditioning, besides latent and sigma, batch axis 1.

    Args:
        model: The host's model (a BaseModel).
        conditioning: ``[[tensor, settings]]``.
        latent: Any latent with the shape that will be denoised, (1, C, H, W), in the model's own scale.
        device: Device for the arguments.
        sound: Any latent of the sound that the model takes beside the picture, if it takes one.

    If called outside inference mode, it returns tensors that autograd may save, whatever mode the inputs were made in.
    """
    converted = comfy.sampler_helpers.convert_cond(conditioning)
    encoded = comfy.samplers.encode_model_conds(
        model.extra_conds, converted, latent, device, "positive", latent_image=latent, denoise_mask=None, seed=0,
        latent_shapes=[latent.shape] if sound is None else [latent.shape, sound.shape],
    )  # fmt: skip
    arguments = encoded[0]["model_conds"]
    return {
        name: on_tensors(value.process_cond(batch_size=1, area=None).cond, torch.clone)
        for name, value in arguments.items()
    }


def arguments_for_each(
    convert: Callable[[list], dict[str, Any]], conditionings: Sequence[list], of_references: str
) -> list[dict[str, Any]]:
    """Return the arguments of some conditionings; those that differ in their references alone share all others.

    Every training example may have a reference of its own, and the arguments of a text can take megabytes.

    Args:
        convert: Conditioning -> arguments, as :func:`model_arguments`.
        conditionings: Each ``[[tensor, settings]]``.
        of_references: Name of the argument that holds the references.
    """
    of_text: dict[Any, dict[str, Any]] = {}
    rows = []
    for conditioning in conditionings:
        made = convert(conditioning)
        [[embedding, settings]] = without_references(conditioning)
        shared = of_text.setdefault((id(embedding), *((name, id(value)) for name, value in settings.items())), made)
        own = {name: made[name] for name in (of_references,) if name in made}
        rows.append({**{name: value for name, value in shared.items() if name in made}, **own})
    return rows


def sharing(row: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments with every tensor that equals that of another row replaced by it, so that it is kept once."""
    return {name: _shared(value, other.get(name)) for name, value in row.items()}


def _shared(value: Any, own: Any) -> Any:
    if _is_list_of_tensors(value) and _is_list_of_tensors(own) and len(value) == len(own):
        return [_shared(one, other) for one, other in zip(value, own, strict=True)]
    if not (isinstance(value, Tensor) and isinstance(own, Tensor) and value.dtype == own.dtype):
        return value
    return own if torch.equal(value, own) else value


def on_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Return an argument with ``function`` applied to it, if it is a tensor, or to each tensor of a list."""
    if isinstance(value, Tensor):
        return function(value)
    return [function(tensor) for tensor in value] if _is_list_of_tensors(value) else value


def _is_list_of_tensors(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(tensor, Tensor) for tensor in value)


def join_arguments(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the arguments of a batch from those of its rows; tensors, also in lists, are joined along the batch axis.

    Raises:
        InvalidInputError: If one row has an argument that another lacks (a text mask, say), so they cannot be batched.
    """
    first = rows[0]
    if any(row.keys() != first.keys() for row in rows):
        raise InvalidInputError(
            "Two captions of one batch carry different settings. Encode all captions in the same way, or set "
            "batch_size to 1."
        )
    return {name: _joined([row[name] for row in rows]) for name in first}


def _joined(values: Sequence[Any]) -> Any:
    """Return the rows' values of one argument as that of a batch; what is no tensor is the first row's."""
    if isinstance(values[0], Tensor):
        return torch.cat(list(values))
    if _is_list_of_tensors(values[0]):
        return [torch.cat(tensors) for tensors in zip(*values, strict=True)]
    return values[0]
