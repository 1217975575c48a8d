"""FLUX.1 of ComfyUI's own classes: run with replaced blocks, trained, and left unchanged."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from blockskip_pack.blockskip_core.blocks.skipping_model import SkippingModel
from blockskip_pack.blockskip_core.data.flow_matching import noisy_batch, velocity_loss
from blockskip_pack.blockskip_core.errors import TrainingError, UnsupportedModelError
from blockskip_pack.blockskip_core.residuals.precompute import precompute_residuals
from blockskip_pack.blockskip_core.residuals.sources import FoldedSource
from torch import nn

from ...core.plain_dit import MemorySource, train
from ..hosted_runs import (
    LATENT_SHAPE,
    PLAN,
    captions,
    chosen,
    clean_latents,
    flux_lora,
    full_forward,
    host_sample,
    hosted,
    plain_forward,
    replayed,
    run,
)
from ..tiny_families import FAMILIES
from ..tiny_flux import assert_same_weights, tiny_flux, weights

pytestmark = pytest.mark.usefixtures("comfyui")

SPANS = [(0, 0), (1, 0), (0, 1), (1, 2), (2, 3), (3, 1), (5, 0), (0, 5)]  # (front, back)


@pytest.fixture(scope="module")
def model(comfyui):
    return tiny_flux()


# --- the numbers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("front", "back"), SPANS)
def test_front_middle_and_back_together_are_the_full_model(model, front, back):
    dit, clean = hosted(model), clean_latents()
    computed = precompute_residuals(dit, PLAN, clean, chosen(front, back), range(4))
    for draw in range(4):
        full = full_forward(dit, clean, [draw])
        skipping = replayed(dit, chosen(front, back), computed.residuals, clean, [draw])
        if back:
            torch.testing.assert_close(skipping, full, atol=1e-5, rtol=0.0)
        else:
            assert torch.equal(skipping, full)  # no rounding: bit for bit
        if draw == computed.reference.draw:
            assert torch.equal(computed.reference.denoised, full)  # streamed block by block


@pytest.mark.parametrize("spans", [(2, 3), (3, 0)])
def test_bf16_models_agree_within_their_rounding(comfyui, spans):
    dit, clean = hosted(tiny_flux(dtype=torch.bfloat16)), clean_latents()
    residuals = precompute_residuals(dit, PLAN, clean, chosen(*spans), range(4)).residuals
    assert all(x.dtype == torch.bfloat16 for x in residuals[0].tensors().values())
    for draw in range(4):
        full = full_forward(dit, clean, [draw])
        removed = noisy_batch(PLAN, clean, [draw])[0] - full
        difference = replayed(dit, chosen(*spans), residuals, clean, [draw]) - full
        assert difference.norm() / removed.norm() <= (2e-2 if spans[1] else 0.0)


@pytest.mark.parametrize(
    ("dtype", "spans"), [(torch.float32, (1, 2)), (torch.bfloat16, (3, 0)), (torch.bfloat16, (0, 4))], ids=str
)
def test_blocks_that_are_loaded_together_leave_the_same_residuals_to_the_last_bit(comfyui, dtype, spans):
    dit, clean, spans = hosted(tiny_flux(dtype=dtype)), clean_latents(), chosen(*spans)
    one = precompute_residuals(dit, PLAN, clean, spans, range(4))
    for room in (dit.blocks[0].num_bytes * 2, dit.room_for_blocks):
        more = precompute_residuals(dit, PLAN, clean, spans, range(4), room=room)
        assert torch.equal(more.reference.denoised, one.reference.denoised)
        for draw, residual in one.residuals.items():
            assert all(torch.equal(more.residuals[draw].tensors()[n], x) for n, x in residual.tensors().items())


def test_all_blocks_go_together_on_a_processor_and_a_quarter_of_what_is_free_on_a_gpu(model, monkeypatch):
    import comfy.model_management

    dit = hosted(model)
    assert dit.room_for_blocks == sum(dit.block_bytes)
    monkeypatch.setattr(model, "load_device", torch.device("cuda"))
    monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda device, **rest: 4000)
    assert dit.room_for_blocks == 1000


def test_guidance_is_passed_to_models_that_are_distilled(comfyui):
    patcher, clean = tiny_flux(guidance=True), clean_latents()
    outputs = []
    for guidance in (1.0, 9.0):
        dit = hosted(patcher, guidance=guidance)
        residuals = precompute_residuals(dit, PLAN, clean, chosen(1, 2), [0]).residuals
        outputs.append(replayed(dit, chosen(1, 2), residuals, clean, [0]))
        torch.testing.assert_close(outputs[-1], full_forward(dit, clean, [0]), atol=1e-5, rtol=0.0)
    assert not torch.allclose(outputs[0], outputs[1], atol=1e-3)


def test_text_lengths_are_those_the_model_is_given(model):
    dit = hosted(model, (5, 3, 8))
    assert [dit.text_length(caption) for caption in range(3)] == [5, 3, 8]


def test_blocks_are_listed_in_the_order_in_which_they_run(model):
    dit, order = hosted(model), []
    names = [block.name for block in dit.blocks]
    hooks = [dit.module(name).register_forward_pre_hook(lambda *_, name=name: order.append(name)) for name in names]
    full_forward(dit, clean_latents(), [0])
    for hook in hooks:
        hook.remove()
    assert order == names == [f"double_blocks.{i}" for i in range(2)] + [f"single_blocks.{i}" for i in range(4)]
    for block, size in zip(dit.blocks, dit.block_bytes, strict=True):
        assert block.num_parameters * 4 == size == sum(p.nbytes for p in dit.module(block.name).parameters())


# --- gradients ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spans", [(1, 2), (0, 5), (5, 0)])
def test_gradients_are_those_of_finite_differences(comfyui, spans):
    """In float64, along one random direction per tensor of the LoRA; ComfyUI rounds its output to float32."""
    dit, clean, spans = hosted(tiny_flux(dtype=torch.float64)), clean_latents(dtype=torch.float64), chosen(*spans)
    source = MemorySource(dit, spans, PLAN, clean, [0, 1])
    adapters = flux_lora(dit, spans, zero=False, dtype=torch.float64)
    before = [p.detach().clone() for p in adapters.parameters()]
    _, gradients = train(dit, spans, source, adapters, plan=PLAN, clean=clean, batch_size=2, learning_rate=1e-12)
    generator = torch.Generator().manual_seed(1)
    stand_ins = SkippingModel(dit, spans, checkpointed=False, folded=False)

    with torch.no_grad(), dit.running(stand_ins.modules) as denoise:
        with adapters.attached(stand_ins.linears(), dit.weight_for_backward):

            def loss():
                total = 0.0
                for draw in (0, 1):
                    noisy, target, sigmas = noisy_batch(PLAN, clean, [draw])
                    stand_ins.replay(source.computed.residuals.__getitem__, [draw], None)
                    total += velocity_loss(denoise(noisy, sigmas, [PLAN[draw].caption]), target, sigmas).item() / 2
                return total

            for parameter, value in zip(adapters.parameters(), before, strict=True):
                parameter.data.copy_(value)
            keys = [f"{name}.{part}" for name in adapters.names for part in "AB"]
            for key, parameter, value in zip(keys, adapters.parameters(), before, strict=True):
                direction = torch.randn(value.shape, generator=generator, dtype=value.dtype)
                step, measured = 1e-2, 0.0
                for distance, weight in ((1, 8), (-1, -8), (2, -1), (-2, 1)):  # fourth-order error
                    parameter.data.copy_(value + distance * step * direction)
                    measured += weight * loss() / (12 * step)
                parameter.data.copy_(value)
                gradient = gradients.get(key, torch.zeros_like(value))
                scale = gradient.norm().item() * direction.norm().item()
                assert (gradient * direction).sum().item() == pytest.approx(measured, abs=1e-4 * scale + 1e-7), key


def test_the_lora_acts_as_if_it_were_merged_into_the_weights(comfyui):
    """Without a back span the skipping model with a LoRA equals the full model with the LoRA in the kept blocks."""
    dit, clean, spans = hosted(tiny_flux()), clean_latents(), chosen(1, 0)
    residuals = precompute_residuals(dit, PLAN, clean, spans, [0]).residuals
    adapters = flux_lora(dit, spans, zero=False)
    merged = tiny_flux()
    with torch.inference_mode():
        for name in adapters.names:
            delta = adapters.scale * adapters.up(name) @ adapters.down(name)
            merged.model.diffusion_model.get_submodule(name).weight.add_(delta)
    got = replayed(dit, spans, residuals, clean, [0], adapters)
    torch.testing.assert_close(got, full_forward(hosted(merged), clean, [0]), atol=1e-5, rtol=0.0)
    assert not torch.allclose(got, full_forward(dit, clean, [0]), atol=1e-3)


@pytest.mark.parametrize("spans", [(0, 0), (1, 2)])
def test_checkpointing_and_the_folded_form_give_the_same_gradients(model, spans):
    spans = chosen(*spans)
    plain = run(model, spans, batch_size=2, checkpointing=False)
    for other in (run(model, spans, batch_size=2), run(model, spans, batch_size=2, source=FoldedSource())):
        assert other[0].losses == pytest.approx(plain[0].losses, rel=1e-5)
        for key, gradient in plain[1].items():
            torch.testing.assert_close(other[1][key], gradient, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("spans", [(0, 0), (1, 2)])
def test_weights_that_the_host_casts_for_every_call_give_the_gradients_of_the_cast_weights(comfyui, spans):
    stored = tiny_flux(dtype=torch.bfloat16, cast_to=torch.float32)
    assert stored.model.diffusion_model.img_in.weight.dtype == torch.bfloat16
    cast = tiny_flux()
    with torch.inference_mode():
        for parameter in cast.model.diffusion_model.parameters():
            parameter.copy_(parameter.bfloat16())
    before = weights(stored)
    result, gradients, _ = run(stored, chosen(*spans), batch_size=2)
    expected, expected_gradients, _ = run(cast, chosen(*spans), batch_size=2)
    assert result.losses == pytest.approx(expected.losses, rel=1e-5)
    for key, gradient in expected_gradients.items():
        torch.testing.assert_close(gradients[key], gradient, atol=1e-5, rtol=1e-4)
    assert_same_weights(stored, before)


def test_training_learns(model):
    result, _, _ = run(model, chosen(1, 2), steps=12, batch_size=4, learning_rate=1e-2)
    assert result.losses[-1] < 0.9 * result.losses[0]
    assert result.self_check < 1e-5


def test_a_model_built_under_inference_mode_trains_also_from_inference_mode(model):
    assert all(p.is_inference() for p in model.model.diffusion_model.parameters())
    expected = run(model, chosen(1, 2), steps=2)[0].losses
    with torch.inference_mode():
        dit = hosted(model)
        adapters = flux_lora(dit, chosen(1, 2))
    adapters = flux_lora(dit, chosen(1, 2))
    with torch.inference_mode():
        assert run(model, chosen(1, 2), steps=2, adapters=adapters)[0].losses == expected


def test_another_model_than_the_one_precomputed_is_noticed(model):
    clean, spans = clean_latents(), chosen(1, 2)
    source = MemorySource(hosted(tiny_flux(seed=3)), spans, PLAN, clean)
    with pytest.raises(TrainingError, match="differs from the full model"):
        run(model, spans, source=source)


# --- the user's model --------------------------------------------------------------------------------------------


def state(patcher):
    """Objects that must be the same afterwards."""
    modules = dict(patcher.model.named_modules())
    parameters = {name: (p, p.data_ptr()) for name, p in patcher.model.named_parameters()}
    others = (
        dict(patcher.object_patches), dict(patcher.object_patches_backup), patcher.patches_uuid, dict(patcher.patches),
        dict(patcher.backup), str(patcher.model_options), str(patcher.wrappers), patcher.size,
    )  # fmt: skip
    return modules, parameters, others


def assert_same_state(patcher, before):
    import comfy.model_management

    modules, parameters, others = state(patcher)
    assert modules.keys() == before[0].keys()
    assert all(modules[name] is before[0][name] for name in modules)
    assert all(parameters[n][0] is before[1][n][0] and parameters[n][1] == before[1][n][1] for n in parameters)
    assert others == before[2]
    assert comfy.model_management.in_training is False
    assert all(p.grad is None for p in patcher.model.parameters())
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in modules.values())


@pytest.mark.parametrize("source", [None, FoldedSource()], ids=["cached", "folded"])
@pytest.mark.parametrize("problem", ["none", "exception", "interrupt"])
def test_the_users_model_is_left_as_it_was(comfyui, problem, source):
    import comfy.model_management

    patcher = tiny_flux()
    patcher.model_size()
    before, numbers = state(patcher), weights(patcher)
    kind = {"exception": RuntimeError, "interrupt": comfy.model_management.InterruptProcessingException}.get(problem)

    def on_step(report):
        assert comfy.model_management.in_training is True
        assert patcher.model.diffusion_model.double_blocks[1] is not before[0]["diffusion_model.double_blocks.1"]
        if kind and report.step == 2:
            raise kind

    with pytest.raises(kind) if kind else nullcontext():
        run(patcher, chosen(1, 2), steps=3, source=source, on_step=on_step)
    assert_same_state(patcher, before)
    assert_same_weights(patcher, numbers)


def test_the_users_model_is_left_as_it_was_when_precomputing_is_interrupted(comfyui):
    import comfy.model_management

    patcher = tiny_flux()
    patcher.model_size()
    before, numbers = state(patcher), weights(patcher)

    def interrupt(done, total):
        if done == 3:
            raise comfy.model_management.InterruptProcessingException

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        precompute_residuals(hosted(patcher), PLAN, clean_latents(), chosen(1, 2), range(4), progress=interrupt)
    assert_same_state(patcher, before)
    assert_same_weights(patcher, numbers)


def test_the_host_samples_the_same_picture_before_and_after(comfyui):
    patcher = tiny_flux()
    before = host_sample(patcher)
    run(patcher, chosen(1, 2), steps=2, learning_rate=1.0)
    assert torch.equal(host_sample(patcher), before)
    run(patcher, chosen(2, 0), steps=2, learning_rate=1.0, source=FoldedSource())
    assert torch.equal(host_sample(patcher.clone()), before)


def test_a_lora_that_the_user_has_applied_stays_in_force(comfyui):
    from blockskip_pack.blockskip_core.adapters.lora_formats import to_file_tensors
    from blockskip_pack.blockskip_core.hosts.files.applied_lora import apply_lora

    clean, spans = clean_latents(), chosen(1, 2)
    plain = tiny_flux()
    users = flux_lora(hosted(plain), chosen(0, 0), zero=False)
    patcher, count, _ = apply_lora(plain, to_file_tensors(users.state_dict(), users.scale, "peft"), 0.7)
    assert count == len(users.names)
    dit = hosted(patcher)
    numbers, picture, before = weights(patcher), host_sample(patcher), full_forward(dit, clean, [0])
    assert not torch.allclose(before, full_forward(hosted(plain), clean, [0]), atol=1e-3)

    residuals = precompute_residuals(dit, PLAN, clean, spans, range(4)).residuals
    torch.testing.assert_close(replayed(dit, spans, residuals, clean, [0]), before, atol=1e-5, rtol=0.0)
    result, gradients, _ = run(patcher, spans, steps=2, batch_size=2)
    assert result.self_check < 1e-5
    folded = run(patcher, spans, steps=2, batch_size=2, source=FoldedSource())[0]
    assert folded.losses[0] == pytest.approx(result.losses[0], rel=1e-4)

    from blockskip_pack.blockskip_core.hosts.models.residency import unload

    assert torch.equal(full_forward(dit, clean, [0]), before)
    assert torch.equal(host_sample(patcher), picture)
    unload(patcher)
    unload(plain)
    assert_same_weights(patcher, {name: plain.model.state_dict()[name] for name in numbers})
    assert_same_weights(plain, weights(tiny_flux()))


def test_a_training_does_not_see_another_clones_patches(comfyui):
    from blockskip_pack.blockskip_core.adapters.lora_formats import to_file_tensors
    from blockskip_pack.blockskip_core.hosts.files.applied_lora import apply_lora

    plain, clean = tiny_flux(), clean_latents()
    expected = run(plain, chosen(1, 2), steps=2)[0].losses
    users = flux_lora(hosted(plain), chosen(0, 0), zero=False)
    patched = apply_lora(plain, to_file_tensors(users.state_dict(), users.scale, "peft"), 0.7).model
    full_forward(hosted(patched), clean, [0])  # now its weights are merged into the shared model
    assert run(plain, chosen(1, 2), steps=2)[0].losses == expected


def test_unloading_a_model_leaves_others_loaded(comfyui):
    import comfy.model_management
    from blockskip_pack.blockskip_core.hosts.models.residency import unload

    other, patcher = tiny_flux(seed=9), tiny_flux()
    run(patcher, chosen(1, 2))
    comfy.model_management.load_models_gpu([patcher, other])
    unload(patcher)
    loaded = [entry.model for entry in comfy.model_management.current_loaded_models]
    assert other in loaded
    assert not any(entry is not None and entry.is_clone(patcher) for entry in loaded)


# --- models that are not supported -------------------------------------------------------------------------------


class SomeUnet(nn.Module):
    """A model of another kind."""


def test_a_model_of_another_kind_is_refused_by_name(comfyui):
    import comfy.ldm.chroma_radiance.model
    from blockskip_pack.blockskip_core.hosts.families.registry import adapter_for
    from blockskip_pack.blockskip_core.hosts.models.hosted_dit import HostedDit

    radiance = comfy.ldm.chroma_radiance.model.ChromaRadiance.__new__(comfy.ldm.chroma_radiance.model.ChromaRadiance)
    for kind, model in (("SomeUnet", SomeUnet()), ("ChromaRadiance", radiance)):
        patcher = SimpleNamespace(model=SimpleNamespace(diffusion_model=model), object_patches_backup={})
        with pytest.raises(UnsupportedModelError, match=rf"supported family \(.*FLUX\.1.*\), got {kind}\."):
            adapter_for(patcher)
        with pytest.raises(UnsupportedModelError):
            HostedDit(patcher)


@pytest.mark.parametrize(("name", "value"), [("yak_mlp", True), ("txt_norm", True), ("txt_ids_dims", [1, 2])])
def test_other_models_that_share_the_class_are_refused(comfyui, name, value):
    """Ovis and LongCat."""
    from blockskip_pack.blockskip_core.hosts.families.registry import adapter_for

    patcher = tiny_flux()
    setattr(patcher.model.diffusion_model.params, name, value)
    with pytest.raises(UnsupportedModelError, match="got Flux"):
        adapter_for(patcher)


@pytest.mark.parametrize(
    ("family", "attribute", "value"),
    [("wan21", "model_type", "i2v"), ("wan21", "in_dim", 36), ("wan21", "ref_conv", nn.Identity()),
     ("lumina2", "clip_text_pooled_proj", nn.Identity()), ("z_image", "siglip_embedder", nn.Identity())],
)  # fmt: skip
def test_variants_that_are_given_more_than_text_are_refused(comfyui, family, attribute, value):
    from blockskip_pack.blockskip_core.hosts.families.registry import adapter_for

    patcher = next(tiny for tiny in FAMILIES if tiny.name == family).build()
    adapter_for(patcher)
    setattr(patcher.model.diffusion_model, attribute, value)
    with pytest.raises(UnsupportedModelError, match="Expected a diffusion transformer of a supported family"):
        adapter_for(patcher)


@pytest.mark.parametrize(
    ("targets", "double", "single"),
    [
        ("attention and mlp", {"img_attn.qkv", "img_attn.proj", "img_mlp.0", "img_mlp.2", "txt_attn.qkv", "txt_attn.proj",
                               "txt_mlp.0", "txt_mlp.2"}, {"linear1", "linear2"}),
        ("attention", {"img_attn.qkv", "img_attn.proj", "txt_attn.qkv", "txt_attn.proj"}, {"linear1", "linear2"}),
        ("mlp", {"img_mlp.0", "img_mlp.2", "txt_mlp.0", "txt_mlp.2"}, {"linear1", "linear2"}),
        ("all linear", {"img_attn.qkv", "img_attn.proj", "img_mlp.0", "img_mlp.2", "img_mod.lin", "txt_attn.qkv",
                        "txt_attn.proj", "txt_mlp.0", "txt_mlp.2", "txt_mod.lin"}, {"linear1", "linear2", "modulation.lin"}),
    ],
)  # fmt: skip
def test_targets_are_the_layers_they_name(model, targets, double, single):
    names = hosted(model).lora_layers(chosen(1, 3), targets)
    assert set(names) == {f"double_blocks.1.{n}" for n in double} | {f"single_blocks.0.{n}" for n in single}


def test_a_kernel_without_a_backward_is_replaced(comfyui, monkeypatch):
    """ComfyUI may be started with a fast attention without backward; training must not use it."""
    import comfy.ldm.flux.math
    from comfy.ldm.modules.attention import attention_pytorch, wrap_attn

    @wrap_attn
    def attention_sage(*args, **kwargs):
        return attention_pytorch(*args, **kwargs).detach()

    spans = chosen(2, 1)
    _, expected, _ = run(tiny_flux(), spans, steps=1)
    monkeypatch.setattr(comfy.ldm.flux.math, "optimized_attention", attention_sage)
    _, gradients, _ = run(tiny_flux(), spans, steps=1)
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, atol=1e-6, rtol=1e-4)


def test_attention_of_another_node_is_not_used_while_training(comfyui):
    patcher = tiny_flux()
    patcher.model_options["transformer_options"]["optimized_attention_override"] = (
        lambda attention, q, *rest, **options: attention(q, *rest, **options).detach()
    )
    _, expected, _ = run(tiny_flux(), chosen(2, 1), steps=1)
    _, gradients, _ = run(patcher, chosen(2, 1), steps=1)
    for name, gradient in expected.items():
        assert torch.equal(gradients[name], gradient)


def test_a_model_with_weight_hooks_is_refused(comfyui):
    patcher = tiny_flux()
    patcher.set_injections("bypass_lora", [])
    with pytest.raises(UnsupportedModelError, match="bypass mode"):
        hosted(patcher)


def test_adapters_moved_under_inference_mode_can_be_trained(comfyui, monkeypatch):
    """On a GPU the LoRA is copied there while the node still runs in inference mode."""
    to = torch.Tensor.to
    patcher, spans = tiny_flux(), chosen(2, 1)
    adapters = flux_lora(hosted(patcher), spans)

    def copying(self, *args, **options):
        return (
            to(self, *args, **{**options, "copy": True})
            if args and isinstance(args[0], torch.device)
            else to(self, *args, **options)
        )

    monkeypatch.setattr(torch.Tensor, "to", copying)
    with torch.inference_mode():
        adapters.to(torch.device("cpu"))
    assert not any(parameter.is_inference() for parameter in adapters.parameters())


@pytest.mark.parametrize("change", ["patches_replace", "wrapper", "attention"])
def test_what_other_nodes_attach_changes_the_identity(comfyui, change):
    import comfy.patcher_extension
    from blockskip_pack.blockskip_core.hosts.models.identity import model_identity

    patcher = tiny_flux()
    changed = patcher.clone()
    if change == "patches_replace":
        changed.set_model_patch_replace(model_identity, "dit", "double_block", 0)
    elif change == "wrapper":
        changed.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, "x", model_identity)
    else:
        changed.model_options["transformer_options"]["optimized_attention_override"] = model_identity
    assert model_identity(changed) != model_identity(patcher)
    assert model_identity(patcher.clone()) == model_identity(patcher)


def test_a_layer_whose_forward_was_replaced_and_put_back_is_trained_as_any_other(comfyui):
    """As after sampling with a LoRA in bypass mode or with a node that replaces attention."""
    _, expected, _ = run(tiny_flux(), chosen(2, 1), steps=1)
    patcher = tiny_flux()
    for module in patcher.model.diffusion_model.modules():
        module.forward = module.forward
    patched = patcher.clone()
    key = "diffusion_model.single_blocks.1.linear1.weight"
    patched.add_patches({key: ("diff", (torch.ones(patched.model.get_submodule(key[:-7]).weight.shape),))})
    _, gradients, _ = run(patcher, chosen(2, 1), steps=1)
    for name, gradient in expected.items():
        assert torch.equal(gradients[name], gradient)
    noisy, sigmas = torch.randn(1, *LATENT_SHAPE), torch.tensor([0.5])
    with torch.no_grad(), hosted(patched).running({}) as denoise:
        torch.testing.assert_close(denoise(noisy, sigmas, [0]), plain_forward(patched, noisy, sigmas, captions()))
