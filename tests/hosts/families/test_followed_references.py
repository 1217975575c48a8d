"""Reference pictures of models that no family file describes, on tiny models of ComfyUI's own classes."""

from __future__ import annotations

import pytest
import torch
from blockskip_pack.blockskip_core.errors import UnsupportedModelError

from ..edit_models import edit_model
from ..followed_families import family
from ..tiny_families import precomputed, replayed, selection
from . import test_followed
from .test_followed_text import Sampled

pytestmark = pytest.mark.usefixtures("comfyui")

CASES = [("omnigen2", None), ("boogu", None), ("mage_flow", None), ("joyimage", None), ("krea2", "index_timestep_zero")]
SINGLE = ("joyimage_edit",)  # ComfyUI's kernel that rotates its queries knows no float64


@pytest.fixture(params=CASES, ids=lambda case: case[0], scope="module")
def tiny(request):
    return edit_model(*request.param)


@pytest.fixture(scope="module")
def patcher(comfyui, tiny):
    return tiny.build()


def test_front_middle_and_back_together_are_the_whole_model(tiny, patcher):
    dit, clean = tiny.hosted(patcher), tiny.clean_latents()
    count, full = len(dit.blocks), tiny.full_forward(dit, clean, [0])
    for front, back, tail in ((count - 1, 0, 0), (1, count - 2, 0), (1, 1, 1)):
        spans = selection(front, back, count, tail)
        computed = precomputed(dit, spans, clean, [0])
        skipping = replayed(dit, spans, computed.residuals, clean, [0])
        torch.testing.assert_close(skipping, full, atol=1e-5 if back else 0.0, rtol=0.0, msg=f"{front}, {back}, {tail}")


def test_what_is_stored_is_what_the_adapter_says(tiny, patcher):
    dit, clean = tiny.hosted(patcher), tiny.clean_latents()
    stored = precomputed(dit, selection(1, 1, len(dit.blocks)), clean, [0]).residuals[0]
    assert stored.front.img.shape == stored.back.shape == (1, 15, dit.width)
    assert (0 if stored.front.txt is None else stored.front.txt.shape[1]) == dit.text_tokens(0)
    bare = family(tiny.name.removesuffix("_edit")).hosted(patcher)
    assert dit.text_tokens(0) - bare.text_tokens(0) == tiny.num_text - family(tiny.name.removesuffix("_edit")).num_text


def test_training_lowers_the_loss(tiny, patcher):
    spans = selection(1, 1, len(tiny.hosted(patcher).blocks))
    result, gradients, _ = tiny.run(patcher, spans, steps=9, batch_size=2, learning_rate=1e-2)
    assert result.losses[-1] < 0.98 * result.losses[0]
    assert result.self_check < 1e-5
    assert all(gradient.any() for gradient in gradients.values())


def test_gradients_are_those_of_central_differences(tiny):
    """In float64; ComfyUI rounds its output to float32."""
    single = tiny.name in SINGLE
    dtype, distances = (torch.float32, (1e-3, 4e-3)) if single else (torch.float64, (5e-4,))
    dit = tiny.hosted(tiny.build(dtype=dtype))
    counts = (1, len(dit.blocks) - 3)
    gradients, along, slopes, _ = test_followed.along_a_direction(tiny, dit, counts, distances, dtype)
    assert all(gradient.any() for gradient in gradients.values())
    assert any(slope == pytest.approx(along, rel=5e-3 if single else 3e-4) for slope in slopes)


def test_a_hidden_text_reaches_the_picture_by_no_reference_either(tiny):
    sampled = Sampled(tiny)
    everywhere = range(sampled.count)
    assert torch.equal(sampled.step(everywhere, seed=1), sampled.step(everywhere, seed=2))
    assert not torch.equal(sampled.step(seed=1), sampled.step(seed=2))


def test_without_references_the_model_is_trained_as_before(tiny, patcher):
    tiny.hosted(patcher)
    bare, clean = family(tiny.name.removesuffix("_edit")), tiny.clean_latents()
    dit = bare.hosted(patcher)
    computed = precomputed(dit, selection(1, 0, len(dit.blocks)), clean, [0])
    assert torch.equal(computed.reference.denoised, bare.full_forward(dit, clean, [0]))


def test_a_model_that_ignores_its_references_is_refused():
    ignoring = edit_model("krea2")
    with pytest.raises(UnsupportedModelError, match="Krea2 models do not look at the reference pictures"):
        ignoring.hosted(ignoring.build())


def test_a_class_that_takes_no_references_refuses_them():
    lens = family("lens")
    with pytest.raises(UnsupportedModelError, match="Reference pictures are not supported for Lens models"):
        lens.hosted(lens.build(), reference_latents=[torch.zeros(1, 128, 3, 5)])
