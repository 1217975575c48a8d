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
