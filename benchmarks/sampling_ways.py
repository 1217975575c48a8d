"""The ways of ``sampling_world``: which steps, noise levels, patches and caches each has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import comfy.patcher_extension
import ddit_world
from blockskip_pack.blockskip_core.ddit.plans import (
    DecidedWhileSampling,
    ErrorBudget,
    EveryOther,
    FixedScales,
    PatchPlan,
    TypedWindows,
)
from blockskip_pack.blockskip_core.ddit.scheduler import CRITERIA, Criterion, SchedulerSettings
from blockskip_pack.blockskip_core.ddit.trained_patches import TrainedPatches
from blockskip_pack.blockskip_core.hosts.sampling.dynamic_patches import DynamicPatches
from torch import Tensor

FULL = 50
BUDGETS = (25, 17, 10)  # plain steps of work: 1/2, 1/3 and 1/5 of all
EVERY_OTHER = EveryOther(2, last_own=0)  # from the second step on; the last of an even number is coarse too
MIXED = {25: 37, 17: 25, 10: 15}  # plain steps of work -> steps that cost as much if every other one is coarse


@dataclass(frozen=True)
class Way:
    """A way of sampling.

    Attributes:
        name: Readable name.
        steps: Steps of the sampler.
        preset: RALU's preset; None for Euler on the ordinary schedule.
        stage: Where a preset's stage has coarse patches: in the first, which then is not a smaller picture, or in the last.
        cache: EasyCache's threshold; 0 for none.
        windows: The coarse steps, as typed on Dynamic Patches; empty for none.
        chosen: How coarse steps are chosen if they are not typed: every other, by the adapters' errors, or while sampling.
        work: What they are chosen to cost, in plain steps.
    """

    name: str
    steps: int
    preset: str | None = None
    stage: Literal["", "first", "last"] = ""
    cache: float = 0.0
    windows: str = ""
    chosen: Literal["", "every other", "by error"] | Criterion = ""
    work: float = 0.0

    @property
    def has_coarse_steps(self) -> bool:
        """Whether it needs adapters."""
        return bool(self.windows or self.chosen or self.stage)

    @property
    def decides(self) -> bool:
        """Whether patch sizes are decided while sampling, so that pictures must not share a batch."""
        return self.chosen in CRITERIA

    def model(self, own: Any, trained: TrainedPatches, plan: PatchPlan | None) -> Any:
        """Return the MODEL with what this way puts on it."""
        from comfy_extras.nodes_easycache import EasyCacheNode

        model = own
        if self.cache:
            model = own.clone()
            wrapper = comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL
            model.add_wrapper_with_key(wrapper, "own latent", _with_own_latent)
            model = EasyCacheNode.execute(model, self.cache, 0.15, 0.95, False)[0]
        return model if plan is None else DynamicPatches(model, trained, plan).patcher

    def plan(self, trained: TrainedPatches, sigmas: Sequence[float], tokens: int, tau: float) -> PatchPlan | None:
        """Return which steps are coarse.

        Args:
            trained: The adapters.
            sigmas: Noise levels of the run.
            tokens: Image tokens of a step with the model's own patches.
            tau: Threshold of a decision while sampling.
        """
        if self.windows:
            return TypedWindows(self.windows, ddit_world.SCALES)
        if self.stage == "last":
            return EveryOtherOfTheLastStage()
        if self.chosen == "every other":
            return EVERY_OTHER
        if self.chosen == "by error":
            tables = {scale: entry.errors for scale, entry in trained.scales.items()}
            within = ddit_world.budget_at(sigmas, tables, trained.operations_of(tokens), self.work)
            return ErrorBudget(within, tables, trained.operations_of)
        if self.decides:
            sides = {scale: entry.coarse.resizing.side for scale, entry in trained.scales.items()}
            return DecidedWhileSampling(SchedulerSettings(criterion=self.chosen, tau=tau), sides)
        return None


@dataclass(frozen=True)
class EveryOtherOfTheLastStage:
    """A plan for RALU: every other step of the run that ends without noise is coarse; the other stages have none."""

    def begin(self, sigmas: Sequence[float], tokens: int, frames: int = 1) -> FixedScales:
        """Return the scales of one stage."""
        return EVERY_OTHER.begin(sigmas, tokens) if sigmas[-1] == 0.0 else FixedScales([1] * (len(sigmas) - 1))


def _with_own_latent(executor: Callable[..., Tensor], latent: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Call the model on a copy: in float32 EasyCache writes into its caller's latent."""
    return executor(latent.clone(), *args, **kwargs)


def every_other(steps: int, cache: float = 0.0) -> Way:
    """Return DDiT with every other step coarse, from the second on."""
    more = f", and EasyCache {cache:g}" if cache else ""
    return Way(f"DDiT, every other of {steps} steps{more}", steps, chosen="every other", cache=cache)


def plain(steps: int) -> Way:
    """Return fewer steps."""
    return Way(f"plain, {steps} steps", steps)


def cached(steps: int, threshold: float) -> Way:
    """Return core's EasyCache."""
    return Way(f"EasyCache {threshold:g}, {steps} steps", steps, cache=threshold)


def staged(preset: str, steps: int, **more: Any) -> Way:
    """Return RALU."""
    return Way(f"RALU, {preset}", steps, preset=preset, **more)


def by_error(steps: int, work: float) -> Way:
    """Return DDiT with the steps that the adapters' errors choose."""
    return Way(f"DDiT, by error, {steps} steps at {work:g}", steps, chosen="by error", work=work)


def decided(steps: int, work: float, criterion: Criterion = "third difference", cache: float = 0.0) -> Way:
    """Return DDiT with steps that are decided while sampling, at the threshold with which they cost this much."""
    more = f", and EasyCache {cache:g}" if cache else ""
    return Way(f"DDiT, {criterion}, {steps} steps at {work:g}{more}", steps, chosen=criterion, work=work, cache=cache)


WAYS = (  # the first is what the others are compared with
    *(plain(steps) for steps in (FULL, *BUDGETS, 14)),
    *(every_other(steps) for steps in MIXED.values()),
    cached(FULL, 0.03), cached(FULL, 0.1),
    by_error(37, 25), every_other(37, 0.1), decided(15, 10),
    Way("RALU, FLUX 5x, first stage by DDiT", 11, preset="FLUX 5x", stage="first", windows="1-4: 2"),
    cached(15, 0.2), by_error(15, 10), plain(7), staged("FLUX 5x", 15), decided(37, 25),
    Way("RALU, FLUX 5x, last stage with DDiT", 15, preset="FLUX 5x", stage="last"),
    by_error(25, 17), decided(25, 17), staged("FLUX 7x", 10), Way("RALU, FLUX 5x, and EasyCache 0.2", 15, preset="FLUX 5x", cache=0.2),
    every_other(21), every_other(20, 0.2), decided(37, 25, "third difference (as published)"), plain(5), every_other(7), plain(28),
    decided(37, 17, cache=0.1), decided(25, 10, cache=0.1),
)  # fmt: skip
