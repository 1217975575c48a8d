"""A MODEL of the host as a :class:`~...model.SkippableDit`.

The user's MODEL is never changed. A run clones the patcher (the clone shares the weights), gives the clone stand-ins as
object patches, loads it through the host's own model management and unloads it at the end, which restores the original
modules. Two details keep the weights of replaced modules off the device: the clone is loaded only after all other
clones are unloaded, because a loaded model keeps what it has; and it gets a new patches id, because the host treats
object patches with an unchanged id as already loaded.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import comfy.model_management
import torch
from comfy.ldm.modules.attention import attention_pytorch
from torch import Tensor, nn

from ...accounting.weight_formats import is_host_quantised, stored_bytes
from ...errors import BlockSkipError, InvalidInputError, UnsupportedModelError
from ...model import BlockInfo, Denoiser, WeightPlacement, is_linear
from ..families.followed import FollowedAdapter, ModelLayout
from ..inputs.conditioning import (
    arguments_for_each,
    model_arguments,
    number_of_texts,
    references_of,
    sharing,
    without_references,
)
from ..inputs.frames import frames_in, with_frames
from . import kernels  # noqa: F401  replaces the host's kernels that have no backward
from .adapted_dit import AdaptedDit
from .following import follow
from .following_references import overwriting, place_references
from .patches import for_training
from .reference_latents import require_references, require_references_read
from .replay_check import require_replay
from .residency import (
    MODEL_PREFIX,
    drop_cast_buffers,
    end_prefetching,
    evict_others,
    keep_what_autograd_saves,
    return_small_layers,
    unload,
    whole_model,
)

# Change of the output over the relative error of the worst layer: at most 1.4 in tiny random models of 6 blocks, 1.3 in
# the demo's trained model of 12 with few blocks quantised, and just above 5 with nine in 4-bit, in one training of twelve. A
# factor of 5 leaves room for deep models; with 5.5, a LoRA that is applied twice is not detected in 4-bit.
ERROR_ALLOWANCE = 5.0

_MORE_THAN_ANY_DEVICE_HAS = 10**20  # bytes to keep free; the host's own trainer uses such a number to stream weights

_LAYOUTS: WeakKeyDictionary[nn.Module, ModelLayout] = WeakKeyDictionary()
_WITH_REFERENCES: WeakKeyDictionary[nn.Module, ModelLayout] = WeakKeyDictionary()
_PICTURE_MAY_BE_EMPTY = ("HunyuanVideo15", "Kandinsky5")
"""The host's models that make clips from text too: it gives them a picture and a mask of zeros then."""
_WITH_BACKWARD = ("attention_basic", "attention_sub_quad", "attention_split", "attention_pytorch", "attention_xformers")


def _error_of_patches(patcher: Any) -> float:
    """Return the relative difference that patches (a LoRA applied earlier) may cause, for the self-check.

    A host without dynamic VRAM writes a patched weight of eight or four bits back in its format, with random rounding,
    if it loads the layer whole, but computes with the unrounded one if it streams the layer. So what was computed with
    few blocks loaded may differ by that rounding from a run that streams some of them.
    """
    if patcher.is_dynamic():
        return 0.0
    named = dict(patcher.model.named_parameters())
    patched = [named[key] for key in patcher.patches if key in named and named[key].dim() > 1]
    return ERROR_ALLOWANCE * max(map(_rounding_of, patched), default=0.0)


def _rounding_of(weight: Tensor) -> float:
    """Return the relative error of random rounding in a weight's format: that of normally distributed numbers, measured.

    Weights that other packs have packed, such as GGUF's, are never written back.
    """
    if type(weight) not in (Tensor, nn.Parameter) and not is_host_quantised(weight):
        return 0.0
    num_bytes = stored_bytes(weight) / weight.numel()
    return 0.0 if num_bytes >= 2 else 0.05 if num_bytes >= 1 else 0.17


class HostedDit(AdaptedDit):
    """A MODEL that can be run with blocks replaced.

    Args:
        patcher: The MODEL, which is left unchanged. Anything that only belongs to sampling is left out; see
            ``patches``.
        captions: Conditionings, each ``[[tensor, settings]]``.
        latent_shape: Shape (C, H, W) of the largest latents that will be denoised.

    Raises:
        UnsupportedModelError: If no adapter knows the model, it has a change that training cannot follow, or captions
            carry reference latents and it reads none.
        InvalidInputError: If a caption comes from another model's text encoder, or its references from another VAE.
    """

    def __init__(self, patcher: Any, captions: Sequence[list] = (), latent_shape: Sequence[int] = ()) -> None:
        super().__init__(for_training(patcher))
        self.known_error = _error_of_patches(self.patcher)  # now, while the modules are the model's own
        _require_plain_access(self.blocks, self.patcher.model.diffusion_model)
        self.adapter.require_texts(captions)
        require_references(self.adapter, self.patcher.model, captions)
        self._captions = captions
        self._latent_shape = tuple(latent_shape)
        self.frames = frames_in(self.patcher.model, latent_shape[0]) if latent_shape else 1
        self._reserved = False
        self._elsewhere: dict[tuple[int, tuple[int, ...]], Mapping[str, Any]] = {}
        if isinstance(self.adapter, FollowedAdapter) and captions:
            self.adapter.layout = self._followed_with_references()

    def _followed_with_references(self) -> ModelLayout:
        """Return the layout with the places of the references, if a caption carries any."""
        first = next((index for index, caption in enumerate(self._captions) if references_of(caption)), None)
        if first is None:
            return self._followed()
        tree, assumed = self.patcher.model.diffusion_model, self.adapter
        assert isinstance(assumed, FollowedAdapter)
        if tree not in _WITH_REFERENCES:
            texts = [without_references(caption) for caption in self._captions]
            assumed.layout = HostedDit(self.patcher, texts, self._latent_shape)._followed()
            assumed.layout = place_references(self, tree, assumed.layout, self._latent_shape, first)
            try:
                require_replay(self, self._latent_shape, first)
            except UnsupportedModelError:  # with references its blocks may overwrite what they do not without
                assumed.layout = overwriting(assumed.layout)
                require_replay(self, self._latent_shape, first)
            _WITH_REFERENCES[tree] = assumed.layout
        return _WITH_REFERENCES[tree]

    def _followed(self) -> ModelLayout:
        """Return the layout of a model that no family file describes; found once per model and process."""
        tree = self.patcher.model.diffusion_model
        if tree not in _LAYOUTS:
            assert isinstance(self.adapter, FollowedAdapter)
            try:
                self._require_no_picture()
                self.adapter.layout = follow(self, tree, self._latent_shape)
            except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as problem:
                if isinstance(problem, (BlockSkipError, torch.OutOfMemoryError)):
                    raise
                raise InvalidInputError(
                    f"{self.adapter.title} could not be run with these captions ({type(problem).__name__}: {problem}). "
                    "Encode them with the text encoder that belongs to the model."
                ) from problem
            require_replay(self, self._latent_shape)
            _LAYOUTS[tree] = self.adapter.layout
        return _LAYOUTS[tree]

    def _require_no_picture(self) -> None:
        given = any("c_concat" in arguments for arguments in self.arguments)
        if given and type(self.patcher.model).__name__ not in _PICTURE_MAY_BE_EMPTY:
            raise UnsupportedModelError(
                f"{self.adapter.title} models take a picture or a mask besides the text, which training does not "
                "support. Load a model that makes pictures from text."
            )

    @property
    def num_texts(self) -> int:
        """Number of texts among the captions."""
        return number_of_texts(self._captions)

    @property
    def device(self) -> torch.device:
        """The device that the model runs on."""
        return self.patcher.load_device

    @property
    def room_for_blocks(self) -> int:
        """Bytes of blocks that may be loaded together: a quarter of the free memory, or all on the CPU."""
        if self.device.type == "cpu":
            return sum(self.block_bytes)
        unload(self.patcher)
        evict_others(self.patcher)
        return comfy.model_management.get_free_memory(self.device) // 4

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the token streams, which another node may have set."""
        chosen = self.patcher.get_model_object("manual_cast_dtype")
        return self.patcher.model.get_dtype() if chosen is None else chosen

    def module(self, name: str) -> nn.Module:
        """Return the model's own module, unloaded, because a copy must not have the attributes of a loaded module."""
        self._reserve_addresses()
        unload(self.patcher)
        return self.patcher.model.diffusion_model.get_submodule(name)

    def _reserve_addresses(self) -> None:
        """Have a dynamic patcher assign the model's own layers their place in its virtual memory, once.

        Copies of layers share the original's place; if the original had none, every copy would get a new one, and
        places are never released.
        """
        if not self._reserved and self.patcher.is_dynamic():
            with torch.inference_mode():  # as in the host; otherwise its weights could no longer be hashed
                comfy.model_management.load_models_gpu([self.patcher])
        self._reserved = True

    @cached_property
    def arguments(self) -> Sequence[Mapping[str, Any]]:
        """The model's arguments besides latent and sigma, for each caption, on the CPU."""
        rows = self._arguments_for(self._captions, self._latent_shape)
        require_references_read(self.adapter, self._captions, rows)
        return rows

    def arguments_of(self, caption: int, shape: tuple[int, ...]) -> Mapping[str, Any]:
        """Return a caption's :attr:`arguments` for latents of a shape; tensors that do not depend on it are kept once."""
        if shape == self._latent_shape:
            return self.arguments[caption]
        if (caption, shape) not in self._elsewhere:
            (row,) = self._arguments_for([self._captions[caption]], shape)
            self._elsewhere[caption, shape] = sharing(row, self.arguments[caption])
        return self._elsewhere[caption, shape]

    def _arguments_for(self, captions: Sequence[list], shape: Sequence[int]) -> Sequence[Mapping[str, Any]]:
        model, cpu = self.patcher.model, torch.device("cpu")
        with torch.inference_mode(False), torch.no_grad():  # tensors that autograd may save
            latent = with_frames(model, torch.zeros(1, *shape))
            sound = self.adapter.sound(frames_in(model, shape[0]) if shape else 1, torch.ones(1))
            return arguments_for_each(
                lambda caption: model_arguments(model, self._as_the_host_reads(caption), latent, cpu, sound),
                captions, self.adapter.reference_argument,
            )  # fmt: skip

    def _as_the_host_reads(self, caption: list) -> list:
        [[embedding, settings]] = caption
        return [[embedding, self.adapter.as_the_host_reads(settings)]]

    @property
    def _host_model(self) -> Any:
        return self.patcher.model

    @contextmanager
    def running(
        self,
        replacements: Mapping[str, nn.Module],
        *,
        activation_bytes: int = 0,
        weights: WeightPlacement = "as fits",
        baked: Collection[str] = frozenset(),
    ) -> Iterator[Denoiser]:
        """Load the model with ``replacements`` in place; unload it and restore everything afterwards.

        Modules that are not replaced are loaded as copies too; ``residency`` explains why.

        Args:
            replacements: Path below the diffusion model -> stand-in.
            activation_bytes: Memory that the host should keep free in addition to the weights.
            weights: Where weights are kept. "resident" loads all of them, even those that the host would leave in host
                memory to keep its reserve (1.2 GiB or more) free. A host that pages weights in and out by itself
                ("dynamic VRAM") always does so, and on cards other than NVIDIA's the host fills 40 % of the free memory
                with weights even if they should be streamed. Weights that autograd saves are always on the device.
            baked: Keys of patches that the weights of ``replacements`` already contain.

        Yields:
            The denoiser, bound to this MODEL's captions.
        """
        unload(self.patcher)
        clone = self.patcher.clone()
        patched = [key.removeprefix(MODEL_PREFIX) for key in clone.object_patches]
        everything = whole_model(self.patcher.model.diffusion_model, replacements, patched)
        for name, module in everything.items():
            clone.add_object_patch(MODEL_PREFIX + name, module)
        for key in baked:
            del clone.patches[key]
        clone.patches_uuid = uuid.uuid4()
        clone.size = self._planned_bytes(replacements)
        was_training = comfy.model_management.in_training
        put_back = _remember_tensors(everything.values())
        try:
            comfy.model_management.in_training = True  # kernels with a backward, and the same ones for residuals
            evict_others(clone)
            with torch.inference_mode(False):
                comfy.model_management.load_models_gpu(
                    [clone],
                    memory_required=_MORE_THAN_ANY_DEVICE_HAS if weights == "streamed" else activation_bytes,
                    force_full_load=weights == "resident",
                )
                if torch.is_grad_enabled():
                    keep_what_autograd_saves(clone, replacements, self.device)
            clone.pre_run()
            yield self._denoiser(clone.model, _options(clone))
        finally:
            comfy.model_management.in_training = was_training
            clone.cleanup()
            end_prefetching()
            return_small_layers(clone)
            put_back()
            unload(clone)
            drop_cast_buffers()

    def _planned_bytes(self, replacements: Mapping[str, nn.Module]) -> int:
        """Return the bytes that will be loaded; the host would plan with the size of the MODEL's own modules."""
        size = comfy.model_management.module_size
        replaced = sum(size(self.module(name)) for name in replacements)
        return size(self.patcher.model) - replaced + sum(size(stand) for stand in replacements.values())


def _options(clone: Any) -> dict[str, Any]:
    """Return the ``transformer_options`` for a training's calls to a loaded clone."""
    options = clone.model_options["transformer_options"]
    return {**options, "optimized_attention_override": _differentiable_attention}


def _require_plain_access(blocks: Sequence[BlockInfo], diffusion_model: nn.Module) -> None:
    """Refuse layers whose weight cannot be obtained: no gradient can pass without it."""
    for block in blocks:
        for path, layer in diffusion_model.get_submodule(block.name).named_modules():
            if not is_linear(layer) or hasattr(layer, "cast_bias_weight"):
                continue
            weight = getattr(layer, "weight", None)
            if weight is None or tuple(weight.shape) != (layer.out_features, layer.in_features):
                kind = f"{type(layer).__module__}.{type(layer).__qualname__}"
                raise UnsupportedModelError(
                    f"The layer {block.name}.{path} is a {kind}, which keeps its weight packed and does not say how "
                    "to unpack it, so no gradient can pass. Load the model in bf16, fp8, one of ComfyUI's own "
                    "quantised formats, or GGUF."
                )


def _differentiable_attention(attention: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """Use the host's attention, or torch's if the host's kernel has no backward."""
    if attention.__name__ not in _WITH_BACKWARD:
        attention = attention_pytorch
    return attention(*args, **kwargs)


def _remember_tensors(modules: Iterable[nn.Module | Tensor]) -> Callable[[], None]:
    """Return a function that restores the tensors that these modules have now.

    Tensors that were moved to the device must be dropped before the host unloads; it would copy them back to host
    memory, where the MODEL's own weights already are.
    """
    places = list(modules)
    trees = [module for module in places if isinstance(module, nn.Module)]
    parameters = [parameter for tree in trees for parameter in tree.parameters()]
    parameters += [tensor for tensor in places if isinstance(tensor, nn.Parameter)]
    data = [(parameter, parameter.data) for parameter in parameters]
    layers = [(layer, dict(layer._parameters)) for tree in trees for layer in tree.modules()]

    def put_back() -> None:
        for layer, own in layers:
            layer._parameters.update(own)
        for parameter, before in data:
            parameter.data = before

    return put_back
