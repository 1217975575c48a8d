"""Models in common storage formats: trained directly, without a dequantised copy."""

from __future__ import annotations

import pytest
import torch
from blockskip_pack.blockskip_core.blocks.skipping_model import SkippingModel
from blockskip_pack.blockskip_core.blocks.weight_sharing import weight_sharing_copy
from blockskip_pack.blockskip_core.data.flow_matching import noisy_batch
from blockskip_pack.blockskip_core.errors import UnsupportedModelError
from blockskip_pack.blockskip_core.selection.selection import BlockSelection

from ...core.plain_dit import MemorySource, lora_for, needed, schedule, train
from ..hosted_runs import plain_forward
from ..packed_linear import PackedTensor, pack_blocks
from ..stored_flux import FORMATS, LATENT_SHAPE, NUM_BLOCKS, load, plain_tensors, stored_flux, write
from ..tiny_flux import captions

pytestmark = pytest.mark.usefixtures("comfyui")
PLAN = schedule((0.3, 0.9, 0.55, 0.7), (0, 2, 1, 2))
SPANS = BlockSelection(front=1, back=1, num_blocks=NUM_BLOCKS, family="flux")
ALL = BlockSelection(front=0, back=0, num_blocks=NUM_BLOCKS, family="flux")
NAMES = [*FORMATS, "packed"]


def make(folder, name, seed=0):
    if name != "packed":
        return stored_flux(folder, name, seed)
    patcher = stored_flux(folder, "fp32", seed)
    with torch.inference_mode():
        pack_blocks(patcher.model.diffusion_model)
    return patcher


def hosted(patcher):
    from blockskip_pack.blockskip_core.hosts.models.hosted_dit import HostedDit

    return HostedDit(patcher, captions((5, 5, 3)), LATENT_SHAPE)


def clean_latents():
    return torch.randn(4, *LATENT_SHAPE, generator=torch.Generator().manual_seed(5))


def trained(patcher, spans, **settings):
    """Train one step on a model with a LoRA that is not zero; return (result, gradients)."""
    dit, clean = hosted(patcher), clean_latents()
    source = MemorySource(dit, spans, PLAN, clean, needed(len(PLAN), batch_size=2, **settings))
    adapters = lora_for(
        dit, spans, wanted=lambda name: dit.adapter.is_lora_target(name, "attention and mlp"),
        dtype=torch.float32, zero=False, size=0.05,
    )  # fmt: skip
    return train(dit, spans, source, adapters, plan=PLAN, clean=clean, batch_size=2, **settings)


def plain_weight_of(layer):
    """The matrix of a layer, dequantised without the code under test."""
    weight = layer.weight
    if isinstance(weight, PackedTensor):
        return weight.unpack(torch.float32)
    if hasattr(weight, "dequantize") and hasattr(weight, "_qdata"):
        weight = weight.dequantize()
    weight = weight.float()
    smoothing = getattr(layer, "pre_quant_scale", None)
    return weight if smoothing is None else weight * smoothing.float()


def dequantised_twin(folder, patcher):
    """The same network with its weights dequantised to float32.

    Where ComfyUI computes with quantised inputs, the twin's layers return ComfyUI's numbers but the gradient of the
    dequantised matrix (a hook on the layer shifts its output).
    """
    tensors = plain_tensors()
    own = dict(patcher.model.diffusion_model.named_modules())
    for name in tensors:
        layer, _, leaf = name.rpartition(".")
        linear = leaf == "weight" and "_blocks." in name and tensors[name].dim() == 2
        value = plain_weight_of(own[layer]) if linear else getattr(own[layer], leaf).float()
        tensors[name] = value.detach().clone()
    write(folder / "twin.safetensors", FORMATS["fp32"], tensors)
    return load(folder / "twin.safetensors", FORMATS["fp32"])


def give_host_numbers(twin, patcher):
    own = patcher.model.diffusion_model
    for name, layer in twin.model.diffusion_model.named_modules():
        if hasattr(layer, "in_features") and "_blocks." in name:
            original = weight_sharing_copy(own.get_submodule(name))
            layer.register_forward_hook(lambda module, args, output, original=original: original(args[0]))


def parameters(patcher):
    """(identity, class, dtype, device) and the bytes of every stored tensor, by name.

    Some layers get new parameter objects whenever ComfyUI loads them; the pack never loads blocks.
    """
    found = {}
    for name, parameter in patcher.model.named_parameters():
        if hasattr(parameter, "_qdata"):
            parts = [getattr(parameter, part) for part in parameter.__tensor_flatten__()[0]]
        else:
            parts = [parameter.as_subclass(torch.Tensor)]
        raw = [part.detach().contiguous().reshape(-1).view(torch.uint8).clone() for part in parts]
        found[name] = (
            (id(parameter) if "_blocks." in name else None, type(parameter), parameter.dtype, parameter.device),
            torch.cat(raw),
        )
    return found


def forward(patcher, draws=(0,)):
    noisy, _, sigmas = noisy_batch(PLAN, clean_latents(), list(draws))
    return plain_forward(patcher, noisy, sigmas, [captions((5, 5, 3))[PLAN[draw].caption] for draw in draws])


@pytest.mark.parametrize("name", NAMES)
def test_before_training_the_skipping_model_is_the_full_model(tmp_path, name):
    patcher = make(tmp_path, name)
    dit, clean = hosted(patcher), clean_latents()
    source = MemorySource(dit, SPANS, PLAN, clean, [0])
    stand_ins = SkippingModel(dit, SPANS, checkpointed=False, folded=False)
    noisy, _, sigmas = noisy_batch(PLAN, clean, [0])
    with torch.no_grad(), dit.running(stand_ins.modules) as denoise:
        stand_ins.replay(source.computed.residuals.__getitem__, [0], None)
        replayed = denoise(noisy, sigmas, [PLAN[0].caption])
    torch.testing.assert_close(replayed, source.computed.reference.denoised, atol=2e-5, rtol=0.0)
    # Outside training ComfyUI may use another kernel for rotary embedding, so that a rounding of int4 inputs may flip.
    loose = FORMATS[name].rounds_inputs if name in FORMATS else False
    torch.testing.assert_close(replayed, forward(patcher), atol=5e-2 if loose else 2e-5, rtol=0.0)


@pytest.mark.parametrize(
    ("name", "spans"),
    [
        *(pytest.param(name, SPANS, id=f"{name}-skipping") for name in NAMES),
        *(pytest.param(name, ALL, id=f"{name}-whole") for name in ("fp8 scaled", "int8 convrot", "packed")),
    ],
)
def test_gradients_are_those_of_the_written_out_weights(tmp_path, name, spans):
    patcher = make(tmp_path, name)
    twin = dequantised_twin(tmp_path, patcher)
    # Where inputs are rounded too, a last bit that differs between machines can flip a rounding.
    rounds = name in FORMATS and FORMATS[name].rounds_inputs
    close = 1e-2 if rounds else 2e-5
    if rounds:
        give_host_numbers(twin, patcher)
    expected, gradients = trained(twin, spans, checkpointing=False)
    for checkpointing in (False, True):
        result, found = trained(patcher, spans, checkpointing=checkpointing)
        assert result.losses == pytest.approx(expected.losses, rel=1e-3 if rounds else 1e-5)
        assert found.keys() == gradients.keys()
        for key, gradient in gradients.items():
            assert gradient.norm() > 0
            assert (found[key] - gradient).norm() <= close * gradient.norm(), key


@pytest.mark.parametrize("name", NAMES)
def test_nothing_of_a_weights_size_is_saved_for_backward(tmp_path, name):
    """Without checkpointing: the saved bytes are those of a float32 model, except for cast norm scales."""
    (tmp_path / "other").mkdir()
    plain = trained(make(tmp_path / "other", "fp32"), SPANS, checkpointing=False)[0].saved_bytes
    found = trained(make(tmp_path, name), SPANS, checkpointing=False)[0].saved_bytes
    cast_norms = 2 * 128 * 4  # query and key norm of the one kept block
    assert plain <= found <= plain + cast_norms


@pytest.mark.parametrize("name", NAMES)
def test_the_model_is_left_as_it_was(tmp_path, name):
    from blockskip_pack.blockskip_core.hosts.models.residency import unload

    patcher = make(tmp_path, name)
    picture = forward(patcher)
    unload(patcher)
    before, modules = parameters(patcher), dict(patcher.model.named_modules())
    trained(patcher, SPANS, steps=2)
    after = parameters(patcher)
    assert before.keys() == after.keys()
    for key, (kind, raw) in before.items():
        assert after[key][0] == kind, key
        assert torch.equal(after[key][1], raw), key
    now = dict(patcher.model.named_modules())
    assert now.keys() == modules.keys()
    assert all(now[key] is modules[key] for key in now)
    assert torch.equal(forward(patcher), picture)


@pytest.mark.parametrize("name", NAMES)
def test_block_bytes_are_the_bytes_on_disk(tmp_path, name):
    """A file contains the same tensors, and in addition only the smoothing scales, which also count."""
    from safetensors import safe_open

    patcher = make(tmp_path, name)
    sizes = dict.fromkeys([block.name for block in hosted(patcher).blocks], 0)
    if name == "packed":
        for block in sizes:
            for parameter in patcher.model.diffusion_model.get_submodule(block).parameters():
                sizes[block] += parameter.numel() * parameter.element_size()
    else:
        with safe_open(tmp_path / "model.safetensors", "pt") as file:
            for key in file.keys():
                block = ".".join(key.split(".")[:2])
                if block in sizes:
                    sizes[block] += file.get_tensor(key).nbytes
    assert {block.name: block.num_bytes for block in hosted(patcher).blocks} == sizes
    shapes = {block.name: block.num_parameters for block in hosted(patcher).blocks}
    assert shapes["double_blocks.0"] >= 2 * 128 * (3 * 128 + 128 + 4 * 128 * 2 + 6 * 128)


@pytest.mark.parametrize("name", [name for name in NAMES if name in ("packed",) or FORMATS[name].algorithm])
def test_scales_are_part_of_the_identity(tmp_path, name):
    from blockskip_pack.blockskip_core.hosts.models.identity import model_identity

    patcher = make(tmp_path, name)
    first = model_identity(patcher)
    (tmp_path / "again").mkdir()
    assert model_identity(make(tmp_path / "again", name)) == first
    assert model_identity(make(tmp_path / "again", name, seed=1)) != first
    weight = patcher.model.diffusion_model.single_blocks[1].linear1.weight
    with torch.inference_mode():
        if name == "packed":
            weight.as_subclass(torch.Tensor)[0, :1] += 1  # the first scale's low byte
        else:
            scale = weight._params.scale
            scale.view(-1).view(torch.uint8)[:1] += 1
    assert model_identity(patcher) != first


@pytest.mark.parametrize("name", ["fp8 cast", "fp8 scaled", "int8", "nvfp4", "convrot w4a4"])
def test_a_lora_that_the_user_has_applied_stays_in_force(tmp_path, name):
    """ComfyUI rounds the patched weights to the format again, in the same way at every load."""
    from blockskip_pack.blockskip_core.adapters.lora_formats import to_file_tensors
    from blockskip_pack.blockskip_core.hosts.files.applied_lora import apply_lora
    from blockskip_pack.blockskip_core.hosts.models.residency import unload

    plain = make(tmp_path, name)
    dit = hosted(plain)
    users = lora_for(
        dit, ALL, wanted=lambda name: dit.adapter.is_lora_target(name, "attention and mlp"),
        dtype=torch.float32, zero=False, size=1.0,
    )  # fmt: skip
    before, alone = parameters(plain), forward(plain)
    patcher = apply_lora(plain, to_file_tensors(users.state_dict(), users.scale, "peft"), 0.7)[0]
    with_lora = forward(patcher)
    assert (with_lora - alone).norm() > 0.02 * alone.norm()
    assert trained(patcher, SPANS, steps=2)[0].self_check < 1e-4
    assert torch.equal(forward(patcher), with_lora)
    unload(patcher)
    after = parameters(plain)
    assert all(torch.equal(after[key][1], raw) for key, (_, raw) in before.items())


def test_weights_stay_in_the_models_own_memory(tmp_path):
    patcher = make(tmp_path, "nvfp4")
    block = patcher.model.diffusion_model.single_blocks[0]
    twin = weight_sharing_copy(block).linear1.weight
    own = block.linear1.weight
    assert own.is_inference()
    assert not twin.is_inference()
    assert twin._qdata.data_ptr() == own._qdata.data_ptr()
    assert twin._params.block_scale.data_ptr() == own._params.block_scale.data_ptr()


def test_a_layer_that_nobody_can_unpack_is_refused_by_name(tmp_path):
    patcher = make(tmp_path, "fp32")
    layer = patcher.model.diffusion_model.single_blocks[1].linear2
    layer._parameters["weight"] = torch.nn.Parameter(torch.zeros(7, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(UnsupportedModelError, match=r"single_blocks\.1\.linear2 is a comfy\.ops.*Linear.*packed"):
        hosted(patcher)


def test_the_formats_here_are_all_that_the_host_has():
    from comfy.quant_ops import QUANT_ALGOS

    tested = {stored.algorithm for stored in FORMATS.values()} | {"float8_e5m2"}
    assert set(QUANT_ALGOS) <= tested


@pytest.mark.parametrize("name", NAMES)
def test_a_run_on_it_can_be_counted_before_it_starts(tmp_path, name):
    """Also for other packs' packed layers: they cannot be queried for shapes, so ComfyUI's own layers replace them."""
    from blockskip_pack.blockskip_core.accounting.plan import MemorySettings
    from blockskip_pack.blockskip_core.adapters.lora import LoraSettings
    from blockskip_pack.blockskip_core.hosts.models.counted_run import CountedRun
    from blockskip_pack.blockskip_core.training.config import TrainingConfig

    dit = hosted(make(tmp_path, name))
    run = CountedRun(dit, SPANS, LoraSettings(rank=2, alpha=2), captions=3, draws=4, chunk_size=2)
    side = LATENT_SHAPE[1] * dit.patcher.model.latent_format.spacial_downscale_ratio
    settings = MemorySettings(config=TrainingConfig(steps=1, checkpointing=False), patch_min=side)
    needs = run.needs(settings)
    assert needs.training.weights == run.trained_weights(settings) < needs.training.peak
    result, _ = trained(make(tmp_path, name), SPANS, checkpointing=False)
    assert 0.3 < 2 * needs.training.saved / result.saved_bytes < 3.0  # the run's batch size is two


@pytest.mark.parametrize("name", ["fp8 scaled", "int8 convrot", "nvfp4"])
def test_coarse_patches_on_it_are_those_of_the_written_out_weights(tmp_path, name):
    """A coarse call of a sampler with adapters that are not zero, and two steps of their training."""
    patcher = make(tmp_path, name)
    twin = dequantised_twin(tmp_path, patcher)
    if FORMATS[name].rounds_inputs:
        give_host_numbers(twin, patcher)
    before = parameters(patcher)
    call, losses, changed = coarse(patcher)
    expected_call, expected_losses, _ = coarse(twin)
    close = 5e-2 if FORMATS[name].rounds_inputs else 1e-4
    torch.testing.assert_close(call, expected_call, atol=close, rtol=0.0)
    assert len(losses) == 2
    assert losses == pytest.approx(expected_losses, rel=1e-2 if FORMATS[name].rounds_inputs else 1e-4)
    assert [part for part, has_changed in changed.items() if not has_changed] == []
    after = parameters(patcher)
    assert all(torch.equal(after[key][1], raw) for key, (_, raw) in before.items())


def coarse(patcher):
    """Return a coarse call's clean estimate, the losses of two steps of training, and what these changed, by part."""
    from blockskip_pack.blockskip_core.adapters.lora import LoraSettings
    from blockskip_pack.blockskip_core.ddit.coarse_estimate import CoarseAdapter
    from blockskip_pack.blockskip_core.ddit.connection import PatchStatistics
    from blockskip_pack.blockskip_core.ddit.patch_adapter import PatchAdapter
    from blockskip_pack.blockskip_core.ddit.patch_resizing import PatchResizing
    from blockskip_pack.blockskip_core.distillation.examples import Examples
    from blockskip_pack.blockskip_core.distillation.loop import DistillationResult, distill
    from blockskip_pack.blockskip_core.distillation.settings import DistillationSettings
    from blockskip_pack.blockskip_core.hosts.models.coarse_distillation import TrainedParts, distilling
    from blockskip_pack.blockskip_core.hosts.models.coarse_forward import CoarseForward
    from blockskip_pack.blockskip_core.hosts.models.hosted_dit import HostedDit

    generator, resizing, prompts = torch.Generator().manual_seed(6), PatchResizing(2, 2), captions((5, 5, 3))
    clean = torch.randn(4, 16, 8, 8, generator=generator)
    dit = HostedDit(patcher.clone(), prompts, clean.shape[1:])
    patches = PatchAdapter(16 * resizing.side**2, dit.width)
    adapter = CoarseAdapter(resizing, PatchStatistics.of(clean, resizing), patches)
    parts = TrainedParts(dit, adapter, LoraSettings(rank=2, alpha=2.0, targets="mlp"), 0)
    with torch.no_grad():
        for tensor in parts.parameters():
            tensor += 0.02 * torch.randn(tensor.shape, generator=generator)
    sampling = CoarseForward(patcher)
    with torch.inference_mode():
        call = sampling(
            lambda x, sigma: plain_forward(patcher, x, sigma, prompts[:2]), clean[:2], torch.full((2,), 0.6),
            adapter, parts.low_rank(), {},
        ).clone()  # fmt: skip
    states, result = [], DistillationResult()
    settings = DistillationSettings(steps=2, batch_size=2, learning_rate=1e-3, warmup_steps=0)
    examples = Examples(clean, [0, 1, 1, 2], lambda uniform: 0.2 + 0.7 * uniform, 0)
    with distilling(dit, parts) as model:
        distill(
            model, examples, settings, result=result, on_step=lambda _: states.append(model.state_dict())
        )  # fmt: skip
    changed = {part: not torch.equal(value, states[-1][part]) for part, value in states[0].items()}
    return call, result.losses, changed
