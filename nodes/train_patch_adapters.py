"""Train Patch Adapters (DDiT): teaches a loaded MODEL to sample with larger patches."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import comfy.samplers
from comfy_api.latest import io
from PIL import Image

from ..blockskip_core.adapters.lora import LoraSettings, LoraTargets
from ..blockskip_core.ddit.coarse_levels import CoarseSteps
from ..blockskip_core.ddit.error_table import ErrorTable
from ..blockskip_core.ddit.patch_resizing import RESIZE_KINDS, ResizeKind
from ..blockskip_core.ddit.trained_patches import TrainedPatches
from ..blockskip_core.ddit.windows import typed_windows
from ..blockskip_core.distillation.loop import DistillationResult
from ..blockskip_core.distillation.settings import DistillationSettings
from ..blockskip_core.errors import InvalidInputError
from ..blockskip_core.hosts.files.lora_files import EXAMPLE_NAME, ReservedName, output_path, require_writable
from ..blockskip_core.hosts.files.names import name_below
from ..blockskip_core.hosts.files.patch_adapter_files import save_patch_adapters
from ..blockskip_core.hosts.inputs.clips import FirstClips
from ..blockskip_core.hosts.inputs.pictures import Pictures
from ..blockskip_core.hosts.models.out_of_memory import out_of_memory_explained
from ..blockskip_core.hosts.sampling.own_latents import OwnLatents
from ..blockskip_core.hosts.sampling.patch_training import GivenPictures, PatchTraining, train_patches
from ..blockskip_core.reporting.patch_pictures import error_chart
from ..blockskip_core.reporting.pictures import as_image
from . import widgets
from .distillation_display import DistillationDisplay
from .distillation_events import DistillationEvents
from .inputs import checked, connected, refusal, singles, tensorboard_refusal
from .load_patch_adapters import description
from .page.live_chart import LiveChart
from .page.progress import NodeProgress
from .types import PatchAdaptersSocket

logger = logging.getLogger(__name__)

SIZES = {"2x": (2,), "4x": (4,), "2x and 4x": (2, 4)}
TRAIN_ON = ("all levels", "every other step", "windows")


class TrainPatchAdapters(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BlockSkip_TrainDDiT",
            display_name="Train Patch Adapters (DDiT)",
            category="BlockSkip/sampling",
            description=(
                "Teaches a model to make some steps with larger patches, on fewer tokens (DDiT). It samples its own "
                "training pictures from your prompts, and the same weights are teacher and student; only small adapters "
                "are trained. They are saved to output/loras, for Dynamic Patches (DDiT)."
            ),
            search_aliases=["blockskip", "ddit", "dynamic patches", "patch size", "speed up", "distill"],
            is_input_list=True,
            is_output_node=True,
            is_experimental=True,
            # Saved workflows store widget values by position: new inputs go to the end.
            inputs=[
                *_what_inputs(), *_training_inputs(), *_picture_inputs(), *_advanced_inputs(), *_given_inputs(),
                widgets.frames(
                    "Pictures of a clip, for Wan: the model samples clips of this length, or `images` are films. 1: single "
                    "pictures. Otherwise a multiple of 4 plus 1."
                ),
                widgets.noise_from("Lowest noise level to train on. For the high-noise model of Wan 2.2: 0.875."),
                widgets.noise_to("Highest noise level to train on. For the low-noise model of Wan 2.2: 0.875."),
                *_level_inputs(),
            ],
            outputs=[
                PatchAdaptersSocket.Output(
                    "patch_adapters", display_name="patch_adapters", tooltip="For Dynamic Patches (DDiT)."
                ),
                io.Image.Output(
                    "errors", display_name="errors",
                    tooltip="Error by noise level on held-out prompts, trained and untrained.",
                ),
                io.String.Output("report", display_name="report", tooltip="Steps, errors, and where the file is."),
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def validate_inputs(
        cls, adapters_name: Any = None, tensorboard: Any = None, train_on: Any = None, windows: Any = None
    ) -> bool | str:
        """Refuse a name that cannot be saved, windows that are not written as such, and a missing package, when queued."""

        def check() -> None:
            known = singles(adapters_name=adapters_name, train_on=train_on, windows=windows)
            if known["adapters_name"] is not None:
                name_below(known["adapters_name"], EXAMPLE_NAME)
            if known["train_on"] is not None:
                require_train_on(known["train_on"])
            if known["train_on"] == "windows" and known["windows"] is not None:
                typed_windows(known["windows"])

        usable = refusal(check)
        return tensorboard_refusal(tensorboard) if usable is True else usable

    @classmethod
    def execute(
        cls, model: Any, positive: Any, negative: Any = None, images: Any = None, vae: Any = None, **settings: Any
    ) -> io.NodeOutput:
        with LiveChart(cls.hidden) as live:
            request = TrainPatchesRequest(**checked(cls, **settings))
            model, given = connected(model=model)["model"], given_pictures(images, vae, request.frames)
            progress = NodeProgress(cls.hidden.unique_id, live.phase)
            trained, report = request.run(model, positive, negative, given, progress, live)
            progress.say(report.splitlines()[0])
        return io.NodeOutput(trained, as_image(chart(trained)), report, ui=live.output())


def given_pictures(images: Any, vae: Any, frames: int) -> GivenPictures | None:
    """Return the pictures or clips to train on, or None if none are connected.

    Raises:
        InvalidInputError: If there are pictures but no VAE, a link is of the wrong kind, or a film is too short.
    """
    if images is None:
        return None
    if vae is None:
        raise InvalidInputError("images came in, but no VAE to encode them with. Connect the model's VAE to `vae`.")
    pictures = Pictures(images) if frames <= 1 else FirstClips(images, frames)
    return GivenPictures(pictures, connected(vae=vae)["vae"])


def chart(trained: TrainedPatches) -> Image.Image:
    """Return a chart of all sizes' errors, trained and without training."""
    tables: dict[str, ErrorTable] = {}
    for scale, entry in trained.scales.items():
        tables |= {f"{scale}x, trained": entry.errors, f"{scale}x, without training": entry.fallback}
    return error_chart(tables)


def _what_inputs() -> list[io.Input]:
    return [
        io.Model.Input("model", tooltip="The model to teach. It is not changed. Sample later with the same file."),
        io.Conditioning.Input(
            "positive",
            tooltip="The prompts, as a list: at least 2, better 30 or more, of the kind that you will use. Some are held "
            "out to measure the error.",
        ),
        io.Combo.Input(
            "patch_sizes", options=list(SIZES), default="2x",
            tooltip="Sizes to train, in multiples of the model's own. 2x needs a quarter of the tokens, 4x a sixteenth.",
        ),
        widgets.side("width", 512, "Of the training pictures, in pixels. Use the size that you sample."),
        widgets.side("height", 512, "Of the training pictures, in pixels. Use the size that you sample."),
    ]  # fmt: skip


def _training_inputs() -> list[io.Input]:
    return [
        io.Int.Input(
            "max_steps", default=1000, min=1, max=widgets.MOST_STEPS,
            tooltip="Training steps for each size, at most: it stops when the held-out error no longer falls.",
        ),
        io.Float.Input(
            "peak_learning_rate", default=1e-4, min=1e-7, max=1.0, step=1e-5, round=1e-7,
            tooltip="AdamW's. It rises over the first steps and falls to 0 along a cosine.",
        ),
        widgets.batch_size("Examples per step. Each also needs one forward of the whole model, as the teacher."),
        widgets.seed("Seeds pictures, noise and initial values."),
        io.String.Input(
            "adapters_name", default="loras/patch_adapters", tooltip="Where to save, below ComfyUI's output folder."
        ),
    ]  # fmt: skip


def _picture_inputs() -> list[io.Input]:
    return [
        io.Conditioning.Input(
            "negative", optional=True,
            tooltip="The negative prompt, for models that are sampled with `cfg` above 1. A fifth of the examples use it.",
        ),
        io.Int.Input(
            "pictures_per_prompt", default=2, min=1, max=64, optional=True,
            tooltip="Pictures that the model samples of each prompt, once; they are kept in output/blockskip/latents.",
        ),
        io.Int.Input(
            "sampler_steps", default=20, min=1, max=1000, optional=True, tooltip="Steps of the sampler (Euler) for them."
        ),
        io.Float.Input(
            "cfg", default=1.0, min=0.0, max=100.0, step=0.1, optional=True,
            tooltip="Guidance for these pictures: 1 for FLUX.1-dev and schnell, more for models that need `negative`.",
        ),
        io.Combo.Input(
            "scheduler", options=list(comfy.samplers.SCHEDULER_NAMES), default="simple", optional=True,
            tooltip="How steps are spread over the noise levels; training follows it.",
        ),
    ]  # fmt: skip


def _advanced_inputs() -> list[io.Input]:
    return [
        io.Int.Input(
            "lora_rank", default=32, min=1, max=1024, optional=True, advanced=True, tooltip="Of the LoRA that acts in coarse steps."
        ),
        io.Combo.Input(
            "lora_targets", options=["mlp", "attention and mlp", "attention", "all linear"], default="mlp", optional=True,
            advanced=True, tooltip="Which layers get a LoRA. The paper uses the feed-forward layers (mlp).",
        ),
        io.Combo.Input(
            "resize", options=list(RESIZE_KINDS), default="nearest", optional=True, advanced=True,
            tooltip="How a coarse patch is reduced to the model's own. nearest: by its mean, which keeps noise white. "
            "bilinear: as in the paper.",
        ),
        widgets.checkpointing(
            "Recompute activations in the backward pass: less memory, about a third more time.", optional=True,
            advanced=True,
        ),
        io.Int.Input(
            "validate_every", default=50, min=1, max=100_000, optional=True, advanced=True,
            tooltip="Training steps between two measurements of the held-out error.",
        ),
        io.Int.Input(
            "patience", default=4, min=0, max=1000, optional=True, advanced=True,
            tooltip="Measurements without an improvement after which it stops. 0: never.",
        ),
        io.Int.Input(
            "save_every", default=100, min=0, max=widgets.MOST_STEPS, optional=True, advanced=True,
            tooltip="Training steps between two saved states. 0: only when it ends or is cancelled.",
        ),
        io.Boolean.Input(
            "resume", default=True, optional=True, advanced=True,
            tooltip="Continue an interrupted training with the same inputs; the result is the same, bit for bit.",
        ),
    ]  # fmt: skip


def _given_inputs() -> list[io.Input]:
    return [
        io.Image.Input(
            "images", optional=True,
            tooltip="Pictures to train on instead of the model's own, one for each prompt, or with `frames` above 1 one film for "
            "each. Their middle parts are used, in the size above.",
        ),
        io.Vae.Input("vae", optional=True, tooltip="The model's VAE, for `images`."),
        io.Boolean.Input(
            "tensorboard", default=False, optional=True, advanced=True,
            tooltip="Also write losses, learning rate, held-out error and memory for TensorBoard, into the folder `tensorboard` "
            "beside the adapters, one run for each size. Needs the Python package tensorboard.",
        ),
    ]  # fmt: skip


def _level_inputs() -> list[io.Input]:
    return [
        io.Combo.Input(
            "train_on", options=list(TRAIN_ON), default=TRAIN_ON[0], optional=True, advanced=True,
            tooltip="Noise levels of the examples. all levels: the whole schedule, for any use. every other step, windows: only the "
            "levels of the steps that you will make coarse in this way.",
        ),
        io.Int.Input(
            "planned_steps", default=20, min=1, max=1000, optional=True, advanced=True,
            tooltip="Steps that you will sample with. Not used with all levels.",
        ),
        io.String.Input(
            "windows", default="", optional=True, advanced=True,
            tooltip="The steps that you will make coarse and their patch sizes, as on Dynamic Patches (DDiT): `2-9: 2`. Only used "
            "by windows.",
        ),
    ]  # fmt: skip


def require_train_on(train_on: str) -> None:
    """Raise InvalidInputError for an unknown choice."""
    if train_on not in TRAIN_ON:
        raise InvalidInputError(f"train_on must be one of {', '.join(TRAIN_ON)}, got {train_on!r}.")


@dataclass(frozen=True, kw_only=True)
class TrainPatchesRequest:
    """The node's widgets by their ids; defaults are those of the widgets."""

    patch_sizes: str
    width: int
    height: int
    max_steps: int
    peak_learning_rate: float
    batch_size: int
    seed: int
    adapters_name: str
    pictures_per_prompt: int = 2
    sampler_steps: int = 20
    cfg: float = 1.0
    scheduler: str = "simple"
    lora_rank: int = 32
    lora_targets: LoraTargets = "mlp"
    resize: ResizeKind = "nearest"
    checkpointing: bool = True
    validate_every: int = 50
    patience: int = 4
    save_every: int = 100
    resume: bool = True
    tensorboard: bool = False
    frames: int = 1
    noise_from: float = 0.0
    noise_to: float = 1.0
    train_on: str = TRAIN_ON[0]
    planned_steps: int = 20
    windows: str = ""

    @property
    def coarse(self) -> CoarseSteps | None:
        """The steps whose noise levels alone are trained on; None for all levels.

        Raises:
            InvalidInputError: If the choice is not known, or the steps or the windows are not some.
        """
        require_train_on(self.train_on)
        if self.train_on == "all levels":
            return None
        return CoarseSteps(self.planned_steps, self.windows if self.train_on == "windows" else None)

    @property
    def training(self) -> PatchTraining:
        """What to train.

        Raises:
            InvalidInputError: If a setting is out of range.
        """
        if self.patch_sizes not in SIZES:
            raise InvalidInputError(f"patch_sizes must be one of {', '.join(SIZES)}, got {self.patch_sizes!r}.")
        return PatchTraining(
            scales=SIZES[self.patch_sizes],
            latents=OwnLatents(
                per_prompt=self.pictures_per_prompt, width=self.width, height=self.height, steps=self.sampler_steps,
                scheduler=self.scheduler, cfg=self.cfg, seed=self.seed,
                frames=self.frames,
            ),
            settings=DistillationSettings(
                steps=self.max_steps, batch_size=self.batch_size, learning_rate=self.peak_learning_rate, seed=self.seed,
                validate_every=self.validate_every, patience=self.patience,
            ),
            lora=LoraSettings(rank=self.lora_rank, alpha=float(self.lora_rank), targets=self.lora_targets),
            resize=self.resize, checkpointing=self.checkpointing, save_every=self.save_every, resume=self.resume,
            noise=(self.noise_from, self.noise_to), coarse=self.coarse,
        )  # fmt: skip

    def run(
        self,
        model: Any,
        positive: Any,
        negative: Any,
        given: GivenPictures | None,
        progress: NodeProgress,
        live: LiveChart,
    ) -> tuple[TrainedPatches, str]:
        """Train and save; return the adapters and a report.

        Raises:
            InvalidInputError: If a setting or an input is not usable.
            StorageError: If the file cannot be written.
            OutOfMemoryError: If the training does not fit on the device.
        """
        training, told = self.training, list[str]()
        path = output_path(self.adapters_name)
        require_writable(path)

        def tell(sentence: str) -> None:
            told.append(sentence)
            progress.say(sentence)

        display = DistillationDisplay(training.scales, training.settings, progress, live, model.load_device)
        with (
            ReservedName(path) as name,
            out_of_memory_explained("Training", "Lower `batch_size` or the size of the pictures."),
        ):
            file, device = path if self.tensorboard else None, model.load_device
            with DistillationEvents(file, training.settings, device, tell) as events:

                def seen(scale: int, result: DistillationResult) -> None:
                    events.seen(scale, result)
                    display.seen(scale, result)  # last, because Cancel ends the training here

                trained = train_patches(model, positive, negative, training, progress, seen, given, tell, events.begun)
            save_patch_adapters(trained, name.renew())
        lines = [f"Saved {name.path.name} in {name.path.parent.name}."]
        return trained, "\n".join([*lines, description(trained), *told])
