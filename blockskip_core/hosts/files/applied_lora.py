"""How ComfyUI reads a LoRA's tensors: which weights they change, and which are ignored."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import comfy.lora
import comfy.lora_convert
from torch import Tensor

from ...errors import LoraFileError
from .patch_shapes import Patches, weight_of, without_misfits

logger = logging.getLogger(__name__)

_OF_TEXT_ENCODERS = re.compile(r"(lora_te|text_encoder|te\d?[._]|clip_|t5|cond_stage_model|conditioner|text_model)")
_ENDINGS = re.compile(
    r"\.(lora_(up|down|mid|A|B)|lora\.(up|down)|hada_|lokr_|oft_|diff|alpha|dora_scale|bias|weight)[^/]*$"
)


class HostPatches:
    """A LoRA as the host reads it for a model.

    Attributes:
        patches: As returned by ``comfy.lora.load_lora``.
        unread: Names of tensors that it ignores.
    """

    def __init__(self, patcher: Any, lora: Mapping[str, Tensor]) -> None:
        """Read a LoRA.

        Raises:
            LoraFileError: If the host fails to read it; the host does not check that tensors match their names.
        """
        self._known = comfy.lora.model_lora_keys_unet(patcher.model, {})
        try:
            tensors = _Watched(comfy.lora_convert.convert_lora(dict(lora)))
            self.patches: Patches = comfy.lora.load_lora(tensors, self._known, log_missing=False)
        except (RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            raise LoraFileError(f"ComfyUI cannot read this as a LoRA: {error}.") from error
        self.unread = sorted(tensors.keys() - tensors.read)
        self._num_tensors = len(tensors)

    def passed_over(self) -> str:
        """Return a sentence on the tensors that the host ignores, by kind; empty if there are none."""
        if not self.unread:
            return ""
        text = [name for name in self.unread if _OF_TEXT_ENCODERS.match(name)]
        odd = [name for name in self.unread if name not in text and self._is_of_a_layer(name)]
        foreign = [_ENDINGS.sub("", name) for name in self.unread if name not in text and name not in odd]
        kinds = [
            (len(text), "of a text encoder"),
            (len(odd), f"of a kind that it does not support here ({listed(odd)})"),
            (len(foreign), f"of layers that this model does not have ({listed(foreign)})"),
        ]
        said = ", ".join(f"{count} {kind}" for count, kind in kinds if count)
        return f"ComfyUI does not use {len(self.unread)} of the {self._num_tensors} tensors: {said}."

    def _is_of_a_layer(self, name: str) -> bool:
        """Return whether a tensor's name begins with the name of a layer of this model."""
        words = name.split(".")
        return any(".".join(words[:count]) in self._known for count in range(1, len(words)))


class _Watched(dict):
    """A LoRA's tensors, with a record of which were read."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(tensors)
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        self.read.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        return self[name] if name in self else default


def listed(names: Sequence[str], most: int = 3) -> str:
    """Return the first few different names, and how many more there are."""
    different = [name.removeprefix("diffusion_model.") for name in dict.fromkeys(names)]
    rest = f" and {len(different) - most} more" if len(different) > most else ""
    return ", ".join(different[:most]) + rest


class AppliedLora(NamedTuple):
    """A MODEL with a LoRA.

    Attributes:
        model: A clone with the LoRA patched in.
        num_patched: Number of weights that it changes.
        passed_over: A sentence on the tensors that the host does not use; empty if there are none.
    """

    model: Any
    num_patched: int
    passed_over: str


def apply_lora(patcher: Any, lora: Mapping[str, Tensor], strength: float) -> AppliedLora:
    """Patch a LoRA into a clone of a MODEL.

    Raises:
        LoraFileError: If the LoRA has no tensors for this model, or tensors of other sizes.
    """
    read = HostPatches(patcher, lora)
    fitting, misfits = without_misfits(patcher, read.patches)
    passed_over = " ".join(filter(None, (read.passed_over(), _on_misfits(misfits))))
    if not fitting:
        raise LoraFileError(
            f"This LoRA has nothing for {type(patcher.model.diffusion_model).__name__}: it was trained for another "
            f"kind of model. {passed_over}".rstrip()
        )
    clone = patcher.clone()
    patched = {weight_of(key) for key in clone.add_patches(fitting, strength)}
    if passed_over:
        logger.warning("BlockSkip: %s", passed_over)
    return AppliedLora(clone, len(patched), passed_over)


def _on_misfits(names: Sequence[str]) -> str:
    """Return a sentence on full differences that the model has no weights of that size for; empty if there are none."""
    if not names:
        return ""
    return f"Left out are full differences of another size than the model's weights ({listed(names)})."
