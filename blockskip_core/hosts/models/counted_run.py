"""Count a run of a loaded MODEL before it starts, and the memory available for it."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import Any

import comfy.model_management

from ...accounting.memory_needs import CountedOnce, MemoryNeeds, RunPlan, StoredWeights, memory_needs
from ...accounting.plan import MemorySettings
from ...accounting.weight_formats import WEIGHT_FORMATS, is_shrunk, predicted_bytes, stored_bytes
from ...adapters.lora import LoraSettings
from ...errors import BlockSkipError
from ...model import SkippableDit
from ...residuals.format import ResidualFormat
from ...selection.selection import BlockSelection
from ..inputs.frames import latent_shape
from .hosted_dit import HostedDit
from .quantised_blocks import bytes_to_unpack
from .weightless_dit import WeightlessDit


class UncountableError(BlockSkipError):
    """The memory of a run could not be counted; the message is the class and the message of what was raised."""


@contextmanager
def counting(*, passed_on: type[Exception] | tuple[()] = ()) -> Iterator[None]:
    """Turn whatever a model's layers raise while they are counted into one error: those of other packs may train all the same.

    Args:
        passed_on: Exceptions that are not turned. Cancel never is; in ComfyUI 0.18.2 it is an ordinary exception.

    Raises:
        UncountableError: In place of any other exception.
    """
    try:
        yield
    except comfy.model_management.InterruptProcessingException:
        raise
    except Exception as error:
        if isinstance(error, passed_on):
            raise
        raise UncountableError(f"{type(error).__name__}: {error}") from error


class CountedRun:
    """Counts what a run with some settings needs, without loading anything.

    Args:
        dit: The MODEL, with the run's captions.
        selection: Blocks to be skipped.
        lora: Rank, alpha, targets.
        captions: Number of captions.
        draws: Number of training examples.
        chunk_size: Number of examples that go through the blocks together.
        linear: Whether the back residual follows its input linearly.
        residual_format: How residuals are stored.
        probe_size: Side in pixels of the pictures that block selection samples.
    """

    def __init__(
        self,
        dit: HostedDit,
        selection: BlockSelection,
        lora: LoraSettings,
        *,
        captions: int,
        draws: int,
        chunk_size: int,
        linear: bool = False,
        residual_format: ResidualFormat = "exact",
        probe_size: int = 512,
    ) -> None:
        self.dit, self.selection, self.lora = dit, selection, lora
        self._draws, self._chunk, self._linear = draws, min(chunk_size, draws), linear
        self._form, self._probe_size = residual_format, probe_size
        self._longest = max(range(captions), key=lambda caption: (dit.text_tokens(caption), dit.text_length(caption)))
        self._once = CountedOnce()

    def of(self, selection: BlockSelection) -> CountedRun:
        """Return the count of the same run with other blocks; what does not depend on them is not counted again."""
        other = copy.copy(self)
        other.selection = selection
        return other

    @cached_property
    def _weightless(self) -> WeightlessDit:
        return WeightlessDit.of(self.dit)

    def needs(self, settings: MemorySettings) -> MemoryNeeds:
        """Count a run with these settings."""
        model = self.dit.patcher.model
        stored = self._draws if settings.storage == "disk" else self._chunk
        plan = RunPlan(
            latent_shape=latent_shape(model, settings.patch_min, self.dit.frames),
            probe_shape=latent_shape(model, self._probe_size),
            selection=self.selection,
            lora=self.lora,
            layers=self._weightless.lora_layers(self.selection, self.lora.targets),
            config=settings.config,
            on_the_fly=settings.storage == "on the fly",
            linear=self._linear,
            draws=self._draws,
            chunk=self._chunk,
            stored=stored,
            caption=self._longest,
            residual_format=self._form,
        )
        weights = self.weights(settings)
        needs = memory_needs(self._weightless, plan, weights, self._once)
        if self._stays_on_device:
            needs = needs.with_all_weights(self._all_weights)
        return self._with_quantised_layers(needs, settings)

    @property
    def _all_weights(self) -> int:
        """Bytes of the model's own weights."""
        module = self.dit.patcher.model.diffusion_model
        return sum(map(stored_bytes, (*module.parameters(), *module.buffers())))

    def _with_quantised_layers(self, needs: MemoryNeeds, settings: MemorySettings) -> MemoryNeeds:
        """Add what layers quantised for the run need in addition to their weights on the device.

        The packed copies of all of them are where the host unloads to, because the MODEL itself is not changed: in host
        memory, or on the device if weights stay there. On the device one layer at a time is unpacked.
        """
        shrunk = self._shrunk(settings)
        unpacked = bytes_to_unpack(max((math.prod(shape) for _, shape in shrunk), default=0), self.dit.dtype)
        training = replace(needs.training, peak=needs.training.peak + unpacked)
        packed = _packed_bytes(shrunk)
        if self._stays_on_device:
            return replace(needs, training=training.with_weights(training.weights + packed))
        return replace(needs, training=training, host=needs.host + packed)

    def _shrunk(self, settings: MemorySettings) -> list[tuple[str, tuple[int, int]]]:
        """Return the format and the shape of every layer that is quantised for the run."""
        module = self.dit.patcher.model.diffusion_model
        return [
            (weight_format, (layer.weight.shape[0], layer.weight.shape[1]))
            for name, weight_format in formats_of(self.dit, self.selection, settings).items()
            for layer in module.get_submodule(name).modules()
            if is_shrunk(layer, weight_format)
        ]

    @property
    def _stays_on_device(self) -> bool:
        """Whether the host never moves weights off the device, as with --highvram; then skipping saves nothing."""
        patcher = self.dit.patcher
        return patcher.offload_device == patcher.load_device and patcher.load_device.type != "cpu"

    def weights(self, settings: MemorySettings) -> StoredWeights:
        """Return the bytes of the weights, with the run's quantised blocks counted as quantised."""
        module, formats = self.dit.patcher.model.diffusion_model, formats_of(self.dit, self.selection, settings)
        blocks = [
            predicted_bytes(module.get_submodule(block.name), formats.get(block.name, "off"))
            for block in self.dit.blocks
        ]
        return StoredWeights(blocks=blocks, others=self._all_weights - sum(self.dit.block_bytes))

    def trained_weights(self, settings: MemorySettings) -> int:
        """Return the bytes of weights that a training step uses; where weights stay on the device, all that are there."""
        if self._stays_on_device:
            return self._all_weights + _packed_bytes(self._shrunk(settings))
        weights = self.weights(settings)
        used = range(len(weights.blocks)) if settings.storage == "on the fly" else self.selection.kept
        return sum(weights.blocks[index] for index in used) + weights.others

    def streamed_bytes(self, settings: MemorySettings) -> int:
        """Return at most how many bytes of weights are on the device at the same time if all of them are streamed.

        The host copies the weights of one layer at a time into a buffer, and has a buffer for each of its streams. In
        backward there is one more, because a layer's weight is requested again.
        """
        module, formats = self.dit.patcher.model.diffusion_model, formats_of(self.dit, self.selection, settings)
        used = range(len(self.dit.blocks)) if settings.storage == "on the fly" else self.selection.kept
        layers = [
            predicted_bytes(layer, formats.get(self.dit.blocks[index].name, "off"))
            for index in used
            for layer in module.get_submodule(self.dit.blocks[index].name).modules()
            if next(layer.children(), None) is None
        ]
        return (max(1, comfy.model_management.NUM_STREAMS) + 1) * max(layers)


def formats_of(dit: SkippableDit, selection: BlockSelection, settings: MemorySettings) -> dict[str, str]:
    """Return the blocks that a run quantises, path -> format; trained and frozen blocks have a format each."""
    chosen = dict.fromkeys(selection.adapted, settings.quantize_kept)
    chosen |= dict.fromkeys(selection.frozen_span, settings.quantize_frozen)
    return {dit.blocks[index].name: chosen[index] for index in sorted(chosen) if chosen[index] != "off"}


def _packed_bytes(shrunk: Iterable[tuple[str, tuple[int, int]]]) -> int:
    return sum(WEIGHT_FORMATS[weight_format].num_bytes(*shape) for weight_format, shape in shrunk)


def room_on(device: Any) -> tuple[int, str]:
    """Return the bytes of a device that are free once other models are unloaded, and the device's name."""
    management = comfy.model_management
    models = [m for m in management.current_loaded_models if m.model is not None and m.device == device]
    loaded = sum(model.model_loaded_memory() for model in models)
    free = management.get_free_memory(device) + (loaded if device.type != "cpu" else 0)
    return int(free), management.get_torch_device_name(device)
