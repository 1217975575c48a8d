"""Residuals in eight bits: their maximum error and their size."""

import dataclasses

import pytest
import torch
from blockskip_pack.blockskip_core.errors import InvalidInputError
from blockskip_pack.blockskip_core.residuals.cache import ResidualCache
from blockskip_pack.blockskip_core.residuals.cached_set import write_cache
from blockskip_pack.blockskip_core.residuals.format import SCALE_BYTES, ResidualShape, packed, unpacked
from blockskip_pack.blockskip_core.residuals.residual_set import residual_bytes

from ..plain_dit import TEXT_LENGTHS, WIDTH, PlainDit
from .test_sources import PLAN, quiet, residual_set, run

EIGHT_BITS = ("int8", "fp8")


def tokens(*shape, seed=0, dtype=torch.float32):
    """Tokens of very different magnitudes, including a zero token and one with a single large number."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    x = x * torch.logspace(-3, 3, shape[1])[:, None]
    x[:, 0] = 0
    x[:, 1, 0] = 1e4
    return x.to(dtype)


def there_and_back(x, form, dtype=torch.float32):
    return unpacked(packed({"back": x}, form), dtype)["back"]


def test_exact_residuals_are_handed_through():
    x = tokens(1, 6, 8)
    stored = packed({"back": x}, "exact")
    assert list(stored) == ["back"]
    assert stored["back"] is x
    assert unpacked(stored, torch.bfloat16)["back"] is x


def test_int8_is_off_by_half_a_step_at_most():
    x = tokens(2, 20, 64)
    step = x.abs().amax(-1, keepdim=True) / 127
    assert ((there_and_back(x, "int8") - x).abs() <= step / 2 * (1 + 1e-5)).all()


def test_fp8_is_off_by_a_sixteenth_at_most():
    x = tokens(2, 20, 64)
    smallest_normal = x.abs().amax(-1, keepdim=True) / 448 / 64
    allowed = torch.maximum(x.abs(), smallest_normal) / 16
    assert ((there_and_back(x, "fp8") - x).abs() <= allowed * (1 + 1e-5)).all()


@pytest.mark.parametrize("form", EIGHT_BITS)
def test_the_largest_numbers_and_zeros_are_kept(form):
    x = tokens(1, 6, 8)
    back = there_and_back(x, form)
    assert not back[:, 0].any()
    torch.testing.assert_close(back.abs().amax(-1), x.abs().amax(-1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("form", EIGHT_BITS)
def test_what_was_packed_once_is_packed_again_without_loss(form):
    once = there_and_back(tokens(1, 6, 64), form)
    torch.testing.assert_close(there_and_back(once, form), once, rtol=1e-6, atol=0)


@pytest.mark.parametrize("form", EIGHT_BITS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_tokens_dtype_comes_back(form, dtype):
    back = there_and_back(tokens(1, 6, 8, dtype=dtype), form, dtype)
    assert back.dtype == dtype
    assert back.shape == (1, 6, 8)


def eight_bit_set(folder, form, **settings):
    residuals = residual_set(folder, **settings)
    return dataclasses.replace(residuals, identity=dataclasses.replace(residuals.identity, residual_format=form))


@pytest.mark.parametrize("form", EIGHT_BITS)
@pytest.mark.parametrize("spans", [(1, 2), (2, 0), (0, 2)])
def test_the_predicted_bytes_are_those_written(tmp_path, form, spans):
    residuals, dit = eight_bit_set(tmp_path, form, spans=spans), PlainDit()
    write_cache(residuals, dit, quiet)
    cache = ResidualCache(residuals.folder, residuals.identity)
    stored = [cache.read(draw, wanted=lambda name: name.startswith(("front", "back"))) for draw in range(len(PLAN))]
    assert residual_bytes(dit, residuals, range(len(PLAN))) == sum(x.nbytes for some in stored for x in some.values())
    if spans == (1, 2):
        texts = sum(TEXT_LENGTHS[draw.caption] for draw in PLAN)
        assert residual_bytes(dit, residuals, range(len(PLAN))) == (2 * 6 * len(PLAN) + texts) * (WIDTH + SCALE_BYTES)


@pytest.mark.parametrize("storage", ["disk", "chunked"])
@pytest.mark.parametrize("form", EIGHT_BITS)
def test_a_run_on_them_is_nearly_the_exact_run(tmp_path, form, storage):
    exact, _ = run(residual_set(tmp_path / "exact", storage), steps=20, learning_rate=1e-2)
    rounded, _ = run(eight_bit_set(tmp_path / form, form, storage=storage), steps=20, learning_rate=1e-2)
    assert exact.self_check < 1e-6
    assert 1e-6 < rounded.self_check < 0.03
    assert rounded.losses != exact.losses
    assert rounded.losses == pytest.approx(exact.losses, rel=0.05)


def test_a_cache_of_another_format_is_another_cache(tmp_path):
    keys = {eight_bit_set(tmp_path, form).identity.key for form in ("exact", *EIGHT_BITS)}
    assert len(keys) == 3


def test_an_unknown_format_is_refused(tmp_path):
    with pytest.raises(InvalidInputError, match="residual_format must be one of exact, int8, fp8, got 'int2'"):
        eight_bit_set(tmp_path, "int2")


def test_the_bytes_of_a_shape_are_those_of_its_tensors():
    sizes = {"img_tokens": 6, "txt_tokens": 5, "width": 4, "itemsize": 2}
    assert ResidualShape(front=True, back=True, **sizes).num_bytes(0) == 0
    assert ResidualShape(front=True, back=False, **sizes).num_bytes() == (6 + 5) * 4 * 2
    assert ResidualShape(front=False, back=True, **sizes).num_bytes(2) == 2 * 6 * 4 * 2
    assert ResidualShape(front=True, back=True, **sizes).num_bytes(3) == 3 * (6 + 5 + 6) * 4 * 2
    assert ResidualShape(front=True, back=True, form="int8", **sizes).num_bytes(3) == 3 * (6 + 5 + 6) * (4 + 4)
