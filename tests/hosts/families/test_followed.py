"""Models whose layout is found by following a few calls, on tiny random models of ComfyUI's own classes."""

from __future__ import annotations

import pytest
import torch
from blockskip_pack.blockskip_core.adapters.lora_formats import to_file_tensors
from blockskip_pack.blockskip_core.data.flow_matching import noisy_batch, velocity_loss
from blockskip_pack.blockskip_core.errors import InvalidInputError, UnsupportedModelError
from blockskip_pack.blockskip_core.hosts.families.block_lists import block_lists
from torch import nn

from ...core.plain_dit import MemorySource, train
from ..followed_families import FOLLOWED, family
from ..sampled_families import built
from ..tiny_families import PLAN, TinyFamily, precomputed, replayed, selection
from ..tiny_flux import assert_same_weights, weights

NOT_COUNTED = {
    "anima": "its text adapter asks torch for the autocast of its device, which tensors without values do not have",
    "hidream": "its experts are chosen by the tokens' values, so it does not run without them",
    "ernie": "its attention is not given the options of a call, so on a CPU the host's own kernel runs, which needs values",
}
SLOWER = {"qwen_image21": 0.995}  # its gates are small in a random model
TEXT_APART = ("qwen_image21",)
OVERWRITING = ("ltxv", "ltx2", "ltx25", "qwen_image21")
pytestmark = pytest.mark.usefixtures("comfyui")


@pytest.fixture(params=FOLLOWED, ids=lambda family: family.name, scope="module")
def tiny(request) -> TinyFamily:
    return request.param


@pytest.fixture(scope="module")
def patcher(comfyui, tiny):
    return tiny.build()


@pytest.fixture(scope="module")
def dit(patcher, tiny):
    return tiny.hosted(patcher)


@pytest.fixture(scope="module")
def precise(comfyui, tiny):
    return tiny.hosted(tiny.build(dtype=torch.float32 if tiny.name in SINGLE else torch.float64))


SINGLE = ("anima", "ernie", "ltx2", "ltx25", "joyimage")  # ComfyUI's kernels that rotate their queries know no float64
PREPARED = ("anima", "ltx2", "ltx25")  # ComfyUI prepares their texts before sampling
OTHER_KERNEL = ("ltxv", "ltx2", "ltx25")  # ComfyUI rotates queries and keys by another kernel while they are trained


def whole(tiny, dit, clean):
    """The whole model's clean estimate: as ComfyUI samples, or as we run it where ComfyUI does something else."""
    if tiny.name not in (*PREPARED, *OTHER_KERNEL):
        return tiny.full_forward(dit, clean, [0])
    noisy, _, sigmas = noisy_batch(PLAN, clean, [0])
    with torch.no_grad(), dit.running({}) as denoise:
        ours = denoise(noisy, sigmas, [PLAN[0].caption])
    if tiny.name not in PREPARED:
        torch.testing.assert_close(ours, tiny.full_forward(dit, clean, [0]), atol=2e-6, rtol=0.0)
    return ours


def test_front_middle_and_back_together_are_the_whole_model(tiny, dit):
    clean, count = tiny.clean_latents(), len(dit.blocks)
    full = whole(tiny, dit, clean)
    for front, back, tail in ((1, 0, 0), (count - 1, 0, 0), (0, 1, 0), (1, count - 2, 0), (0, count - 1, 0), (1, 1, 1)):
        spans = selection(front, back, count, tail)
        streamed = {"room": 0} if tail else {}  # block by block
        computed = precomputed(dit, spans, clean, [0], **streamed)
        skipping = replayed(dit, spans, computed.residuals, clean, [0])
        if back:
            torch.testing.assert_close(skipping, full, atol=1e-5, rtol=0.0, msg=f"{front}, {back}, {tail}")
        else:
            assert torch.equal(skipping, full), (front, back)
        assert torch.equal(computed.reference.denoised, full)


def test_the_stream_has_as_many_tokens_as_the_adapter_says(tiny, dit):
    stored = precomputed(dit, selection(1, 1, len(dit.blocks)), tiny.clean_latents(), [0]).residuals[0]
    assert stored.front.img.shape == stored.back.shape == (1, 15, dit.width)
    assert dit.image_tokens(*tiny.latent_shape[1:]) == 15
    assert (0 if stored.front.txt is None else stored.front.txt.shape[1]) == dit.text_tokens(0)


def test_a_batch_agrees_with_single_rows(tiny, dit):
    clean, spans, draws = tiny.clean_latents(), selection(1, 1, len(dit.blocks)), [0, 2]
    one = precomputed(dit, spans, clean, draws).residuals
    rows = [replayed(dit, spans, one, clean, [draw]) for draw in draws]
    torch.testing.assert_close(replayed(dit, spans, one, clean, draws), torch.cat(rows), atol=1e-5, rtol=1e-4)


def along_a_direction(tiny, dit, counts, distances, dtype=torch.float32):
    """Gradients of a step; what they say along a random direction; central differences; and the run of that step."""
    spans = selection(*counts, len(dit.blocks))
    clean = tiny.clean_latents(dtype=dtype)
    source = MemorySource(dit, spans, PLAN, clean, [0])
    adapters = tiny.lora(dit, spans, zero=False, dtype=dtype)
    tensors = {
        f"{name}.{part}": tensor
        for name in adapters.names
        for part, tensor in (("A", adapters.down(name)), ("B", adapters.up(name)))
    }
    generator = torch.Generator().manual_seed(3)
    before = {key: tensor.detach().clone() for key, tensor in tensors.items()}
    directions = {key: torch.randn(tensor.shape, generator=generator, dtype=dtype) for key, tensor in tensors.items()}

    def moved(distance):
        for key, tensor in tensors.items():
            tensor.data.copy_(before[key] + distance * directions[key])
        return adapters

    def loss(distance):
        _, target, sigmas = noisy_batch(PLAN, clean, [0])
        denoised = replayed(dit, spans, source.computed.residuals, clean, [0], moved(distance))
        return velocity_loss(denoised, target, sigmas).item()

    def again(**others):
        settings = {"plan": PLAN, "clean": clean, "learning_rate": 1e-12, "max_grad_norm": 0.0, **others}
        return train(dit, spans, source, moved(0.0), **settings)

    _, gradients = again()
    assert gradients.keys() == directions.keys()
    along = sum((gradients[key].double() * direction.double()).sum().item() for key, direction in directions.items())
    slopes = [(loss(distance) - loss(-distance)) / (2 * distance) for distance in distances]
    if len(distances) == 2:  # a difference's error grows with the square of the distance, so two tell it (Richardson)
        near, far = slopes
        ratio = (distances[1] / distances[0]) ** 2
        slopes.append((ratio * near - far) / (ratio - 1))
    return gradients, along, slopes, again


@pytest.mark.parametrize("counts", [(1, 1), (2, 0)])
def test_gradients_are_those_of_central_differences(tiny, precise, counts):
    """In float64; ComfyUI rounds its output to float32."""
    single = tiny.name in SINGLE
    dtype, distances = (torch.float32, (1e-3, 4e-3)) if single else (torch.float64, (5e-4, 2e-3))
    gradients, along, slopes, again = along_a_direction(tiny, precise, counts, distances, dtype)
    _, plain = again(checkpointing=False)
    assert all(torch.equal(plain[key], gradient) for key, gradient in gradients.items())
    idle = {key for key, gradient in gradients.items() if not gradient.any()}
    assert not {key for key in idle if ".experts." not in key}  # not every expert is chosen
    errors = [abs(slope / along - 1) for slope in slopes]
    assert min(errors) < (5e-3 if single else 1e-3), errors


def test_a_back_in_float64_is_the_whole_model_up_to_the_rounding_of_its_output(tiny, precise):
    if tiny.name in SINGLE:
        pytest.skip("knows no float64")
    clean, count = tiny.clean_latents(dtype=torch.float64), len(precise.blocks)
    spans = selection(1, count - 2, count)
    computed = precomputed(precise, spans, clean, [0])
    skipping = replayed(precise, spans, computed.residuals, clean, [0])
    torch.testing.assert_close(skipping, computed.reference.denoised, atol=1e-6, rtol=0.0)


def test_training_lowers_the_loss_and_leaves_the_model_as_it_was(tiny, patcher, dit):
    before, spans = weights(patcher), selection(1, 1, len(dit.blocks))
    result, _, _ = tiny.run(patcher, spans, steps=10, batch_size=2, learning_rate=1e-2)
    assert result.losses[-1] < SLOWER.get(tiny.name, 0.97) * result.losses[0]
    assert result.self_check < 1e-5
    assert_same_weights(patcher, before)
    assert not patcher.object_patches
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in patcher.model.modules())


def test_cores_loader_patches_every_layer(tiny, patcher, dit):
    import comfy.lora
    import comfy.lora_convert

    spans = selection(1, 1, len(dit.blocks))
    adapters = tiny.lora(dit, spans, zero=False)
    tensors = comfy.lora_convert.convert_lora(to_file_tensors(adapters.state_dict(), adapters.scale, "peft"))
    keys = comfy.lora.model_lora_keys_unet(patcher.model, {})
    assert len(comfy.lora.load_lora(tensors, keys)) == len(adapters.names) > 0


def assert_counted(tiny, dit):
    """A call of the model runs without values, on the same parts."""
    from blockskip_pack.blockskip_core.hosts.models.weightless_dit import WeightlessDit

    twin = WeightlessDit.of(dit)
    assert [block.name for block in twin.blocks] == [block.name for block in dit.blocks]
    assert (list(twin.frozen_stem), list(twin.trainable_head)) == (list(dit.frozen_stem), list(dit.trainable_head))
    with torch.no_grad(), twin.running({}) as denoise:
        output = denoise(torch.empty(1, *tiny.latent_shape, device="meta"), torch.empty(1, device="meta"), [0])
    assert output.shape == (1, *tiny.latent_shape)


def test_a_run_can_be_counted_before_it_starts(tiny, dit):
    if tiny.name in NOT_COUNTED:
        pytest.skip(NOT_COUNTED[tiny.name])
    assert_counted(tiny, dit)


def test_ernie_is_counted_where_the_hosts_attention_is_torchs(comfyui, monkeypatch):
    """As on NVIDIA cards by default."""
    from comfy.ldm.ernie import model
    from comfy.ldm.modules.attention import attention_pytorch

    monkeypatch.setattr(model, "optimized_attention", attention_pytorch)
    tiny = family("ernie")
    assert_counted(tiny, tiny.hosted(tiny.build()))


def test_text_that_sees_no_picture_and_no_noise_is_the_same_for_every_draw(tiny, dit):
    """So the cache on disk stores it once for each caption."""
    spans = selection(2, 1, len(dit.blocks))
    stored = precomputed(dit, spans, tiny.clean_latents(), [1, 3]).residuals  # of one caption
    assert PLAN[1].caption == PLAN[3].caption
    texts = [stored[draw].front.txt for draw in (1, 3)]
    assert (texts[0] is not None and torch.equal(*texts)) == (tiny.name in TEXT_APART)


# --- refused -----------------------------------------------------------------------------------------------------


def changed_blocks(patcher, monkeypatch, change):
    """Have the blocks of a model return what ``change`` makes of what they return."""
    kind = type(patcher.model.diffusion_model.transformer_blocks[0])
    plain = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, *args, **kwargs: change(*plain(self, *args, **kwargs)))


def test_a_block_that_overwrites_what_its_gradient_needs_is_refused(comfyui, monkeypatch):
    def overwriting(text, image):
        kept = image.sin()
        used = kept.square()
        kept.add_(1.0)
        return text, used + kept

    tiny = family("mage_flow")
    patcher = tiny.build()
    changed_blocks(patcher, monkeypatch, overwriting)
    with pytest.raises(
        UnsupportedModelError, match="No gradient passes .* \\(a block overwrites a tensor that its gradient needs\\)"
    ):
        tiny.hosted(patcher)


def test_blocks_that_overwrite_their_tokens_run_on_copies(comfyui, dit, tiny):
    layouts = dit.adapter.found.lists.values()
    assert all(layout.overwrites == (tiny.name in OVERWRITING) for layout in layouts)


def test_sound_is_passed_on_and_gets_no_lora(comfyui):
    tiny = family("ltx2")
    dit = tiny.hosted(tiny.build())
    names = list(tiny.lora(dit, selection(1, 1, len(dit.blocks))).names)
    assert names
    assert not [name for name in names if "audio" in name]
    [layout] = dit.adapter.found.lists.values()
    assert {name.partition(".")[0] for name in layout.unused} == {
        "audio_attn1", "audio_attn2", "audio_ff", "audio_to_video_attn", "video_to_audio_attn"
    }  # fmt: skip
    assert [place.key for place in layout.places] == [(0, 0), (0, 1)]


@pytest.mark.parametrize("change", ["noise", "sound"])
def test_models_of_other_noise_or_of_sound_are_not_followed(comfyui, monkeypatch, change):
    import comfy.model_sampling
    from blockskip_pack.blockskip_core.hosts.families.registry import adapter_for

    patcher = family("mage_flow").build()
    assert adapter_for(patcher).title == "MageFlow"
    if change == "noise":
        patcher.model.model_sampling = comfy.model_sampling.ModelSamplingDiscrete()
    else:
        monkeypatch.setattr(type(patcher.model.latent_format), "latent_dimensions", 1)
    with pytest.raises(UnsupportedModelError, match="Expected a diffusion transformer of a supported family"):
        adapter_for(patcher)


def test_pixart_is_refused_by_name(comfyui):
    from blockskip_pack.blockskip_core.hosts.families.registry import adapter_for

    patcher = built("PixArtAlpha", {"image_model": "pixart_alpha", "hidden_size": 48, "depth": 4, "num_heads": 2})
    with pytest.raises(UnsupportedModelError, match=r"supported family \(.*\), got PixArtMS\. Load one of these"):
        adapter_for(patcher)


@pytest.mark.parametrize(
    ("like", "supported", "config"),
    [
        ("hunyuan_video15", "HunyuanVideo15_SR_Distilled", {"in_channels": 98}),
        ("hunyuan_video", "HunyuanVideoI2V", {"in_channels": 33}),
    ],
)
def test_models_that_need_a_picture_are_refused(comfyui, like, supported, config):
    """ComfyUI gives them an empty one where a graph has none, which they were not trained on."""
    tiny, patcher = family(like), built(supported, {**family(like).build.args[1], **config})
    with pytest.raises(UnsupportedModelError, match="models take a picture or a mask besides the text"):
        tiny.hosted(patcher)


def test_lists_of_other_modules_are_not_taken_for_blocks():
    def block(width):
        return nn.Sequential(nn.Linear(width, width), nn.ModuleList([nn.Linear(width, width) for _ in range(3)]))

    model = nn.Module()
    model.refiner = nn.ModuleList([block(4) for _ in range(2)])
    model.blocks = nn.ModuleList([block(16) for _ in range(4)])
    model.mixed = nn.ModuleList([nn.Linear(8, 8), nn.LayerNorm(8)])
    assert block_lists(model) == ["blocks"]
    model.head = nn.Linear(200, 200)  # now the blocks are a small part
    assert block_lists(model) == []


@pytest.mark.parametrize("lacks", [False, True])
def test_texts_that_the_model_cannot_read_are_refused(comfyui, monkeypatch, lacks):
    """Of another width, or without something that the model wants beside them."""
    tiny = family("auraflow")
    patcher = tiny.build()
    from blockskip_pack.blockskip_core.hosts.models.hosted_dit import HostedDit

    if lacks:
        monkeypatch.setattr(patcher.model, "extra_conds", lambda **settings: settings["embeds"])
    with pytest.raises(InvalidInputError, match="AuraFlow could not be run with these captions .* Encode them"):
        HostedDit(patcher, [[[torch.zeros(1, 5, 7), {}]]], tiny.latent_shape)


def test_a_model_with_skip_connections_between_blocks_is_refused(comfyui, monkeypatch):
    """Its tokens are found, and only the comparison with the whole model shows that the blocks exchange more."""
    tiny = family("mage_flow")
    patcher = tiny.build()
    blocks, kept = patcher.model.diffusion_model.transformer_blocks, []
    plain = type(blocks[0]).forward
    for index, block in enumerate(blocks):
        block.place = index  # copies have it too

    def connected(self, *args, **kwargs):
        text, image = plain(self, *args, **kwargs)
        if self.place == 0:
            kept[:] = [image]
        return text, image + kept.pop() if self.place == 3 and kept else image

    monkeypatch.setattr(type(blocks[0]), "forward", connected)
    with pytest.raises(UnsupportedModelError, match="with its blocks replayed the model computes something else"):
        tiny.hosted(patcher)
