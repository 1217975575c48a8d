"""Operations of coarse steps, counted on published models at full size, without weights and without a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from blockskip_pack.blockskip_core.accounting.measuring import Counting
from blockskip_pack.blockskip_core.ddit.coarse_estimate import CoarseAdapter
from blockskip_pack.blockskip_core.ddit.connection import PatchStatistics
from blockskip_pack.blockskip_core.ddit.operations import StepOperations
from blockskip_pack.blockskip_core.ddit.patch_adapter import PatchAdapter
from blockskip_pack.blockskip_core.ddit.patch_resizing import PatchResizing
from blockskip_pack.blockskip_core.hosts.models.coarse_distillation import all_blocks
from blockskip_pack.blockskip_core.hosts.models.coarse_forward import CoarseForward
from blockskip_pack.blockskip_core.hosts.models.counted_calls import operations_by_tokens
from blockskip_pack.blockskip_core.hosts.models.weightless_dit import WeightlessDit

RANK, PATCH = 32, 2
STEPS = 50
SCALES = (2, 4)


@dataclass(frozen=True)
class Subject:
    """A published model and the size at which it is sampled.

    Attributes:
        name: A key of ``published_sizes``.
        size: Readable size.
        cells: Rows and columns of the latent.
        text: Text tokens and their features.
        frames: Latent frames.
        paper: Ratio of seconds that the paper reports; None if it reports none.
    """

    name: str
    size: str
    cells: tuple[int, int]
    text: tuple[int, int]
    frames: int = 1
    paper: float | None = None

    @property
    def tokens(self) -> int:
        """Image tokens with the model's own patches."""
        return self.frames * self.cells[0] * self.cells[1] // PATCH**2


FLUX = Subject("FLUX.1-dev", "1024 px", (128, 128), (512, 4096), paper=2.18)
WAN = Subject("Wan2.1-T2V-1.3B", "832 x 480, 81 frames", (60, 104), (512, 4096), frames=21, paper=2.1)
Z_IMAGE = Subject("Z-Image", "1024 px", (128, 128), (512, 2560))
QWEN = Subject("Qwen-Image", "1024 px", (128, 128), (512, 3584))
SUBJECTS = (FLUX, WAN)


@lru_cache
def weightless(subject: Subject) -> WeightlessDit:
    """Return the model without weights, with one caption."""
    number, width = subject.text
    caption = [[torch.zeros(1, number, width), {"pooled_output": torch.zeros(1, 768), "guidance": 3.5}]]
    return WeightlessDit.published(subject.name, caption, (16, 2 * PATCH, 2 * PATCH))


@lru_cache
def by_tokens(subject: Subject) -> StepOperations:
    """Return the operations of a call by its image tokens, as Train Patch Adapters counts them."""
    return operations_by_tokens(weightless(subject))


def adapter_parameters(subject: Subject, scale: int) -> int:
    """Return the parameters of an adapter: LoRA on feed-forward layers, embedding, de-embedding, vector and block."""
    dit = weightless(subject)
    layers = dit.lora_layers(all_blocks(dit), "mlp").values()
    numbers = 16 * (PATCH * scale) ** 2
    ends = 2 * numbers * dit.width + dit.width + numbers + 256 * (2 * numbers + 3)
    return sum(RANK * (layer.in_features + layer.out_features) for layer in layers) + ends


def step(subject: Subject, scale: int) -> float:
    """Return the operations of a step; a coarse one with the adapter's own products."""
    counts = by_tokens(subject)
    if scale == 1:
        return counts.own(subject.tokens)
    return counts.coarse(subject.tokens, scale, adapter_parameters(subject, scale))


@lru_cache
def call(subject: Subject, scale: int) -> int:
    """Return the operations of a call at full size as sampling makes it, counted one by one.

    In a coarse one these are the model's on fewer tokens, the adapter's, and those that reduce and enlarge the latent.
    """
    dit = weightless(subject)
    latent = torch.empty(1, 16 * subject.frames, *subject.cells, device="meta")
    sigma, coarse = torch.empty(1, device="meta"), CoarseForward(dit.patcher)
    numbers, layers = 16 * (PATCH * scale) ** 2, dit.lora_layers(all_blocks(dit), "mlp")
    with torch.inference_mode(False), torch.no_grad(), dit.running({}) as denoise, Counting() as counting:
        if scale == 1:
            denoise(latent, sigma, [0])
            return counting.operations
        with torch.device("meta"):
            statistics = PatchStatistics(torch.empty(numbers), torch.empty(numbers, numbers), torch.empty(numbers))
            lora = {
                name: (torch.empty(RANK, layer.in_features), torch.empty(layer.out_features, RANK))
                for name, layer in layers.items()
            }
        patches = PatchAdapter(numbers, dit.width).to("meta")
        adapter = CoarseAdapter(PatchResizing(PATCH, scale), statistics, patches)
        coarse(lambda noisy, level: denoise(noisy, level, [0]), latent, sigma, adapter, lora, {})
    return counting.operations


def rows(subjects: Sequence[Subject] = SUBJECTS) -> list[dict[str, Any]]:
    """Return operations of a step by patch size, and how many of 50 steps must be coarse for the paper's ratio."""
    found = []
    for subject in subjects:
        own, of = step(subject, 1), {"model": subject.name, "size": subject.size, "text_tokens": subject.text[0]}
        found.append({
            **of, "what": "a step with the model's own patches", "operations": own, "ratio": 1.0, "call_by_call": 1.0,
            "tokens": subject.tokens,
        })  # fmt: skip
        for scale in SCALES:
            if any(cells % (PATCH * scale) for cells in subject.cells):
                continue
            found.append({
                **of, "what": f"a step with patches of {scale}x", "operations": step(subject, scale),
                "ratio": own / step(subject, scale), "tokens": subject.tokens // scale**2,
                "call_by_call": call(subject, 1) / call(subject, scale),
                "parameters": adapter_parameters(subject, scale),
            })  # fmt: skip
            if subject.paper:
                share = (1.0 - 1.0 / subject.paper) / (1.0 - step(subject, scale) / own)
                what = f"coarse steps of {STEPS} for 1/{subject.paper}, all {scale}x"
                found.append({**of, "what": what, "steps": STEPS * share})
    return found
