"""Runs with blocks in 4-bit predict what the model as loaded predicts, whatever else they are given."""

from __future__ import annotations

import pytest
import torch

from .test_references import WHOLE, before  # noqa: F401 - a fixture
from .test_run import weights

FORMATS = [{"quantize_kept": "4-bit"}, {"quantize_frozen": "4-bit"}]
HARDLY = 1e-8  # learning rate: the losses are those of the model without a LoRA


def differences(bench, residuals, format_of_blocks, **changes):
    """Largest relative difference of losses from those of unquantised blocks: without and with correction."""
    common = {"residuals": residuals, "steps": 4, "learning_rate": HARDLY, "quantize_frozen": "off", **changes}
    plain = bench.train(**common)[1]["loss"]
    runs = [bench.train(**{**common, **format_of_blocks}, correct_4bit=on)[1]["loss"] for on in (False, True)]
    return tuple(max(abs(one / other - 1) for one, other in zip(plain, losses, strict=True)) for losses in runs)


@pytest.mark.parametrize("storage", ["disk", "chunked", "on the fly"])
@pytest.mark.parametrize("settings", FORMATS, ids=str)
def test_what_4_bit_changes_is_undone(bench, storage, settings):
    residuals = bench.precompute(storage=storage, chunk_size=4, back_residual="exact")[0]
    loaded = weights(bench.model)
    far, near = differences(bench, residuals, settings)
    assert near < 1e-5 < 1e-4 < far
    after = weights(bench.model)
    assert all(torch.equal(loaded[name], after[name]) for name in loaded)


@pytest.mark.parametrize("part", ["whole", "same part"])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_with_references_too(bench, before, pictures, part, batch_size):  # noqa: F811
    given = before if part == "whole" else pictures
    residuals = bench.precompute(references=given, reference_part=part, back_residual="exact", **WHOLE)[0]
    far, near = differences(bench, residuals, FORMATS[0], batch_size=batch_size)
    assert near < 1e-5 < 1e-4 < far


@pytest.mark.parametrize("batch_size", [1, 3])
def test_with_pictures_of_several_shapes_too(bench, batch_size):
    residuals = bench.precompute(draws=9, patch_order="fixed", patch_shape="as pictures", back_residual="exact")[0]
    far, near = differences(bench, residuals, FORMATS[0], batch_size=batch_size)
    assert near < 1e-5 < 1e-4 < far


@pytest.mark.parametrize("residual_format", ["exact", "int8"])
@pytest.mark.parametrize("back_residual", ["constant", "linear"])
def test_with_skipped_last_blocks_too(bench, back_residual, residual_format):
    residuals = bench.precompute(back_residual=back_residual, residual_format=residual_format)[0]
    far, near = differences(bench, residuals, FORMATS[0])
    assert near < 1e-5 < 1e-4 < far


def test_with_empty_captions_too(bench):
    residuals = bench.precompute(caption_dropout=0.5, empty_caption=bench.prompt, back_residual="exact")[0]
    far, near = differences(bench, residuals, FORMATS[0])
    assert near < 1e-5 < 1e-4 < far


def test_from_a_lora_too(bench):
    """The LoRA that a run starts from is no part of the model as loaded."""
    residuals = bench.precompute(back_residual="exact")[0]
    start = bench.train(residuals=residuals)[0]
    far, near = differences(bench, residuals, FORMATS[0], start_from=start)
    assert near < 0.5 * far, "the LoRA acts on quantised weights, so what it adds differs a little"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_in_half_precision_too(bench, tiny, dtype):
    model = tiny.tiny_flux(dtype=dtype)
    residuals = bench.precompute(model=model, selection=bench.select(model=model)[0], back_residual="exact")[0]
    far, near = differences(bench, residuals, FORMATS[0], model=model)
    assert near < 1e-3 < 1e-2 < far


def test_eight_bits_are_not_corrected(bench):
    residuals = bench.precompute()[0]
    runs = [bench.train(residuals=residuals, quantize_kept="int8", correct_4bit=on) for on in (True, False)]
    assert all(torch.equal(runs[0][0][name], tensor) for name, tensor in runs[1][0].items())
