"""Which weights ComfyUI loads while residuals are computed and while a LoRA is trained."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from blockskip_pack.blockskip_core.blocks.stand_ins import TrainedBlock
from blockskip_pack.blockskip_core.residuals.precompute import precompute_residuals

from ..hosted_runs import PLAN, chosen, clean_latents, hosted, run
from ..tiny_families import FAMILIES
from ..tiny_flux import tiny_flux


@pytest.fixture
def watched(comfyui, monkeypatch):
    """The blocks with weights in the loaded model, recorded at every load of a clone with stand-ins."""
    from blockskip_pack.blockskip_core.hosts.models.hosted_dit import HostedDit

    loads: list[set[str]] = []
    running = HostedDit.running

    @contextmanager
    def watching(self, replacements, **options):
        with running(self, replacements, **options) as denoise:
            names = [name for name, _ in self.patcher.model.diffusion_model.named_parameters()]
            loads.append({".".join(name.split(".")[:2]) for name in names if "_blocks." in name})
            yield denoise

    monkeypatch.setattr(HostedDit, "running", watching)
    return loads


def test_one_block_at_a_time_is_loaded_while_residuals_are_computed(watched):
    dit = hosted(tiny_flux())
    precompute_residuals(dit, PLAN, clean_latents(), chosen(1, 2), range(4))
    assert watched == [{block.name} for block in dit.blocks]


@pytest.mark.parametrize(("front", "back"), [(0, 0), (2, 1), (3, 2)])
def test_only_kept_blocks_are_loaded_while_training(watched, front, back):
    patcher = tiny_flux()
    spans = chosen(front, back)
    run(patcher, spans, steps=1)
    kept = {hosted(patcher).blocks[index].name for index in spans.kept}
    assert watched[-1] == kept


def test_kept_weights_lie_in_the_models_own_memory(comfyui, monkeypatch):
    """No second copy: the clone's weights are the same bytes at the same address."""
    from blockskip_pack.blockskip_core.hosts.models.hosted_dit import HostedDit

    patcher = tiny_flux()
    own = {name: p.data_ptr() for name, p in patcher.model.diffusion_model.named_parameters()}
    seen: dict[str, int] = {}
    running = HostedDit.running

    @contextmanager
    def watching(self, replacements, **options):
        with running(self, replacements, **options) as denoise:
            seen.update({n: p.data_ptr() for n, p in self.patcher.model.diffusion_model.named_parameters()})
            yield denoise

    monkeypatch.setattr(HostedDit, "running", watching)
    run(patcher, chosen(2, 1), steps=1)
    assert seen
    assert seen == {name: own[name] for name in seen}


def test_weights_that_were_moved_for_a_run_are_dropped_not_copied_back(comfyui):
    """ComfyUI moves a layer by giving it new parameters; afterwards the clone has those of the model again."""
    dit = hosted(tiny_flux())
    name = dit.blocks[0].name
    stand = TrainedBlock(dit.module(name), checkpointed=False)
    layer = stand.get_submodule("img_attn.qkv")
    own = layer.weight
    with dit.running({name: stand}):
        layer._parameters["weight"] = torch.nn.Parameter(own.detach().clone())
    assert layer.weight is own
    assert own.data_ptr() == dit.module(name).img_attn.qkv.weight.data_ptr()


def test_text_encoder_and_vae_are_unloaded_before_the_model_comes(comfyui):
    import comfy.model_management as management

    others = [tiny_flux(seed=7), tiny_flux(seed=8)]
    management.load_models_gpu(others)
    patcher = tiny_flux()
    with hosted(patcher).running({}):
        assert [loaded.model.is_clone(patcher) for loaded in management.current_loaded_models] == [True]
    for other in others:
        management.load_models_gpu([other])  # they are loaded again on request
        assert any(loaded.model is other for loaded in management.current_loaded_models)


def free_memory_of(free):
    """Replace ComfyUI's query for free memory."""

    def get_free_memory(device=None, torch_free_too=False):
        return (free, free) if torch_free_too else free

    return get_free_memory


@pytest.fixture
def a_card(comfyui, monkeypatch):
    """Make the meta device act as a card with this many bytes free; return the patcher of a tiny model on it."""
    import comfy.model_management as management

    def with_free_bytes(free):
        monkeypatch.setattr(management, "vram_state", management.VRAMState.NORMAL_VRAM)
        monkeypatch.setattr(management, "get_free_memory", free_memory_of(free))
        monkeypatch.setattr(management, "MIN_WEIGHT_MEMORY_RATIO", 0.0)  # as for NVIDIA cards
        monkeypatch.setattr(management, "minimum_inference_memory", lambda: 0)
        monkeypatch.setattr(management, "extra_reserved_memory", lambda: 0)
        patcher = tiny_flux()
        patcher.load_device = torch.device("meta")
        return patcher

    return with_free_bytes


def on_the_card(patcher, spans, **placement):
    """Names of the blocks with a weight matrix on the card while the kept blocks are loaded for training."""
    from blockskip_pack.blockskip_core.blocks.skipping_model import SkippingModel

    dit = hosted(patcher)
    model = SkippingModel(dit, spans, checkpointed=True, folded=False)
    with dit.running(model.modules, **placement):
        named = list(patcher.model.diffusion_model.named_parameters())
        found = {".".join(name.split(".")[:2]) for name, p in named if "_blocks." in name and p.is_meta and p.ndim == 2}
        patcher.model.model_sampling.to_empty(device="cpu")  # the meta device cannot return data
    return found


def test_resident_weights_of_kept_blocks_go_to_the_card_and_no_others(a_card):
    patcher = a_card(10**12)
    kept = {hosted(patcher).blocks[index].name for index in chosen(2, 1).kept}
    assert on_the_card(patcher, chosen(2, 1)) == kept
    assert not any(p.is_meta for p in patcher.model.parameters()), "and they are the model's own again afterwards"


def test_streamed_weights_stay_off_the_card(a_card):
    patcher = a_card(10**12)
    assert on_the_card(patcher, chosen(2, 1), weights="streamed") == set()
    assert not any(p.is_meta for p in patcher.model.parameters())


# --- the MODEL's own modules are never loaded ---------------------------------------------------------------------


def own_tensors(patcher):
    """Ids of the MODEL's parameters and buffers."""
    model = patcher.model.diffusion_model
    return {id(tensor) for tensor in (*model.parameters(), *model.buffers())}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_run_loads_copies_of_everything_made_outside_inference_mode(comfyui, family):
    patcher = family.build()
    own, dit = own_tensors(patcher), family.hosted(patcher)
    with torch.inference_mode(), dit.running({}):
        model = patcher.model.diffusion_model
        loaded = [*model.named_parameters(), *model.named_buffers()]
        assert loaded
        assert not [name for name, tensor in loaded if id(tensor) in own or tensor.is_inference()]
    assert own_tensors(patcher) == own


def test_what_another_node_has_put_in_stays_in(comfyui):
    patcher = tiny_flux()
    theirs = torch.nn.Linear(4, 4)
    patcher.add_object_patch("diffusion_model.time_in.in_layer", theirs)
    with hosted(patcher).running({}):
        assert patcher.model.diffusion_model.time_in.in_layer is theirs
        assert not patcher.model.diffusion_model.time_in.out_layer.weight.is_inference()


def patch_a_norm(patcher):
    """Add one to a norm's weights, and return its key; ComfyUI has had two names for it."""
    keys = [f"diffusion_model.double_blocks.1.img_attn.norm.query_norm.{name}" for name in ("weight", "scale")]
    (key,) = patcher.add_patches({key: ("diff", (torch.ones(32),)) for key in keys})
    return key


def test_weights_that_autograd_saves_are_brought_to_the_device_with_the_users_patches(a_card):
    """A streamed run: matrices stay in host memory, everything else is on the card, a LoRA on a norm included."""
    from blockskip_pack.blockskip_core.blocks.skipping_model import SkippingModel
    from blockskip_pack.blockskip_core.model import is_linear

    patcher = a_card(10**12)
    key = patch_a_norm(patcher)
    dit, spans = hosted(patcher), chosen(1, 1)
    model = SkippingModel(dit, spans, checkpointed=True, folded=False)
    with torch.enable_grad(), torch.inference_mode(False), dit.running(model.modules, weights="streamed"):
        for name in (dit.blocks[index].name for index in spans.kept):
            block = patcher.model.diffusion_model.get_submodule(name)
            layers = [layer for layer in block.modules() if any(p is not None for p in layer._parameters.values())]
            assert {is_linear(layer) for layer in layers} == {True, False}
            for layer in layers:
                assert {p.is_meta for p in layer._parameters.values() if p is not None} == {not is_linear(layer)}
        patched = patcher.model.get_submodule(key.rpartition(".")[0])
        assert not any(getattr(patched, "weight_function", [])), "the patch is in the weight, and not applied again"
        patcher.model.model_sampling.to_empty(device="cpu")


def test_a_patch_is_not_applied_again_where_the_hosts_device_has_another_name(comfyui):
    """MPS is `mps` to the host and `mps:0` to a tensor; here the CPU is `cpu:0` and `cpu`."""
    import comfy.model_management
    from blockskip_pack.blockskip_core.hosts.models.residency import keep_what_autograd_saves

    patcher = tiny_flux().clone()
    key = patch_a_norm(patcher)
    comfy.model_management.load_models_gpu([patcher])
    loaded = patcher.model.get_parameter(key)
    expected = loaded.clone()
    blocks = {
        name: patcher.model.diffusion_model.get_submodule(name) for name in ("double_blocks.0", "double_blocks.1")
    }
    keep_what_autograd_saves(patcher, blocks, torch.device("cpu", 0))
    assert patcher.model.get_parameter(key) is loaded
    assert torch.equal(loaded, expected)
    patcher.detach()
