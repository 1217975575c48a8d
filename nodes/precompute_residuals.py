"""Precompute Residuals: the training schedule, its latents, and what the skipped blocks would have done."""

from __future__ import annotations

from dataclasses import replace

import torch
from comfy_api.latest import io

from ..blockskip_core.accounting.plan import MemorySettings
from ..blockskip_core.data.patch_sampling import PATCH_ORDERS, PatchConfig
from ..blockskip_core.data.schedule import draw_schedule, largest_crop
from ..blockskip_core.data.timesteps import TIMESTEP_DISTRIBUTIONS, sigma_sampler
from ..blockskip_core.hosts.files.folders import residuals_folder
from ..blockskip_core.hosts.inputs.conditioning import flatten_conditionings
from ..blockskip_core.hosts.inputs.encoding import TrainingCrops, crop_multiple, encode_crops, flatten_pictures
from ..blockskip_core.hosts.inputs.frames import latent_shape
from ..blockskip_core.hosts.models.hosted_dit import HostedDit
from ..blockskip_core.hosts.models.identity import (
    conditionings_identity,
    host_identity,
    model_identity,
    module_identity,
    tensors_identity,
)
from ..blockskip_core.hosts.models.out_of_memory import out_of_memory_explained
from ..blockskip_core.reporting import pictures
from ..blockskip_core.residuals.back_response import BACK_RESIDUALS
from ..blockskip_core.residuals.cache import CacheIdentity
from ..blockskip_core.residuals.format import RESIDUAL_FORMATS
from ..blockskip_core.residuals.sources import STORAGES, ResidualSet, require_room, stored_latents, write_cache
from .inputs import checked, connected, require_memory_settings, single
from .page.live_chart import announcer
from .page.progress import NodeProgress
from .types import BlockSelectionSocket, MemorySettingsSocket, ResidualsSocket


class PrecomputeResiduals(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BlockSkip_PrecomputeResiduals",
            display_name="Precompute Residuals",
            category="BlockSkip/training",
            description=(
                "Decides everything that training will see (crops, noise levels, noise) and computes what the skipped "
                "blocks would have contributed, so that training needs only the blocks in the middle. Large crops are "
                "shown at high noise, small ones at low noise, all resized to the same small side."
            ),
            search_aliases=["blockskip", "dynamic patch", "residual cache", "cache latents", "make dataset"],
            is_input_list=True,
            is_experimental=True,
            inputs=[
                io.Model.Input("model", tooltip="The same MODEL that you will train on."),
                io.Vae.Input("vae", tooltip="The VAE that belongs to the model."),
                io.Image.Input(
                    "images",
                    tooltip="Pictures of your subject, 4 to 20 are usual; a batch or a list, sizes may differ. "
                    "The shorter side should have at least `patch_max` pixels.",
                ),
                io.Conditioning.Input(
                    "positive",
                    tooltip="The caption: one for all pictures, or one for each (a list, or one from a dataset node).",
                ),
                BlockSelectionSocket.Input("selection", tooltip="From Select Blocks."),
                io.Int.Input(
                    "draws",
                    default=400,
                    min=1,
                    max=1_000_000,
                    tooltip="How many training examples to prepare. One is used per step and batch row; a longer run "
                    "starts over. FLUX.1 stores about 4.5 to 6 MiB for each at 256 px.",
                ),
                io.Int.Input(
                    "patch_min",
                    default=256,
                    min=16,
                    max=4096,
                    step=16,
                    tooltip="Side in pixels of every training picture, and of the smallest crop. Memory and time "
                    "depend on it. 256 is the paper's for FLUX.1.",
                ),
                io.Int.Input(
                    "patch_max",
                    default=512,
                    min=16,
                    max=4096,
                    step=16,
                    tooltip="Side in pixels of the largest crop; larger pictures are first scaled down until their "
                    "shorter side is this. 512 is the paper's for FLUX.1.",
                ),
                io.Combo.Input(
                    "storage",
                    options=list(STORAGES),
                    default="disk",
                    tooltip="disk: compute all now and keep them on disk (fast training, least GPU memory). "
                    "chunked: a part at a time while training (little disk). "
                    "on the fly: store nothing, run the whole model in every step (needs memory for all weights).",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=io.ControlAfterGenerate.fixed,
                    tooltip="Decides crops, noise levels and noise.",
                ),
                io.Combo.Input(
                    "patch_order",
                    options=list(PATCH_ORDERS),
                    default="low-to-high",
                    optional=True,
                    advanced=True,
                    tooltip="low-to-high: small crops at low noise (the paper's). fixed: always the largest crop, "
                    "i.e. a plain resize. The others are for comparison.",
                ),
                io.Combo.Input(
                    "timesteps",
                    options=list(TIMESTEP_DISTRIBUTIONS),
                    default="model",
                    optional=True,
                    advanced=True,
                    tooltip="How noise levels are drawn. model: spread as this model's sampler spreads its steps.",
                ),
                io.Float.Input(
                    "timestep_shift",
                    default=3.0,
                    min=0.01,
                    max=100.0,
                    step=0.01,
                    optional=True,
                    advanced=True,
                    tooltip="Only read by `shifted`: above 1 favours high noise.",
                ),
                io.Int.Input(
                    "chunk_size",
                    default=64,
                    min=1,
                    max=100_000,
                    optional=True,
                    advanced=True,
                    tooltip="Draws that go through the model's blocks together. More needs more RAM and loads each "
                    "block's weights less often. With `chunked`, also how many are kept on disk at a time.",
                ),
                io.Combo.Input(
                    "back_residual",
                    options=list(BACK_RESIDUALS),
                    default="constant",
                    optional=True,
                    advanced=True,
                    tooltip="What stands in for the last blocks. constant: what they added before training (the "
                    "paper's). linear: that, and how it changes with what the trained blocks learn, to first order, at "
                    "the same memory. Not read by `on the fly`.",
                ),
                io.Combo.Input(
                    "residual_format",
                    options=list(RESIDUAL_FORMATS),
                    default="exact",
                    optional=True,
                    advanced=True,
                    tooltip="exact: as the model computes them. int8 and fp8: half the disk for models in bf16, "
                    "slightly rounded; int8 rounds less. Not read by `on the fly`.",
                ),
                MemorySettingsSocket.Input(
                    "memory_settings",
                    optional=True,
                    tooltip="From Memory Plan. Takes precedence over `patch_min` and `storage`.",
                ),
            ],
            outputs=[
                ResidualsSocket.Output("residuals", display_name="residuals", tooltip="For Dynamic Patch Trainer."),
                io.Image.Output(
                    "patches",
                    display_name="patches",
                    tooltip="What training will see: crops with their noise level t and side in pixels.",
                ),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt, io.Hidden.extra_pnginfo],
        )

    @classmethod
    def validate_inputs(cls, patch_min, patch_max) -> bool | str:
        low, high = single(patch_min, "patch_min"), single(patch_max, "patch_max")
        if low is None or high is None:  # linked: known only when the node runs
            return True
        for name, side in (("patch_min", low), ("patch_max", high)):
            if side < 16 or side > 4096:
                return f"{name} must lie between 16 and 4096 px, got {side}."
        return True if low <= high else f"patch_min must not be larger than patch_max, got {low} and {high}."

    @classmethod
    def execute(cls, model, vae, images, positive, selection, **widgets) -> io.NodeOutput:
        advice = "Lower `patch_min`, or unload what else uses the device, and queue again: what was finished is kept."
        with out_of_memory_explained("Precomputing", advice):
            return cls._precompute(model, vae, images, positive, selection, **widgets)

    @classmethod
    def _precompute(cls, model, vae, images, positive, selection, **widgets) -> io.NodeOutput:
        model, vae, selection = connected(model=model, vae=vae, selection=selection).values()
        widgets = _with_memory_settings(**checked(cls, **widgets))
        photos, captions = flatten_pictures(images), flatten_conditionings(positive)
        progress = NodeProgress(cls.hidden.unique_id, announcer(cls.hidden, "precomputing"))

        bare = HostedDit(model)
        selection.require_for(len(bare.blocks), bare.family)
        multiple = crop_multiple(vae, bare.adapter.patch_size)
        storage, back_residual = widgets["storage"], widgets.get("back_residual", "constant")
        residual_format = widgets.get("residual_format", "exact")
        if storage == "on the fly":  # neither is read, so neither makes the run another one
            back_residual = "constant" if back_residual in BACK_RESIDUALS else back_residual
            residual_format = "exact" if residual_format in RESIDUAL_FORMATS else residual_format
        chunk_size = widgets.get("chunk_size", 64)
        schedule = _schedule(model, photos, len(captions), multiple, **widgets)
        crops = TrainingCrops(photos, schedule)

        identity = CacheIdentity(
            model=model_identity(model),
            schedule=schedule.fingerprint,
            selection=selection.fingerprint,
            pictures=tensors_identity(photos) + module_identity(vae.first_stage_model),
            captions=conditionings_identity(captions),
            dtype=str(bare.dtype),
            host=host_identity(),
            # A linear answer is fitted on the first chunk, so its size decides what is stored.
            residual_format=residual_format,
            back_residual=f"linear, {chunk_size} draws" if back_residual == "linear" else back_residual,
        )
        folder = residuals_folder(identity.key + ("-chunk" if storage == "chunked" else ""))
        residuals = ResidualSet(
            schedule=schedule,
            latents=torch.empty(
                len(schedule), *latent_shape(model.model, schedule.patches.patch_min), device="meta"
            ),  # what they will be, without memory
            selection=selection,
            captions=captions,
            identity=identity,
            storage=storage,
            chunk_size=chunk_size,
            folder=folder,
            family=bare.family,
            back_residual=back_residual,
        )
        latents = stored_latents(folder, identity, len(schedule)) if storage == "disk" else None
        if latents is None:
            require_room(
                residuals, HostedDit(model, captions, residuals.latents.shape[1:])
            )  # before an hour is spent on pictures
            latents = encode_crops(vae, model.model, crops, lambda done, total: progress("encoding crops", done, total))
        residuals = replace(residuals, latents=latents)
        if storage == "disk":
            write_cache(residuals, HostedDit(model, captions, latents.shape[1:]), progress)
        sheet = _contact_sheet(crops, schedule)
        progress.say(_size_note(photos, schedule))
        return io.NodeOutput(residuals, pictures.as_image(sheet))


def _with_memory_settings(memory_settings: MemorySettings | None = None, **widgets) -> dict:
    if memory_settings is None:
        return widgets
    require_memory_settings(memory_settings)
    return {**widgets, "patch_min": memory_settings.patch_min, "storage": memory_settings.storage}


def _schedule(
    model, photos, num_captions, multiple, *, draws, patch_min, patch_max, seed, patch_order="low-to-high",
    timesteps="model", timestep_shift=3.0, **_unused,
):  # fmt: skip
    sampling = model.get_model_object("model_sampling")
    return draw_schedule(
        [tuple(photo.shape[:2]) for photo in photos],
        num_captions=num_captions,
        num_draws=draws,
        patches=PatchConfig(patch_min=patch_min, patch_max=patch_max, multiple=multiple, order=patch_order),
        sample_sigmas=sigma_sampler(
            timesteps,
            model_sigma=lambda time: float(sampling.percent_to_sigma(1.0 - time)),
            shift=timestep_shift,
        ),
        seed=seed,
        timesteps=timesteps,
    )


def _contact_sheet(crops, schedule):
    by_noise = sorted(range(len(schedule)), key=lambda index: schedule[index].sigma)
    shown = [by_noise[place] for place in pictures.evenly(len(by_noise))]
    labels = [f"t {schedule[index].sigma:.2f} · {schedule[index].side} px" for index in shown]
    return pictures.contact_sheet([crops[index] for index in shown], labels)


def _size_note(photos, schedule) -> str:
    """Say which pictures have no room for the largest crop; nothing is scaled up for them."""
    top = schedule.patches.patch_max
    room = [largest_crop(*photo.shape[:2], schedule.patches) for photo in photos]
    short = [side for side in room if side < top]
    if not short:
        return f"{len(schedule)} draws from {len(photos)} pictures"
    return (
        f"{len(short)} of {len(photos)} pictures are smaller than patch_max ({top} px): their largest crop is "
        f"{min(short)} px or more, and nothing is scaled up"
    )
