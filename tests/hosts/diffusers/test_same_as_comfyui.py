"""One FLUX.1 in ComfyUI's layout and in diffusers': the same estimates, gradients and LoRA, and a file that both read.

ComfyUI keeps queries, keys and values in one layer, and in single blocks the MLP's entry too. A LoRA on such a layer has one
A for all its parts, so trainings on the layers that both have are compared, and of the others the gradients.
"""

from __future__ import annotations

import diffusers
import pytest
import torch
from blockskip_pack import blockskip_core as blockskip
from blockskip_pack.blockskip_core.adapters.lora import LinearShape, LoraAdapters, LoraSettings
from blockskip_pack.blockskip_core.hosts import diffusers as host
from blockskip_pack.blockskip_core.model import linear_names
from blockskip_pack.blockskip_core.residuals.precompute import precompute_residuals

from ...core.plain_dit import MemorySource, train
from ..tiny_families import FLUX, PLAN
from ..tiny_flux import captions, tiny_flux

pytestmark = pytest.mark.usefixtures("comfyui")

SIZES = {"depth": 2, "depth_single": 3, "width": 32, "heads": 2, "mlp_ratio": 4.0}
SAME_LAYERS = {
    "img_attn.proj": "attn.to_out.0", "img_mlp.0": "ff.net.0.proj", "img_mlp.2": "ff.net.2",
    "txt_attn.proj": "attn.to_add_out", "txt_mlp.0": "ff_context.net.0.proj", "txt_mlp.2": "ff_context.net.2",
    "linear2": "proj_out",
}  # fmt: skip
PARTS = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
}
LISTS = {"double_blocks": "transformer_blocks", "single_blocks": "single_transformer_blocks"}
SPANS = blockskip.BlockSelection(front=1, back=1, num_blocks=5, family="flux")
CLEAN = FLUX.clean_latents()


def converted(patcher):
    """The model in diffusers' layout, by ComfyUI's own table of names."""
    from comfy.utils import flux_to_diffusers

    table = flux_to_diffusers({"depth": 2, "depth_single_blocks": 3, "hidden_size": 32})
    model = diffusers.FluxTransformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=3, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=(8, 4, 4),
    ).eval()  # fmt: skip
    theirs = patcher.model.diffusion_model.state_dict()
    ours = {}
    for name, tensor in model.state_dict().items():
        target, part, *change = (table[name], None) if isinstance(table[name], str) else table[name]
        found = theirs[target].clone() if part is None else theirs[target].narrow(*part).clone()
        ours[name] = change[0](found) if change else found
        assert ours[name].shape == tensor.shape
    model.load_state_dict(ours)
    return model


@pytest.fixture(scope="module")
def pair(comfyui):
    """The same model in both hosts: ComfyUI's and diffusers'."""
    from blockskip_pack.blockskip_core.hosts.models.hosted_dit import HostedDit

    patcher, texts = tiny_flux(**SIZES), captions((5, 5, 3))
    given = [
        {"encoder_hidden_states": tokens.clone(), "pooled_projections": settings["pooled_output"].clone()}
        for [[tokens, settings]] in texts
    ]
    return HostedDit(patcher, texts, FLUX.latent_shape), host.DiffusersDit(converted(patcher), given)


def in_diffusers(name):
    """A layer's names in diffusers, one or several."""
    kind, index, layer = name.split(".", 2)
    parts = (SAME_LAYERS[layer],) if layer in SAME_LAYERS else PARTS[layer]
    return [f"{LISTS[kind]}.{index}.{part}" for part in parts]


def same_adapters(pair, layers, *, size=0.0):
    """Adapters of both with the same A, and B of this size; a layer's parts in diffusers share its A and divide its B."""
    ours, theirs = pair
    found = linear_names(ours, SPANS, lambda name: name.endswith(layers))
    shapes = {name: LinearShape(layer.in_features, layer.out_features) for name, layer in found.items()}
    first = LoraAdapters(shapes, LoraSettings(rank=2, alpha=3.0), seed=4)
    parts = {
        part: LinearShape(layer.in_features, layer.out_features)
        for name in shapes
        for part in in_diffusers(name)
        for layer in (theirs.module(part),)
    }
    second = LoraAdapters(parts, LoraSettings(rank=2, alpha=3.0), seed=4)
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for name in first.names:
            first.up(name).copy_(size * torch.randn(first.up(name).shape, generator=generator))
            rows = first.up(name).split([len(second.up(part)) for part in in_diffusers(name)])
            for part, up in zip(in_diffusers(name), rows, strict=True):
                second.down(part).copy_(first.down(name))
                second.up(part).copy_(up)
    return first, second


def both(pair, adapters, **settings):
    """Train both; return (result, gradients) of each."""
    return [
        train(dit, SPANS, MemorySource(dit, SPANS, PLAN, CLEAN), lora, plan=PLAN, clean=CLEAN, **settings)
        for dit, lora in zip(pair, adapters, strict=True)
    ]


def assert_close(ours, theirs, bound):
    assert (ours - theirs).norm() <= bound * theirs.norm()


def test_estimates_and_residuals_are_the_same(pair):
    """Up to float32's rounding: matrices are multiplied in parts of another size."""
    ours, theirs = (precompute_residuals(dit, PLAN, CLEAN, SPANS, range(4)) for dit in pair)
    assert_close(theirs.reference.denoised, ours.reference.denoised, 5e-6)
    for draw, residual in ours.residuals.items():
        for name, tensor in residual.tensors().items():
            assert_close(theirs.residuals[draw].tensors()[name], tensor, 5e-6)


def test_gradients_are_the_same_where_a_layer_is_divided_too(pair):
    """B's gradient is divided like B; A's is the sum over the parts, because A is the same for all of them."""
    layers = (*SAME_LAYERS, *PARTS)
    first, second = same_adapters(pair, layers, size=0.05)
    (_, ours), (_, theirs) = both(pair, (first, second), learning_rate=1e-12, max_grad_norm=0.0)
    assert len(first.names) == 8 + 2 * 2
    for name in first.names:
        parts = in_diffusers(name)
        assert_close(torch.cat([theirs[f"{part}.B"] for part in parts]), ours[f"{name}.B"], 1e-5)
        assert_close(sum(theirs[f"{part}.A"] for part in parts), ours[f"{name}.A"], 1e-5)


def test_a_training_gives_the_same_lora(pair):
    """Five steps of AdamW on the layers that both have, in float32; measured: 2.5e-6 apart, relative to the LoRA."""
    first, second = same_adapters(pair, tuple(SAME_LAYERS))
    (ours, _), (theirs, _) = both(pair, (first, second), steps=5, learning_rate=1e-3)
    assert theirs.losses == pytest.approx(ours.losses, rel=1e-5)
    for name in first.names:
        (part,) = in_diffusers(name)
        assert_close(second.down(part), first.down(name), 2e-5)
        assert_close(second.up(part), first.up(name), 2e-5)
        assert first.up(name).any()


def test_comfyuis_loader_reads_the_file_of_a_lora_trained_in_diffusers(pair, tmp_path):
    """The same estimate as in diffusers, with queries, keys and values joined by the loader."""
    import comfy.sd
    import comfy.utils
    from blockskip_pack.blockskip_core.hosts.models.hosted_dit import HostedDit

    ours, theirs = pair
    config = blockskip.TrainingConfig(steps=3, learning_rate=1e-2)
    examples, settings = blockskip.Examples(PLAN, CLEAN), blockskip.LoraSettings(rank=2, alpha=6.0)
    lora = blockskip.train(theirs, examples, SPANS, config, lora=settings, layers=theirs.lora_layers(SPANS))
    host.save_lora(lora, tmp_path / "lora.safetensors")
    noisy, sigmas = CLEAN[:1] + 0.5, torch.tensor([0.6])
    with blockskip.apply(theirs, lora) as denoise:
        expected = denoise(noisy, sigmas, [0])
    with torch.no_grad(), theirs.running({}) as denoise:
        plain = denoise(noisy, sigmas, [0])
    tensors = comfy.utils.load_torch_file(str(tmp_path / "lora.safetensors"))
    patcher, _ = comfy.sd.load_lora_for_models(tiny_flux(**SIZES), None, tensors, 1.0, 0.0)
    with torch.no_grad(), HostedDit(patcher, captions((5,)), FLUX.latent_shape).running({}) as denoise:
        loaded = denoise(noisy, sigmas, [0])
    assert (expected - plain).norm() > 1e-3 * plain.norm()
    assert (loaded - expected).norm() < 1e-3 * (expected - plain).norm()
    assert (len({name.rsplit(".lora_", 1)[0] for name in tensors}), len(patcher.patches)) == (22, 12)
