"""Precompute Residuals: the training schedule, its latents, and what the skipped blocks would have contributed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from comfy_api.latest import io
from PIL import Image
from torch import Tensor

from ..blockskip_core.data.buckets import PATCH_SHAPES
from ..blockskip_core.data.crops import TrainingCrops
from ..blockskip_core.data.patch_sampling import PATCH_ORDERS
from ..blockskip_core.data.reference_pictures import ReferenceSettings
from ..blockskip_core.data.schedule import Draw, TrainingSchedule, largest_crop
from ..blockskip_core.data.timesteps import TIMESTEP_DISTRIBUTIONS
from ..blockskip_core.hosts.inputs.empty_captions import checked_empty_caption
from ..blockskip_core.hosts.inputs.given_latents import LatentRows
from ..blockskip_core.hosts.inputs.material import Material, checked_material
from ..blockskip_core.hosts.models.out_of_memory import out_of_memory_explained
from ..blockskip_core.hosts.models.prepare import ResidualSettings, prepare_residuals
from ..blockskip_core.reporting import pictures
from ..blockskip_core.residuals.residual_set import ResidualSet
from ..blockskip_core.selection.selection import BlockSelection
from . import widgets
from .inputs import NOT_CONNECTED, checked, connected, require_memory_settings, single
from .page.live_chart import announcer
from .page.progress import NodeProgress
from .types import BlockSelectionSocket, ResidualsSocket, TrainingFilesSocket


class PrecomputeResiduals(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BlockSkip_PrecomputeResiduals",
            display_name="Prepare Training (Precompute Residuals)",
            category="BlockSkip/training",
            description=(
                "Prepares all training examples (crops, noise levels, noise) and computes what the skipped blocks "
                "would have contributed to each, so that training does not need them. Crops are large at high noise and "
                "small at low noise, all resized to the same small side."
            ),
            search_aliases=[
                "blockskip",
                "dynamic patch",
                "residual cache",
                "cache latents",
                "make dataset",
                "lora training",
                "low vram",
            ],
            is_input_list=True,
            is_experimental=True,
            inputs=[*_training_inputs(), *_example_inputs(), *_detail_inputs()],
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
    def validate_inputs(cls, patch_min: Any, patch_max: Any, memory_settings: Any = NOT_CONNECTED) -> bool | str:
        if memory_settings is not NOT_CONNECTED:  # then this widget's value is not used, and nobody can change it
            patch_min = None
        low, high = single(patch_min, "patch_min"), single(patch_max, "patch_max")
        if low is None or high is None:  # linked inputs are known only when the node runs
            return True
        for name, side in (("patch_min", low), ("patch_max", high)):
            if side < 16 or side > widgets.LARGEST_SIDE:
                return f"{name} must be between 16 and 4096 px, got {side}."
        return True if low <= high else f"patch_min must not be larger than patch_max, got {low} and {high}."

    @classmethod
    def execute(
        cls, model: Any, vae: Any, images: Any, positive: Any, selection: Any, files: Any = None,
        references: Any = None, reference_size: Any = 512, reference_part: Any = "whole", empty_caption: Any = None,
        **settings: Any,
    ) -> io.NodeOutput:  # fmt: skip
        model, vae, selection = connected(model=model, vae=vae, selection=selection).values()
        asked = residual_settings(**checked(cls, **settings))
        shown = checked(cls, reference_size=reference_size, reference_part=reference_part)
        given = GivenMaterial(images, positive, files, references, reference_settings(**shown), empty_caption)
        progress = NodeProgress(cls.hidden.unique_id, announcer(cls.hidden, "precomputing"))
        planned = settings.get("memory_settings") is not None
        return io.NodeOutput(*precompute(model, vae, given, selection, asked, progress, planned))


def _training_inputs() -> list[io.Input]:
    return [
        io.Model.Input("model", tooltip="The same MODEL that you will train on."),
        io.Vae.Input("vae", tooltip="The VAE that belongs to the model."),
        io.MultiType.Input(
            "images", [io.Image, io.Latent],
            tooltip="Pictures of your subject, usually 4 to 20; a batch or a list, sizes may differ. The shorter side "
            "should have at least `patch_max` pixels. Or latents of whole pictures, as from core's Resolution Bucket.",
        ),
        io.Conditioning.Input(
            "positive",
            tooltip="The caption: one for all pictures, or one for each (a list, or one from a dataset node).",
        ),
        BlockSelectionSocket.Input("selection", tooltip="From Select Blocks."),
    ]  # fmt: skip


def _example_inputs() -> list[io.Input]:
    return [
        widgets.draws(
            "How many training examples to prepare. Each step uses one for each row of its batch; a longer run starts "
            "over. FLUX.1 stores about 3 to 4.5 MiB for each at 256 px, and 1.5 MiB more if last blocks are skipped too."
        ),
        widgets.patch_min(
            "Side in pixels of every training picture, and of the smallest crop. Memory and time depend on it. The "
            "paper uses 256 for FLUX.1."
        ),
        widgets.side(
            "patch_max", 512,
            "Side in pixels of the largest crop; larger pictures are first scaled down to this shorter side. The paper "
            "uses 512 for FLUX.1.",
        ),
        widgets.storage(
            "disk: compute all residuals now and keep them on disk (fast training, least GPU memory). chunked: compute "
            "a part at a time during training (little disk space). on the fly: store nothing, run the whole model in "
            "every step (needs memory for all weights)."
        ),
        widgets.seed("Determines crops, noise levels and noise."),
    ]  # fmt: skip


def _detail_inputs() -> list[io.Input]:
    return [
        io.Combo.Input(
            "patch_order", options=list(PATCH_ORDERS), default="low-to-high", optional=True, advanced=True,
            tooltip="low-to-high: small crops at low noise (as in the paper). fixed: always the largest crop, i.e. a "
            "plain resize. The others are for comparison.",
        ),
        io.Combo.Input(
            "timesteps", options=list(TIMESTEP_DISTRIBUTIONS), default="model", optional=True, advanced=True,
            tooltip="Distribution of the noise levels. model: like the steps of this model's sampler.",
        ),
        io.Float.Input(
            "timestep_shift", default=3.0, min=0.01, max=100.0, step=0.01, optional=True, advanced=True,
            tooltip="Only used by `shifted`. Above 1 favours high noise.",
        ),
        widgets.chunk_size(
            "Training examples that go through the model's blocks together. More needs more RAM and loads each block's "
            "weights less often. With `chunked`, also how many are kept on disk at a time."
        ),
        widgets.back_residual(
            "What replaces the last blocks. constant: what they added before training (as in the paper). linear: also "
            "how that changes as the trained blocks learn, to first order, in the same memory. exact: nothing; they "
            "run forward and backward without adapters, in eight bits (the trainer's `quantize_frozen`), so that only their "
            "weights are approximated. `on the fly` ignores constant and linear."
        ),
        widgets.residual_format(
            "exact: as the model computes them. int8 and fp8: half the disk space for models in bf16, slightly "
            "rounded; int8 rounds less. Ignored by `on the fly`."
        ),
        widgets.memory_settings("From Memory Plan. Takes precedence over `patch_min` and `storage`."),
        TrainingFilesSocket.Input(
            "files", optional=True,
            tooltip="From Load Training Folder: messages then name a picture by its file, and missing captions are noticed.",
        ),
        widgets.frames(
            "1: train on single pictures. More: every IMAGE batch is a film, and is cut into clips of this many pictures. "
            "Wan, HunyuanVideo and Kandinsky 5 need a multiple of 4 plus 1, LTX a multiple of 8 plus 1."
        ),
        widgets.noise_from("Lowest noise level to train on. For the high-noise model of Wan 2.2: 0.875."),
        widgets.noise_to("Highest noise level to train on. For the low-noise model of Wan 2.2: 0.875."),
        *_reference_inputs(),
        *_dropout_inputs(),
        io.Combo.Input(
            "patch_shape", options=list(PATCH_SHAPES), default="square", optional=True, advanced=True,
            tooltip="square: as in the paper. as pictures: every training picture has nearly the proportions of its picture, "
            "with at most the area of the square (aspect ratio buckets). With `patch_order` fixed that is the whole picture.",
        ),
    ]  # fmt: skip


def _reference_inputs() -> list[io.Input]:
    return [
        io.Image.Input(
            "references", optional=True,
            tooltip="For edit models (FLUX.1 Kontext, FLUX.2, Qwen-Image-Edit): the pictures before the edit, from Load "
            "Training Folder; equally many for each of `images`, in the same order, or one for all.",
        ),
        widgets.reference_size(
            "Largest shorter side in pixels at which a reference is shown whole; nothing is scaled up. Its tokens take "
            "memory and time like the picture's own: at 512 px four times those of a `patch_min` of 256."
        ),
        widgets.reference_part(
            "whole: the model sees all of a reference, whatever the crop. same part: it sees the part that the crop shows, "
            "at the crop's size; for pictures that match their references point by point."
        ),
    ]  # fmt: skip


def _dropout_inputs() -> list[io.Input]:
    return [
        io.Float.Input(
            "caption_dropout", default=0.0, min=0.0, max=1.0, step=0.01, optional=True, advanced=True,
            tooltip="Share of the training examples that get the empty caption in place of their own, for models that "
            "are sampled with a `cfg` above 1: 0.05 to 0.1 is usual. Everything else about the examples stays.",
        ),
        io.Conditioning.Input(
            "empty_caption", optional=True,
            tooltip="Only used by `caption_dropout`: CLIP Text Encode with an empty text, or with the negative "
            "prompt that you will sample with.",
        ),
    ]  # fmt: skip


@dataclass(frozen=True)
class GivenMaterial:
    """The inputs that pictures, captions and references come from, as the node gets them."""

    images: Any
    positive: Any
    files: Any = None
    references: Any = None
    shown: ReferenceSettings | None = None
    empty: Any = None


def reference_settings(reference_size: int, reference_part: Any) -> ReferenceSettings:
    """Return the widgets as settings."""
    return ReferenceSettings(size=reference_size, part=reference_part)


def residual_settings(*, memory_settings: Any = None, **settings: Any) -> ResidualSettings:
    """Return the widgets as settings; those from Memory Plan take precedence."""
    if memory_settings is not None:
        require_memory_settings(memory_settings)
        settings |= {"patch_min": memory_settings.patch_min, "storage": memory_settings.storage}
    return ResidualSettings(**settings)


def precompute(
    model: Any,
    vae: Any,
    given: GivenMaterial,
    selection: BlockSelection,
    settings: ResidualSettings,
    progress: NodeProgress,
    planned: bool,
) -> tuple[ResidualSet, Tensor]:
    """Return the residuals, and some of the crops as a picture; ``planned`` says whether Memory Plan is connected.

    Raises:
        BlockSkipError: If inputs do not fit together, or there is not enough memory or disk space.
    """
    advice = "Lower `patch_min`, or unload whatever else uses the device, and queue again: finished parts are kept."
    with out_of_memory_explained("Precomputing", advice):
        material = checked_material(
            given.images, given.positive, given.files, settings.frames, given.references, given.shown
        )
        residuals, crops = prepare_residuals(
            model, vae, material.pictures, material.captions, selection, settings, progress, material.pictures.labels,
            material.references, checked_empty_caption(given.empty), planned,
        )  # fmt: skip
        sheet = pictures.as_image(contact_sheet(crops, residuals.schedule, material.blank))
    notes = [
        *material.remarks,
        size_note(_sizes(material, residuals.schedule), residuals.schedule),
        residuals.on_dropped,
    ]
    progress.say("\n".join(filter(None, notes)))
    return replace(residuals, remarks=material.remarks), sheet


def _sizes(material: Material, schedule: TrainingSchedule) -> list[tuple[int, int]]:
    """Return height and width in pixels of every picture; latents are whole training pictures."""
    if isinstance(material.pictures, LatentRows):
        return [schedule.size_of(index) for index in range(len(material.pictures))]
    return material.pictures.sizes


def contact_sheet(crops: TrainingCrops, schedule: TrainingSchedule, blank: Collection[int]) -> Image.Image:
    """Return some of the crops, from low to high noise, with their labels; those of blank pictures are marked."""
    by_noise = sorted(range(len(schedule)), key=lambda index: schedule[index].sigma)
    shown = [by_noise[place] for place in pictures.evenly(len(by_noise))]
    labels = [f"t {schedule[index].sigma:.2f} · {_side_of(schedule, schedule[index])} px" for index in shown]
    marked = [place for place, index in enumerate(shown) if schedule[index].picture in blank]
    stills = [crop[0] if crop.ndim == 4 else crop for crop in crops.taken(shown)]  # of a clip, its first picture
    return pictures.contact_sheet(stills, labels, marked)


def _side_of(schedule: TrainingSchedule, draw: Draw) -> str:
    """Return the side of a square crop, or width and height of another one."""
    height, width = schedule.crop_of(draw)
    return f"{width}" if width == height else f"{width}x{height}"


def size_note(sizes: Sequence[tuple[int, int]], schedule: TrainingSchedule) -> str:
    """Return a note on pictures that are too small for the largest crop, as nothing is scaled up, and on their shapes."""
    top, sized = schedule.patches.patch_max, enumerate(sizes)
    room = [largest_crop(height, width, schedule.patches, schedule.size_of(index)) for index, (height, width) in sized]
    short = [side for side in room if side < top]
    if not short:
        shapes = Counter(schedule.sizes).most_common()
        listed = ", ".join(f"{width} x {height} px ({count})" for (height, width), count in shapes)
        return f"{len(schedule)} training examples from {len(sizes)} pictures" + (f", as {listed}" if listed else "")
    return (
        f"{len(short)} of {len(sizes)} pictures are smaller than patch_max ({top} px): their largest crop is "
        f"{min(short)} px or more, and nothing is scaled up"
    )
