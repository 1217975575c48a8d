"""The workflows for cards of 8, 12 and 24 GB: their settings, counted on FLUX.1-dev at full size, fit the card they name."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from blockskip_pack.blockskip_core.block_selection import preset_selection
from blockskip_pack.blockskip_core.lora import LoraSettings
from blockskip_pack.blockskip_core.memory_counts import RunPlan, memory_needs
from blockskip_pack.blockskip_core.memory_plan import fits
from blockskip_pack.blockskip_core.training import TrainingConfig

GIB = 2**30
TEXT_TOKENS = 512  # a long caption; ComfyUI fills short ones up to 256
FORMS = {"flux1-dev.safetensors": torch.bfloat16, "flux1-dev-fp8.safetensors": torch.float8_e4m3fn}


def cards():
    """The graphs by the memory of the card in GB."""
    path = Path(__file__).resolve().parents[2] / "devtools" / "workflow_graphs.py"
    spec = importlib.util.spec_from_file_location("blockskip_workflow_graphs", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return {8: module.CARD_8, 12: module.CARD_12, 24: module.CARD_24}


@pytest.mark.slow
@pytest.mark.parametrize("size", [8, 12, 24])
def test_the_settings_fit_the_card_with_room_for_the_desktop(comfyui, size):
    from blockskip_pack.blockskip_core.hosts.weightless_dit import WeightlessDit

    graph = cards()[size]
    inputs = {name: spec["inputs"] for name, spec in graph.prompt.items()}
    plan, train = inputs["plan"], inputs["train"]
    assert plan["card_memory"] * GIB <= (size - 1.5) * GIB, (
        "1.5 GiB for the screen, other programs and the CUDA context"
    )
    for name in ("patch_min", "draws", "storage"):
        assert plan[name] == inputs["residuals"][name]
    for name in ("rank", "activation_budget"):
        assert plan[name] == train[name]
    file = inputs.get("model", {}).get("unet_name") or inputs["checkpoint"]["ckpt_name"]
    caption = [[torch.zeros(1, TEXT_TOKENS, 4096), {"pooled_output": torch.zeros(1, 768), "guidance": 1.0}]]
    cells = plan["patch_min"] // 8
    dit = WeightlessDit.published("FLUX.1-dev", caption, (16, cells, cells), FORMS[file])
    sizes = [block.num_bytes for block in dit.blocks]
    selection = preset_selection(inputs["select"]["skip_ratio"], len(dit.blocks), dit.family, sizes)
    needs = memory_needs(
        dit,
        RunPlan(
            latent_shape=(16, cells, cells), probe_shape=(16, cells, cells), selection=selection,
            lora=LoraSettings(rank=plan["rank"]), layers=dit.lora_layers(selection, "attention and mlp"),
            config=TrainingConfig(steps=1, activation_budget=plan["activation_budget"] * GIB),
            draws=plan["draws"], chunk=64, stored=plan["draws"],
        ),
    )  # fmt: skip
    peak = max(needs.training.peak, needs.precomputing.peak)
    assert fits(peak, round(plan["card_memory"] * GIB))
    assert f"It counts {round(peak / GIB, 1):g} GiB" in graph.note, f"the note must say {peak / GIB:.2f}"
