"""diffusers' transformers with blocks skipped: replay, gradients, training, and the model left as found."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from blockskip_pack import blockskip_core as blockskip
from blockskip_pack.blockskip_core.data.flow_matching import noisy_batch, velocity_loss
from blockskip_pack.blockskip_core.hosts.diffusers import DiffusersDit
from blockskip_pack.blockskip_core.residuals.precompute import precompute_residuals
from torch.func import functional_call

from ...core.plain_dit import MemorySource, lora_tensors, train
from .tiny_models import FAMILIES, FLUX, PLAN, QWEN_IMAGE, TinyModel, replayed

IN_FLOAT32 = ("wan",)  # its norms compute in float32 whatever the model's dtype


@pytest.fixture(params=FAMILIES, ids=lambda tiny: tiny.name, scope="module")
def tiny(request) -> TinyModel:
    return request.param


@pytest.fixture(scope="module")
def model(tiny):
    return tiny.build()


@pytest.fixture(scope="module")
def dit(tiny, model):
    return tiny.hosted(model)


@pytest.fixture(scope="module")
def exact(tiny):
    """The model in float64."""
    return tiny.hosted(tiny.build(dtype=torch.float64))


def states(model):
    """Everything about a model that a run must leave alone: weights, modules by identity, hooks and attributes."""
    weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    modules = {name: (id(module), sorted(module.__dict__)) for name, module in model.named_modules()}
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    return weights, modules, hooks


def assert_as_before(model, before):
    weights, modules, hooks = states(model)
    assert (modules, hooks) == before[1:]
    assert all(torch.equal(weights[name], tensor) for name, tensor in before[0].items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


# --- replay ------------------------------------------------------------------------------------------------------


def test_run_whole_it_is_the_model_as_its_pipeline_calls_it(tiny, model, dit):
    clean = tiny.clean_latents()
    for draws in ([0], [1, 3]):
        noisy, _, sigmas = noisy_batch(PLAN, clean, draws)
        with torch.no_grad(), dit.running({}) as denoise:
            ours = denoise(noisy, sigmas, [PLAN[draw].caption for draw in draws])
            assert torch.equal(ours, tiny.whole(model, clean, draws))


def test_front_middle_and_back_together_are_the_whole_model(tiny, model, dit):
    """The front is exact to the bit; the back adds a stored sum, which differs by rounding."""
    clean, count = tiny.clean_latents(), tiny.num_blocks
    whole = tiny.whole(model, clean, [0])
    for front, back, tail in ((1, 0, 0), (count - 1, 0, 0), (0, 1, 0), (1, count - 2, 0), (0, count - 1, 0), (1, 1, 1)):
        spans = tiny.chosen(front, back, tail)
        computed = precompute_residuals(dit, PLAN, clean, spans, [0], room=0 if tail else dit.room_for_blocks)
        assert torch.equal(computed.reference.denoised, whole)
        skipping = replayed(dit, spans, computed.residuals, clean, [0])
        if back:
            torch.testing.assert_close(skipping, whole, atol=2e-6, rtol=0.0, msg=f"{front}, {back}, {tail}")
        else:
            assert torch.equal(skipping, whole), front


def test_the_stream_has_as_many_tokens_as_it_says(tiny, dit):
    stored = precompute_residuals(dit, PLAN, tiny.clean_latents(), tiny.chosen(1, 1), [1]).residuals[1]
    assert stored.front.img.shape == stored.back.shape == (1, tiny.num_img, dit.width)
    assert dit.image_tokens(*tiny.latent_shape[1:]) == tiny.num_img
    assert (0 if stored.front.txt is None else stored.front.txt.shape[1]) == dit.text_tokens(2) == tiny.num_txt
    assert dit.text_length(2) == 3


def test_a_batch_agrees_with_single_rows(tiny, dit):
    clean, spans, draws = tiny.clean_latents(), tiny.chosen(1, 1), [0, 2]
    computed = precompute_residuals(dit, PLAN, clean, spans, draws).residuals
    rows = [replayed(dit, spans, computed, clean, [draw]) for draw in draws]
    torch.testing.assert_close(replayed(dit, spans, computed, clean, draws), torch.cat(rows), atol=2e-6, rtol=1e-5)


def test_examples_of_several_shapes_are_skipped_as_each_alone(tiny, dit):
    channels, rows, columns = tiny.latent_shape
    generator, spans = torch.Generator().manual_seed(5), tiny.chosen(1, 1)
    shapes = [(channels, rows, columns), (channels, rows + 2, columns), (channels, rows, columns + 2)]
    clean = [torch.randn(shape, generator=generator) for shape in shapes]
    computed = precompute_residuals(dit, PLAN, clean, spans, range(3), batch_size=3).residuals
    for draw in range(3):
        noisy, _, sigmas = noisy_batch(PLAN, clean, [draw])
        with torch.no_grad(), dit.running({}) as denoise:
            whole = denoise(noisy, sigmas, [PLAN[draw].caption])
        torch.testing.assert_close(replayed(dit, spans, computed, clean, [draw]), whole, atol=2e-6, rtol=1e-5)


def test_an_embedded_guidance_is_the_pipelines_unless_the_text_says_another():
    model = FLUX.build(guidance_embeds=True)
    clean, text = FLUX.clean_latents(), FLUX.captions()
    noisy, _, sigmas = noisy_batch(PLAN, clean, [0])
    plain, weaker = DiffusersDit(model, text), DiffusersDit(model, [{**x, "guidance": torch.ones(1)} for x in text])
    with torch.no_grad(), plain.running({}) as denoise:
        assert torch.equal(denoise(noisy, sigmas, [0]), FLUX.whole(model, clean, [0]))
    with torch.no_grad(), weaker.running({}) as denoise:
        assert not torch.allclose(denoise(noisy, sigmas, [0]), FLUX.whole(model, clean, [0]))


# --- gradients ---------------------------------------------------------------------------------------------------


def gradients_of_the_whole_model(tiny, dit, adapters, clean):
    """By autograd through the model with the LoRA merged into its weights; the loss of the schedule's first draw."""
    tensors = lora_tensors(adapters)
    weights = dict(dit.model.named_parameters())
    merged = {
        f"{name}.weight": weights[f"{name}.weight"].detach() + scale * up @ down
        for name, (down, up, scale) in tensors.items()
    }

    class Merged:
        config = dit.model.config

        def __call__(self, *args, **kwargs):
            return functional_call(dit.model, merged, args, kwargs)

    _, target, sigmas = noisy_batch(PLAN, clean, [0])
    velocity_loss(tiny.estimate(Merged(), clean, [0]), target, sigmas).sum().backward()
    return {f"{name}.{part}": x.grad for name, pair in tensors.items() for part, x in zip("AB", pair[:2], strict=True)}


@pytest.mark.parametrize("front", [1])
def test_with_only_a_front_skipped_gradients_are_those_of_the_whole_model(tiny, exact, front):
    spans, clean = tiny.chosen(front, 0), tiny.clean_latents(torch.float64)
    adapters = tiny.lora(exact, spans, zero=False)
    expected = gradients_of_the_whole_model(tiny, exact, adapters, clean)
    _, gradients, _ = tiny.run(exact, spans, adapters=adapters, learning_rate=1e-12, max_grad_norm=0.0)
    assert gradients.keys() == expected.keys()
    close = 2e-5 if tiny.name in IN_FLOAT32 else 1e-8
    for name, gradient in gradients.items():
        assert gradient.any(), name
        assert (gradient - expected[name]).norm() <= close * expected[name].norm(), name


@pytest.mark.parametrize("counts", [(1, 1, 0), (0, 1, 1)])
def test_gradients_are_those_of_central_differences(tiny, exact, counts):
    spans, clean = tiny.chosen(*counts), tiny.clean_latents(torch.float64)
    source, generator = MemorySource(exact, spans, PLAN, clean, [0]), torch.Generator().manual_seed(3)
    adapters = tiny.lora(exact, spans, zero=False)
    tensors = {
        f"{name}.{part}": tensor
        for name in adapters.names
        for part, tensor in (("A", adapters.down(name)), ("B", adapters.up(name)))
    }
    before = {key: tensor.detach().clone() for key, tensor in tensors.items()}
    directions = {key: torch.randn(x.shape, generator=generator, dtype=x.dtype) for key, x in tensors.items()}

    def moved(distance):
        for key, tensor in tensors.items():
            tensor.data.copy_(before[key] + distance * directions[key])
        return adapters

    def gradients_of(**settings):
        settings = {"plan": PLAN, "clean": clean, "learning_rate": 1e-12, "max_grad_norm": 0.0, **settings}
        return train(exact, spans, source, moved(0.0), **settings)[1]

    def loss(distance):
        _, target, sigmas = noisy_batch(PLAN, clean, [0])
        denoised = replayed(exact, spans, source.computed.residuals, clean, [0], moved(distance))
        return velocity_loss(denoised, target, sigmas).item()

    gradients = gradients_of()
    along = sum((gradients[key] * x).sum() for key, x in directions.items()).item()
    step = 1e-3  # larger than rounding: rotary positions are float32 in all of these classes
    assert (loss(step) - loss(-step)) / (2 * step) == pytest.approx(along, rel=1e-3)
    plain = gradients_of(checkpointing=False)
    assert all(torch.equal(plain[name], gradient) for name, gradient in gradients.items())


# --- training ----------------------------------------------------------------------------------------------------


def whole_loss(tiny, dit, lora, clean):
    """The loss of the whole model over the schedule, with the LoRA; a context of its own for each model."""
    noisy, target, sigmas = noisy_batch(PLAN, clean, range(4))
    with blockskip.apply(dit, lora) as denoise:
        rows = [denoise(noisy[[i]], sigmas[[i]], [PLAN[i].caption]) for i in range(4)]
    return velocity_loss(torch.cat(rows), target, sigmas).mean().item()


def test_training_lowers_the_loss_of_the_whole_model_and_leaves_it_as_it_was(tiny, model, dit):
    before, spans, clean = states(model), tiny.chosen(1, 1), tiny.clean_latents()
    examples = blockskip.Examples(PLAN, clean)

    def trained(steps, rate):
        config = blockskip.TrainingConfig(steps=steps, learning_rate=rate, batch_size=2)
        selection = blockskip.BlockSelection(front=1, back=1, num_blocks=tiny.num_blocks, family=dit.family)
        return blockskip.train(dit, examples, selection, config, layers=dit.lora_layers(spans))

    untrained, lora = trained(1, 1e-12), trained(12, 5e-3)
    assert lora.result.self_check < 1e-5
    assert whole_loss(tiny, dit, lora, clean) < 0.97 * whole_loss(tiny, dit, untrained, clean)
    first = [name for name in lora.adapters.names if name.startswith(f"{dit.blocks[1].name}.")]
    assert len(first) == tiny.num_layers
    assert_as_before(model, before)


def interrupted_call(dit, noisy, sigmas, interrupt):
    with dit.running({}) as denoise:
        denoise(noisy, sigmas, [0])
        raise interrupt


def test_an_interrupted_training_leaves_the_model_as_it_was(tiny, model, dit):
    before = states(model)

    class Stop(BaseException):
        pass

    def stop(report):
        raise Stop

    with pytest.raises(Stop):
        tiny.run(dit, tiny.chosen(1, 1), steps=3, on_step=stop)
    assert_as_before(model, before)
    noisy, _, sigmas = noisy_batch(PLAN, tiny.clean_latents(), [0])
    with pytest.raises(Stop):
        interrupted_call(dit, noisy, sigmas, Stop)
    assert_as_before(model, before)
    assert not model.gradient_checkpointing


def test_a_model_loaded_in_bf16_trains(tiny, model, tmp_path):
    """Some classes keep parts in float32 when they are loaded; the LoRA is in float32 for all."""
    model.save_pretrained(tmp_path)
    reduced = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16, local_files_only=True, use_safetensors=True)
    dit, clean = tiny.hosted(reduced), tiny.clean_latents()
    with torch.no_grad(), dit.running({}) as denoise:
        noisy, _, sigmas = noisy_batch(PLAN, clean, [0])
        rough = denoise(noisy, sigmas, [PLAN[0].caption])
    exact = tiny.whole(model, clean, [0])
    assert (dit.dtype, rough.dtype) == (torch.bfloat16, torch.float32)
    assert 0 < (rough - exact).norm() < 0.05 * exact.norm()
    result, gradients, adapters = tiny.run(dit, tiny.chosen(1, 1), batch_size=2)
    assert result.self_check < 1e-2
    assert all(gradients[f"{name}.B"].any() for name in adapters.names)
    assert {tensor.dtype for tensor in adapters.parameters()} == {torch.float32}


def test_the_model_may_check_point_its_own_blocks_when_it_is_used_elsewhere():
    model = FLUX.build()
    model.enable_gradient_checkpointing()
    plain, checkpointed = FLUX.hosted(), FLUX.hosted(model)
    losses = [FLUX.run(dit, FLUX.chosen(1, 1))[0].losses for dit in (plain, checkpointed)]
    assert losses[0] == losses[1]
    assert model.gradient_checkpointing


def test_only_what_a_run_needs_is_moved_to_another_device():
    """On ``meta``, where nothing can be computed, but everything can be moved."""
    model = FLUX.build()
    FLUX.hosted(model)
    dit = DiffusersDit(model, FLUX.captions(), device="meta")
    spans = FLUX.chosen(1, 1)
    from blockskip_pack.blockskip_core.blocks.skipping_model import SkippingModel

    skipping = SkippingModel(dit, spans, checkpointed=False, folded=False)
    with dit.running(skipping.modules):
        moved = {name: {x.device.type for x in module.parameters()} for name, module in skipping.modules.items()}
    assert moved == {name: set() if name in ("transformer_blocks.0", "single_transformer_blocks.2") else {"meta"}
                     for name in moved}  # fmt: skip
    assert {x.device.type for x in model.parameters()} == {"cpu"}


@pytest.mark.parametrize("weights", ["as fits", "resident"])
def test_a_model_in_host_memory_runs_on_another_device(tiny, model, dit, weights):
    """On ``meta`` again: an operation that mixes its tensors with others is an error, so everything has been moved."""
    elsewhere, before = DiffusersDit(model, tiny.captions(), device="meta"), states(model)
    noisy, _, sigmas = (x.to("meta") for x in noisy_batch(PLAN, tiny.clean_latents(), [0, 1]))
    with torch.no_grad(), elsewhere.running({}, weights=weights) as denoise:
        output = denoise(noisy[:1], sigmas[:1], [0])
    assert (output.device.type, output.shape) == ("meta", noisy[:1].shape)
    assert {x.device.type for x in model.parameters()} == {"cpu"}
    assert_as_before(model, before)
    assert tiny.whole(model, tiny.clean_latents(), [0]).device.type == "cpu"


def test_a_whole_model_in_host_memory_runs_with_one_block_on_the_device_at_a_time(monkeypatch):
    from blockskip_pack.blockskip_core.hosts.diffusers import diffusers_dit

    model, moved, move = FLUX.build(), [], diffusers_dit.move_weights
    FLUX.hosted(model)
    dit = DiffusersDit(model, FLUX.captions(), device="meta")
    monkeypatch.setattr(
        diffusers_dit,
        "move_weights",
        lambda twin, device: moved.append(dict(twin.named_parameters())) or move(twin, device),
    )
    noisy, _, sigmas = (x.to("meta") for x in noisy_batch(PLAN, FLUX.clean_latents(), [0]))
    with torch.no_grad(), dit.running({}) as denoise:
        denoise(noisy, sigmas, [0])
    ends, *blocks = moved
    assert ends
    assert not [name for name in ends if "transformer_blocks" in name]
    assert [set(block) for block in blocks] == [
        set(dict(dit.module(info.name).named_parameters())) for info in dit.blocks
    ]


def test_a_model_that_is_on_the_device_is_not_streamed_because_the_device_has_another_name():
    """A user writes `cuda` or `mps`, and a tensor says `cuda:0` or `mps:0`; here `cpu:0` and `cpu`."""
    dit = DiffusersDit(FLUX.build(), FLUX.captions(), device="cpu:0")
    assert dit.device == torch.device("cpu")
    assert dit._streamed({}) == {}


def test_nothing_of_a_run_stays_alive(tiny, dit, monkeypatch):
    """diffusers caches tables of positions under the module that made them, for the life of the process."""
    from blockskip_pack.blockskip_core.hosts.diffusers import diffusers_dit

    made, whole_copy = [], diffusers_dit.weight_sharing_copy

    def watched(module):
        twin = whole_copy(module)
        made.extend(map(weakref.ref, twin.modules()))
        return twin

    monkeypatch.setattr(diffusers_dit, "weight_sharing_copy", watched)
    tiny.run(dit, tiny.chosen(1, 1), steps=1)
    gc.collect()
    assert made
    assert [type(module()).__name__ for module in made if module() is not None] == []


def test_a_model_that_was_loaded_in_inference_mode_trains():
    """Its tables are inference tensors then, as are those that it caches, and autograd must not be given any."""
    with torch.inference_mode():
        dit = QWEN_IMAGE.hosted(QWEN_IMAGE.build())
    result, *_ = QWEN_IMAGE.run(dit, QWEN_IMAGE.chosen(1, 1), steps=1)
    assert result.steps == 1
