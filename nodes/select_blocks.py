"""Select Blocks (attention mask): which blocks may be skipped."""

from __future__ import annotations

import hashlib
import json
import logging

from comfy_api.latest import io

from ..blockskip_core.errors import InvalidInputError
from ..blockskip_core.files import write_atomically
from ..blockskip_core.hosts.families.registry import adapter_for
from ..blockskip_core.hosts.files.folders import probe_file
from ..blockskip_core.hosts.inputs.conditioning import flatten_conditionings
from ..blockskip_core.hosts.models.hosted_dit import HostedDit
from ..blockskip_core.hosts.models.identity import conditionings_identity, model_identity, module_identity
from ..blockskip_core.hosts.models.out_of_memory import out_of_memory_explained
from ..blockskip_core.hosts.sampling.probe_pictures import MaskedSampler, ProbeConfig, picture_metric
from ..blockskip_core.reporting import pictures
from ..blockskip_core.selection.presets import preset_selection
from ..blockskip_core.selection.selection import MAX_SKIP_RATIO, BlockSelection, num_skipped
from ..blockskip_core.selection.text_influence import TextInfluence, measured_selection, selection_table
from .inputs import checked, connected
from .page.live_chart import announcer
from .page.progress import NodeProgress
from .types import BlockSelectionSocket

logger = logging.getLogger(__name__)


class SelectBlocks(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BlockSkip_SelectBlocks",
            display_name="Select Blocks (attention mask)",
            category="BlockSkip/training",
            description=(
                "Chooses which blocks of a diffusion transformer can be left out while a LoRA is trained: the first "
                "few and the last few, measured by hiding the text from the picture in those blocks and seeing how "
                "much the picture changes. Skipped blocks take no GPU memory and no time while training."
            ),
            search_aliases=["blockskip", "dit-blockskip", "skip layers", "block selection", "low vram lora"],
            is_input_list=True,
            is_experimental=True,
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="The diffusion transformer that you want to train on (FLUX.1, FLUX.2, Qwen-Image, Z-Image, Wan, "
                    "Chroma, SD3.5).",
                ),
                io.Conditioning.Input(
                    "positive",
                    tooltip="Prompts for the probe pictures. Name the kind of subject you will train, e.g. "
                    "`a photo of a toy on a table`. Several prompts (a list) make the measurement steadier.",
                ),
                io.Combo.Input(
                    "method",
                    options=["attention mask", "preset", "manual"],
                    default="attention mask",
                    tooltip="attention mask: measure on this model (samples many small pictures once, then they are remembered). "
                    "preset: the paper's choice for FLUX.1, scaled for other models, at once. manual: `front` and `back` below.",
                ),
                io.Float.Input(
                    "skip_ratio",
                    default=0.5,
                    min=0.0,
                    max=MAX_SKIP_RATIO,
                    step=0.05,
                    tooltip="Share of the blocks to skip. 0.3 is close to full quality, 0.5 saves the most memory that "
                    "the paper tested. Not read by `manual`.",
                ),
                io.Int.Input(
                    "front", default=19, min=0, max=1000, tooltip="Blocks skipped at the start. Only read by `manual`."
                ),
                io.Int.Input(
                    "back", default=10, min=0, max=1000, tooltip="Blocks skipped at the end. Only read by `manual`."
                ),
                io.Vae.Input(
                    "vae",
                    optional=True,
                    tooltip="With `clip_vision` too, probe pictures are compared as the paper does it. Without, their "
                    "latents are compared.",
                ),
                io.ClipVision.Input(
                    "clip_vision",
                    optional=True,
                    tooltip="A CLIP-ViT or DINOv2 from Load CLIP Vision. The paper uses DINO. Needs `vae` as well.",
                ),
                io.Conditioning.Input("negative", optional=True, tooltip="Only used when `probe_cfg` is above 1."),
                io.Int.Input(
                    "probe_size",
                    default=512,
                    min=64,
                    max=2048,
                    step=16,
                    optional=True,
                    advanced=True,
                    tooltip="Side of the probe pictures in pixels.",
                ),
                io.Int.Input(
                    "probe_steps",
                    default=8,
                    min=1,
                    max=100,
                    optional=True,
                    advanced=True,
                    tooltip="Sampler steps of each probe picture.",
                ),
                io.Float.Input(
                    "probe_cfg",
                    default=1.0,
                    min=1.0,
                    max=30.0,
                    step=0.1,
                    optional=True,
                    advanced=True,
                    tooltip="Guidance of the probe pictures: 1 for FLUX.1-dev and schnell, more for models without "
                    "guidance distillation, such as Qwen-Image, Wan, Chroma and SD3.5.",
                ),
                io.Int.Input(
                    "probe_seeds",
                    default=1,
                    min=1,
                    max=64,
                    optional=True,
                    advanced=True,
                    tooltip="Probe pictures per prompt. More are slower and steadier.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=io.ControlAfterGenerate.fixed,
                    optional=True,
                    advanced=True,
                    tooltip="Noise of the probe pictures.",
                ),
                io.Boolean.Input(
                    "window_profile",
                    default=True,
                    optional=True,
                    advanced=True,
                    tooltip="Also measure a window of a quarter of the blocks sliding over the model, for the heatmap. "
                    "It takes about half as long again and does not change the choice.",
                ),
            ],
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
    def execute(cls, model, positive, vae=None, clip_vision=None, negative=None, **widgets) -> io.NodeOutput:
        model = connected(model=model)["model"]
        vae = None if vae is None else connected(vae=vae)["vae"]
        clip_vision = None if clip_vision is None else connected(clip_vision=clip_vision)["clip_vision"]
        settings = _Settings(**checked(cls, **widgets))
        dit = HostedDit(model)
        influence = None
        if settings.method == "attention mask":
            budget = num_skipped(settings.skip_ratio, len(dit.blocks))
            probe = _Probe(model, positive, negative, vae, clip_vision, settings, len(dit.blocks))
            progress = NodeProgress(cls.hidden.unique_id, announcer(cls.hidden, "selecting"))
            with out_of_memory_explained("Sampling the probe pictures", "Lower `probe_size`, or choose `preset`."):
                influence = probe.measured(budget, progress)
            selection = measured_selection(influence, settings.skip_ratio, dit.family, dit.block_bytes)
        else:
            selection = settings.choose(dit)
        report = selection.describe()
        if influence is not None:
            if vae is None or clip_vision is None:
                report += "\nConnect `vae` and `clip_vision` to compare pictures as the paper does."
            report += "\n\nFor other budgets, as far as measured:\n" + selection_table(influence, dit.block_bytes)
        heatmap = pictures.selection_heatmap(selection, influence, [block.name for block in dit.blocks])
        return io.NodeOutput(selection, pictures.as_image(heatmap), report)


class _Settings:
    """The node's widgets."""

    def __init__(
        self,
        method: str,
        skip_ratio: float,
        front: int,
        back: int,
        probe_size: int = 512,
        probe_steps: int = 8,
        probe_cfg: float = 1.0,
        probe_seeds: int = 1,
        seed: int = 0,
        window_profile: bool = True,
    ) -> None:
        self.method, self.skip_ratio, self.front, self.back = method, skip_ratio, front, back
        self.window_profile = window_profile
        self.probe = ProbeConfig(size=probe_size, steps=probe_steps, cfg=probe_cfg, seed=seed, num_seeds=probe_seeds)

    def choose(self, dit: HostedDit) -> BlockSelection:
        """Return the selection of the methods that measure nothing."""
        if self.method == "preset":
            return preset_selection(self.skip_ratio, len(dit.blocks), dit.family, dit.block_bytes)
        if self.method == "manual":
            return BlockSelection(
                front=self.front,
                back=self.back,
                num_blocks=len(dit.blocks),
                family=dit.family,
                block_bytes=dit.block_bytes,
                note="Chosen by hand.",
            )
        raise InvalidInputError(f"method must be attention mask, preset or manual, got {self.method!r}.")


class _Probe:
    """Probe pictures of a MODEL, and what has been measured with them so far."""

    def __init__(self, model, positive, negative, vae, clip_vision, settings: _Settings, num_blocks: int) -> None:
        self._positive = flatten_conditionings(positive)
        self._negative = flatten_conditionings(negative)[0] if negative else None
        adapter_for(model).require_texts([*self._positive, *([self._negative] if self._negative else [])])
        self._settings = settings
        self._metric = picture_metric(vae, clip_vision)
        self._sampler = MaskedSampler(model, settings.probe)
        self._num_blocks = num_blocks
        self._file = probe_file(self._key(model, vae, clip_vision))

    def measured(self, budget: int, progress: NodeProgress) -> TextInfluence:
        """Return the influence for budgets up to ``budget``; measures what is missing, remembering each distance."""
        influence = self._remembered()
        runs = influence.missing(budget, with_window=self._settings.window_profile)
        if not runs:
            return influence
        steps = self._settings.probe.steps
        ticks = _Ticks(progress, total=(1 + len(runs)) * influence.num_pictures * steps)
        plain = self._embeddings(frozenset(), ticks)
        for run, masked in runs.items():
            pairs = zip(plain, self._embeddings(masked, ticks), strict=True)
            influence.record(run, sum(self._metric.distance(a, b) for a, b in pairs))
            write_atomically(self._file, lambda path: path.write_text(influence.to_json(), encoding="utf-8"))
        return influence

    def _embeddings(self, masked: frozenset[int], ticks: _Ticks) -> list:
        probe = self._settings.probe
        return [
            self._metric.embed(
                self._sampler.sample(
                    conditioning,
                    self._negative or conditioning,
                    seed=(probe.seed + number) % 2**64,
                    masked=masked,
                    on_step=ticks.tick,
                )
            )
            for conditioning in self._positive
            for number in range(probe.num_seeds)
        ]

    def _remembered(self) -> TextInfluence:
        fresh = TextInfluence(
            self._num_blocks, self._metric.name, num_pictures=len(self._positive) * self._settings.probe.num_seeds
        )
        if not self._file.is_file():
            return fresh
        try:
            return TextInfluence.from_json(self._file.read_text(encoding="utf-8"))
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            logger.warning("BlockSkip: the remembered probe %s is damaged (%s); measuring anew", self._file.name, error)
            return fresh

    def _key(self, model, vae, clip_vision) -> str:
        probe = self._settings.probe
        negative = [self._negative] if self._negative and probe.cfg != 1.0 else []
        parts = [
            model_identity(model),
            conditionings_identity([*self._positive, *negative]),
            self._metric.name,
            "" if vae is None else module_identity(vae.first_stage_model),
            "" if clip_vision is None else module_identity(clip_vision.model),
            [probe.size, probe.steps, probe.cfg, probe.seed, probe.num_seeds],
        ]
        return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


class _Ticks:
    """Counts sampler steps over all probe pictures."""

    def __init__(self, progress: NodeProgress, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0

    def tick(self) -> None:
        self._done += 1
        self._progress("measuring blocks, sampler step", self._done, self._total)
