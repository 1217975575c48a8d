"""Which weights the host has in hand while residuals are computed and while a LoRA is trained."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from blockskip_pack.blockskip_core.precompute import precompute_residuals
from blockskip_pack.blockskip_core.stand_ins import TrainedBlock

from .hosted_runs import PLAN, chosen, clean_latents, hosted, run
from .tiny_flux import tiny_flux


@pytest.fixture
def watched(comfyui, monkeypatch):
    """The blocks with weights in the loaded model, noted at every load of a stand-in clone."""
    from blockskip_pack.blockskip_core.hosts.hosted_dit import HostedDit

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
    """No second copy: a stand-in's weights are the same bytes at the same address."""
    from blockskip_pack.blockskip_core.hosts.hosted_dit import HostedDit

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
    """A host moves a layer by giving it new parameters; afterwards the stand-in has those of the model again."""
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
        management.load_models_gpu([other])  # and they come back when they are asked for
        assert any(loaded.model is other for loaded in management.current_loaded_models)


def free_memory_of(free):
    """The host's question for free memory, answered."""

    def get_free_memory(device=None, torch_free_too=False):
        return (free, free) if torch_free_too else free

    return get_free_memory


@pytest.fixture
def a_card(comfyui, monkeypatch):
    """Let the meta device play a card with so many bytes free; return the patcher of a tiny model that runs on it."""
    import comfy.model_management as management

    def with_free_bytes(free):
        monkeypatch.setattr(management, "vram_state", management.VRAMState.NORMAL_VRAM)
        monkeypatch.setattr(management, "get_free_memory", free_memory_of(free))
        monkeypatch.setattr(management, "MIN_WEIGHT_MEMORY_RATIO", 0.0)  # as for NVIDIA's
        monkeypatch.setattr(management, "minimum_inference_memory", lambda: 0)
        monkeypatch.setattr(management, "extra_reserved_memory", lambda: 0)
        patcher = tiny_flux()
        patcher.load_device = torch.device("meta")
        return patcher

    return with_free_bytes


def on_the_card(patcher, spans, **placement):
    """Names of the blocks with a weight matrix on the card while the kept ones are loaded for training."""
    from blockskip_pack.blockskip_core.skipping_model import SkippingModel

    dit = hosted(patcher)
    model = SkippingModel(dit, spans, checkpointed=True, folded=False)
    with dit.running(model.modules, **placement):
        named = list(patcher.model.diffusion_model.named_parameters())
        found = {".".join(name.split(".")[:2]) for name, p in named if "_blocks." in name and p.is_meta and p.ndim == 2}
        patcher.model.model_sampling.to_empty(device="cpu")  # the meta device gives no data back
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
