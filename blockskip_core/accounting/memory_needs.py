"""What a whole run needs, known before it starts: the phases counted by ``phase_counts``, put together.

Axis legend: ``C H W`` latent channels, rows, columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from ..adapters.lora import LoraSettings
from ..model import SkippableDit, TokenStreams
from ..residuals.back_response import empty_response, fit_bytes, response_bytes
from ..residuals.format import ResidualFormat, ResidualShape
from ..selection.selection import BlockSelection
from ..training.config import TrainingConfig
from .phase_counts import (
    PhaseCount,
    adapters_on,
    count_pass,
    count_precompute,
    count_training,
    residual_of_zeros,
    token_shapes,
)


@dataclass(frozen=True, kw_only=True)
class StoredWeights:
    """Bytes of a model's weights as loaded, whatever their format.

    Attributes:
        blocks: Bytes of each block.
        others: Bytes of everything else.
    """

    blocks: Sequence[int]
    others: int


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """What a run will do.

    Attributes:
        latent_shape: (C, H, W) of the training crops.
        probe_shape: (C, H, W) of the pictures that block selection samples.
        selection: Blocks to be skipped.
        lora: Rank, alpha, targets.
        layers: Native name -> linear layer that gets an adapter.
        config: Settings of the training.
        on_the_fly: Whether residuals are computed in every step; if so, nothing is precomputed.
        linear: Whether the back residual follows its input linearly.
        draws: Number of training examples.
        chunk: Number of examples that go through the blocks together.
        stored: Number of examples whose residuals are on disk at a time.
        caption: Index of the longest conditioning.
        residual_format: How residuals are stored.
    """

    latent_shape: Sequence[int]
    probe_shape: Sequence[int]
    selection: BlockSelection
    lora: LoraSettings
    layers: Mapping[str, nn.Linear]
    config: TrainingConfig
    on_the_fly: bool = False
    linear: bool = False
    draws: int = 1
    chunk: int = 1
    stored: int = 1
    caption: int = 0
    residual_format: ResidualFormat = "exact"


@dataclass(frozen=True, kw_only=True)
class MemoryNeeds:
    """What a run needs.

    Attributes:
        selecting, training: On the device, by phase.
        precomputing: Likewise; None if nothing is precomputed.
        lora: Bytes of the LoRA's tensors.
        replayed: Bytes on the device of what is replayed in place of the skipped blocks.
        host: Upper bound on bytes of host memory, without the model, captions and libraries.
        disk: Bytes of residuals on disk, without headers and latents.
    """

    selecting: PhaseCount
    precomputing: PhaseCount | None
    training: PhaseCount
    lora: int
    replayed: int
    host: int
    disk: int

    def with_all_weights(self, weights: int) -> MemoryNeeds:
        """Return the needs on a host that keeps all weights on the device, skipped or not.

        Args:
            weights: Bytes of all weights.
        """
        return replace(
            self,
            precomputing=self.precomputing and self.precomputing.with_weights(weights),
            training=self.training.with_weights(weights),
        )

    def without_weights(self) -> MemoryNeeds:
        """Return the needs without the model's weights."""
        return replace(
            self,
            selecting=self.selecting.with_weights(0),
            precomputing=self.precomputing and self.precomputing.with_weights(0),
            training=self.training.with_weights(0),
        )


class CountedOnce:
    """Caches the counts of a model's phases by what they depend on, as counting a full-size model takes seconds."""

    def __init__(self) -> None:
        self._counts: dict[Hashable, PhaseCount] = {}

    def __call__(self, count: Callable[[], PhaseCount], *depends_on: Hashable) -> PhaseCount:
        """Return the count for these arguments, computing it only the first time."""
        if depends_on not in self._counts:
            self._counts[depends_on] = count()
        return self._counts[depends_on]


def memory_needs(
    dit: SkippableDit, plan: RunPlan, weights: StoredWeights | None = None, once: CountedOnce | None = None
) -> MemoryNeeds:
    """Return what a run will need.

    Args:
        dit: The model, without weights.
        plan: The run.
        weights: Bytes of the weights as loaded, if they differ from the tensors of ``dit``.
        once: Cache of counts from other runs of the same model, if there is one.
    """
    once = once or CountedOnce()
    selection, shape = plan.selection, plan.latent_shape
    spans = (tuple(shape), selection.front, selection.back, selection.frozen, selection.tail, plan.caption)
    passing = not plan.on_the_fly
    tokens = token_shapes(dit, shape, block=max(0, selection.front - 1), caption=plan.caption)
    residual = residual_of_zeros(tokens, selection)
    response = None
    if plan.linear and residual.back is not None and passing:
        response = empty_response(plan.draws, dit.width, residual.back.dtype)
    adapters = adapters_on(dit, plan.layers, plan.lora)
    selecting = once(
        lambda: count_pass(dit, plan.probe_shape, caption=plan.caption), "selecting", *plan.probe_shape, plan.caption
    )
    training = once(
        lambda: count_training(
            dit, shape, selection, adapters, plan.config, residual if passing else None, caption=plan.caption,
            response=response,
        ),
        "training", *spans, frozenset(plan.layers), plan.lora, plan.config, passing, response and len(response.diagonal),
    )  # fmt: skip
    precomputing = None
    if passing and selection.front + selection.back:
        precomputing = once(
            lambda: count_precompute(dit, shape, selection, caption=plan.caption, keep_entering=plan.linear),
            "precomputing", *spans, plan.linear,
        )  # fmt: skip
    if weights is not None:
        kept = selection.kept if passing else range(len(weights.blocks))
        selecting = selecting.with_weights(sum(weights.blocks) + weights.others)
        training = training.with_weights(sum(weights.blocks[index] for index in kept) + weights.others)
        precomputing = precomputing and precomputing.with_weights(max(weights.blocks) + weights.others)
    one = _bytes(residual.tensors().values())
    lora = _bytes(adapters.parameters())
    latents = plan.draws * math.prod(shape) * 4
    ahead = (2 * plan.config.batch_size + 1) * one if passing else 0  # see ``prefetch``
    host = max(
        _host_precompute(plan, tokens, precomputing) if precomputing else 0,
        training.host + ahead,
        2 * lora,  # the LoRA's tensors and the file's, when it is saved
    )
    return MemoryNeeds(
        selecting=selecting,
        precomputing=precomputing,
        training=training,
        lora=lora,
        replayed=plan.config.batch_size * one + (0 if response is None else response.nbytes),
        host=latents + host,
        disk=_disk(plan, tokens) if passing else 0,
    )


def _disk(plan: RunPlan, tokens: TokenStreams) -> int:
    """Return the bytes of stored residuals for tokens of these shapes."""
    shape = ResidualShape(
        front=plan.selection.front > 0,
        back=plan.selection.back > 0,
        back_has_text=plan.selection.back_has_text,
        img_tokens=tokens.img.shape[1],
        txt_tokens=0 if tokens.txt is None else tokens.txt.shape[1],
        width=tokens.img.shape[2],
        itemsize=tokens.img.itemsize,
        form=plan.residual_format,
    )
    stored = shape.num_bytes(plan.stored)
    if plan.linear and plan.selection.back:
        stored += response_bytes(plan.draws, shape.width, shape.itemsize)
    return stored


def _host_precompute(plan: RunPlan, tokens: TokenStreams, counted: PhaseCount) -> int:
    """Return an upper bound on a chunk's tokens, residuals and outputs; ``counted`` is the count of one draw."""
    stream, img = _bytes(tokens.tensors().values()), tokens.img
    per_draw = stream + stream * (plan.selection.front > 0)  # on its way through the blocks, and as the front's output
    if plan.selection.back:  # summed in float32 at least, then stored in the stream's dtype while the sum still exists
        text = tokens.txt if plan.selection.back_has_text else None
        numbers = img.numel() + (0 if text is None else text.numel())
        per_draw += numbers * (max(4, img.itemsize) + img.itemsize)
        per_draw += 0 if plan.selection.tail else math.prod(plan.latent_shape) * 4  # outputs, if all draws pass the end
        per_draw += img.nbytes * plan.linear
    fitting = fit_bytes(img.shape[2]) if plan.linear and plan.selection.back else 0
    return counted.host + (plan.chunk - 1) * per_draw + fitting


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
