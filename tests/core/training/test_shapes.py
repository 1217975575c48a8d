"""Training examples of several shapes: each is precomputed and trained as it would be alone, in batches of equals."""

from dataclasses import replace

import pytest
import torch
from blockskip_pack.blockskip_core.data import latents as latents_module
from blockskip_pack.blockskip_core.residuals.precompute import precompute_residuals
from blockskip_pack.blockskip_core.residuals.residual_set import residual_bytes
from blockskip_pack.blockskip_core.residuals.sources import source_of
from blockskip_pack.blockskip_core.training.config import TrainingConfig
from blockskip_pack.blockskip_core.training.loop import train_lora
from blockskip_pack.blockskip_core.training.result import TrainingResult

from ..plain_dit import LATENT_SHAPE, MemorySource, PlainDit, latents, lora_for, schedule, selection, train
from ..residuals.test_sources import PLAN, quiet, residual_set
from .test_checkpoints import Cut, assert_same, store

CHANNELS, ROWS, COLUMNS = LATENT_SHAPE
SHAPES = (
    (CHANNELS, ROWS, COLUMNS),
    (CHANNELS, ROWS + 2, COLUMNS),
    (CHANNELS, ROWS, COLUMNS),
    (CHANNELS, ROWS, COLUMNS + 1),
)


def of_shapes(count=4):
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(SHAPES[draw % 4], generator=generator, dtype=torch.float64) for draw in range(count)]


def test_latents_of_one_shape_are_one_tensor():
    clean = latents()
    assert torch.equal(latents_module.joined(list(clean)), clean)
    assert torch.equal(latents_module.in_batch(clean, [2, 0]), clean[[2, 0]])
    mixed = latents_module.joined(of_shapes())
    assert isinstance(mixed, list)
    assert latents_module.largest_shape(mixed) == SHAPES[1]
    assert latents_module.total_bytes(mixed) == sum(8 * torch.Size(shape).numel() for shape in SHAPES)
    assert latents_module.are_equal(mixed, of_shapes())
    assert not latents_module.are_equal(mixed, clean)


def test_residuals_of_mixed_shapes_are_those_of_each_alone():
    dit, chosen, plan, clean = PlainDit(), selection(1, 1), schedule(captions=(0, 0, 0, 0)), of_shapes()
    together = precompute_residuals(dit, plan, clean, chosen, range(4), batch_size=4)
    for draw in range(4):
        alone = precompute_residuals(dit, plan, clean, chosen, [draw])
        for name, tensor in alone.residuals[draw].tensors().items():
            torch.testing.assert_close(together.residuals[draw].tensors()[name], tensor, atol=1e-12, rtol=0)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_batch_of_mixed_shapes_has_the_mean_gradient_of_its_examples(checkpointing):
    dit, chosen, plan, clean = PlainDit(), selection(1, 1), schedule(captions=(0, 0, 0, 0)), of_shapes()
    source = MemorySource(dit, chosen, plan, clean)

    def gradients(draws):
        part = replace(plan, draws=tuple(plan[draw] for draw in draws))
        few = [clean[draw] for draw in draws]
        own = source if len(draws) == 4 else MemorySource(dit, chosen, part, few)
        adapters = lora_for(dit, chosen, zero=False)
        _, found = train(
            dit, chosen, own, adapters, plan=part, clean=few, batch_size=len(draws), checkpointing=checkpointing
        )  # fmt: skip
        return found

    together, alone = gradients(range(4)), [gradients([draw]) for draw in range(4)]
    for name, gradient in together.items():
        torch.testing.assert_close(gradient, sum(one[name] for one in alone) / 4, atol=1e-12, rtol=0)


def run(folder, storage, back_residual="constant", checkpoints=None, cut_after=None):
    made = residual_set(folder, storage, spans=(1, 2), back_residual=back_residual, chunk_size=3)
    clean = latents_module.joined(of_shapes(len(PLAN)))
    residuals, dit, result = replace(made, latents=clean), PlainDit(), TrainingResult()
    adapters = lora_for(dit, residuals.selection)

    def stop(report):
        if report.step == cut_after:
            raise Cut

    from blockskip_pack.blockskip_core.training.observer import OnStep

    try:
        train_lora(
            dit, PLAN, clean, residuals.selection, source_of(residuals, dit, quiet), adapters,
            TrainingConfig(steps=4, learning_rate=1e-2, batch_size=3), result=result, checkpoints=checkpoints,
            observers=[OnStep(stop)],
        )  # fmt: skip
    except Cut:
        pass
    return adapters.state_dict(), residuals, dit


@pytest.mark.parametrize(
    ("storage", "back_residual"), [("disk", "constant"), ("chunked", "linear"), ("on the fly", "constant")]
)
def test_a_run_of_mixed_shapes_resumes_to_the_same_bits(tmp_path, storage, back_residual):
    expected, residuals, dit = run(tmp_path / "a", storage, back_residual)
    run(tmp_path / "b", storage, back_residual, store(tmp_path), cut_after=2)
    assert_same(run(tmp_path / "b", storage, back_residual, store(tmp_path))[0], expected)
    if storage == "disk":
        from blockskip_pack.blockskip_core.residuals.cached_set import stored_latents

        assert latents_module.are_equal(stored_latents(residuals, quiet), residuals.latents)
        tensors = precompute_residuals(dit, PLAN, residuals.latents, residuals.selection, range(len(PLAN))).residuals
        exact = sum(x.nbytes for one in tensors.values() for x in one.tensors().values())
        assert residual_bytes(dit, residuals, range(len(PLAN))) == exact
