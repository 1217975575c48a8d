"""Select Blocks (attention mask): which blocks may be skipped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from comfy_api.latest import io

from ..blockskip_core.errors import InvalidInputError
from ..blockskip_core.hosts.models.hosted_dit import HostedDit
from ..blockskip_core.hosts.models.out_of_memory import out_of_memory_explained
from ..blockskip_core.hosts.models.patches import for_training
from ..blockskip_core.hosts.sampling.measured_blocks import stored_influence, text_influence
from ..blockskip_core.hosts.sampling.probe_pictures import ProbeConfig, require_negative
from ..blockskip_core.reporting import pictures
from ..blockskip_core.selection.cost_and_influence import TAILS, affordable_selection
from ..blockskip_core.selection.presets import preset_selection
from ..blockskip_core.selection.selection import MAX_SKIP_RATIO, BlockSelection, num_skipped
from ..blockskip_core.selection.skip_and_freeze import skip_and_freeze
from ..blockskip_core.selection.text_influence import TextInfluence, measured_selection, selection_table
from . import widgets
from .inputs import NOT_CONNECTED, checked, connected, connected_if_any, refusal, single
from .page.live_chart import announcer
from .page.progress import NodeProgress
from .types import BlockSelectionSocket

MEASURED, PRESET, MANUAL, AFFORDABLE, FROZEN = METHODS = (
    "attention mask", "preset", "manual", "cost and influence", "skip and freeze",
)  # fmt: skip
PROBING = (MEASURED, AFFORDABLE)  # these sample probe pictures, or look for those of earlier
BY_METHOD = -1  # of `tail`


class SelectBlocks(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BlockSkip_SelectBlocks",
            display_name="Select Blocks (attention mask)",
            category="BlockSkip/training",
            description=(
                "Chooses which blocks of a diffusion transformer are left out while a LoRA is trained: by default the first "
                "quarter is skipped and the last half frozen (skip and freeze), without measuring. With attention mask the "
                "first few and the last few are skipped, found by hiding the text from the picture there and measuring how "
                "much the picture changes. Skipped blocks take no GPU memory and no time during training."
            ),
            search_aliases=[
                "blockskip",
                "dit-blockskip",
                "skip layers",
                "block selection",
                "low vram",
                "low vram lora",
                "lora training",
                "8gb",
                "12gb",
            ],
            is_input_list=True,
            is_experimental=True,
            inputs=[*_choice_inputs(), *_probe_model_inputs(), *_probe_inputs()],
            outputs=[
                BlockSelectionSocket.Output("selection", display_name="selection", tooltip="For Precompute Residuals."),
                io.Image.Output(
                    "heatmap", display_name="heatmap", tooltip="How much the text matters in each part of the model."
                ),
                io.String.Output(
                    "report", display_name="report", tooltip="The choice in blocks and bytes, and for other ratios."
                ),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt, io.Hidden.extra_pnginfo],
        )

    @classmethod
    def validate_inputs(
        cls, probe_size: Any = None, probe_cfg: Any = None, method: Any = None, negative: Any = NOT_CONNECTED
    ) -> bool | str:
        """Refuse a size that no probe picture can have, and guidance without a negative prompt, when the graph is queued."""
        size, cfg, chosen = single(probe_size, "probe_size"), single(probe_cfg, "probe_cfg"), single(method, "method")

        def check() -> None:
            if size is not None:
                ProbeConfig(size=size)
            if cfg is not None and chosen in PROBING:
                require_negative(cfg, negative is not NOT_CONNECTED)

        return refusal(check)

    @classmethod
    def execute(
        cls, model: Any, positive: Any, vae: Any = None, clip_vision: Any = None, negative: Any = None, **settings: Any
    ) -> io.NodeOutput:
        model = connected(model=model)["model"]
        plugged = {"positive": positive, "negative": negative, **connected_if_any(vae=vae, clip_vision=clip_vision)}
        progress = NodeProgress(cls.hidden.unique_id, announcer(cls.hidden, "selecting"))
        chosen = choose_blocks(model, Choice(**checked(cls, **settings)), progress, **plugged)
        return io.NodeOutput(chosen.selection, pictures.as_image(chosen.heatmap), chosen.report)


def _choice_inputs() -> list[io.Input]:
    return [
        io.Model.Input(
            "model",
            tooltip="The diffusion transformer that you want to train on: FLUX.1, FLUX.2, Qwen-Image, Z-Image, Wan, Krea 2, "
            "LTX-2 and others.",
        ),
        io.Conditioning.Input(
            "positive",
            tooltip="Prompts of the probe pictures. Only used by attention mask and cost and influence; otherwise connect any "
            "prompt. Name the kind of subject you will train, e.g. `a photo of a toy on a table`. Several prompts (a list) make "
            "the measurement more reliable.",
        ),
        io.Combo.Input(
            "method", options=list(METHODS), default=FROZEN,
            tooltip="attention mask: measure on this model (samples many small pictures once and keeps the results). "
            "preset: the paper's choice for FLUX.1, scaled for other models; instant. manual: `front`, `back` and "
            "`tail` below. cost and influence: skip that share of the bytes, at the front if possible because it "
            "is exact there; uses what attention mask has measured with the same settings, samples nothing. skip and "
            "freeze: skip half of that share of the blocks at the start and freeze all of it at the end; instant.",
        ),
        io.Float.Input(
            "skip_ratio", default=0.5, min=0.0, max=MAX_SKIP_RATIO, step=0.05,
            tooltip="Share of the blocks to skip; for cost and influence, share of their bytes; for skip and freeze, share "
            "to freeze, up to 0.6; more than 0.5 costs likeness. Of the ratios that the paper tested for skipping, 0.3 is close to full "
            "quality and 0.5 saves the most memory. Ignored by `manual`.",
        ),
        io.Int.Input(
            "front", default=19, min=0, max=1000,
            tooltip="Number of blocks to skip at the start. Only used by `manual`.",
        ),
        io.Int.Input(
            "back", default=10, min=0, max=1000,
            tooltip="Number of blocks to skip at the end. Only used by `manual`.",
        ),
    ]  # fmt: skip


def _probe_model_inputs() -> list[io.Input]:
    return [
        io.Vae.Input(
            "vae", optional=True,
            tooltip="If `clip_vision` is connected too, probe pictures are compared as in the paper; otherwise their "
            "latents are compared.",
        ),
        io.ClipVision.Input(
            "clip_vision", optional=True,
            tooltip="A CLIP-ViT or DINOv2 from Load CLIP Vision. The paper uses DINO. Needs `vae` as well.",
        ),
        io.Conditioning.Input("negative", optional=True, tooltip="Only used when `probe_cfg` is above 1."),
    ]  # fmt: skip


def _probe_inputs() -> list[io.Input]:
    return [
        widgets.probe_size("Side of the probe pictures in pixels."),
        io.Int.Input(
            "probe_steps", default=8, min=1, max=100, optional=True, advanced=True,
            tooltip="Sampler steps of each probe picture.",
        ),
        io.Float.Input(
            "probe_cfg", default=1.0, min=1.0, max=30.0, step=0.1, optional=True, advanced=True,
            tooltip="Guidance of the probe pictures: 1 for FLUX.1-dev and schnell, more for models without guidance "
            "distillation, such as Qwen-Image, Wan, Chroma and SD3.5.",
        ),
        io.Int.Input(
            "probe_seeds", default=1, min=1, max=64, optional=True, advanced=True,
            tooltip="Number of probe pictures per prompt. More are slower and more reliable.",
        ),
        widgets.seed("Seeds the noise of the probe pictures.", optional=True, advanced=True),
        io.Boolean.Input(
            "window_profile", default=True, optional=True, advanced=True,
            tooltip="Also measure a sliding window of a quarter of the blocks, for the heatmap. This takes about half "
            "as long again and does not change the choice.",
        ),
        io.Int.Input(
            "tail", default=BY_METHOD, min=BY_METHOD, max=1000, optional=True, advanced=True,
            tooltip="Last blocks to keep and train after skipped ones. -1: by method, 1 to 3 for cost and influence "
            "and 0 for manual. 0 for `back_residual` exact. Only used by these two.",
        ),
    ]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The node's widgets by their ids; defaults are those of the widgets."""

    method: str
    skip_ratio: float
    front: int
    back: int
    probe_size: int = 512
    probe_steps: int = 8
    probe_cfg: float = 1.0
    probe_seeds: int = 1
    seed: int = 0
    window_profile: bool = True
    tail: int = BY_METHOD

    def __post_init__(self) -> None:
        if self.tail < BY_METHOD:
            raise InvalidInputError(f"tail must be at least {BY_METHOD}, got {self.tail}.")

    @property
    def probe(self) -> ProbeConfig:
        """How probe pictures are sampled."""
        return ProbeConfig(
            size=self.probe_size, steps=self.probe_steps, cfg=self.probe_cfg, seed=self.seed, num_seeds=self.probe_seeds
        )


@dataclass(frozen=True)
class Chosen:
    """A selection, with its measurement and report."""

    selection: BlockSelection
    influence: TextInfluence | None
    report: str
    block_names: list[str]

    @property
    def heatmap(self) -> Any:
        """A picture of how much the text matters in each part of the model."""
        return pictures.selection_heatmap(self.selection, self.influence, self.block_names)


def choose_blocks(model: Any, choice: Choice, progress: NodeProgress, **plugged: Any) -> Chosen:
    """Choose blocks of a MODEL; ``plugged`` are the other inputs of a measurement.

    Raises:
        InvalidInputError: If a setting is out of range, or no block would be left to train.
        OutOfMemoryError: If the probe pictures do not fit on the device.
    """
    choice.probe  # noqa: B018 - checks the settings for every method
    if choice.method in PROBING:
        require_negative(choice.probe_cfg, plugged["negative"] is not None)
    model = for_training(model)
    dit, influence = HostedDit(model), None
    if choice.method == MEASURED:
        influence = _measured(model, dit, choice, progress, **plugged)
        selection = measured_selection(influence, choice.skip_ratio, dit.family, dit.block_bytes)
    elif choice.method == AFFORDABLE:
        influence = stored_influence(model, probe=choice.probe, **plugged)
        tails = TAILS if choice.tail == BY_METHOD else (choice.tail,)
        selection = affordable_selection(choice.skip_ratio, dit.family, dit.block_bytes, influence, tails=tails)
    else:
        selection = _without_measuring(dit, choice)
    report = selection.describe()
    if choice.method == MEASURED and influence is not None:
        if plugged["vae"] is None or plugged["clip_vision"] is None:
            report += "\nConnect `vae` and `clip_vision` to compare pictures as in the paper."
        report += "\n\nFor other budgets, as far as measured:\n" + selection_table(influence, dit.block_bytes)
    return Chosen(selection, influence, report, [block.name for block in dit.blocks])


def _measured(model: Any, dit: HostedDit, choice: Choice, progress: NodeProgress, **plugged: Any) -> TextInfluence:
    positive, negative = plugged.pop("positive"), plugged.pop("negative")
    budget = num_skipped(choice.skip_ratio, len(dit.blocks))

    def tell(done: int, total: int) -> None:
        progress("measuring blocks, sampler step", done, total)

    with out_of_memory_explained("Sampling the probe pictures", "Lower `probe_size`, or choose `preset`."):
        return text_influence(
            model, positive, negative, choice.probe, len(dit.blocks), budget, with_window=choice.window_profile,
            progress=tell, waiting=lambda: progress("waiting for another process that measures the same blocks", 0, 1),
            **plugged,
        )  # fmt: skip


def _without_measuring(dit: HostedDit, choice: Choice) -> BlockSelection:
    if choice.method == PRESET:
        return preset_selection(choice.skip_ratio, len(dit.blocks), dit.family, dit.block_bytes)
    if choice.method == FROZEN:
        return skip_and_freeze(choice.skip_ratio, len(dit.blocks), dit.family, dit.block_bytes)
    if choice.method == MANUAL:
        return BlockSelection(
            front=choice.front,
            back=choice.back,
            tail=max(0, choice.tail),
            num_blocks=len(dit.blocks),
            family=dit.family,
            block_bytes=dit.block_bytes,
            note="Chosen by hand.",
        )
    raise InvalidInputError(f"method must be one of {', '.join(METHODS)}, got {choice.method!r}.")
