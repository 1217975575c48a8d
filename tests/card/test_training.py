"""Training on a card equals training on the CPU bit for bit, however ComfyUI treats the MODEL, and leaves nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

from ..core.plain_dit import MemorySource, needed
from ..hosts.edit_models import edit_model
from ..hosts.followed_families import family as followed
from ..hosts.tiny_families import FAMILIES, FLUX, PLAN, TinyFamily, selection
from ..hosts.tiny_flux import assert_same_weights, weights
from ..hosts.tiny_minimax import MINIMAX
from .modes import MODES
from .runs import Outcome, Runs, leaving_nothing, on_cpu

STORAGES = ("disk", "chunked", "on the fly")
# A fused RMS norm adds up the gradients of its input in another order than the CPU, where it is decomposed. This
# matters where the norm's input is also used elsewhere. Largest relative difference of a gradient; for all others it is
# 0.
ROUNDING = {"lumina2": 3e-6, "z_image": 3e-6, "krea2": 1e-4}  # Krea 2's first step is 2e-7 off, its third 3e-5
UNASKED = [mode for mode in MODES if mode not in ("resident", "streamed_by_trainer", "small_layers")]
WAYS = ("resident", "streamed", "few_pages")
NOT_PRESSED = "z_image"  # its weights are so small a part of a tiny run that either all of them fit or the run does not


def pairs() -> Iterator[Any]:
    """FLUX.1 in all modes and every other family in two; storages alternate, so that every mode gets each."""
    for row, family in enumerate(FAMILIES):
        own = {UNASKED[row % len(UNASKED)], WAYS[1 + row % 2]}
        for column, mode in enumerate(UNASKED):
            if (family.name, mode) == (NOT_PRESSED, "pressed_pages"):
                continue
            if mode in own or family.name == "flux":
                storage = STORAGES[(row + column) % len(STORAGES)]
                yield pytest.param(family, mode, storage, id=f"{family.name}-{mode}")


@pytest.fixture(scope="module")
def known() -> dict[Any, Outcome]:
    """The results of training on the CPU."""
    return {}


@pytest.fixture
def compare(card: Any, runs: Runs, known: dict[Any, Outcome]) -> Callable[..., Outcome]:
    """Train in a mode and compare with the CPU."""

    def run(family: TinyFamily, mode: str, storage: str = "disk", **settings: Any) -> Outcome:
        key = family.name, storage, tuple(settings.items())
        if key not in known:
            known[key] = runs.train(family, on_cpu(family.build()), storage=storage, **settings)
        model, expected = family.build(), known[key]
        with MODES[mode](card, model) as treated, leaving_nothing(card, treated):
            outcome = runs.train(family, treated, storage=storage, **settings)
        if family.name in ROUNDING:
            assert max(outcome.differences(expected)) <= ROUNDING[family.name]
            assert outcome.losses == pytest.approx(expected.losses, rel=1e-6)
        else:
            assert max(outcome.differences(expected)) == 0.0
            assert outcome.is_bit_equal(expected)
        return outcome

    return run


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_where_all_weights_fit(compare, family):
    compare(family, "resident")


@pytest.mark.parametrize(
    ("name", "mode"),
    [("krea2", "few_pages"), ("hunyuan_video", "resident"), ("ltx2", "streamed"), ("ltx2", "few_pages")],
)
def test_models_without_a_file(compare, name, mode):
    """Their layout is found on the card, with the weights wherever the host has them."""
    compare(followed(name), mode)


@pytest.mark.parametrize("name", ["krea2", "hunyuan_video", "kandinsky5"])
def test_skipped_weights_of_a_followed_model_are_not_on_the_card(card, monkeypatch, name):
    from blockskip_pack.blockskip_core.hosts.models.hosted_dit import HostedDit

    family, running, loaded = followed(name), HostedDit.running, []

    @contextmanager
    def watching(self: Any, replacements: Any, **options: Any) -> Iterator[Any]:
        before = card.memory.settled()
        with running(self, replacements, **options) as denoise:
            tree = self.patcher.model.diffusion_model
            loaded.append((card.memory.settled() - before, {name for name, p in tree.named_parameters() if p.is_cuda}))
            yield denoise

    patcher = family.build()
    dit = family.hosted(patcher)
    spans = selection(1, 1, len(dit.blocks))
    computed = MemorySource(dit, spans, PLAN, family.clean_latents(), needed(len(PLAN)))
    monkeypatch.setattr(HostedDit, "running", watching)
    family.run(patcher, spans, source=computed, adapters=family.lora(dit, spans), steps=1)
    [(num_bytes, names)] = loaded
    own = {name: parameter.nbytes for name, parameter in patcher.model.diffusion_model.named_parameters()}
    skipped = [dit.blocks[index] for index in sorted({*range(len(dit.blocks))} - {*spans.kept})]
    assert names == {name for name in own if not name.startswith(tuple(f"{block.name}." for block in skipped))}
    beside = num_bytes - sum(own[name] for name in names)  # the LoRA and the captions
    assert 0 <= beside < min(block.num_bytes for block in skipped)


@pytest.mark.parametrize("mode", ["streamed", "few_pages"])
def test_a_model_of_video_and_sound(compare, mode):
    compare(MINIMAX, mode)


@pytest.mark.parametrize(("family", "mode", "storage"), list(pairs()))
def test_where_they_do_not(compare, family, mode, storage):
    compare(family, mode, storage)


SETTINGS: dict[str, dict[str, Any]] = {
    "fp8": {"quantize_kept": "fp8"},
    "int8": {"quantize_kept": "int8"},
    "4-bit": {"quantize_kept": "4-bit"},
    "activations kept": {"activation_budget": 0.25},
    "no checkpointing": {"checkpointing": False},
    "batches": {"batch_size": 2, "accumulation": 2},
    "linear residual": {"back_residual": "linear"},
    "exact back": {"back_residual": "exact", "quantize_frozen": "off"},
    "exact back in 4-bit": {"back_residual": "exact", "quantize_frozen": "4-bit"},
    "residuals in eight bits": {"residual_format": "int8"},
    "samples in between": {"sample_every": 2},
}


@pytest.mark.parametrize(("storage", "mode"), [("disk", "resident"), ("on the fly", "streamed"), ("disk", "few_pages")])
def test_a_span_before_trained_last_blocks(compare, storage, mode):
    compare(FLUX, mode, storage, tail=1)


def each_in_turn() -> Iterator[Any]:
    """Every setting in one of the modes."""
    for place, (name, settings) in enumerate(SETTINGS.items()):
        mode = ("few_pages", "resident", "low_vram")[place % 3]
        yield pytest.param(settings, mode, id=f"{name}-{mode}")


@pytest.mark.parametrize(("settings", "mode"), list(each_in_turn()))
def test_every_way_to_spend_or_save_memory(compare, settings, mode):
    compare(FLUX, mode, **settings)


@pytest.mark.parametrize("mode", ["resident", "streamed", "few_pages"])
def test_a_model_in_eight_bits_with_frozen_blocks_in_four(compare, mode):
    eight_bits = replace(
        FLUX, name="flux fp8", build=lambda: FLUX.build(dtype=torch.float8_e4m3fn, cast_to=torch.float32)
    )
    compare(eight_bits, mode, back_residual="exact", quantize_frozen="4-bit")


@pytest.mark.parametrize("weight_format", ["off", "4-bit"])
def test_a_lora_on_a_model_in_eight_bits_does_not_stop_a_run(card, runs, weight_format):
    """Its layers are written back in eight bits if they are loaded whole, as for precomputing, and not if streamed."""
    patcher = FLUX.build(dtype=torch.float8_e4m3fn, cast_to=torch.float32)
    generator = torch.Generator().manual_seed(2)
    for name, weight in list(patcher.model.named_parameters()):
        if "_blocks." in name and weight.dim() == 2:
            values = torch.randn(weight.shape, generator=generator)
            patcher.add_patches({name: ("diff", (0.1 * weight.float().norm() / values.norm() * values,))})
    assert len(patcher.patches) > 10
    with MODES["streamed_by_trainer"](card, patcher) as treated:
        outcome = runs.train(FLUX, treated, quantize_kept=weight_format, kept_weights="streamed")
    assert 1e-3 < outcome.said["self_check"] < 0.3


@pytest.mark.parametrize("weight_format", ["off", "int8", "4-bit"])
def test_layers_that_are_too_small_to_be_paged(card, runs, weight_format):
    """The host remembers the weights of such layers by name, and the user's model must not get quantised ones."""
    patcher = FLUX.build()
    before = weights(patcher)
    with MODES["small_layers"](card, patcher) as treated:
        for seed in (0, 1):
            runs.train(FLUX, treated, quantize_kept=weight_format, seed=seed)
            assert_same_weights(patcher, before)


def test_an_edit_model_with_references(compare):
    compare(edit_model("flux"), "streamed", batch_size=2)


def test_weights_that_the_trainer_streams(compare):
    import comfy.model_management as management

    compare(FLUX, "streamed_by_trainer", kept_weights="streamed")
    compare(FLUX, "streamed_by_trainer", kept_weights="streamed", back_residual="exact", quantize_frozen="int8")
    assert not management.STREAM_CAST_BUFFERS  # the host would keep them for its next streamed model


def test_the_lora_that_its_owner_still_holds_is_not_on_the_card(card):
    before = card.memory.settled()
    _, gradients, adapters = FLUX.run(FLUX.build(), FLUX.chosen(2, 1), steps=2)
    del gradients
    assert card.memory.settled() == before
    assert all(parameter.is_cpu for parameter in adapters.parameters())


def test_after_the_button_that_unloads_models(runs):
    """In this case ComfyUI unloads in its main thread, outside the inference mode of prompts."""
    import comfy.model_management as management

    model = FLUX.build()
    with torch.inference_mode():
        management.load_models_gpu([model])
    management.unload_all_models()
    runs.train(FLUX, model)
