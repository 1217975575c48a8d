"""Starting from any trainer's LoRA: the same change of the weights, or a message with the reason why not."""

import pytest
import torch
from blockskip_pack.blockskip_core.adapters.lora import LinearShape, LoraAdapters, LoraSettings
from blockskip_pack.blockskip_core.adapters.lora_formats import to_file_tensors, to_host_lora
from blockskip_pack.blockskip_core.errors import LoraFileError

from .. import other_loras
from ..hosted_runs import chosen, hosted
from ..tiny_flux import tiny_flux

pytestmark = pytest.mark.usefixtures("comfyui")

KEPT = ["double_blocks.1", "single_blocks.0", "single_blocks.1"]


@pytest.fixture
def start(comfyui):
    from blockskip_pack.blockskip_core.hosts.files.start_lora import lora_to_start_from

    return lora_to_start_from


@pytest.fixture
def model(comfyui):
    return tiny_flux(mlp_ratio=4.0)


def adapters_of(model, rank=8, alpha=None, targets="all linear"):
    dit = hosted(model)
    layers = dit.lora_layers(chosen(1, 2), targets)
    shapes = {name: LinearShape(layer.in_features, layer.out_features) for name, layer in layers.items()}
    return LoraAdapters(shapes, LoraSettings(rank=rank, alpha=alpha or rank, targets=targets), seed=3)


def changes(adapters):
    """Layer -> change of its weight, for layers that have one."""
    found = {name: adapters.scale * (adapters.up(name) @ adapters.down(name)).detach() for name in adapters.names}
    return {name: change for name, change in found.items() if change.any()}


def assert_starts_from(start, model, tensors, expected, adapters):
    before = adapters.state_dict()
    adapters.load_state_dict(start(model, tensors, adapters))
    got = changes(adapters)
    assert got.keys() == expected.keys()
    for name, change in expected.items():
        torch.testing.assert_close(got[name], change, atol=1e-6, rtol=1e-5)
    after = adapters.state_dict()
    for name in adapters.names:
        if name not in expected:
            assert torch.equal(after[f"{name}.lora_A.weight"], before[f"{name}.lora_A.weight"])


def products(made):
    return {name: up @ down for name, (up, down) in made.items()}


@pytest.mark.parametrize("alpha", [None, 3.0])
def test_layers_of_different_ranks_are_filled_up(start, model, alpha):
    made = other_loras.pairs(model, KEPT, rank=lambda place: 1 + place % 5)
    adapters = adapters_of(model, rank=8, alpha=alpha)
    first = adapters.state_dict()
    assert_starts_from(start, model, other_loras.native(made), products(made), adapters)
    for name, (up, _) in made.items():  # new ranks can learn: A as in a fresh LoRA, B zero
        rank = up.shape[1]
        assert torch.equal(adapters.down(name)[rank:], first[f"{name}.lora_A.weight"][rank:])
        assert not adapters.up(name)[:, rank:].any()


def test_the_advice_on_ranks_leads_to_a_run(start, model):
    made = other_loras.pairs(model, KEPT, rank=lambda place: 3 + place % 3)
    with pytest.raises(LoraFileError, match=r"has ranks from 3 to 5, .* but rank is 2 here\. Set rank to 5 or more\."):
        start(model, other_loras.native(made), adapters_of(model, rank=2))
    assert_starts_from(start, model, other_loras.native(made), products(made), adapters_of(model, rank=5))


def test_names_of_kohya_and_its_alpha_are_read(start, model):
    made = other_loras.pairs(model, KEPT[:1])
    expected = {name: 3.0 * product for name, product in products(made).items()}  # alpha 6 at rank 2
    assert_starts_from(start, model, other_loras.kohya(made, 6.0), expected, adapters_of(model))


def test_layers_that_diffusers_splits_are_joined(start, model):
    tensors, expected = other_loras.diffusers(model, KEPT)
    with pytest.raises(LoraFileError, match=r"has ranks from 2 to 8, .*Set rank to 8 or more"):
        start(model, tensors, adapters_of(model, rank=4))
    assert_starts_from(start, model, tensors, expected, adapters_of(model, rank=8))


@pytest.mark.parametrize("form", ["diffusers", "peft", "kohya", "host"])
def test_our_own_files_come_back_bit_for_bit_at_the_same_rank(start, model, form):
    from blockskip_pack.blockskip_core.hosts.families.lora_names import file_names

    trained = adapters_of(model, rank=4, alpha=8.0)
    with torch.no_grad():
        for name in trained.names:
            trained.up(name).normal_()
    state = trained.state_dict()
    rows = {name: trained.up(name).shape[0] for name in trained.names}
    names = file_names(model.model, hosted(model).adapter, rows, "diffusers").in_diffusers
    assert names
    tensors = to_host_lora(state, 2.0) if form == "host" else to_file_tensors(state, 2.0, form, names)
    again = start(model, tensors, trained)
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in state.items())


def test_a_layer_that_is_narrower_than_the_lora_is_cut_down(start, model):
    made = other_loras.pairs(model, KEPT, rank=80)  # the model is 64 wide
    assert_starts_from(start, model, other_loras.native(made), products(made), adapters_of(model, rank=64))


# --- files that cannot be used -----------------------------------------------------------------------------------


def of_kept(model):
    return other_loras.native(other_loras.pairs(model, KEPT))


NAME = "diffusion_model.single_blocks.0.linear2"


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (
            {"lora_te1_x.lora_up.weight": torch.ones(2, 2)},
            r"parts that cannot be trained here\. .* 1 of a text encoder\. Apply it",
        ),
        ({f"{NAME}0.lora_A.weight": torch.ones(2, 2)}, r"1 of layers that this model does not have \(single_blocks.0.linear20\)"),
        (
            {f"{NAME}.diff_b": torch.ones(64)},
            r"also changes layers that are not trained here \(single_blocks\.0\.linear2\.bias\)",
        ),
        ({f"{NAME}.dora_scale": torch.ones(64, 1)}, r"single_blocks\.0\.linear2 has a magnitude vector, as in DoRA"),
        ({f"{NAME}.reshape_weight": torch.tensor([128, 640])}, "linear2 has more inputs or outputs than the model"),
        ({f"{NAME}.lora_B.weight": torch.full((64, 2), torch.nan)}, "its numbers for single_blocks.0.linear2 are not all finite"),
        ({f"{NAME}.lora_A.weight": torch.full((2, 320), torch.inf)}, "are not all finite"),
    ],
)  # fmt: skip
def test_what_would_be_lost_is_named(start, model, more, said):
    with pytest.raises(LoraFileError, match=said) as refusal:
        start(model, of_kept(model) | more, adapters_of(model))
    assert "(0, 0" not in str(refusal.value)


def test_other_kinds_of_adapters_are_named(start, model):
    made = other_loras.pairs(model, KEPT[1:2])
    lokr = {f"diffusion_model.{name}.lokr_w1": torch.ones(1, 1) for name in made}
    lokr |= {
        f"diffusion_model.{name}.lokr_w2": torch.ones(up.shape[0], down.shape[1]) for name, (up, down) in made.items()
    }
    with pytest.raises(
        LoraFileError, match=r"not a plain LoRA: single_blocks\.0\.[\w.]+ has a LoKr\. Apply it to the MODEL"
    ):
        start(model, lokr, adapters_of(model))


@pytest.mark.parametrize("form", ["native", "diffusers"])
def test_layers_that_are_not_trained_are_named_as_layers(start, model, form):
    blocks = ["single_blocks.3"]
    tensors = other_loras.diffusers(model, blocks)[0] if form == "diffusers" else other_loras.native(other_loras.pairs(model, blocks))  # fmt: skip
    with pytest.raises(LoraFileError, match=r"not trained here \(single_blocks\.3\.linear1, single_blocks\.3\.linear2"):
        start(model, of_kept(model) | tensors, adapters_of(model))


def test_a_lora_for_another_model_is_refused(start, model):
    with pytest.raises(LoraFileError, match="has nothing for this model"):
        start(model, {"x.lora_up.weight": torch.ones(2, 2)}, adapters_of(model))
