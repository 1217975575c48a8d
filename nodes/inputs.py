"""Unpack and check a node's inputs.

For a node that takes lists, every input, widgets included, arrives as a list. The host checks numbers and choices
entered in a widget, but not values that come over a link; and a link of a wildcard type can carry anything.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any

from comfy_api.latest import io
from torch import Tensor

from ..blockskip_core.ddit.trained_patches import TrainedPatches
from ..blockskip_core.errors import BlockSkipError, InvalidInputError
from ..blockskip_core.hosts.files.lora_files import NO_FILE as NO_FILE
from ..blockskip_core.hosts.models.quantised_blocks import require_known
from ..blockskip_core.hosts.runs.request import require_memory_settings as require_memory_settings
from ..blockskip_core.reporting.event_files import require_tensorboard
from ..blockskip_core.residuals.residual_set import ResidualSet
from ..blockskip_core.selection.selection import BlockSelection

NOT_CONNECTED = object()
"""Default of an optional input in ``validate_inputs``, where a linked input is None or a list of None."""


def single(value: Any, name: str = "") -> Any:
    """Return the only element of a list input; None, from an unconnected optional input, stays None.

    Raises:
        InvalidInputError: If the list holds several different things where one is expected.
    """
    if not isinstance(value, list):
        return value
    if not value:
        raise InvalidInputError(f"Nothing came in for `{name}`. Connect one value.")
    if len(value) > 1 and any(other is not value[0] and not _equal(other, value[0]) for other in value[1:]):
        raise InvalidInputError(f"`{name}` takes one value, got a list of {len(value)}. Connect a node that gives one.")
    return value[0]


def _equal(a: Any, b: Any) -> bool:
    return isinstance(a, (str, int, float, bool)) and a == b


def singles(**values: Any) -> dict[str, Any]:
    """Return the only element of each list input, by name."""
    return {name: single(value, name) for name, value in values.items()}


def checked(node: type[io.ComfyNode], **values: Any) -> dict[str, Any]:
    """Return the only element of each list input, by name, with widget values in the type that the node declares.

    Raises:
        InvalidInputError: If one has another type, or is a whole number larger than the node allows.
    """
    found = singles(**values)
    for declared in node.define_schema().inputs:  # not cached: a running node's class is locked
        if declared.id in found:
            found[declared.id] = _of_type(declared, found[declared.id])
    return found


def _of_type(declared: Any, value: Any) -> Any:
    name = declared.id
    if isinstance(declared, io.Int.Input):
        try:
            number = operator.index(value)
        except TypeError:
            raise _wrong(name, "a whole number", value) from None
        if number > declared.max:
            raise InvalidInputError(f"`{name}` must be at most {declared.max}, got {number}.")
        return number
    if isinstance(declared, io.Float.Input):
        if not isinstance(value, Real):
            raise _wrong(name, "a number", value)
        try:
            return float(value)
        except OverflowError:  # a whole number beyond all floats
            raise InvalidInputError(
                f"`{name}` must be at most {declared.max:g}, got a number that is too large."
            ) from None
    if isinstance(declared, io.Boolean.Input) and not isinstance(value, bool):
        raise _wrong(name, "true or false", value)
    if isinstance(declared, (io.String.Input, io.Combo.Input)) and not isinstance(value, str):
        raise _wrong(name, "a text", value)
    return value


def _wrong(name: str, expected: str, value: Any) -> InvalidInputError:
    return InvalidInputError(f"`{name}` must be {expected}, got a {type(value).__name__}. Connect one, or type it in.")


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


_SOCKETS: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "model": ("a MODEL, from Load Diffusion Model", lambda x: hasattr(getattr(x, "model", None), "diffusion_model")),
    "vae": ("a VAE, from Load VAE", lambda x: hasattr(x, "encode") and hasattr(x, "first_stage_model")),
    "clip": (
        "a CLIP, from Load CLIP",
        lambda x: hasattr(x, "tokenize") and hasattr(x, "cond_stage_model"),
    ),
    "clip_vision": ("a CLIP_VISION, from Load CLIP Vision", lambda x: hasattr(x, "encode_image")),
    "latent_image": (
        "a LATENT, from Empty Latent Image",
        lambda x: isinstance(x, Mapping) and hasattr(x.get("samples"), "is_nested"),
    ),
    "mask": ("a MASK", _is_tensor),
    "selection": ("a selection, from Select Blocks", lambda x: isinstance(x, BlockSelection)),
    "residuals": ("residuals, from Precompute Residuals", lambda x: isinstance(x, ResidualSet)),
    "patch_adapters": (
        "patch adapters, from Load Patch Adapters or Train Patch Adapters (DDiT)",
        lambda x: isinstance(x, TrainedPatches),
    ),
    "sigmas": ("SIGMAS, from a scheduler node", _is_tensor),
    "lora": ("a LoRA, from Dynamic Patch Trainer", lambda x: isinstance(x, Mapping)),
    "start_from": ("a LoRA, from Dynamic Patch Trainer", lambda x: isinstance(x, Mapping)),
}


def connected(**values: Any) -> dict[str, Any]:
    """Return the only element of each input that is not a widget, by name, after checking that it fits.

    Raises:
        InvalidInputError: If it is something else, or None, which loaders return for what a file does not contain.
    """
    found = singles(**values)
    for name, value in found.items():
        expected, is_one = _SOCKETS[name]
        if not is_one(value):
            raise InvalidInputError(f"`{name}` must be {expected}, got a {type(value).__name__}.")
    return found


def connected_if_any(**values: Any) -> dict[str, Any]:
    """Like :func:`connected`, for optional inputs, which are None if not connected."""
    found = singles(**values)
    return {name: None if value is None else connected(**{name: value})[name] for name, value in found.items()}


def refusal(check: Callable[[], object]) -> bool | str:
    """Return what ``validate_inputs`` returns: the sentence that a check of widgets raises, or True.

    The host then refuses the graph when it is queued. It marks every input that ``validate_inputs`` names, so a node
    names only those that the check is about; naming one also turns off the host's own check of its range or choices.
    """
    try:
        check()
    except BlockSkipError as error:
        return str(error)
    return True


def require_formats(**values: Any) -> None:
    """Check formats of weights by the name of their widget; the host's own message would not say what to do.

    A workflow that was saved with a newer ComfyUI may have one that this ComfyUI lacks.
    """
    for setting, value in values.items():
        given = single(value, setting)
        if given is not None:
            require_known(given, setting)


def tensorboard_refusal(value: Any) -> bool | str:
    """Return what ``validate_inputs`` returns about the input ``tensorboard``: its package must be installed."""
    return refusal(lambda: require_tensorboard() if single(value, "tensorboard") is True else None)
