"""The workflows for 8, 12 and 24 GB cards: their settings, counted on full-size FLUX.1-dev, fit the card."""

from __future__ import annotations

import importlib.util
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from blockskip_pack.blockskip_core.accounting.memory_needs import CountedOnce, RunPlan, memory_needs
from blockskip_pack.blockskip_core.accounting.plan import MemorySettings, fits, peak_of, room_of_card, with_spare_used
from blockskip_pack.blockskip_core.adapters.lora import LoraSettings
from blockskip_pack.blockskip_core.selection.presets import preset_selection
from blockskip_pack.blockskip_core.training.config import TrainingConfig

GIB = 2**30
TEXT_TOKENS = 512  # a long caption; ComfyUI pads short ones to 256
FORMS = {"flux1-dev.safetensors": torch.bfloat16, "flux1-dev-fp8.safetensors": torch.float8_e4m3fn}


def cards():
    """The graphs by the card's memory in GB."""
    path = Path(__file__).resolve().parents[3] / "devtools" / "workflow_graphs.py"
    spec = importlib.util.spec_from_file_location("blockskip_workflow_graphs", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return {8: module.CARD_8, 12: module.CARD_12, 24: module.CARD_24}


@cache
def full_size(dtype, cells):
    """The model without weights, and a cache of its counts, for the workflows that share both."""
    from blockskip_pack.blockskip_core.hosts.models.weightless_dit import WeightlessDit

    caption = [[torch.zeros(1, TEXT_TOKENS, 4096), {"pooled_output": torch.zeros(1, 768), "guidance": 1.0}]]
    return WeightlessDit.published("FLUX.1-dev", caption, (16, cells, cells), dtype), CountedOnce()


@pytest.mark.slow
@pytest.mark.parametrize("size", [8, 12, 24])
def test_the_settings_fit_the_card_with_room_for_the_desktop(comfyui, size):
    graph = cards()[size]
    inputs = {name: spec["inputs"] for name, spec in graph.prompt.items()}
    plan = inputs["plan"]
    assert plan["preset"] == f"{size} GB"
    for name in ("residuals", "train"):
        assert inputs[name]["memory_settings"][0] == "plan"
    assert plan["draws"] == inputs["residuals"]["draws"]
    assert plan["rank"] == inputs["train"]["rank"]
    file = inputs.get("model", {}).get("unet_name") or inputs["checkpoint"]["ckpt_name"]
    cells = plan["patch_min"] // 8
    dit, once = full_size(FORMS[file], cells)
    sizes = [block.num_bytes for block in dit.blocks]
    selection = preset_selection(inputs["select"]["skip_ratio"], len(dit.blocks), dit.family, sizes)

    @cache
    def count(settings):
        return memory_needs(
            dit,
            RunPlan(
                latent_shape=(16, cells, cells), probe_shape=(16, cells, cells), selection=selection,
                lora=LoraSettings(rank=plan["rank"]), layers=dit.lora_layers(selection, "attention and mlp"),
                config=settings.config, draws=plan["draws"], chunk=64, stored=plan["draws"],
            ),
            once=once,
        )  # fmt: skip

    room = room_of_card(plan["preset"])
    asked = MemorySettings(config=TrainingConfig(steps=1))
    assert fits(peak_of(asked, count(asked)), room), "as it is, without any change"
    used = with_spare_used(asked, room, count)
    assert used.config.activation_budget > 0 or not used.config.checkpointing, "what is left makes it faster"
    counted = peak_of(used, count(used)) / GIB
    assert f"fit into {room / GIB:g} GiB" in graph.note
    assert f"It counts {round(counted, 1):g} GiB" in graph.note, f"the note must say {counted:.2f}"
    assert f"{round(counted, 1):g} GiB counted" in graph.subline
