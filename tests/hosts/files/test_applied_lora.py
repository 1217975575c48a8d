"""LoRAs on a MODEL: applied like ComfyUI's own loader, or refused; ignored tensors are reported."""

import pytest
import torch
from blockskip_pack.blockskip_core.adapters.lora_formats import to_file_tensors
from blockskip_pack.blockskip_core.errors import LoraFileError

from ...core.plain_dit import selection
from .. import other_loras
from ..hosted_runs import clean_latents, flux_lora, full_forward, hosted
from ..tiny_flux import assert_same_weights, tiny_flux, weights

pytestmark = pytest.mark.usefixtures("comfyui")


@pytest.fixture
def files(comfyui):
    from blockskip_pack.blockskip_core.hosts.files import applied_lora

    return applied_lora


def merged(patcher):
    """All weights of a MODEL with its patches, as merged by ComfyUI."""
    import comfy.model_management

    clone = patcher.clone()
    comfy.model_management.load_models_gpu([clone], force_full_load=True)
    found = {name: tensor.detach().clone() for name, tensor in clone.model.state_dict().items()}
    comfy.model_management.unload_all_models()
    return found


def assert_as_the_hosts_loader(files, patcher, lora, strength=0.7):
    import comfy.sd

    theirs, _ = comfy.sd.load_lora_for_models(patcher, None, dict(lora), strength, 0.0)
    expected, plain = merged(theirs), merged(patcher)
    applied = files.apply_lora(patcher, lora, strength)
    got = merged(applied.model)
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())
    assert any(not torch.equal(plain[name], tensor) for name, tensor in expected.items())
    return applied


# --- whether it fits ---------------------------------------------------------------------------------------------


def a_lora(**sizes):
    dit = hosted(tiny_flux(**sizes))
    adapters = flux_lora(dit, selection(0, 0, len(dit.blocks)), zero=False)
    return to_file_tensors(adapters.state_dict(), adapters.scale, "peft")


def test_a_lora_for_a_model_of_another_size_is_refused_and_the_model_stays(files):
    patcher = tiny_flux()
    before = weights(patcher)
    with pytest.raises(LoraFileError, match="it has .*, the model has .* trained for a model of another size"):
        files.apply_lora(patcher, a_lora(width=128, heads=2), 1.0)
    assert not patcher.patches
    assert_same_weights(patcher, before)


def test_a_lora_for_another_kind_of_model_is_refused(files):
    foreign = {
        "lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": torch.ones(2, 8),
        "lora_unet_down_blocks_0_attentions_0_proj_in.lora_up.weight": torch.ones(8, 2),
    }
    for lora in (foreign, {}, {"x": torch.ones(3)}):
        with pytest.raises(LoraFileError, match="has nothing for Flux"):
            files.apply_lora(tiny_flux(), lora, 1.0)


def test_applying_makes_a_clone_and_strength_scales_the_change(files):
    patcher, lora, clean = tiny_flux(), a_lora(), clean_latents()
    plain = full_forward(hosted(patcher), clean, [0])
    zero = files.apply_lora(patcher, lora, 0.0).model
    assert torch.equal(full_forward(hosted(zero), clean, [0]), plain)
    one = files.apply_lora(patcher, lora, 1.0).model
    assert one is not patcher
    assert not patcher.patches
    assert not torch.allclose(full_forward(hosted(one), clean, [0]), plain, atol=1e-3)
    assert torch.equal(full_forward(hosted(patcher), clean, [0]), plain)


# --- files of other programs -------------------------------------------------------------------------------------

BLOCKS = ["double_blocks.0", "single_blocks.1"]


def test_split_names_of_diffusers_are_patched_as_the_host_does(files):
    patcher = tiny_flux(mlp_ratio=4.0)
    tensors, change = other_loras.diffusers(patcher, BLOCKS)
    applied = assert_as_the_hosts_loader(files, patcher, tensors)
    assert (applied.num_patched, applied.passed_over) == (len(change), "")


def test_a_part_that_is_no_part_of_the_layer_is_refused(files):
    patcher = tiny_flux(mlp_ratio=4.0)
    tensors, _ = other_loras.diffusers(patcher, BLOCKS)
    with pytest.raises(LoraFileError, match="It was trained for a model of another size"):
        files.apply_lora(tiny_flux(mlp_ratio=2.0), tensors, 1.0)


def control_lora(patcher, widened):
    """A LoRA in the form of FLUX.1 Canny and Depth: biases, norms, and a first layer with more inputs."""
    tensors = {}
    for name, (up, down) in other_loras.pairs(patcher, BLOCKS).items():
        tensors |= {
            f"{name}.lora_B.weight": up,
            f"{name}.lora_A.weight": down,
            f"{name}.lora_B.bias": torch.ones(len(up)),
        }
    for index in range(4):
        tensors[f"single_blocks.{index}.norm.key_norm.scale"] = torch.full((32,), 1.5)
    rows, columns = patcher.model.diffusion_model.img_in.weight.shape
    return tensors | {
        "img_in.lora_B.weight": torch.full((rows, 4), 0.1), "img_in.lora_A.weight": torch.ones(4, columns + widened),
        "img_in.lora_B.bias": torch.zeros(rows),
    }  # fmt: skip


def test_a_lora_that_widens_a_layer_is_patched_as_the_host_does(files):
    patcher = tiny_flux()
    columns = patcher.model.diffusion_model.img_in.weight.shape[1]
    applied = assert_as_the_hosts_loader(files, patcher, control_lora(patcher, columns), 1.0)
    assert merged(applied.model)["diffusion_model.img_in.weight"].shape[1] == 2 * columns


def test_a_lora_that_would_make_a_layer_narrower_is_refused(files):
    patcher = tiny_flux()
    with pytest.raises(LoraFileError, match="for diffusion_model.img_in.weight it has"):
        files.apply_lora(patcher, control_lora(patcher, -2), 1.0)


# --- tensors that ComfyUI ignores --------------------------------------------------------------------------------


def test_what_is_not_used_is_counted_and_named_by_kind(files, caplog):
    patcher = tiny_flux()
    tensors = other_loras.native(other_loras.pairs(patcher, ["double_blocks.0"]))
    total = len(tensors)
    tensors |= {
        name.replace("double_blocks.0", "double_blocks.30"): tensor
        for name, tensor in other_loras.native(other_loras.pairs(patcher, ["double_blocks.0"])).items()
        if "mlp.0" in name
    }
    tensors["lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight"] = torch.ones(4, 4)
    tensors["text_encoder_2.x.lora_A.weight"] = torch.ones(4, 4)
    tensors["diffusion_model.double_blocks.0.img_mlp.0.lora_C.weight"] = torch.ones(4, 4)
    applied = assert_as_the_hosts_loader(files, patcher, tensors)
    assert applied.passed_over == (
        f"ComfyUI does not use 7 of the {total + 7} tensors: 2 of a text encoder, 1 of a kind that it does not support "
        "here "
        "(double_blocks.0.img_mlp.0.lora_C.weight), 4 of layers that this model does not have "
        "(double_blocks.30.img_mlp.0, double_blocks.30.txt_mlp.0)."
    )
    assert any(applied.passed_over in record.getMessage() for record in caplog.records)


def test_a_lora_that_is_used_as_a_whole_says_nothing(files, caplog):
    patcher = tiny_flux()
    for tensors in (
        other_loras.native(other_loras.pairs(patcher, BLOCKS)), other_loras.kohya(other_loras.pairs(patcher, BLOCKS), 4.0),
    ):  # fmt: skip
        assert files.apply_lora(patcher, tensors, 1.0).passed_over == ""
    assert not [record for record in caplog.records if "BlockSkip" in record.getMessage()]


def test_the_reader_of_the_host_agrees_on_what_is_passed_over(files, caplog):
    """ComfyUI warns about each tensor that it did not load; the same ones are counted here."""
    import comfy.lora

    patcher = tiny_flux()
    lora = other_loras.kohya(other_loras.pairs(patcher, BLOCKS), 4.0)
    lora |= {"a.alpha": torch.tensor(1.0), "b.lora_up.weight": torch.ones(2, 2), "lora_te_x.alpha": torch.tensor(1.0)}
    comfy.lora.load_lora(dict(lora), comfy.lora.model_lora_keys_unet(patcher.model, {}), log_missing=True)
    warned = sorted(record.getMessage().removeprefix("lora key not loaded: ") for record in caplog.records)
    assert files.HostPatches(patcher, lora).unread == warned
    assert len(warned) == 3


# --- LoHa, LoKr and full differences ------------------------------------------------------------------------------

LAYER = "diffusion_model.single_blocks.1.linear2"


def loha(rows, columns):
    parts = {"hada_w1_a": (rows, 2), "hada_w1_b": (2, columns), "hada_w2_a": (rows, 2), "hada_w2_b": (2, columns)}
    return {f"{LAYER}.{name}": torch.full(shape, 0.1) for name, shape in parts.items()}


def lokr(rows, columns):
    return {f"{LAYER}.lokr_w1": torch.full((2, 2), 0.1), f"{LAYER}.lokr_w2": torch.ones(rows // 2, columns // 2)}


def lokr_in_parts(rows, columns):
    parts = {"lokr_w1": (2, 2), "lokr_w2_a": (rows // 2, 2), "lokr_w2_b": (2, columns // 2)}
    return {f"{LAYER}.{name}": torch.full(shape, 0.1) for name, shape in parts.items()}


def difference(rows, columns):
    return {f"{LAYER}.diff": torch.full((rows, columns), 0.1), f"{LAYER}.diff_b": torch.ones(rows)}


KINDS = pytest.mark.parametrize("tensors_of", [loha, lokr, lokr_in_parts, difference])


@KINDS
def test_other_kinds_that_fit_are_patched_as_the_host_does(files, tensors_of):
    patcher = tiny_flux()
    tensors = tensors_of(*patcher.model.diffusion_model.single_blocks[1].linear2.weight.shape)
    applied = assert_as_the_hosts_loader(files, patcher, tensors)
    assert applied.num_patched == (2 if tensors_of is difference else 1)
    assert applied.passed_over == ""


@pytest.mark.parametrize("tensors_of", [loha, lokr, lokr_in_parts])
def test_low_rank_kinds_of_another_size_are_refused_where_the_host_goes_on_without_them(files, tensors_of):
    patcher = tiny_flux()
    rows, columns = patcher.model.diffusion_model.single_blocks[1].linear2.weight.shape
    for tensors in (tensors_of(rows, 2 * columns), tensors_of(columns, rows)):
        with pytest.raises(LoraFileError, match=r"single_blocks\.1\.linear2\.\w+ it has \d+ x \d+, the model has"):
            files.apply_lora(patcher, tensors, 1.0)


def test_matrices_that_do_not_fit_each_other_are_refused(files):
    patcher = tiny_flux()
    tensors = loha(*patcher.model.diffusion_model.single_blocks[1].linear2.weight.shape)
    for damage in (torch.ones(3, 4), torch.ones(2, 7)):
        with pytest.raises(LoraFileError, match="This LoRA is damaged: for .* do not fit each other"):
            files.apply_lora(patcher, {**tensors, f"{LAYER}.hada_w2_b": damage}, 1.0)


def test_a_difference_of_another_size_is_left_out_and_named_and_the_rest_is_applied(files, caplog):
    patcher = tiny_flux()
    rows, columns = patcher.model.diffusion_model.single_blocks[1].linear2.weight.shape
    lora = a_lora() | difference(rows, 2 * columns)
    applied = assert_as_the_hosts_loader(files, patcher, lora)
    said = "Left out are full differences of another size than the model's weights (single_blocks.1.linear2.weight)."
    assert applied.passed_over == said
    assert applied.num_patched == len(a_lora()) // 2  # without that weight, with its bias
    assert any(said in record.getMessage() for record in caplog.records)
    alone = {f"{LAYER}.diff": torch.ones(rows, 2 * columns)}
    with pytest.raises(LoraFileError, match="has nothing for Flux.* Left out"):
        files.apply_lora(patcher, alone, 1.0)


def test_a_tucker_decomposition_is_left_to_the_host(files):
    from comfy.weight_adapter.lora import LoRAAdapter

    class Convolution:
        model = torch.nn.Module()

    Convolution.model.conv = torch.nn.Conv2d(6, 8, 3)
    mid, up, down = torch.ones(2, 2, 3, 3), torch.ones(8, 2, 1, 1), torch.ones(2, 6, 1, 1)
    patch = LoRAAdapter(set(), (up, down, 2.0, mid, None, None))
    from blockskip_pack.blockskip_core.hosts.files.patch_shapes import without_misfits

    assert without_misfits(Convolution, {"conv.weight": patch}) == ({"conv.weight": patch}, [])
