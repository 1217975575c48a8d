"""Kept blocks quantised for a run: their size, their results, and that nothing is left of them."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from itertools import cycle
from pathlib import Path

import pytest
import torch
from blockskip_pack.blockskip_core.accounting.weight_formats import (
    WEIGHT_FORMATS,
    is_quantizable,
    predicted_bytes,
    stored_bytes,
)
from blockskip_pack.blockskip_core.blocks.stand_ins import TrainedBlock
from blockskip_pack.blockskip_core.errors import InvalidInputError, TrainingError
from blockskip_pack.blockskip_core.residuals.sources import FoldedSource
from blockskip_pack.blockskip_core.selection.selection import BlockSelection
from blockskip_pack.blockskip_core.training.quantisation_offsets import QuantisationOffsets

from ...core.plain_dit import MemorySource, lora_for, train
from ..hosted_runs import PLAN, chosen, clean_latents, flux_lora, host_sample, hosted
from ..tiny_flux import assert_same_weights, tiny_flux, weights
from .test_hosted_dit import assert_same_state, state

pytestmark = pytest.mark.usefixtures("comfyui")
FORMATS = list(WEIGHT_FORMATS)
DEMO = Path(__file__).resolve().parents[3] / "demo" / "assets" / "blockskip_world_dit.safetensors"
DTYPES = {
    "fp32": (torch.float32, None),
    "bf16": (torch.bfloat16, torch.float32),
    "fp16": (torch.float16, torch.float32),
}
SPANS = chosen(1, 2)
# Relative error of normally distributed weights, rows of 64 to 192: fp8 has 3 bits of mantissa, int8 has 127 steps up
# to a row's largest number (about 2.5 standard deviations), NVFP4 has a scale per 16 numbers. Bounds are within 10 % of
# the errors measured on random matrices.
WEIGHT_ERROR = {"fp8": (0.022, 0.030), "int8": (0.0045, 0.0075), "4-bit": (0.085, 0.105)}


def quantised(patcher, weight_format, spans=SPANS):
    from blockskip_pack.blockskip_core.hosts.models.quantised_blocks import QuantisedDit

    dit = hosted(patcher)
    return QuantisedDit(dit, {dit.blocks[index].name: weight_format for index in spans.kept})


@pytest.fixture(autouse=True)
def _skip_what_the_host_does_not_have(request):
    import comfy.quant_ops

    name = getattr(request.node, "callspec", None) and request.node.callspec.params.get("weight_format")
    if name and WEIGHT_FORMATS[name].algorithm not in comfy.quant_ops.QUANT_ALGOS:
        pytest.skip("this ComfyUI does not have the format")


def flux(kind="fp32"):
    dtype, cast_to = DTYPES[kind]
    return tiny_flux(dtype=dtype, cast_to=cast_to)


def one_run(dit, spans=SPANS, *, residuals_of=None, source=None, on_step=None, **settings):
    """Train on ``dit`` with residuals of another model; return (result, gradients)."""
    clean = clean_latents()
    source = source or MemorySource(residuals_of or dit, spans, PLAN, clean)
    adapters = flux_lora(dit, spans, zero=False)
    return train(dit, spans, source, adapters, plan=PLAN, clean=clean, batch_size=2, on_step=on_step, **settings)


def written_out(patcher, dit):
    """A float32 model with the weights that ``dit`` computes with."""
    twin = tiny_flux()
    own = patcher.model.diffusion_model
    with torch.inference_mode():
        for name, module in twin.model.diffusion_model.named_modules():
            for leaf, parameter in module.named_parameters(recurse=False):
                parameter.copy_(getattr(own.get_submodule(name), leaf))
        for block in dit._formats:
            for path, layer in dit.module(block).named_modules():
                if hasattr(getattr(layer, "weight", None), "_qdata"):
                    linear = twin.model.diffusion_model.get_submodule(f"{block}.{path}")
                    linear.weight.copy_(layer.weight.to(torch.float32).dequantize())
    return twin


@pytest.fixture
def loaded(monkeypatch):
    """Block -> (bytes, dtypes) of the weights stored during every run."""
    from blockskip_pack.blockskip_core.hosts.models.hosted_dit import HostedDit

    loads = []
    running = HostedDit.running

    @contextmanager
    def watching(self, replacements, **options):
        with running(self, replacements, **options) as denoise:
            sizes = {}
            for name, parameter in self.patcher.model.diffusion_model.named_parameters():
                block = ".".join(name.split(".")[:2])
                sizes[block] = sizes.get(block, 0) + stored_bytes(parameter)
            loads.append(sizes)
            yield denoise

    monkeypatch.setattr(HostedDit, "running", watching)
    return loads


@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("kind", DTYPES)
def test_the_host_holds_exactly_the_predicted_bytes(loaded, weight_format, kind):
    patcher = flux(kind)
    plain = hosted(patcher)
    dit = quantised(patcher, weight_format)
    one_run(dit, residuals_of=plain)
    for index in SPANS.kept:
        block = plain.blocks[index]
        expected = predicted_bytes(plain.module(block.name), weight_format)
        assert loaded[-1][block.name] == expected == dit.blocks[index].num_bytes < block.num_bytes
    for index in set(range(6)) - set(SPANS.kept):
        assert plain.blocks[index].name not in loaded[-1]
        assert dit.blocks[index].num_bytes == plain.blocks[index].num_bytes
    full = sum(plain.blocks[index].num_bytes for index in SPANS.kept)
    share = sum(dit.blocks[index].num_bytes for index in SPANS.kept) / full
    number = 0.5625 if weight_format == "4-bit" else 1.0
    assert share == pytest.approx(number / DTYPES[kind][0].itemsize, rel=0.25)


@pytest.mark.parametrize("weight_format", FORMATS)
def test_bytes_of_odd_shapes_are_predicted_and_need_no_memory(weight_format):
    import comfy.quant_ops

    chosen_format = WEIGHT_FORMATS[weight_format]
    layout = comfy.quant_ops.QUANT_ALGOS[chosen_format.algorithm]["comfy_tensor_layout"]
    for shape in ((1, 16), (16, 16), (17, 33), (128, 64), (130, 250), (3, 1000)):
        packed = comfy.quant_ops.QuantizedTensor.from_float(torch.randn(shape), layout, **chosen_format.options)
        assert stored_bytes(packed) == chosen_format.num_bytes(*shape), shape
    large = torch.nn.Linear(3072, 12288, device="meta", dtype=torch.bfloat16)
    assert predicted_bytes(large, weight_format) == chosen_format.num_bytes(12288, 3072) + 2 * 12288
    assert predicted_bytes(large, "off") == 2 * 12288 * 3073


@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize(("kind", "checkpointing"), list(zip(DTYPES, cycle((False, True)), strict=False)))
def test_gradients_are_those_of_the_written_out_weights(kind, weight_format, checkpointing):
    """Both use residuals of the model as loaded; the reference model holds the quantised numbers in float32."""
    patcher = flux(kind)
    source = MemorySource(hosted(patcher), SPANS, PLAN, clean_latents())
    dit = quantised(patcher, weight_format)
    result, gradients = one_run(dit, source=source, checkpointing=checkpointing)
    reference = hosted(written_out(patcher, dit))
    reference.known_error = dit.known_error
    expected, expected_gradients = one_run(reference, source=source, checkpointing=False)
    assert result.losses == pytest.approx(expected.losses, rel=1e-5)
    for key, gradient in expected_gradients.items():
        assert (gradients[key] - gradient).norm() <= 2e-5 * gradient.norm(), key


@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("kind", DTYPES)
def test_weight_errors_are_those_of_the_format_and_no_norm_or_bias_is_touched(kind, weight_format):
    patcher = flux(kind)
    dit = quantised(patcher, weight_format)
    names = {
        f"{block}.{path}" for block in dit._formats for path, _ in dit._shrunk(block, hosted(patcher).module(block))
    }
    for block in dit._formats:
        own = dict(hosted(patcher).module(block).named_parameters())
        for name, parameter in dit.module(block).named_parameters():
            if hasattr(parameter, "_qdata"):
                weight = own[name].float()
                error = ((parameter.to(torch.float32).dequantize() - weight).norm() / weight.norm()).item()
                assert dit.layer_errors[f"{block}.{name.removesuffix('.weight')}"] == pytest.approx(error, abs=1e-4)
                low, high = WEIGHT_ERROR[weight_format]
                assert low < error < high, (name, error)
                names.remove(f"{block}.{name.removesuffix('.weight')}")
            else:
                assert parameter.data_ptr() == own[name].data_ptr(), name
    assert not names
    assert dit.known_error == pytest.approx(5 * max(dit.layer_errors.values()))


@pytest.mark.parametrize("weight_format", FORMATS)
def test_nothing_of_a_weights_size_is_saved_for_backward(weight_format):
    patcher = flux("bf16")
    plain = one_run(hosted(patcher), checkpointing=False)[0].saved_bytes
    assert (
        one_run(quantised(patcher, weight_format), residuals_of=hosted(patcher), checkpointing=False)[0].saved_bytes
        == plain
    )


@pytest.mark.parametrize("weight_format", FORMATS)
def test_the_self_check_is_on_and_sees_the_error_of_quantisation(weight_format):
    """The error is less than twice that of the worst layer (measured: 1.4 times); wrong residuals are still refused."""
    patcher = flux()
    plain, dit = hosted(patcher), quantised(patcher, weight_format)
    source = MemorySource(plain, SPANS, PLAN, clean_latents())
    exact = one_run(plain, source=source)[0].self_check
    result = one_run(dit, source=source)[0]
    assert exact < 1e-5 < result.self_check < 2 * max(dit.layer_errors.values())
    for residual in source.computed.residuals.values():
        residual.back.neg_()
    with pytest.raises(TrainingError, match="differs from the full model.*choose a finer format"):
        one_run(dit, source=source)
    with pytest.raises(TrainingError, match=r"for both\.$"):
        one_run(plain, source=source)


@pytest.mark.parametrize(
    ("weight_format", "layers", "output"),
    [("fp8", (0.026, 0.027), 0.0314), ("int8", (0.006, 0.009), 0.0104), ("4-bit", (0.093, 0.097), 0.123)],
)
def test_errors_of_the_demos_model_are_those_that_the_documents_name(weight_format, layers, output):
    """A trained model of 12 blocks, none skipped, random captions and latents: help page, ERROR_ALLOWANCE."""
    import comfy.sd
    from blockskip_pack.blockskip_core.hosts.models.hosted_dit import HostedDit
    from blockskip_pack.blockskip_core.hosts.models.quantised_blocks import QuantisedDit

    model = comfy.sd.load_diffusion_model(str(DEMO))
    params, generator = model.model.diffusion_model.params, torch.Generator().manual_seed(0)
    texts = [
        [[
            torch.randn(1, length, params.context_in_dim, generator=generator),
            {"pooled_output": torch.randn(1, params.vec_in_dim, generator=generator)},
        ]]
        for length in (5, 5, 3)
    ]  # fmt: skip
    clean = torch.randn(4, params.in_channels, 8, 8, generator=generator)
    dit = HostedDit(model, texts, clean.shape[1:])
    spans = BlockSelection(front=0, back=0, num_blocks=12, family="flux")
    again = QuantisedDit(dit, {block.name: weight_format for block in dit.blocks})
    source = MemorySource(dit, spans, PLAN, clean)
    result, _ = train(again, spans, source, flux_lora(dit, spans), plan=PLAN, clean=clean)
    errors = again.layer_errors.values()
    assert layers[0] < min(errors) < max(errors) < layers[1]
    assert result.self_check == pytest.approx(output, rel=0.03)
    assert result.self_check < 1.4 * max(errors)


@pytest.mark.parametrize("source", [None, FoldedSource()], ids=["cached", "folded"])
@pytest.mark.parametrize("problem", ["none", "exception", "interrupt", "while quantising"])
def test_the_users_model_is_left_as_it_was(problem, source):
    import comfy.model_management

    patcher = flux("bf16")
    patcher.model_size()
    before, numbers, plain = state(patcher), weights(patcher), hosted(patcher)
    dit = quantised(patcher, "4-bit")
    kind = {"none": None, "exception": RuntimeError}.get(problem, comfy.model_management.InterruptProcessingException)

    def interrupt(done, total=0):
        if getattr(done, "step", done) == 2 and kind:
            raise kind

    with pytest.raises(kind) if kind else nullcontext():
        dit.quantise(interrupt if problem == "while quantising" else None)
        one_run(dit, residuals_of=plain, source=source, steps=3, on_step=interrupt)
    assert_same_state(patcher, before)
    assert_same_weights(patcher, numbers)


def test_the_model_samples_and_trains_as_before_afterwards():
    patcher = flux()
    plain = hosted(patcher)
    picture, losses = host_sample(patcher), one_run(plain)[0].losses
    one_run(quantised(patcher, "fp8"), residuals_of=plain, steps=2)
    assert torch.equal(host_sample(patcher), picture)
    assert one_run(plain)[0].losses == losses


@pytest.mark.parametrize("weight_format", FORMATS)
def test_a_users_lora_is_quantised_with_the_weights_and_applied_once(weight_format):
    from blockskip_pack.blockskip_core.adapters.lora_formats import to_file_tensors
    from blockskip_pack.blockskip_core.hosts.files.applied_lora import apply_lora

    plain = flux()
    users = flux_lora(hosted(plain), chosen(0, 0), zero=False, size=1.0)
    patcher = apply_lora(plain, to_file_tensors(users.state_dict(), users.scale, "peft"), 0.7)[0]
    patches = {key: list(value) for key, value in patcher.patches.items()}
    source = MemorySource(hosted(patcher), SPANS, PLAN, clean_latents())
    dit = quantised(patcher, weight_format)
    assert one_run(dit, source=source)[0].self_check < 2 * max(dit.layer_errors.values())
    assert {key: list(value) for key, value in patcher.patches.items()} == patches

    in_kept = [name for name in users.names if ".".join(name.split(".")[:2]) in dit._formats]
    assert in_kept
    for name in in_kept:
        block = ".".join(name.split(".")[:2])
        own = plain.model.diffusion_model.get_submodule(name).weight
        merged = own + 0.7 * users.scale * users.up(name).detach() @ users.down(name).detach()
        found = dit.module(block).get_submodule(name[len(block) + 1 :]).weight.to(torch.float32).dequantize()
        assert (found - merged).norm() < 1.2 * WEIGHT_ERROR[weight_format][1] * merged.norm()
        assert (found - own).norm() > 0.3 * own.norm()

    dit._baked.clear()  # so that ComfyUI applies the patches to the quantised weights once more
    with pytest.raises(TrainingError, match="differs from the full model"):
        one_run(dit, source=source)
    with pytest.raises(TrainingError, match="predictions differ from those of the model as loaded by"):
        one_run(dit, source=source, offsets=QuantisationOffsets(hosted(patcher)), steps=2)


@pytest.mark.parametrize("weight_format", FORMATS)
def test_a_corrected_run_checks_both_models(weight_format):
    """The model as loaded against what was recorded with the residuals, strictly, and the mean error of quantisation."""
    patcher = flux()
    plain, dit = hosted(patcher), quantised(patcher, weight_format)
    source = MemorySource(plain, SPANS, PLAN, clean_latents())
    result = one_run(dit, source=source, offsets=QuantisationOffsets(plain), steps=2)[0]
    assert 1e-5 < result.self_check < 2 * max(dit.layer_errors.values())
    for residual in source.computed.residuals.values():
        residual.back.mul_(1.001)
    with pytest.raises(TrainingError, match=r"differs from the full model by .* for both\.$"):
        one_run(dit, source=source, offsets=QuantisationOffsets(plain), steps=2)


@pytest.mark.parametrize("name", ["nvfp4", "fp8 cast"])
def test_what_is_as_small_already_is_not_packed(tmp_path, name):
    from ..stored_flux import stored_flux
    from .test_stored_formats import hosted as hosted_file

    from blockskip_pack.blockskip_core.hosts.models.quantised_blocks import QuantisedDit  # isort: skip

    dit = hosted_file(stored_flux(tmp_path, name))
    again = QuantisedDit(dit, {block.name: "4-bit" for block in dit.blocks})
    assert again.packs_into("4-bit") is (name == "fp8 cast")
    assert again.packs_into("int8") is False


EIGHT_BITS = ["fp8 cast", "fp8 scaled", "mxfp8", "int8", "int8 convrot"]


@pytest.mark.parametrize(("name", "weight_format"), [*((name, "int8") for name in EIGHT_BITS), ("nvfp4", "4-bit"), ("nvfp4 smoothed", "4-bit"), ("convrot w4a4", "4-bit")])  # fmt: skip
def test_weights_that_are_small_already_are_left_as_they_are(tmp_path, name, weight_format):
    from ..stored_flux import stored_flux
    from .test_stored_formats import NUM_BLOCKS
    from .test_stored_formats import hosted as hosted_file

    from blockskip_pack.blockskip_core.hosts.models.quantised_blocks import QuantisedDit  # isort: skip

    dit = hosted_file(stored_flux(tmp_path, name))
    again = QuantisedDit(dit, {block.name: weight_format for block in dit.blocks})
    assert len(again.blocks) == NUM_BLOCKS
    assert [block.num_bytes for block in again.blocks] == [block.num_bytes for block in dit.blocks]
    for block in dit.blocks:
        own = dict(dit.module(block.name).named_modules())
        for path, layer in again.module(block.name).named_modules():
            assert type(layer) is type(own[path])
    assert again.known_error == 0.0


@pytest.mark.parametrize("name", EIGHT_BITS)
def test_weights_in_eight_bits_are_packed_into_four(tmp_path, name):
    """From what the host reads in them: the error is that of four bits, against the weights as loaded."""
    from ..stored_flux import stored_flux
    from .test_stored_formats import hosted as hosted_file

    from blockskip_pack.blockskip_core.hosts.models.quantised_blocks import QuantisedDit  # isort: skip

    dit = hosted_file(stored_flux(tmp_path, name))
    small = QuantisedDit(dit, {block.name: "4-bit" for block in dit.blocks})
    block = dit.blocks[0]
    own, packed = dit.module(block.name), small.module(block.name)
    assert sum(map(stored_bytes, packed.parameters())) == small.blocks[0].num_bytes < 0.7 * block.num_bytes
    changed = 0
    for path, layer in packed.named_modules():
        if small.layer_errors.get(f"{block.name}.{path}") is None:
            continue
        weight = own.get_submodule(path).weight
        loaded = (weight.dequantize() if name != "fp8 cast" else weight).float()
        found = layer.weight.dequantize().float()
        assert WEIGHT_ERROR["4-bit"][0] < (found - loaded).norm() / loaded.norm() < WEIGHT_ERROR["4-bit"][1]
        tokens = torch.randn(3, loaded.shape[1], dtype=dit.dtype)
        bias = None if layer.bias is None else layer.bias.float()
        expected = torch.nn.functional.linear(tokens.float(), found, bias)
        assert (layer(tokens).float() - expected).norm() < 0.01 * expected.norm()
        changed += 1
    assert changed == len([module for module in own.modules() if is_quantizable(module)]) > 3


def test_a_layers_place_in_virtual_memory_is_used_again():
    """Addresses for paged weights are never freed; small layers have none."""
    patcher = tiny_flux(width=128, heads=1, mlp_ratio=4.0)
    block = patcher.model.diffusion_model.single_blocks[0]
    block.linear1._v = place = object()
    block.linear2._v = object()
    dit = quantised(patcher, "fp8", chosen(1, 2))
    found = dit.module("single_blocks.0")
    assert found.linear1._v is place
    assert not hasattr(found.modulation.lin, "_v")
    with pytest.MonkeyPatch.context() as patch:
        from blockskip_pack.blockskip_core.hosts.models import quantised_blocks

        patch.setattr(quantised_blocks, "_SMALLEST_STREAMED", 2**30)
        assert not hasattr(quantised(patcher, "fp8", chosen(1, 2)).module("single_blocks.0").linear1, "_v")


def test_a_format_that_the_host_does_not_have_is_refused(monkeypatch):
    import comfy.quant_ops

    monkeypatch.delitem(comfy.quant_ops.QUANT_ALGOS, "int8_tensorwise", raising=False)
    from blockskip_pack.blockskip_core.hosts.models.quantised_blocks import available_formats

    assert available_formats() == ["off", "fp8", "4-bit"]
    with pytest.raises(InvalidInputError, match=r"'int8' is not a format of this ComfyUI .*has off, fp8, 4-bit"):
        quantised(flux(), "int8")
    monkeypatch.setattr(comfy.quant_ops, "QuantizedTensor", object)
    assert available_formats() == ["off"]


def test_hooks_on_layers_are_kept():
    patcher = flux()
    seen = []
    layer = patcher.model.diffusion_model.single_blocks[0].linear1
    handle = layer.register_forward_hook(lambda module, args, output: seen.append(module))
    dit = quantised(patcher, "fp8", chosen(1, 2))
    stand = TrainedBlock(dit.module("single_blocks.0"), checkpointed=False)
    stand.get_submodule("linear1")(torch.randn(1, 64))
    handle.remove()
    assert len(seen) == 1
    assert seen[0] is not layer


def test_adapters_find_the_same_layers():
    dit = quantised(flux(), "fp8")
    plain = hosted(flux())
    assert lora_for(dit, SPANS).names == lora_for(plain, SPANS).names


@pytest.mark.parametrize("name", ["fp8 cast", "fp8 scaled", "int8 convrot"])
def test_a_model_in_eight_bits_trains_with_frozen_blocks_in_four(tmp_path, name):
    """Loss and gradients are those of the model whose frozen block was replaced by what four bits hold of it."""
    from ..stored_flux import stored_flux
    from . import test_stored_formats as stored

    from blockskip_pack.blockskip_core.hosts.models.quantised_blocks import QuantisedDit  # isort: skip

    spans, clean = stored.SPANS.with_exact_back(), stored.clean_latents()
    dit = stored.hosted(stored_flux(tmp_path, name))
    frozen = dit.blocks[spans.frozen_span[0]].name
    small = QuantisedDit(dit, {frozen: "4-bit"})
    before = MemorySource(dit, spans, stored.PLAN, clean)

    def run(model, source):
        adapters = lora_for(
            dit, spans, wanted=lambda layer: dit.adapter.is_lora_target(layer, "attention and mlp"),
            dtype=torch.float32, zero=False, size=0.05,
        )  # fmt: skip
        return train(model, spans, source, adapters, plan=stored.PLAN, clean=clean, batch_size=2)

    result, gradients = run(small, before)
    assert 0.001 < result.self_check < 2 * max(small.layer_errors.values())
    block = dit.module(frozen)
    with torch.inference_mode():
        for path, layer in list(block.named_modules()):
            if f"{frozen}.{path}" in small.layer_errors:
                layer.weight = torch.nn.Parameter(
                    small.module(frozen).get_submodule(path).weight.dequantize().to(dit.dtype), requires_grad=False
                )
    expected, wanted = run(dit, MemorySource(dit, spans, stored.PLAN, clean))
    assert result.losses == pytest.approx(expected.losses, rel=2e-2)
    for key, gradient in wanted.items():
        assert (gradients[key] - gradient).norm() < 0.05 * gradient.norm().clamp_min(1e-12), key
