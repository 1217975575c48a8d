"""The arms to count: core's trainer, a plain LoRA, and this package in many settings, on models without weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from blockskip_pack.blockskip_core.accounting.measuring import Counting
from blockskip_pack.blockskip_core.accounting.memory_needs import RunPlan, StoredWeights, memory_needs
from blockskip_pack.blockskip_core.accounting.phase_counts import (
    PhaseCount,
    adapters_on,
    count_pass,
    count_precompute,
    count_training,
    residual_of_zeros,
    token_shapes,
)
from blockskip_pack.blockskip_core.accounting.weight_formats import predicted_bytes
from blockskip_pack.blockskip_core.accounting.weightless import weightless_copy
from blockskip_pack.blockskip_core.adapters.lora import LoraSettings
from blockskip_pack.blockskip_core.blocks.out_of_place import OutOfPlace
from blockskip_pack.blockskip_core.blocks.saved_bytes import SavedBytes
from blockskip_pack.blockskip_core.blocks.skipping_model import SkippingModel
from blockskip_pack.blockskip_core.data.flow_matching import velocity_loss
from blockskip_pack.blockskip_core.hosts.models.weightless_dit import WeightlessDit
from blockskip_pack.blockskip_core.residuals.back_response import empty_response
from blockskip_pack.blockskip_core.selection.presets import PAPER_FLUX_SELECTIONS
from blockskip_pack.blockskip_core.selection.selection import BlockSelection
from blockskip_pack.blockskip_core.selection.skip_and_freeze import skip_and_freeze
from blockskip_pack.blockskip_core.training.config import TrainingConfig
from memory_followed import followed_dits, is_followed
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

CORE, PLAIN, OURS, PREPARE = "ComfyUI's Train LoRA", "plain LoRA (peft)", "BlockSkip", "before training"
WHOLE_RUN = "a whole run: 400 draws, 64 at a time"
FORMATS = ("bf16", "fp8", "int8", "4-bit")
FROZEN = "4-bit"
EXACT = f"half skipped, the last ones frozen in {FROZEN}"
LINEAR, DRAWS = "half skipped, the last ones linear", 500
OURS_FROZEN, OURS_RATIO = "int8", 0.5
DEFAULT = f"skip and freeze {OURS_RATIO}: a quarter skipped, half frozen in {OURS_FROZEN}"
ROOMY, ROOMY_SPANS = f"few skipped, a quarter frozen in {OURS_FROZEN}", (5, 14)  # as the template for 24 GB
SIZES = (512, 256)
TEXT_TOKENS, RANK, CELL = 512, 16, 8  # CELL: pixels per latent cell


@dataclass(frozen=True)
class Published:
    """A published model to count.

    Attributes:
        name: A key of ``published_sizes``.
        text_width: Features of a text token.
        channels, cell: Channels of its latents, and pixels per cell.
        halves: (front, back) with half of the blocks skipped: the paper's choice, or else the same from each end.
        masked: Whether the model asks for the text's attention mask.
    """

    name: str
    text_width: int
    channels: int = 16
    cell: int = CELL
    halves: tuple[int, int] = (0, 0)
    masked: bool = False


FLUX = Published("FLUX.1-dev", 4096, halves=PAPER_FLUX_SELECTIONS[0.5])
FAMILIES = (
    FLUX,
    Published("FLUX.2-dev", 15360, channels=128, cell=16, halves=(14, 14)),
    Published("Qwen-Image", 3584, halves=(15, 15)),
    Published("Qwen-Image-2.1", 4096, channels=64, cell=16, halves=(8, 8)),  # in ComfyUI from 0.37 on
    Published("Z-Image", 2560, halves=(8, 7)),
    Published("Wan2.1-T2V-14B", 4096, halves=(10, 10)),
    Published("Wan2.1-T2V-1.3B", 4096, halves=(8, 7)),
    Published("Wan2.2-TI2V-5B", 4096, channels=48, cell=16, halves=(8, 7)),
    Published("MiniMax-H3", 5376, channels=24, cell=16, halves=(13, 12)),  # the text as the model has refined it
    Published("Krea-2", 30720, halves=(7, 7)),
    Published("LTX-2", 3840, channels=128, cell=32, halves=(12, 12)),
    Published("HunyuanVideo", 4096, halves=(20, 10)),
    Published("FLUX.2-klein-4B", 7680, channels=128, cell=16, halves=(6, 6)),
    Published("FLUX.2-klein-9B", 12288, channels=128, cell=16, halves=(8, 8)),
    Published("Chroma", 4096, halves=(14, 14)),
    Published("SD3.5-Large", 4096, halves=(10, 9)),
    Published("SD3.5-Medium", 4096, halves=(6, 6)),
    Published("LTX-Video-2B", 4096, channels=128, cell=32, halves=(7, 7), masked=True),
    Published("LTX-Video-13B", 4096, channels=128, cell=32, halves=(12, 12), masked=True),
    Published("HunyuanVideo-1.5", 3584, channels=32, cell=16, halves=(14, 13)),
    Published("HunyuanImage-2.1", 3584, channels=64, cell=32, halves=(20, 10)),
    Published("AuraFlow", 2048, channels=4, halves=(9, 9)),
    Published("Mage-Flow", 2560, channels=128, cell=16, halves=(3, 3)),
    Published("Lens", 11520, channels=128, cell=16, halves=(12, 12)),
    Published("Boogu-Image", 4096, halves=(10, 10), masked=True),
    Published("Kandinsky-5-Image-Lite", 3584, halves=(13, 12)),
    Published("Kandinsky-5-T2V-Lite", 3584, halves=(8, 8)),
    Published("OmniGen2", 2048, halves=(8, 8), masked=True),
    Published("JoyAI-Image-Edit", 4096, halves=(10, 10)),
    Published("Anima", 1024, halves=(7, 7)),  # the text as its adapter has prepared it
    Published("Ideogram-4", 53248, channels=128, cell=16, halves=(9, 8)),
    Published("Ernie-Image", 3072, channels=128, cell=16, halves=(9, 9)),
)


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One row.

    Attributes:
        part: The trainer or model that it belongs to.
        name: Readable name.
        size: Pixels per side.
        checkpointing: Whether activations are recomputed.
        weights: Format of the base's weights.
        skipped: (front, back).
        source: Where residuals come from: "cached" or "on the fly".
        count: Counts it.
        host_copies: Number of copies of the model's weights that it makes in host memory besides the loaded one.
    """

    part: str
    name: str
    size: int
    count: Callable[[], PhaseCount]
    checkpointing: bool = False
    weights: str = "bf16"
    skipped: tuple[int, int] = (0, 0)
    source: str = ""
    host_copies: int = 0


def caption_for(published: Published) -> list:
    """Return a conditioning with everything that the host's text encoders give some families beside the text."""
    pooled = torch.zeros(1, 2048 if "SD3" in published.name else 768)
    settings = {"pooled_output": pooled, "guidance": 3.5}
    if published.masked:
        settings["attention_mask"] = torch.ones(1, TEXT_TOKENS, dtype=torch.long)
    return [[torch.zeros(1, TEXT_TOKENS, published.text_width), settings]]


class Subject:
    """A published model in two forms: weights in bfloat16, and in eight bits that are unpacked for every use."""

    def __init__(self, published: Published) -> None:
        self.published = published
        caption = caption_for(published)
        shape, dtypes = self.latent_shape(256), (torch.bfloat16, torch.float8_e4m3fn)
        if is_followed(published.name):
            dits = followed_dits(published.name, caption, shape, dtypes)
        else:
            dits = [WeightlessDit.published(published.name, caption, shape, dtype) for dtype in dtypes]
        self._forms = dict(zip(dtypes, dits, strict=True))

    @property
    def dit(self) -> WeightlessDit:
        """The model in bfloat16."""
        return self._forms[torch.bfloat16]

    def latent_shape(self, size: int) -> tuple[int, int, int]:
        """Return (C, H, W) of a picture with ``size`` pixels per side."""
        side = size // self.published.cell
        return (self.published.channels, side, side)

    def stored(self, weights: str) -> StoredWeights:
        """Return the bytes of the weights in a format: the blocks' linear layers packed, all others in bfloat16."""
        blocks = [predicted_bytes(self.dit.module(info.name), _OFF.get(weights, weights)) for info in self.dit.blocks]
        model = self.dit.model.diffusion_model
        others = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
        return StoredWeights(blocks=blocks, others=others - sum(info.num_bytes for info in self.dit.blocks))

    def selection(self, front: int, back: int) -> BlockSelection:
        """Return a selection of its blocks."""
        return BlockSelection(front=front, back=back, num_blocks=len(self.dit.blocks), family=self.dit.family)

    def ours(
        self, size: int, spans: tuple[int, int], checkpointing: bool, weights: str, source: str, linear: bool = False
    ) -> PhaseCount:
        """Count a step of this package's training loop."""
        count = self._ours(size, spans, checkpointing, weights == "bf16", source, linear)
        stored = self.stored(weights)
        kept = range(len(stored.blocks)) if source == "on the fly" else self.selection(*spans).kept
        return count.with_weights(sum(stored.blocks[index] for index in kept) + stored.others)

    @cache  # noqa: B019  formats of eight bits and less differ only in the bytes of weights
    def _ours(
        self, size: int, spans: tuple[int, int], checkpointing: bool, plain: bool, source: str, linear: bool
    ) -> PhaseCount:
        dit, shape, selection = self._form(plain), self.latent_shape(size), self.selection(*spans)
        adapters = adapters_on(dit, dit.lora_layers(selection, "attention and mlp"), LoraSettings(rank=RANK))
        tokens = token_shapes(dit, shape, block=max(0, spans[0] - 1))
        residual = None if source == "on the fly" else residual_of_zeros(tokens, selection)
        response = empty_response(DRAWS, dit.width, tokens.img.dtype) if linear else None
        config = TrainingConfig(steps=1, checkpointing=checkpointing)
        return count_training(dit, shape, selection, adapters, config, residual, response=response)

    def default(self, size: int, weights: str) -> PhaseCount:
        """Count a step of the nodes' default."""
        selection = skip_and_freeze(OURS_RATIO, len(self.dit.blocks), self.dit.family)
        return self.exact(size, (selection.front, selection.frozen), weights, OURS_FROZEN)

    def exact(self, size: int, spans: tuple[int, int], weights: str, frozen_format: str = FROZEN) -> PhaseCount:
        """Count a step whose last blocks run frozen in a format, or as loaded if that is smaller, instead of being skipped."""
        selection = self.selection(*spans).with_exact_back()
        trained, frozen = self.stored(weights), self.stored(frozen_format)
        blocks = [trained.blocks[index] for index in selection.adapted]
        blocks += [min(frozen.blocks[index], trained.blocks[index]) for index in selection.frozen_span]
        return self._exact(size, spans).with_weights(sum(blocks) + trained.others)

    @cache  # noqa: B019  formats differ only in the bytes of weights
    def _exact(self, size: int, spans: tuple[int, int]) -> PhaseCount:
        """All weights are counted as unpacked for every use, because the largest layer of a step is packed anyway."""
        dit, shape, selection = self._form(False), self.latent_shape(size), self.selection(*spans).with_exact_back()
        adapters = adapters_on(dit, dit.lora_layers(selection, "attention and mlp"), LoraSettings(rank=RANK))
        residual = residual_of_zeros(token_shapes(dit, shape, block=max(0, spans[0] - 1)), selection)
        return count_training(dit, shape, selection, adapters, TrainingConfig(steps=1), residual)

    def precompute(self, size: int, spans: tuple[int, int], weights: str) -> PhaseCount:
        """Count precomputing one draw."""
        count = count_precompute(self._form(weights == "bf16"), self.latent_shape(size), self.selection(*spans))
        stored = self.stored(weights)
        return count.with_weights(max(stored.blocks) + stored.others)

    def whole_pass(self, size: int, weights: str) -> PhaseCount:
        """Count a pass of the whole model, as in block selection."""
        stored = self.stored(weights)
        count = count_pass(self._form(weights == "bf16"), self.latent_shape(size))
        return count.with_weights(sum(stored.blocks) + stored.others)

    def needs(self, spans: tuple[int, int], draws: int, chunk: int) -> PhaseCount:
        """Count training at 256 px; ``host`` is that of a whole run with ``draws`` draws, by ``memory_needs``."""
        selection, shape = self.selection(*spans), self.latent_shape(256)
        plan = RunPlan(
            latent_shape=shape, probe_shape=shape, selection=selection, lora=LoraSettings(rank=RANK),
            layers=self.dit.lora_layers(selection, "attention and mlp"), config=TrainingConfig(steps=1), draws=draws,
            chunk=chunk, stored=draws,
        )  # fmt: skip
        needs = memory_needs(self.dit, plan)
        return replace(needs.training, host=needs.host)

    def plain(self, size: int, checkpointing: bool) -> PhaseCount:
        """Count a step of peft's own LoRA on the same layers of all blocks."""
        import peft

        stand_ins = SkippingModel(self.dit, self.selection(0, 0), checkpointing, folded=False).modules
        names = self.dit.lora_layers(self.selection(0, 0), "attention and mlp")
        for block, module in stand_ins.items():
            targets = [name.removeprefix(block + ".") for name in names if name.startswith(block + ".")]
            if targets:
                config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets)
                peft.inject_adapter_in_model(config, module)
        parameters = [p for module in stand_ins.values() for p in module.parameters() if p.requires_grad]
        return _count_loop(self.dit, stand_ins, parameters, self.latent_shape(size))

    def core(self, size: int, checkpointing: bool, bypass: bool) -> PhaseCount:
        """Count a step with the adapters of core's node, set up by core's own functions on a separate model.

        Core's loop runs under autocast, which ``meta`` does not support; it would keep some tensors in float32 instead.
        Blocks run out of place, because autograd would raise otherwise. With checkpointing each block is recomputed
        separately, which is ``checkpoint_depth`` 2 of the node. Its default, 1, treats the whole model as one block,
        which computes everything twice and saves nothing at the peak.
        """
        import comfy_extras.nodes_train as core

        model = weightless_copy(self.dit.model)
        patcher = SimpleNamespace(model=model, add_weight_wrapper=lambda key, adapter: _wrap(model, key, adapter))
        with torch.device("meta"):
            if bypass:
                tensors, _, manager = core._setup_lora_adapters_bypass(patcher, {}, "LoRA", torch.bfloat16, RANK)
                manager.create_injections(model)
                for hook in manager.hooks:  # its own inject() moves the adapter to the host's device first
                    hook.original_forward = hook.module.forward
                    hook.module.forward = hook._bypass_forward
            else:
                tensors, _ = core._setup_lora_adapters(patcher, {}, "LoRA", torch.bfloat16, RANK)
        dit = WeightlessDit(model, self.dit.arguments, torch.device("cuda"))
        for info in dit.blocks:
            block = dit.module(info.name)
            block.forward = _guarded(block.forward, checkpointing)
        return _count_loop(dit, {}, list(tensors.values()), self.latent_shape(size))

    def _form(self, plain: bool) -> WeightlessDit:
        return self._forms[torch.bfloat16 if plain else torch.float8_e4m3fn]


_OFF = {"bf16": "off"}


def arms_of(flux: Subject) -> list[Arm]:
    """Return all arms of FLUX.1-dev, in the order of the table."""
    arms = [
        Arm(part=CORE, name=("bypass mode" if bypass else "weight wrappers") + (", checkpoint_depth 2" if on else ""),
            size=512, checkpointing=on, host_copies=1, count=lambda on=on, bypass=bypass: flux.core(512, on, bypass))
        for bypass in (False, True) for on in (False, True)
    ]  # fmt: skip
    arms += [
        Arm(part=PLAIN, name="all blocks", size=size, checkpointing=on,
            count=lambda size=size, on=on: flux.plain(size, on))
        for size in SIZES for on in (False, True)
    ]  # fmt: skip
    spans = {0.0: (0, 0), **PAPER_FLUX_SELECTIONS}
    for weights in FORMATS:
        for size in SIZES:
            for ratio, skipped in spans.items():
                if weights != "bf16" and ratio not in (0.0, 0.3, 0.5):
                    continue
                for source in ("cached", "on the fly") if ratio == 0.5 else ("cached",):
                    arms += [
                        Arm(part=OURS, name=f"{ratio:.0%} skipped", size=size, checkpointing=on, weights=weights,
                            skipped=skipped, source=source if ratio else "",
                            count=lambda a=(size, skipped, on, weights, source): flux.ours(*a))
                        for on in ((False, True) if source == "cached" else (True,))
                    ]  # fmt: skip
    arms += [
        Arm(part=OURS, name=EXACT, size=256, checkpointing=True, weights=weights, skipped=(19, 10), source="cached",
            count=lambda weights=weights: flux.exact(256, (19, 10), weights))
        for weights in FORMATS
    ] + [
        Arm(part=OURS, name=LINEAR, size=256, checkpointing=True, weights=weights, skipped=(19, 10), source="cached",
            count=lambda weights=weights: flux.ours(256, (19, 10), True, weights, "cached", linear=True))
        for weights in FORMATS
    ] + [
        Arm(part=OURS, name=DEFAULT, size=256, checkpointing=True, weights=weights, source="cached",
            count=lambda weights=weights: flux.default(256, weights))
        for weights in FORMATS
    ] + [
        Arm(part=OURS, name=ROOMY, size=256, checkpointing=True, weights=weights, skipped=ROOMY_SPANS, source="cached",
            count=lambda weights=weights: flux.exact(256, ROOMY_SPANS, weights, OURS_FROZEN))
        for weights in FORMATS
    ]  # fmt: skip
    arms += [
        Arm(part=PREPARE, name="precomputing, 50% skipped", size=size, weights=weights, skipped=(19, 10),
            count=lambda a=(size, (19, 10), weights): flux.precompute(*a))
        for weights in FORMATS for size in SIZES
    ]  # fmt: skip
    arms.append(
        Arm(part=PREPARE, name=WHOLE_RUN, size=256, checkpointing=True, skipped=(19, 10), source="cached",
            count=lambda: flux.needs((19, 10), 400, 64))
    )  # fmt: skip
    arms += [
        Arm(part=PREPARE, name="choosing blocks", size=512, weights=weights,
            count=lambda weights=weights: flux.whole_pass(512, weights))
        for weights in FORMATS
    ]  # fmt: skip
    return arms


def arms_of_family(published: Published) -> list[Arm]:
    """Return the arms of every other family: 30 % and half of the model skipped, at 256 px."""
    subject = cache(lambda: Subject(published))
    fewer = (round(0.6 * published.halves[0]), round(0.6 * published.halves[1]))
    return [
        Arm(part=published.name, name="30% skipped", size=256, checkpointing=True, weights=weights,
            skipped=fewer, source="cached",
            count=lambda weights=weights: subject().ours(256, fewer, True, weights, "cached"))
        for weights in FORMATS
    ] + [
        Arm(part=published.name, name="half skipped", size=256, checkpointing=True, weights=weights,
            skipped=published.halves, source="cached",
            count=lambda weights=weights: subject().ours(256, published.halves, True, weights, "cached"))
        for weights in FORMATS
    ] + [
        Arm(part=published.name, name=EXACT, size=256, checkpointing=True, weights=weights,
            skipped=published.halves, source="cached",
            count=lambda weights=weights: subject().exact(256, published.halves, weights))
        for weights in FORMATS if published.halves[1]
    ] + [
        Arm(part=published.name, name=LINEAR, size=256, checkpointing=True, weights=weights,
            skipped=published.halves, source="cached",
            count=lambda weights=weights: subject().ours(256, published.halves, True, weights, "cached", linear=True))
        for weights in FORMATS
    ] + [
        Arm(part=published.name, name=DEFAULT, size=256, checkpointing=True, weights=weights, source="cached",
            count=lambda weights=weights: subject().default(256, weights))
        for weights in FORMATS
    ]  # fmt: skip


def _count_loop(
    dit: WeightlessDit, modules: Mapping[str, nn.Module], parameters: Sequence[Tensor], latent_shape: Sequence[int]
) -> PhaseCount:
    """Count two steps of a plain loop (loss, backward, clipping, AdamW) and report the second."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.01)
    before = 0
    with torch.inference_mode(False), torch.enable_grad(), Counting() as counting:
        counting.hold(parameters)
        lora = counting.live(dit.device)
        with dit.running(modules) as denoise:
            weights = counting.live(dit.device) - lora
            for _ in range(2):
                between, before = counting.live(dit.device), counting.operations
                saved = SavedBytes()
                noisy, clean = (torch.zeros(1, *latent_shape, device="meta") for _ in range(2))
                sigmas = noisy.new_ones(1)
                with _saving_into(saved, modules):
                    loss = velocity_loss(denoise(noisy, sigmas, [0]), clean, sigmas).sum()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                del loss
    return PhaseCount(
        weights=weights, peak=counting.peak(dit.device), between=between, saved=saved.total,
        operations=counting.operations - before, host=counting.peak(torch.device("cpu")),
    )  # fmt: skip


@contextmanager
def _saving_into(saved: SavedBytes, modules: Mapping[str, nn.Module]):
    """Count what autograd and our stand-ins' checkpoints keep for the backward pass."""
    for module in modules.values():
        if hasattr(module, "checkpointed"):
            module.saved = saved

    def pack(tensor: Tensor) -> Tensor:
        saved.add(tensor)
        return tensor

    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield
    finally:
        for module in modules.values():
            if hasattr(module, "checkpointed"):
                module.saved = None


def _wrap(model: nn.Module, key: str, adapter: Any) -> None:
    """Wrap a weight in a function, as the host's loader does for a patcher's weight wrappers."""
    path, _, kind = key.rpartition(".")
    module = model.get_submodule(path)
    setattr(module, f"{kind}_function", [*getattr(module, f"{kind}_function"), adapter])  # the list may be the class's
    module.comfy_cast_weights = True


def _guarded(forward: Callable[..., Any], checkpointing: bool) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with OutOfPlace():
            return forward(*args, **kwargs)

    def recomputed(*args: Any, **kwargs: Any) -> Any:
        kwargs["transformer_options"] = dict(kwargs.get("transformer_options", {}))  # the host writes into it
        return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return recomputed if checkpointing else run
