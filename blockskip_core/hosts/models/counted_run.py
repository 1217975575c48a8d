"""A run of a loaded MODEL, counted before it starts, and the memory that there is for it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import comfy.model_management

from ...accounting.memory_needs import MemoryNeeds, RunPlan, StoredWeights, memory_needs
from ...accounting.plan import MemorySettings
from ...accounting.weight_formats import WEIGHT_FORMATS, is_shrunk, predicted_bytes, stored_bytes
from ...adapters.lora import LoraSettings
from ...residuals.cache import predicted_bytes as residual_bytes
from ...residuals.format import ResidualFormat
from ...selection.selection import BlockSelection
from ..inputs.frames import latent_shape
from .hosted_dit import HostedDit
from .quantised_blocks import bytes_to_unpack
from .weightless_dit import WeightlessDit


class CountedRun:
    """What a run with some settings takes. Nothing is loaded for it.

    Args:
        dit: The MODEL, with the run's captions.
        selection: Blocks to be skipped.
        lora: Rank, alpha, targets.
        captions: How many there are.
        draws: Training examples.
        chunk_size: Examples that go through the blocks together.
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
        self._longest = max(range(captions), key=dit.text_length)

    @cached_property
    def _weightless(self) -> WeightlessDit:
        return WeightlessDit.of(self.dit)

    def needs(self, settings: MemorySettings) -> MemoryNeeds:
        """Count a run with these settings."""
        model = self.dit.patcher.model
        stored = self._draws if settings.storage == "disk" else self._chunk
        plan = RunPlan(
            latent_shape=latent_shape(model, settings.patch_min),
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
        )
        weights = self.weights(settings.quantize_kept)
        needs = self._with_quantised_layers(memory_needs(self._weightless, plan, weights), settings.quantize_kept)
        if self._stays_on_device:
            needs = needs.with_all_weights(sum(weights.blocks) + weights.others)
        return needs if plan.on_the_fly else replace(needs, disk=self._disk(plan.latent_shape, stored))

    def _with_quantised_layers(self, needs: MemoryNeeds, weight_format: str) -> MemoryNeeds:
        """Add what layers that are quantised for the run take beside their weights on the device.

        Packed, all of them are in host memory, for the MODEL stays as it is; unpacked, one is on the device at a time.
        """
        if weight_format == "off":
            return needs
        blocks = [
            self.dit.patcher.model.diffusion_model.get_submodule(self.dit.blocks[i].name) for i in self.selection.kept
        ]
        shapes = [x.weight.shape for block in blocks for x in block.modules() if is_shrunk(x, weight_format)]
        packed = sum(WEIGHT_FORMATS[weight_format].num_bytes(*shape) for shape in shapes)
        unpacked = bytes_to_unpack(max(map(math.prod, shapes), default=0), self.dit.dtype)
        training = replace(needs.training, peak=needs.training.peak + unpacked)
        return replace(needs, training=training, host=needs.host + packed)

    @property
    def _stays_on_device(self) -> bool:
        """Whether the host never takes weights off the device again, as with --highvram; skipping saves nothing then."""
        patcher = self.dit.patcher
        return patcher.offload_device == patcher.load_device and patcher.load_device.type != "cpu"

    def weights(self, weight_format: str) -> StoredWeights:
        """Return what the weights take, the kept blocks' in another format."""
        module, kept = self.dit.patcher.model.diffusion_model, self.selection.kept
        everything = sum(map(stored_bytes, (*module.parameters(), *module.buffers())))
        blocks = [
            predicted_bytes(module.get_submodule(block.name), weight_format if index in kept else "off")
            for index, block in enumerate(self.dit.blocks)
        ]
        return StoredWeights(blocks=blocks, others=everything - sum(self.dit.block_bytes))

    def trained_weights(self, settings: MemorySettings) -> int:
        """Return the bytes of weights that a training step uses."""
        weights = self.weights(settings.quantize_kept)
        everything = settings.storage == "on the fly" or self._stays_on_device
        used = range(len(weights.blocks)) if everything else self.selection.kept
        return sum(weights.blocks[index] for index in used) + weights.others

    def largest_trained_block(self, settings: MemorySettings) -> int:
        """Return the bytes of the largest block that a training step uses."""
        blocks = self.weights(settings.quantize_kept).blocks
        used = range(len(blocks)) if settings.storage == "on the fly" else self.selection.kept
        return max(blocks[index] for index in used)

    def _disk(self, shape: Sequence[int], stored: int) -> int:
        draws, itemsize = range(stored), self.dit.dtype.itemsize
        residuals = residual_bytes(
            draws,
            front=self.selection.front > 0,
            back=self.selection.back > 0,
            img_tokens=self.dit.image_tokens(*shape[1:]),
            txt_tokens=dict.fromkeys(draws, self.dit.text_tokens(self._longest)),
            width=self.dit.width,
            itemsize=itemsize,
            form=self._form,
        )
        return residuals + self._linear * (self.selection.back > 0) * self.dit.width**2 * itemsize


def room_on(device: Any) -> tuple[int, str]:
    """Return the bytes of a device that are free once other models are unloaded, and the device's name."""
    management = comfy.model_management
    models = [m for m in management.current_loaded_models if m.model is not None and m.device == device]
    loaded = sum(model.model_loaded_memory() for model in models)
    free = management.get_free_memory(device) + (loaded if device.type != "cpu" else 0)
    return int(free), management.get_torch_device_name(device)
