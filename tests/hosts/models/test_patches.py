"""Changes of other nodes and packs to a MODEL, made as they make them; for ComfyUI's nodes see test_host_nodes.py."""

from __future__ import annotations

import logging
import re
from itertools import cycle
from types import MethodType

import pytest
import torch
from blockskip_pack.blockskip_core.blocks.weight_sharing import weight_sharing_copy
from blockskip_pack.blockskip_core.errors import UnsupportedModelError
from torch import nn

from ...compatibility.recorded import assert_recorded
from ..hosted_runs import chosen, hosted, run
from ..packed_linear import pack_blocks
from ..tiny_flux import assert_same_weights, tiny_flux, weights

pytestmark = pytest.mark.usefixtures("comfyui")


def for_training(patcher):
    from blockskip_pack.blockskip_core.hosts.models.patches import for_training

    return for_training(patcher)


def in_stages(patcher) -> str:
    """Return how region-adaptive sampling treats a MODEL's changes."""
    from blockskip_pack.blockskip_core.hosts.models.patches import require_sampled_in_stages

    try:
        require_sampled_in_stages(patcher)
    except UnsupportedModelError as error:
        sentence = r"Region-adaptive sampling cannot follow [^.]+ on the MODEL, got [^.]+\. .+"
        return "refused" if re.fullmatch(sentence, str(error)) else str(error)
    return "followed"


def record(put, *outcomes):
    assert_recorded("model_patches.json", ("On the MODEL", "Training", "RALU Sampler"), [put.__doc__, *outcomes])


def compiled(module):
    return torch.compile(module, backend="eager")


def other_function(*args, **kwargs):
    raise AssertionError("it is left out")


def blocks_compiled_as_patches(patcher):
    """blocks compiled one by one, as object patches"""
    for path in ("double_blocks.0", "double_blocks.1", "single_blocks.2"):
        name = f"diffusion_model.{path}"
        patcher.add_object_patch(name, compiled(patcher.get_model_object(name)))


def whole_model_compiled_as_a_patch(patcher):
    """the whole model compiled, as an object patch"""
    patcher.add_object_patch("diffusion_model", compiled(patcher.model.diffusion_model))


def blocks_compiled_for_a_call(patcher):
    """blocks compiled one by one with ComfyUI's `set_torch_compile_wrapper`"""
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    set_torch_compile_wrapper(patcher, "eager", keys=[f"diffusion_model.single_blocks.{i}" for i in range(4)])


def attention_replaced(patcher):
    """another `forward` in one of its blocks, as set by packs with guidance inside attention"""
    block = patcher.model.diffusion_model.single_blocks[1]
    patcher.add_object_patch("diffusion_model.single_blocks.1.forward", MethodType(other_function, block))


def forward_replaced(patcher):
    """another `forward_orig` of the whole model"""
    patcher.add_object_patch("diffusion_model.forward_orig", MethodType(other_function, patcher.model.diffusion_model))


def block_replaced(patcher):
    """a function that replaces a block (`patches_replace`)"""
    patcher.set_model_patch_replace(other_function, "dit", "double_block", 0)


def block_patched(patcher):
    """a function after a block (`patches`)"""
    patcher.set_model_double_block_patch(other_function)


def call_wrapped(patcher):
    """a function around each call (`model_function_wrapper`), as some caches use"""
    patcher.set_model_unet_function_wrapper(other_function)


def model_wrapped(patcher):
    """a wrapper around the diffusion model, as other caches use"""
    import comfy.patcher_extension

    patcher.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, "a_cache", other_function)


def model_wrapped_in_the_options(patcher):
    """a wrapper in `transformer_options`"""
    import comfy.patcher_extension

    options = patcher.model_options["transformer_options"]
    comfy.patcher_extension.add_wrapper(comfy.patcher_extension.WrappersMP.APPLY_MODEL, other_function, options)


def attention_overridden(patcher):
    """another attention (`optimized_attention_override`)"""
    patcher.model_options["transformer_options"]["optimized_attention_override"] = other_function


def on_several_gpus(patcher):
    """copies for several GPUs"""
    patcher.set_additional_models("multigpu", [tiny_flux()])


LEFT_OUT = {
    blocks_compiled_as_patches: "torch.compile",
    whole_model_compiled_as_a_patch: "torch.compile",
    blocks_compiled_for_a_call: "torch.compile",
    attention_replaced: "diffusion_model.single_blocks.1.forward",
    forward_replaced: "diffusion_model.forward_orig",
    block_replaced: "other_function",
    block_patched: "other_function",
    call_wrapped: "other_function",
    model_wrapped: "a_cache",
    model_wrapped_in_the_options: "other_function",
    attention_overridden: "optimized_attention_override",
    on_several_gpus: "several GPUs",
}


@pytest.fixture(scope="module")
def plain_gradients(comfyui):
    """Of a model that nothing was put on."""
    return run(tiny_flux(), chosen(2, 1), steps=1)[1]


@pytest.mark.parametrize(
    ("put", "name", "loaded"),
    [
        pytest.param(put, name, loaded, id=f"{put.__name__}-{'loaded' if loaded else 'unloaded'}")
        for (put, name), loaded in zip(LEFT_OUT.items(), cycle((False, True)), strict=False)
    ],
)
def test_what_belongs_to_sampling_is_left_out_and_named_in_one_line(put, name, loaded, plain_gradients, caplog):
    import comfy.model_management
    from blockskip_pack.blockskip_core.hosts.models.identity import model_identity

    patcher = tiny_flux()
    before, plain = weights(patcher), model_identity(patcher)
    changed = patcher.clone()
    put(changed)
    if loaded:  # as after sampling a picture with it
        comfy.model_management.load_models_gpu([changed])
    patches, caplog.records[:] = dict(changed.object_patches), []
    with caplog.at_level(logging.WARNING):
        cleaned = for_training(changed)
        _, gradients, _ = run(cleaned, chosen(2, 1), steps=1)
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [f"BlockSkip: left out of training, because it belongs to sampling: {name}"]
    for layer, gradient in plain_gradients.items():
        assert torch.equal(gradients[layer], gradient)
    assert model_identity(cleaned) == plain
    assert (changed.object_patches, cleaned.object_patches) == (patches, {})
    comfy.model_management.unload_all_models()
    assert_same_weights(patcher, before)
    record(put, "left out", in_stages(changed))


def test_a_model_without_anything_is_the_same_object_and_nothing_is_said(caplog):
    patcher = tiny_flux()
    patcher.add_patches({"diffusion_model.img_in.weight": ("diff", (torch.ones(64, 16),))})
    patcher.set_model_rope_options(2.0, 0.0, 1.0, 0.0, 1.0, 0.0)
    assert for_training(patcher) is patcher
    assert not caplog.records


def test_what_is_followed_stays_when_something_is_left_out():
    patcher = tiny_flux()
    patcher.set_model_rope_options(2.0, 0.0, 1.0, 0.0, 1.0, 0.0)
    patcher.add_patches({"diffusion_model.img_in.weight": ("diff", (torch.ones(64, 16),))})
    theirs = nn.Linear(4, 4)
    patcher.add_object_patch("diffusion_model.time_in.in_layer", theirs)
    patcher.set_model_compute_dtype(torch.bfloat16)
    model_wrapped(patcher)
    cleaned = for_training(patcher)
    assert cleaned is not patcher
    assert cleaned.model_options == {
        "transformer_options": {"rope_options": patcher.model_options["transformer_options"]["rope_options"]}
    }
    assert cleaned.patches.keys() == {"diffusion_model.img_in.weight"}
    assert cleaned.object_patches == patcher.object_patches
    assert hosted(cleaned).dtype == torch.bfloat16
    assert patcher.wrappers


class Hint:
    """A patch that contains a model, like ComfyUI's ControlNets."""

    def models(self):
        return []

    def __call__(self, args):
        raise AssertionError("it is refused")


def another_block(patcher):
    """another module instead of a block"""
    patcher.add_object_patch("diffusion_model.double_blocks.1", nn.Identity())


def another_layer(patcher):
    """another layer in a block"""
    patcher.add_object_patch("diffusion_model.single_blocks.1.linear1", nn.Linear(64, 320))


def another_weight(patcher):
    """another weight in a block"""
    patcher.add_object_patch("diffusion_model.single_blocks.1.linear1.weight", nn.Parameter(torch.zeros(320, 64)))


def another_list(patcher):
    """another list of blocks"""
    patcher.add_object_patch("diffusion_model.double_blocks", nn.ModuleList())


def another_model(patcher):
    """another model instead of the whole one"""
    patcher.add_object_patch("diffusion_model", nn.Identity())


def compiled_for_good(patcher):
    """a block replaced by its compiled version in the model itself, not on the MODEL"""
    patcher.model.diffusion_model.single_blocks[1] = compiled(patcher.model.diffusion_model.single_blocks[1])


def hint_in_the_blocks(patcher):
    """a function after a block, with its own model"""
    patcher.set_model_double_block_patch(Hint())


def hint_in_a_block_s_place(patcher):
    """a function that replaces a block, with its own model"""
    patcher.set_model_patch_replace(Hint(), "dit", "single_block", 1)


def hint_around_the_model(patcher):
    """a function around each call, with its own model"""
    patcher.set_model_unet_function_wrapper(Hint())


def another_prediction(patcher):
    """another kind of prediction than flow matching"""
    import comfy.model_sampling

    class Sampling(comfy.model_sampling.ModelSamplingDiscrete, comfy.model_sampling.V_PREDICTION):
        pass

    patcher.add_object_patch("model_sampling", Sampling())


def other_latents(patcher):
    """another latent format"""
    import comfy.latent_formats

    patcher.add_object_patch("latent_format", comfy.latent_formats.SDXL())


def hooks(patcher):
    """weight hooks"""
    patcher.hook_patches = {"a hook": {}}


REFUSED = {
    another_block: ("other modules instead of its blocks", "diffusion_model.double_blocks.1", False),
    another_layer: ("other modules instead of its blocks", "diffusion_model.single_blocks.1.linear1", False),
    another_weight: ("other modules instead of its blocks", "diffusion_model.single_blocks.1.linear1.weight", False),
    another_list: ("other modules instead of its blocks", "diffusion_model.double_blocks", False),
    another_model: ("other modules instead of its blocks", "diffusion_model", False),
    compiled_for_good: (
        "other modules instead of its blocks", r"diffusion_model.single_blocks.1 \(compiled in place\)", False,
    ),
    hint_in_the_blocks: ("a ControlNet or another model in its blocks", "Hint", True),
    hint_in_a_block_s_place: ("a ControlNet or another model in its blocks", "Hint", True),
    hint_around_the_model: ("a ControlNet or another model in its blocks", "Hint", True),
    another_prediction: (
        "another kind of prediction than flow matching", "ModelSamplingDiscrete, V_PREDICTION", True,
    ),
    other_latents: ("another latent format", "SDXL", True),
    hooks: ("a LoRA in bypass mode or weight hooks", "weight hooks", False),
}  # fmt: skip
"""Change -> its title, the name in the message, whether region-adaptive sampling refuses it too."""


@pytest.mark.parametrize(("put", "said"), REFUSED.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_what_cannot_be_followed_is_refused_in_a_sentence(put, said):
    title, names, both = said
    patcher = tiny_flux()
    put(patcher)
    with pytest.raises(UnsupportedModelError, match=f"^Training cannot follow {title} on the MODEL, got {names}\\. "):
        for_training(patcher)
    assert in_stages(patcher) == ("refused" if both else "followed")
    record(put, "refused", in_stages(patcher))


def test_a_block_that_compiles_itself_is_trained_as_it_is():
    _, expected, _ = run(tiny_flux(), chosen(2, 1), steps=1)
    patcher = tiny_flux()
    for block in patcher.model.diffusion_model.single_blocks:
        block.compile(backend="eager")
    _, gradients, _ = run(patcher, chosen(2, 1), steps=1)
    for layer, gradient in expected.items():
        assert torch.equal(gradients[layer], gradient)


def packed_layers(patcher):
    """another pack's packed layers that unpack their weights themselves, as for GGUF files"""
    pack_blocks(patcher.model.diffusion_model)


def test_packed_layers_are_followed():
    patcher = tiny_flux(mlp_ratio=4.0)
    packed_layers(patcher)
    assert for_training(patcher) is patcher
    result, gradients, _ = run(patcher, chosen(2, 1), steps=1)
    assert all(bool(gradient.isfinite().all()) for gradient in gradients.values())
    assert any(bool(gradient.any()) for gradient in gradients.values())
    record(packed_layers, "followed", in_stages(patcher))


def weight_wrapper(patcher):
    """a function that wraps a weight (`add_weight_wrapper`)"""


def test_a_weight_wrapper_is_followed():
    def half(weight):
        return weight * 0.5

    key = "diffusion_model.single_blocks.1.linear1.weight"
    wrapped, halved = tiny_flux(), tiny_flux()
    wrapped.add_weight_wrapper(key, half)
    shape = halved.model.get_submodule(key.removesuffix(".weight")).weight.shape
    halved.add_patches({key: ("diff", (torch.zeros(shape),))}, 1.0, 0.5)
    _, expected, _ = run(halved, chosen(2, 1), steps=1)
    _, gradients, _ = run(wrapped, chosen(2, 1), steps=1)
    for layer, gradient in expected.items():
        torch.testing.assert_close(gradients[layer], gradient)
    record(weight_wrapper, "followed", in_stages(wrapped))


def test_calls_have_the_options_of_the_host_s_samplers():
    seen = []

    class Watching(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, *args, **kwargs):
            seen.append(kwargs["transformer_options"])
            return self.layer(*args, **kwargs)

    patcher = tiny_flux()
    dit = hosted(patcher)
    block = Watching(weight_sharing_copy(dit.module("double_blocks.0")))
    sigmas = torch.tensor([0.7, 0.2], device=dit.device)
    noisy = torch.randn(2, 4, 8, 8).to(dit.device)
    with torch.no_grad(), dit.running({"double_blocks.0": block}) as denoise:
        denoise(noisy, sigmas, [1, 1])
        denoise(noisy, sigmas, [0, 1])
    one, two = seen
    assert torch.equal(one["sigmas"], sigmas)
    assert torch.equal(one["sample_sigmas"], sigmas)
    assert (one["cond_or_uncond"], two["cond_or_uncond"]) == ([0], [0, 0])
    assert one["uuids"] == two["uuids"][1:]
    assert len({*two["uuids"]}) == 2


@pytest.mark.parametrize("change", ["multiplier", "noise levels", "dtype"])
def test_numbers_of_what_is_followed_are_part_of_the_identity(change):
    """Otherwise, stored residuals would be used for another model."""
    import comfy.model_sampling
    from blockskip_pack.blockskip_core.hosts.models.identity import model_identity

    class Sampling(comfy.model_sampling.ModelSamplingDiscreteFlow, comfy.model_sampling.CONST):
        pass

    one, other = tiny_flux(), tiny_flux()
    if change == "dtype":
        one.set_model_compute_dtype(torch.float16)
        other.set_model_compute_dtype(torch.bfloat16)
    else:
        for patcher, multiplier, shift in ((one, 1.0, 3.0), (other, 1000.0 if change == "multiplier" else 1.0, 3.0)):
            sampling = Sampling()
            sampling.set_parameters(
                shift=shift + (patcher is other and change == "noise levels"), multiplier=multiplier
            )
            patcher.add_object_patch("model_sampling", sampling)
    assert model_identity(one) != model_identity(other)
    assert model_identity(one) == model_identity(one.clone())


def test_memory_is_counted_in_the_compute_dtype_of_another_node():
    from blockskip_pack.blockskip_core.hosts.models.weightless_dit import WeightlessDit

    patcher = tiny_flux()
    patcher.set_model_compute_dtype(torch.bfloat16)
    twin = WeightlessDit.of(hosted(patcher))
    assert twin.dtype == torch.bfloat16
    with torch.no_grad(), twin.running({}) as denoise:
        answer = denoise(torch.empty(1, 4, 8, 8, device="meta"), torch.empty(1, device="meta"), [0])
    assert answer.shape == (1, 4, 8, 8)
    assert hosted(tiny_flux()).dtype == torch.float32
