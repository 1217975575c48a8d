"""A run on a card takes the memory counted beforehand, within 3 %, on a model of a few hundred MiB."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from ..core.plain_dit import selection
from ..hosts.tiny_families import FLUX
from ..hosts.tiny_flux import tiny_flux
from .modes import resident, streamed_by_trainer
from .runs import DRAWS, SKIPPING, Runs
from .test_sampling import MEASURE

MIB = 2**20
ALLOWED = 0.03
WAYS: dict[str, dict[str, Any]] = {
    "as always": {},
    "no checkpointing": {"checkpointing": False},
    "batches": {"batch_size": 2},
    "all layers, high rank": {"targets": "all linear", "rank": 64},
    "linear residual": {"back_residual": "linear"},
    "on the fly": {"storage": "on the fly"},
}

# How many unpacked copies of the largest layer's weight exist while a quantised one is used or created. They are not
# counted. These are torch's own operations; ComfyUI's CUDA kernels unpack it once.
UNPACKED = {"fp8": 2, "int8": 2, "4-bit": 6}


@pytest.fixture(scope="module")
def model(comfyui: Any) -> Any:
    """A FLUX.1 of 190 MiB, of which 120 MiB are kept: one of two double blocks and two of three single blocks."""
    return tiny_flux(depth=2, depth_single=3, width=640, heads=5, mlp_ratio=4.0)


@contextmanager
def peak_of(card: Any) -> Iterator[list[int]]:
    """Yield a function that returns the peak bytes in this context, minus those in use before."""
    peak: list[int] = []
    before = card.memory.settled()
    card.memory.reset_peak()
    yield peak
    peak.append(card.memory.peak - before)


def needs(model: Any, **ways: Any) -> Any:
    """Count a run without running it, as Memory Plan and the trainer do."""
    run, settings = counted_run(model, **ways)
    return run.needs(settings)


def counted_run(
    model: Any, *, quantize_kept: str = "off", rank: int = 4, targets: str = "attention and mlp", **ways: Any
) -> tuple[Any, Any]:
    """Return what counts a run, and the run's settings."""
    from blockskip_pack.blockskip_core.accounting.plan import MemorySettings
    from blockskip_pack.blockskip_core.adapters.lora import LoraSettings
    from blockskip_pack.blockskip_core.hosts.inputs.frames import latent_shape
    from blockskip_pack.blockskip_core.hosts.models.counted_run import CountedRun
    from blockskip_pack.blockskip_core.hosts.models.hosted_dit import HostedDit
    from blockskip_pack.blockskip_core.training.config import TrainingConfig

    linear, storage = ways.pop("back_residual", "") == "linear", ways.pop("storage", "disk")
    dit = HostedDit(model, FLUX.captions((5,)), latent_shape(model.model, DRAWS["patch_min"]))
    spans = selection(SKIPPING["front"], SKIPPING["back"], len(dit.blocks))
    run = CountedRun(
        dit, spans, LoraSettings(rank=rank, alpha=rank, targets=targets), captions=1, draws=4, chunk_size=3, linear=linear,
        probe_size=MEASURE["probe_size"],
    )  # fmt: skip
    config = TrainingConfig(steps=2, **ways)
    return run, MemorySettings(
        config=config, storage=storage, quantize_kept=quantize_kept, patch_min=DRAWS["patch_min"]
    )


@pytest.mark.parametrize("ways", WAYS.values(), ids=WAYS)
def test_training(card, runs: Runs, model, ways):
    runs.start_over()
    settings = dict(ways)
    residuals = runs.precompute(FLUX, model, **{name: settings.pop(name) for name in DRAWS.keys() & settings.keys()})
    with peak_of(card) as peak:
        outcome = runs.train_on(model, residuals, steps=2, **settings)
    counted = needs(model, **ways).training.peak
    assert counted > 100 * MIB
    assert peak[0] == pytest.approx(counted, rel=ALLOWED)
    assert outcome.said["peak_memory_bytes"] == pytest.approx(counted, rel=ALLOWED)


def test_what_is_kept_for_the_backward_pass(card, runs: Runs, comfyui):
    """Exact but for a few single numbers, in a dtype in which fused kernels keep less than plain operations."""
    half = tiny_flux(depth=2, depth_single=3, width=640, heads=5, mlp_ratio=4.0, dtype=torch.bfloat16)
    for checkpointing in (True, False):
        runs.start_over()
        residuals = runs.precompute(FLUX, half)
        outcome = runs.train_on(half, residuals, steps=2, checkpointing=checkpointing)
        counted = needs(half, checkpointing=checkpointing).training.saved
        assert outcome.said["saved_for_backward_bytes"] == pytest.approx(counted, abs=256)


def test_training_with_streamed_weights(card, runs: Runs, comfyui):
    """Wide, so that weights are most of what is counted."""
    half = tiny_flux(depth=2, depth_single=3, width=1280, heads=10, mlp_ratio=4.0, dtype=torch.bfloat16)
    runs.start_over()
    residuals = runs.precompute(FLUX, half)
    run, settings = counted_run(half)
    training = run.needs(settings).training
    counted = training.peak - training.weights + run.streamed_bytes(settings)
    with streamed_by_trainer(card, half), peak_of(card) as peak:
        runs.train_on(half, residuals, steps=2, kept_weights="streamed")
    assert counted > 50 * MIB
    assert 0.85 * counted < peak[0] <= (1 + ALLOWED) * counted  # at most: the peak is not always at the largest layer


@pytest.mark.parametrize(("weight_format", "copies"), UNPACKED.items())
def test_training_on_quantised_weights(card, runs: Runs, model, weight_format, copies):
    runs.start_over()
    residuals = runs.precompute(FLUX, model)
    with peak_of(card) as peak:
        runs.train_on(model, residuals, steps=2, quantize_kept=weight_format)
    counted = needs(model, quantize_kept=weight_format).training.peak
    largest = max(weight.nbytes for weight in model.model.parameters())
    assert counted * (1 - ALLOWED) <= peak[0] <= counted * (1 + ALLOWED) + copies * largest


@pytest.mark.parametrize("weight_format", ["off", "int8"])
def test_a_host_that_keeps_all_weights_on_the_device(card, runs: Runs, weight_format):
    """As with --highvram: the MODEL's own weights stay beside the quantised copies."""
    model = tiny_flux(depth=2, depth_single=3, width=640, heads=5, mlp_ratio=4.0)
    model.offload_device = model.load_device
    with torch.inference_mode():  # as ComfyUI loads it then
        model.model.to(model.load_device)
    runs.start_over()
    residuals = runs.precompute(FLUX, model)
    there = sum(weight.nbytes for weight in model.model.parameters() if weight.is_cuda)
    try:
        with peak_of(card) as peak:
            runs.train_on(model, residuals, steps=2, quantize_kept=weight_format)
    finally:
        model.model.to("cpu")
    counted = needs(model, quantize_kept=weight_format).training.peak
    largest = max(weight.nbytes for weight in model.model.parameters())
    taken = there + peak[0]
    assert counted * (1 - ALLOWED) <= taken <= counted * (1 + ALLOWED) + UNPACKED.get(weight_format, 0) * largest


def test_a_step_of_the_optimiser_makes_no_copies(card):
    """Of the weights, the gradients or the moments, as torch's own choice for cards does."""
    from blockskip_pack.blockskip_core.training.optimizers import build_optimizer

    parameters = [torch.nn.Parameter(torch.zeros(MIB, device="cuda")) for _ in range(4)]
    optimizer = build_optimizer("AdamW", parameters, learning_rate=1e-4, weight_decay=0.01)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()  # makes the moments
    before = card.memory.settled()
    card.memory.reset_peak()
    optimizer.step()
    assert card.memory.peak - before < parameters[0].nbytes


def test_precomputing_a_block_at_a_time(card, runs: Runs, model, monkeypatch):
    from blockskip_pack.blockskip_core.hosts.models.hosted_dit import HostedDit

    monkeypatch.setattr(HostedDit, "room_for_blocks", 0)
    runs.start_over()
    with peak_of(card) as peak:
        runs.precompute(FLUX, model)
    counted = needs(model).precomputing.peak
    assert peak[0] == pytest.approx(counted, abs=ALLOWED * 100 * MIB)


def test_measuring(card, runs: Runs, model):
    runs.start_over()
    with peak_of(card) as peak:
        runs.call("SelectBlocks", model=model, positive=FLUX.captions((5,))[0], **MEASURE)
    counted = needs(model).selecting.peak
    assert counted > 100 * MIB
    assert peak[0] == pytest.approx(counted, rel=ALLOWED)


@pytest.mark.emulated
def test_what_fits_by_count_is_loaded_whole_and_fits(card, runs: Runs, model):
    """ComfyUI alone would stream some of it, to keep 1.2 GiB free."""
    from blockskip_pack.blockskip_core.accounting.plan import fits

    runs.start_over()
    residuals = runs.precompute(FLUX, model)
    counted = needs(model).training.peak
    room = next(room for room in range(counted, 2 * counted, MIB) if fits(counted, room))
    assert room < 1.1 * counted
    with card.memory.limited_to(card.memory.settled() + room), resident(card, model):
        outcome = runs.train_on(model, residuals, steps=2)
    assert outcome.said["problems"] == []
