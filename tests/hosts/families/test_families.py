"""Properties that every supported family must have, on tiny random models of ComfyUI's own classes."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from blockskip_pack.blockskip_core.adapters.lora_formats import to_file_tensors, to_host_lora
from blockskip_pack.blockskip_core.blocks.replay import Residual
from blockskip_pack.blockskip_core.blocks.skipping_model import SkippingModel
from blockskip_pack.blockskip_core.data.flow_matching import noisy_batch, velocity_loss
from blockskip_pack.blockskip_core.errors import InvalidInputError
from blockskip_pack.blockskip_core.residuals.precompute import precompute_residuals
from blockskip_pack.blockskip_core.residuals.sources import FoldedSource

from ...core.plain_dit import MemorySource, train
from ..tiny_families import FAMILIES, PLAN, TinyFamily, precomputed, replayed
from ..tiny_flux import assert_same_weights, weights

pytestmark = pytest.mark.usefixtures("comfyui")

RANK = 2


@pytest.fixture(params=FAMILIES, ids=lambda family: family.name, scope="module")
def tiny(request) -> TinyFamily:
    return request.param


@pytest.fixture(scope="module")
def patcher(comfyui, tiny):
    return tiny.build()


@pytest.fixture(autouse=True)
def _model_is_left_as_it_was(comfyui, patcher):
    """After every test the MODEL has the same modules and weights, and no attributes of the pack."""
    modules, before = dict(patcher.model.named_modules()), weights(patcher)
    yield
    from blockskip_pack.blockskip_core.hosts.models.residency import unload

    unload(patcher)
    now = dict(patcher.model.named_modules())
    assert now.keys() == modules.keys()
    assert all(now[name] is module for name, module in modules.items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in now.values())
    assert (patcher.object_patches, patcher.object_patches_backup, patcher.patches, patcher.wrappers) == (
        {},
        {},
        {},
        {},
    )
    assert_same_weights(patcher, before)


def every_front_and_back(tiny: TinyFamily) -> list[tuple[int, int]]:
    """(front, back) in which every front and every back of the family occurs."""
    last = tiny.num_blocks - 1
    return [(0, 0), (1, 1), *((front, last - front) for front in range(tiny.num_blocks))]


# --- the numbers -------------------------------------------------------------------------------------------------


def test_the_adapter_is_that_of_the_family_and_lists_the_blocks_in_the_order_in_which_they_run(tiny, patcher):
    dit, order = tiny.hosted(patcher), []
    assert dit.family == tiny.family
    names = [block.name for block in dit.blocks]
    hooks = [dit.module(name).register_forward_pre_hook(lambda *_, name=name: order.append(name)) for name in names]
    tiny.full_forward(dit, tiny.clean_latents(), [0])
    for hook in hooks:
        hook.remove()
    assert tuple(order) == tuple(names) == tiny.blocks


def test_every_weight_is_in_the_stem_the_blocks_or_the_head(tiny, patcher):
    """Weights in none of them would run as ComfyUI's inference tensors; only single tensors do."""
    dit = tiny.hosted(patcher)
    parts = [*dit.frozen_stem, *(block.name for block in dit.blocks), *dit.trainable_head]
    assert len(set(parts)) == len(parts)
    others = [
        name
        for name, _ in patcher.model.diffusion_model.named_parameters()
        if not name.startswith(tuple(f"{part}." for part in parts))
    ]
    assert not any("." in name for name in others), others


def test_front_middle_and_back_together_are_the_full_model(tiny, patcher):
    dit, clean = tiny.hosted(patcher), tiny.clean_latents()
    full = [tiny.full_forward(dit, clean, [draw]) for draw in range(2)]
    for front, back in every_front_and_back(tiny):
        streamed = {"room": 0} if (front, back) == (1, 1) else {}  # block by block
        computed = precomputed(dit, tiny.chosen(front, back), clean, range(2), **streamed)
        for draw in range(2):
            skipping = replayed(dit, tiny.chosen(front, back), computed.residuals, clean, [draw])
            assert skipping.shape == clean[:1].shape
            if back:
                torch.testing.assert_close(skipping, full[draw], atol=1e-5, rtol=0.0, msg=f"{front}, {back}")
            else:
                assert torch.equal(skipping, full[draw]), (front, back)  # no rounding: bit for bit
        assert torch.equal(computed.reference.denoised, full[0])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-6)], ids=str)
def test_a_span_before_a_tail_is_replayed_as_the_full_model(tiny, comfyui, dtype, tolerance):
    """In float64 too, where only ComfyUI's output is rounded to float32."""
    dit, clean = tiny.hosted(tiny.build(dtype=dtype)), tiny.clean_latents(dtype=dtype)
    if dtype == torch.float32:
        full = tiny.full_forward(dit, clean, [0])
    else:  # the host's own kernels lack this dtype; ours with nothing skipped equal them, see above
        full = replayed(dit, tiny.chosen(0, 0), {0: Residual(None, None)}, clean, [0])
    for front, tail in ((0, 1), (tiny.num_blocks > 3, 1), (0, 2)):
        spans = tiny.chosen(int(front), tiny.num_blocks - front - tail - 1, tail)
        if not spans.back:
            continue
        stored = precomputed(dit, spans, clean, [0]).residuals
        assert (stored[0].back_txt is None) == (not tiny.num_text)
        torch.testing.assert_close(replayed(dit, spans, stored, clean, [0]), full, atol=tolerance, rtol=0.0)


def test_every_tensor_before_and_after_a_skipped_span_has_a_gradient(tiny, patcher):
    spans = tiny.chosen(0, tiny.num_blocks - 2, 1)
    adapters = tiny.lora(tiny.hosted(patcher), spans, zero=False)
    assert {name.split(".")[1] for name in adapters.names} == {tiny.blocks[i].split(".")[1] for i in spans.adapted}
    _, gradients, _ = tiny.run(patcher, spans, adapters=adapters, checkpointing=False)
    assert all(gradients[f"{name}.{part}"].abs().max() > 0 for name in adapters.names for part in "AB")


def test_without_the_stored_residual_the_output_is_another(tiny, patcher):
    dit, clean = tiny.hosted(patcher), tiny.clean_latents()
    spans = tiny.chosen(1, 1)
    stored = precomputed(dit, spans, clean, [0]).residuals[0]
    full = tiny.full_forward(dit, clean, [0])
    for other in (
        Residual(stored.front, torch.zeros_like(stored.back)),
        Residual(stored.front.map(torch.zeros_like), stored.back),
    ):
        assert not torch.allclose(replayed(dit, spans, {0: other}, clean, [0]), full, atol=1e-3)


def test_the_stream_has_as_many_tokens_as_the_adapter_says(tiny, patcher):
    dit, clean = tiny.hosted(patcher), tiny.clean_latents()
    stored = precomputed(dit, tiny.chosen(1, 1), clean, [1]).residuals[1]  # caption 2: three tokens
    width = dit.width
    assert dit.text_tokens(2) == tiny.num_text
    assert dit.image_tokens(*tiny.latent_shape[1:]) == tiny.num_img
    assert stored.front.img.shape == stored.back.shape == (1, tiny.num_img, width)
    if tiny.num_text:
        assert stored.front.txt.shape == (1, tiny.num_text, width)
    else:
        assert stored.front.txt is None


def test_texts_of_another_encoder_are_refused(tiny, patcher):
    from blockskip_pack.blockskip_core.hosts.families.registry import adapter_for

    adapter, texts = adapter_for(patcher), tiny.captions((5, 7))
    adapter.require_texts(texts)
    (embedding, settings), *_ = texts[1]
    for width in (1, embedding.shape[-1] + 1):
        wrong = [texts[0], [[torch.zeros(1, 7, width), settings]]]
        with pytest.raises(InvalidInputError, match=f"Conditioning 2 has width {width}, .* needs"):
            adapter.require_texts(wrong)


def test_batches_of_captions_agree_with_single_rows(tiny, patcher):
    dit, clean, spans = tiny.hosted(patcher), tiny.clean_latents(), tiny.chosen(1, 2)
    one = precomputed(dit, spans, clean, range(4)).residuals
    many = precomputed(dit, spans, clean, range(4), batch_size=3).residuals
    for draw in range(4):
        for name, tensor in one[draw].tensors().items():
            torch.testing.assert_close(many[draw].tensors()[name], tensor, atol=1e-5, rtol=1e-5)
    together = replayed(dit, spans, one, clean, [1, 3])
    torch.testing.assert_close(together, tiny.full_forward(dit, clean, [1, 3]), atol=1e-5, rtol=0.0)


def test_bf16_models_agree_within_their_rounding(tiny, comfyui):
    dit, clean = tiny.hosted(tiny.build(dtype=torch.bfloat16)), tiny.clean_latents()
    spans = tiny.chosen(1, 2)
    residuals = precomputed(dit, spans, clean, [0]).residuals
    assert all(x.dtype == torch.bfloat16 for x in residuals[0].tensors().values())
    full = tiny.full_forward(dit, clean, [0])
    removed = noisy_batch(PLAN, clean, [0])[0] - full
    assert (replayed(dit, spans, residuals, clean, [0]) - full).norm() / removed.norm() <= 2e-2


# --- gradients ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("counts", [(1, 1), (2, 0)])
def test_gradients_are_those_of_finite_differences(tiny, comfyui, counts):
    """In float64, along one random direction per kept block; ComfyUI rounds its output to float32."""
    dit, clean = tiny.hosted(tiny.build(dtype=torch.float64)), tiny.clean_latents(dtype=torch.float64)
    spans = tiny.chosen(*counts)
    source = MemorySource(dit, spans, PLAN, clean, [0])
    adapters = tiny.lora(dit, spans, zero=False, dtype=torch.float64)
    before = [p.detach().clone() for p in adapters.parameters()]
    _, gradients = train(dit, spans, source, adapters, plan=PLAN, clean=clean, learning_rate=1e-12)
    generator = torch.Generator().manual_seed(1)
    stand_ins = SkippingModel(dit, spans, checkpointed=False, folded=False)
    noisy, target, sigmas = noisy_batch(PLAN, clean, [0])

    with torch.no_grad(), dit.running(stand_ins.modules) as denoise:
        with adapters.attached(stand_ins.linears(), dit.weight_for_backward):
            stand_ins.replay(source.computed.residuals.__getitem__, [0], None)

            def slope(moved, step):
                total = 0.0
                for distance, weight in ((1, 8), (-1, -8), (2, -1), (-2, 1)):  # fourth-order error
                    for _, parameter, value, direction in moved:
                        parameter.data.copy_(value + distance * step * direction)
                    loss = velocity_loss(denoise(noisy, sigmas, [PLAN[0].caption]), target, sigmas).item()
                    total += weight * loss / (12 * step)
                for _, parameter, value, _ in moved:
                    parameter.data.copy_(value)
                return total

            moved_in: dict[str, list] = {}
            keys = [f"{name}.{part}" for name in adapters.names for part in "AB"]
            for key, parameter, value in zip(keys, adapters.parameters(), before, strict=True):
                parameter.data.copy_(value)
                direction = torch.randn(value.shape, generator=generator, dtype=value.dtype)
                moved_in.setdefault(block_of(tiny, key), []).append((key, parameter, value, direction))
            assert list(moved_in) == [tiny.blocks[index] for index in spans.adapted]
            for block, moved in moved_in.items():
                found = sum((gradients[key] * direction).sum().item() for key, _, _, direction in moved)
                size = sum(gradients[key].square().sum().item() for key, *_ in moved) ** 0.5
                length = sum(direction.square().sum().item() for *_, direction in moved) ** 0.5
                allowed = 1e-4 * size * length + 1e-6
                # With a small gradient, small steps drown in ComfyUI's rounding; with a large one, large steps are
                # not accurate enough. A wrong gradient agrees with neither.
                errors = (slope(moved, step) - found for step in (1e-2, 4e-2))
                assert any(abs(error) <= allowed for error in errors), block


def block_of(tiny: TinyFamily, key: str) -> str:
    return next(name for name in tiny.blocks if key.startswith(f"{name}."))


def test_every_tensor_of_the_lora_has_a_gradient_whatever_is_kept(tiny, patcher):
    """Text branches whose output is unused get no adapter, so that no adapter stays without gradients."""
    for back in range(tiny.num_blocks):  # each block is the last kept one once
        counts = (0, back)
        spans = tiny.chosen(*counts)
        dit = tiny.hosted(patcher)
        adapters = tiny.lora(dit, spans, zero=False)
        _, gradients, _ = tiny.run(patcher, spans, adapters=adapters, checkpointing=False)
        for name in adapters.names:
            for part in "AB":
                assert gradients[f"{name}.{part}"].abs().max() > 0, (counts, name, part)


def test_targets_are_the_layers_they_name(tiny, patcher):
    dit = tiny.hosted(patcher)
    first, second = (f"{name}." for name in tiny.blocks[:2])
    names = dit.lora_layers(tiny.chosen(0, tiny.num_blocks - 2), "attention and mlp")
    assert {name.removeprefix(first) for name in names if name.startswith(first)} == tiny.layers
    assert {name.removeprefix(second) for name in names if name.startswith(second)} == tiny.layers - tiny.text_outputs
    attention, mlp = (set(dit.lora_layers(tiny.chosen(0, 1), targets)) for targets in ("attention", "mlp"))
    assert attention | mlp == set(dit.lora_layers(tiny.chosen(0, 1), "attention and mlp"))
    assert attention | mlp <= set(dit.lora_layers(tiny.chosen(0, 1), "all linear"))


def test_checkpointing_gives_the_same_gradients_to_the_last_bit(tiny, patcher):
    for counts in ((0, 0), (1, 2)):
        spans = tiny.chosen(*counts)
        dit = tiny.hosted(patcher)
        plain, other = (
            tiny.run(
                patcher, spans, adapters=tiny.lora(dit, spans, zero=False), batch_size=2, checkpointing=checkpointing
            )
            for checkpointing in (False, True)
        )
        assert plain[0].losses == other[0].losses
        assert plain[1].keys() == other[1].keys()
        assert all(torch.equal(other[1][key], gradient) for key, gradient in plain[1].items())


@pytest.mark.parametrize(("tail", "checkpointing"), [(0, True), (1, False)], ids=["checkpointed", "kept"])
def test_an_exact_back_gives_the_gradients_of_the_whole_model(tiny, patcher, checkpointing, tail):
    """Both runs have the LoRA on the middle blocks; one replays the front and freezes the back, one skips nothing."""
    exact = tiny.chosen(1 - tail, 1, tail).with_exact_back()
    dit, clean = tiny.hosted(patcher), tiny.clean_latents()
    got = {}
    for spans, kind in ((exact, "exact"), (tiny.chosen(0, 0), "whole")):
        adapters = tiny.lora(dit, exact, zero=False)
        source = MemorySource(dit, spans, PLAN, clean, [0, 1])
        result, gradients = train(
            dit, spans, source, adapters, plan=PLAN, clean=clean, batch_size=2, checkpointing=checkpointing
        )
        got[kind] = (result.losses, gradients)
    assert got["exact"][0] == pytest.approx(got["whole"][0], rel=1e-6)
    assert got["exact"][1].keys() == got["whole"][1].keys()
    for name, gradient in got["whole"][1].items():
        difference = (got["exact"][1][name] - gradient).norm() / gradient.norm().clamp_min(1e-12)
        assert difference.item() < 1e-5, name


def test_the_folded_form_gives_the_gradients_of_the_cached_one_while_the_lora_is_zero(tiny, patcher):
    for counts in ((1, 2), (tiny.num_blocks - 1, 0)):
        spans = tiny.chosen(*counts)
        cached = tiny.run(patcher, spans, batch_size=2)
        folded = tiny.run(patcher, spans, batch_size=2, source=FoldedSource())
        assert folded[0].losses == pytest.approx(cached[0].losses, rel=1e-5)
        for key, gradient in cached[1].items():
            torch.testing.assert_close(folded[1][key], gradient, atol=1e-5, rtol=1e-4)


def test_training_learns_and_checks_itself(tiny, patcher):
    result, _, _ = tiny.run(patcher, tiny.chosen(1, 1), steps=10, batch_size=4, learning_rate=1e-2)
    assert result.losses[-1] < 0.95 * result.losses[0]
    assert result.self_check < 1e-5


# --- the text hidden ---------------------------------------------------------------------------------------------


def masked_forward(tiny, patcher, blocks, text_seed, **options):
    """The MODEL's clean estimate with the text hidden in some blocks; another seed gives other words."""
    from blockskip_pack.blockskip_core.hosts.families.registry import adapter_for

    wrapper = adapter_for(patcher).text_masking_wrapper(frozenset(blocks))
    clone = patcher.clone()
    clone.add_wrapper_with_key("apply_model", "test", wrapper)
    noisy, _, sigmas = noisy_batch(PLAN, tiny.clean_latents(), [0])
    entry = tiny.captions((5,), seed=text_seed)[0]
    settings = tiny.captions((5,), seed=1)[0][0][1]  # the same pooled vector
    arguments = tiny.extra(entry[0][0], [settings])
    import comfy.model_management

    comfy.model_management.load_models_gpu([clone])
    options["wrappers"] = clone.wrappers
    with torch.inference_mode():
        latents = noisy[:, :, None] if tiny.frames else noisy
        return clone.model.apply_model(latents, sigmas, transformer_options=options, **arguments).clone()


def test_masking_all_blocks_makes_the_output_independent_of_the_words(tiny, patcher):
    everywhere = range(tiny.num_blocks)
    first, second = (masked_forward(tiny, patcher, everywhere, seed) for seed in (1, 2))
    assert torch.equal(first, second)
    plain, other = (masked_forward(tiny, patcher, (), seed) for seed in (1, 2))
    assert not torch.allclose(plain, other, atol=1e-4)
    assert not torch.allclose(plain, first, atol=1e-4)


def test_masking_nothing_is_the_plain_model(tiny, patcher):
    dit = tiny.hosted(patcher)
    plain = tiny.full_forward(dit, tiny.clean_latents(), [0])
    masked = masked_forward(tiny, patcher, (), 1)
    assert torch.equal(masked[:, :, 0] if tiny.frames else masked, plain)


def test_masking_everywhere_is_a_masked_softmax_everywhere(tiny, patcher):
    """Compared with ComfyUI's own attention with a dense mask; where text has separate attention, with zeros."""
    from comfy.ldm.modules.attention import attention_pytorch

    def by_hand(_, q, k, v, heads, mask=None, *args, **kwargs):
        skip_reshape = kwargs.get("skip_reshape", False)
        axis = 2 if skip_reshape else 1
        if not tiny.num_text and k.shape[axis] == 5:  # the caption
            return torch.zeros_like(q)
        if q.shape[axis] == num_text + tiny.num_img:  # joint; refiners and image-only attention are shorter
            mask = torch.zeros(q.shape[axis], k.shape[axis])
            mask[num_text:, :num_text] = -torch.inf
        return attention_pytorch(q, k, v, heads, mask=mask, skip_reshape=skip_reshape)

    num_text = tiny.hosted(patcher).text_tokens(0)
    expected = masked_forward(tiny, patcher, (), 1, optimized_attention_override=by_hand)
    found = masked_forward(tiny, patcher, range(tiny.num_blocks), 1)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_masking_reaches_each_block_by_its_own_index(tiny, patcher):
    everywhere = set(range(tiny.num_blocks))
    for left_out in everywhere:
        first, second = (masked_forward(tiny, patcher, everywhere - {left_out}, seed) for seed in (1, 2))
        assert not torch.equal(first, second), left_out
    pictures = [masked_forward(tiny, patcher, {block}, 1) for block in everywhere]
    pictures.append(masked_forward(tiny, patcher, (), 1))
    for i, a in enumerate(pictures):
        assert not any(torch.equal(a, b) for b in pictures[:i])


def test_attention_and_block_replacements_of_other_nodes_stay_in_force_while_masking(tiny, patcher):
    def other_values(attention, q, k, v, *args, **kwargs):
        return attention(q, k, v.flip(-1), *args, **kwargs)

    def reversed_tokens(args, extra):
        out = extra["original_block"](args)
        return {**out, "img": out["img"].flip(-1)}

    everywhere = range(tiny.num_blocks)
    masked = masked_forward(tiny, patcher, everywhere, 1)
    overridden = masked_forward(tiny, patcher, everywhere, 1, optimized_attention_override=other_values)
    assert not torch.allclose(overridden, masked, atol=1e-5)
    if tiny.family == "lumina2":  # ComfyUI has no replacement hook there
        return
    replaced = {"dit": {("double_block", 1): reversed_tokens}}
    first, second = (masked_forward(tiny, patcher, everywhere, seed, patches_replace=replaced) for seed in (1, 2))
    assert torch.equal(first, second)
    assert not torch.allclose(first, masked, atol=1e-5)


def test_probe_pictures_are_sampled_in_the_hosts_own_shape(tiny, patcher):
    from blockskip_pack.blockskip_core.hosts.sampling.probe_pictures import MaskedSampler, ProbeConfig

    sampler = MaskedSampler(patcher, ProbeConfig(size=64, steps=2))
    entry = tiny.captions((5,))[0]
    cells = 64 // patcher.model.latent_format.spacial_downscale_ratio
    plain, masked = (sampler.sample(entry, entry, seed=3, masked=frozenset(blocks)) for blocks in ((), (0, 1)))
    assert plain.shape == (1, tiny.latent_shape[0], *((1,) if tiny.frames else ()), cells, cells)
    assert not torch.allclose(plain, masked, atol=1e-4)


# --- weights, files, pictures ------------------------------------------------------------------------------------


@pytest.fixture
def watched(comfyui, monkeypatch, tiny):
    """The blocks with weights in the loaded model, recorded at every load of a clone with stand-ins."""
    from blockskip_pack.blockskip_core.hosts.models.hosted_dit import HostedDit

    loads: list[set[str]] = []
    running = HostedDit.running

    @contextmanager
    def watching(self, replacements, **options):
        with running(self, replacements, **options) as denoise:
            names = [name for name, _ in self.patcher.model.diffusion_model.named_parameters()]
            loads.append({".".join(name.split(".")[:2]) for name in names} & set(tiny.blocks))
            yield denoise

    monkeypatch.setattr(HostedDit, "running", watching)
    return loads


def test_no_parameter_of_a_skipped_block_is_loaded(watched, tiny, patcher):
    dit = tiny.hosted(patcher)
    precompute_residuals(dit, PLAN, tiny.clean_latents(), tiny.chosen(1, 2), range(2))
    assert watched == [{name} for name in tiny.blocks]
    last = tiny.num_blocks - 1
    for counts in ((0, 0), (1, 2), (last, 0), (0, last)):
        spans = tiny.chosen(*counts)
        tiny.run(patcher, spans)
        assert watched[-1] == {tiny.blocks[index] for index in spans.kept}


def test_an_interrupted_run_leaves_the_model_as_it_was(tiny, patcher):
    import comfy.model_management

    def on_step(report):
        raise comfy.model_management.InterruptProcessingException

    for source in (None, FoldedSource()):
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            tiny.run(patcher, tiny.chosen(1, 1), steps=2, source=source, on_step=on_step)
    assert comfy.model_management.in_training is False


@pytest.fixture(scope="module")
def trained(tiny, patcher):
    """A LoRA that is not zero, as (adapters, the model's output with it, the output without it)."""
    dit, clean, spans = tiny.hosted(patcher), tiny.clean_latents(), tiny.chosen(1, 0)
    adapters = tiny.lora(dit, spans, zero=False)
    residuals = precomputed(dit, spans, clean, [0]).residuals
    return adapters, replayed(dit, spans, residuals, clean, [0], adapters), tiny.full_forward(dit, clean, [0])


@pytest.mark.parametrize("form", ["peft", "kohya", "host"])
def test_a_saved_lora_loads_through_the_hosts_loader_and_acts_as_in_training(tiny, patcher, trained, tmp_path, form):
    import comfy.sd
    import comfy.utils
    from blockskip_pack.blockskip_core.hosts.files.applied_lora import apply_lora
    from blockskip_pack.blockskip_core.hosts.files.lora_files import save_lora

    (adapters, expected, plain), clean = trained, tiny.clean_latents()
    state = adapters.state_dict()
    tensors = to_host_lora(state, adapters.scale) if form == "host" else to_file_tensors(state, adapters.scale, form)
    save_lora(tensors, {"steps": 3}, tmp_path / "toy.safetensors")

    lora = comfy.utils.load_torch_file(str(tmp_path / "toy.safetensors"))
    loaded, _ = comfy.sd.load_lora_for_models(patcher, None, lora, 1.0, 0.0)
    got = tiny.full_forward(tiny.hosted(loaded), clean, [0])
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0.0)
    ours, count, _ = apply_lora(patcher, lora, 1.0)
    assert count == len(adapters.names)
    assert torch.equal(tiny.full_forward(tiny.hosted(ours), clean, [0]), got)
    assert not torch.allclose(got, plain, atol=1e-3)


def test_crops_become_latents_without_an_axis_of_frames_in_the_models_scale(tiny, patcher):
    from blockskip_pack.blockskip_core.hosts.inputs.encoding import crop_multiple, encode_crops
    from blockskip_pack.blockskip_core.hosts.models.hosted_dit import HostedDit

    model = patcher.model
    ratio, channels = model.latent_format.spacial_downscale_ratio, tiny.latent_shape[0]
    vae = Vae(ratio, channels, frames=tiny.frames)
    crops = [torch.rand(64, 96, 3) for _ in range(2)]
    latents = encode_crops(vae, model, crops)
    assert latents.shape == (2, channels, 64 // ratio, 96 // ratio)
    expected = model.process_latent_in(torch.cat([vae.encode(crop[None]) for crop in crops]))
    torch.testing.assert_close(latents, expected[:, :, 0] if tiny.frames else expected, atol=1e-6, rtol=0.0)
    assert crop_multiple(vae, HostedDit(patcher).adapter.patch_size) == (32 if tiny.name == "wan22" else 16)
    with pytest.raises(InvalidInputError, match="this VAE makes latents of shape"):
        encode_crops(Vae(ratio, channels, frames=not tiny.frames), model, crops)


class Vae:
    """Averages squares of pixels, with the requested number of channels."""

    def __init__(self, ratio: int, channels: int, *, frames: bool) -> None:
        self._ratio, self._channels, self._frames = ratio, channels, frames

    def encode(self, pixels):
        cells = torch.nn.functional.avg_pool2d(pixels.movedim(-1, 1), self._ratio)
        cells = cells[:, torch.arange(self._channels) % 3]
        return cells[:, :, None] if self._frames else cells

    def spacial_compression_encode(self):
        return self._ratio
