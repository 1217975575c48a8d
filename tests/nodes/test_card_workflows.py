"""The workflows for cards of 6 to 24 GB: their settings, counted on full-size FLUX.1-dev, fit the card."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

GIB = 2**30
TEXT_TOKENS = 512  # a long caption; ComfyUI pads short ones to 256
FORMS = {"flux1-dev.safetensors": torch.bfloat16, "flux1-dev-fp8.safetensors": torch.float8_e4m3fn}


def cards():
    """The graphs by the card's memory in GB."""
    path = Path(__file__).resolve().parents[2] / "devtools" / "workflow_graphs.py"
    spec = importlib.util.spec_from_file_location("blockskip_workflow_graphs", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.CARDS


def meta_patcher(dtype):
    """FLUX.1-dev at full size, with every weight on the meta device, as a MODEL."""
    import comfy.model_patcher
    from blockskip_pack.blockskip_core.hosts.families.published_sizes import published_model

    cpu = torch.device("cpu")
    model = published_model("FLUX.1-dev", dtype, torch.bfloat16 if dtype.itemsize < 2 else None)
    return comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)


class Silent:
    """Progress that nobody sees."""

    def __call__(self, *args):
        pass

    def say(self, text):
        pass


@pytest.mark.slow
@pytest.mark.parametrize("size", [6, 8, 12, 16, 24])
def test_the_settings_fit_the_card_with_room_for_the_desktop(nodes, size):
    """Memory Plan's own count, with the widgets of the workflow."""
    from blockskip_pack.blockskip_core.accounting.plan import peak_of, room_of_card
    from blockskip_pack.blockskip_core.selection.selection import BlockSelection
    from blockskip_pack.blockskip_core.selection.skip_and_freeze import skip_and_freeze

    graph = cards()[size]
    inputs = {name: spec["inputs"] for name, spec in graph.prompt.items()}
    plan = {name: value for name, value in inputs["plan"].items() if not isinstance(value, list)}
    assert plan["preset"] == f"{size} GB"
    for name in ("residuals", "train"):
        assert inputs[name]["memory_settings"][0] == "plan"
    assert plan["draws"] == inputs["residuals"]["draws"]
    assert plan["rank"] == inputs["train"]["rank"]
    assert plan["back_residual"] == inputs["residuals"]["back_residual"] == "exact"
    file = inputs.get("model", {}).get("unet_name") or inputs["checkpoint"]["ckpt_name"]
    model = meta_patcher(FORMS[file])
    caption = [[torch.zeros(1, TEXT_TOKENS, 4096), {"pooled_output": torch.zeros(1, 768), "guidance": 1.0}]]
    dit = nodes.memory_plan.HostedDit(model, [caption], (16, 8, 8))
    chosen = inputs["select"]
    if chosen["method"] == "manual":
        selection = BlockSelection(
            front=chosen["front"],
            back=chosen["back"],
            num_blocks=len(dit.blocks),
            family=dit.family,
            block_bytes=dit.block_bytes,
        )
    else:
        selection = skip_and_freeze(chosen["skip_ratio"], len(dit.blocks), dit.family, dit.block_bytes)
    found = nodes.memory_plan.Plan(model, [caption], selection, nodes.memory_plan.PlanRequest(**plan), Silent())
    assert found.fits, "as it is, without any change"
    used = found.settings_that_fit
    counted = peak_of(used, found.count(used)) / GIB
    room = room_of_card(plan["preset"]) / GIB
    assert counted <= room
    assert f"fit into {room:g} GiB" in graph.note
    assert f"It counts {round(counted, 1):g} GiB" in graph.note, f"the note must say {counted:.2f}"
    assert f"{round(counted, 1):g} GiB counted" in graph.subline
