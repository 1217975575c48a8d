"""What one phase of a run needs, known before it starts: the real loop runs on a model without weights and is counted.

Nothing here is fitted: the model, its stand-ins, the LoRA, the loss and the optimiser are those of the run, with the
same shapes. See ``measuring`` for what is counted and what is not.

Axis legend: ``C H W`` latent channels, rows, columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..adapters.lora import LinearShape, LoraAdapters, LoraSettings
from ..blocks.linear_response import LinearResponse
from ..blocks.replay import Residual
from ..blocks.stand_ins import PassThrough
from ..data.micro_batches import MicroBatches
from ..data.patch_sampling import PatchConfig
from ..data.schedule import Draw, TrainingSchedule
from ..model import Denoiser, SkippableDit, TokenStreams, WeightPlacement, WrappedDit
from ..residuals.precompute import precompute_residuals
from ..residuals.source import OpenResiduals
from ..selection.selection import BlockSelection
from ..training.config import TrainingConfig
from ..training.loop import train_lora
from ..training.observer import OnStep
from ..training.result import TrainingResult
from .measuring import Counting


@dataclass(frozen=True, kw_only=True)
class PhaseCount:
    """One phase of a run, in bytes on the device unless stated otherwise.

    Attributes:
        weights: The model's weights that are loaded at the same time.
        peak: Everything alive at the same time, weights included.
        between: Everything alive between two training steps: weights, LoRA, the optimiser's state, what is replayed.
        saved: Kept for the backward pass of a micro-batch, parameters not counted.
        operations: Of one optimiser step, one draw or one pass.
        host: Peak on the CPU, without the model and what is read ahead.
    """

    weights: int
    peak: int
    between: int = 0
    saved: int = 0
    operations: int
    host: int

    def with_weights(self, weights: int) -> PhaseCount:
        """Return the count for weights that take another number of bytes and are unpacked in the same way."""
        more = weights - self.weights
        between = self.between and self.between + more
        return replace(self, weights=weights, peak=self.peak + more, between=between)


def count_pass(dit: SkippableDit, latent_shape: Sequence[int], *, caption: int = 0) -> PhaseCount:
    """Count one pass of the whole model without gradients, as in sampling.

    Args:
        dit: The model.
        latent_shape: (C, H, W).
        caption: Index of the conditioning.
    """
    with Counting() as counting, torch.inference_mode(False), torch.no_grad():
        watched = _Watched(dit, counting)
        with watched.running({}) as denoise:
            noisy = torch.zeros(1, *latent_shape).to(dit.device)
            denoise(noisy, noisy.new_full((1,), 0.5), [caption])
    return watched.count(operations=counting.operations)


def count_precompute(
    dit: SkippableDit,
    latent_shape: Sequence[int],
    selection: BlockSelection,
    *,
    draws: int = 1,
    caption: int = 0,
    keep_entering: bool = False,
) -> PhaseCount:
    """Count precomputing a chunk.

    Args:
        dit: The model.
        latent_shape: (C, H, W).
        selection: Blocks to be skipped.
        draws: Number of draws in the chunk; only the count ``host`` depends on it.
        caption: Index of the conditioning of all draws.
        keep_entering: Whether a linear response will be fitted.
    """
    schedule, latents = _stand_in_draws(draws, caption), torch.zeros(draws, *latent_shape)
    with Counting() as counting:
        watched = _Watched(dit, counting)
        precompute_residuals(watched, schedule, latents, selection, range(draws), keep_entering=keep_entering)
    return watched.count(operations=counting.operations // draws)


def token_shapes(dit: SkippableDit, latent_shape: Sequence[int], *, block: int = 0, caption: int = 0) -> TokenStreams:
    """Return zeros on the CPU with the shapes and dtype of the tokens that enter a block.

    This takes one pass through stand-ins without weights, because the family's stem decides how many tokens there are.

    Args:
        dit: The model.
        latent_shape: (C, H, W).
        block: Index of the block.
        caption: Index of the conditioning.
    """
    modules = {info.name: PassThrough(info.io) for info in dit.blocks}
    seen = modules[dit.blocks[block].name] = _Seen(dit.blocks[block].io)
    with torch.inference_mode(False), torch.no_grad(), Counting(), dit.running(modules) as denoise:
        noisy = torch.zeros(1, *latent_shape).to(dit.device)
        denoise(noisy, noisy.new_full((1,), 0.5), [caption])
    return seen.tokens.map(lambda x: torch.zeros(x.shape, dtype=x.dtype))


def residual_of_zeros(tokens: TokenStreams, selection: BlockSelection) -> Residual:
    """Return one draw's residual in the form in which it is replayed, for tokens of these shapes."""
    text = tokens.txt if selection.back_has_text else None
    return Residual(
        tokens if selection.front else None,
        tokens.img.clone() if selection.back else None,
        None if text is None else text.clone(),
    )


def count_training(
    dit: SkippableDit,
    latent_shape: Sequence[int],
    selection: BlockSelection,
    adapters: LoraAdapters,
    config: TrainingConfig,
    residual: Residual | None,
    *,
    caption: int = 0,
    response: LinearResponse | None = None,
) -> PhaseCount:
    """Count the training loop's second step; the optimiser creates its state in the first.

    Args:
        dit: The model.
        latent_shape: (C, H, W).
        selection: Blocks to be skipped.
        adapters: The LoRA, on the model's device; see :func:`adapters_on`.
        config: The settings; the number of steps is ignored.
        residual: One draw's residual, see :func:`residual_of_zeros`; None for the folded form.
        caption: Index of the conditioning of all draws.
        response: The back span's linear response, or None.
    """
    config = replace(config, steps=2)
    draws = config.batch_size
    opened = OpenResiduals(
        range(len(config.micro_batches)), None if residual is None else lambda draw: residual, None, response
    )
    schedule, latents, result = _stand_in_draws(draws, caption), torch.zeros(draws, *latent_shape), TrainingResult()
    after: list[tuple[int, int]] = []
    with Counting() as counting:
        counting.hold(adapters.parameters())
        watched = _Watched(dit, counting)

        def on_step(_: Any) -> None:
            after.append((counting.live(dit.device), counting.operations))

        train_lora(
            watched, schedule, latents, selection, _OneStretch(opened), adapters, config, result=result,
            observers=[OnStep(on_step)],
        )  # fmt: skip
    (_, first), (between, both) = after
    return watched.count(operations=both - first, between=between, saved=result.saved_bytes)


def adapters_on(dit: SkippableDit, layers: Mapping[str, nn.Linear], settings: LoraSettings) -> LoraAdapters:
    """Return a LoRA created on the model's device; on ``meta`` it takes no memory.

    Args:
        dit: The model.
        layers: Native name -> linear layer that gets an adapter.
        settings: Rank, alpha, targets.
    """
    shapes = {name: LinearShape(layer.in_features, layer.out_features) for name, layer in layers.items()}
    with torch.inference_mode(False), torch.device(dit.device):
        return LoraAdapters(shapes, settings, seed=0)


class _Watched(WrappedDit):
    """A model that records how many bytes its runs load, as seen by a :class:`Counting`."""

    def __init__(self, dit: SkippableDit, counting: Counting) -> None:
        super().__init__(dit)
        self._counting = counting
        self._weights = 0

    @contextmanager
    def running(
        self,
        replacements: Mapping[str, nn.Module],
        *,
        activation_bytes: int = 0,
        weights: WeightPlacement = "as fits",
    ) -> Iterator[Denoiser]:
        """Run the model, and record how much is loaded for it."""
        before = self._counting.live(self.device)
        with super().running(replacements, activation_bytes=activation_bytes, weights=weights) as denoise:
            self._weights = max(self._weights, self._counting.live(self.device) - before)
            yield denoise

    def count(self, **further: int) -> PhaseCount:
        """Return what was counted."""
        counting, device = self._counting, self.device
        host = 0 if device.type == "cpu" else counting.peak(torch.device("cpu"))
        return PhaseCount(weights=self._weights, peak=counting.peak(device), host=host, **further)


class _Seen(PassThrough):
    """Hands its tokens on and keeps them in ``tokens``."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.tokens = self.io.entering(args, kwargs)
        return super().forward(*args, **kwargs)


class _OneStretch:
    """A source of residuals with a single stretch."""

    def __init__(self, opened: OpenResiduals) -> None:
        self._opened = opened

    def stretches(self, run: MicroBatches, start: int = 0) -> Iterator[AbstractContextManager[OpenResiduals]]:
        """Yield the stretch."""
        yield nullcontext(self._opened)


def _stand_in_draws(count: int, caption: int) -> TrainingSchedule:
    """Return placeholder draws of the right shape."""
    draw = Draw(picture=0, caption=caption, sigma=0.5, side=16, top=0, left=0, noise_seed=0)
    return TrainingSchedule((draw,) * count, PatchConfig(patch_min=16, patch_max=16), 0, "none")
