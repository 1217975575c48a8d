"""The same graph queued again: nothing is computed twice, unless a file that it names was rewritten."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from .conftest import load_devtool
from .test_workflows import SMALL, part_of, succeed


@pytest.fixture(scope="module", params=["server", "older"])
def host(request: pytest.FixtureRequest) -> Any:
    """A server with the file that the graphs name; no other test names it, so nothing here is in its cache."""
    running = request.getfixturevalue(request.param)
    write_lora(running, seed=0)
    return running


def write_lora(server: Any, seed: int) -> None:
    """Write a LoRA for a block of the demo's model to output/loras, always of the same size."""
    generator = torch.Generator().manual_seed(seed)
    stem = "diffusion_model.single_blocks.1.linear2.lora"
    file = Path(server.base) / "output" / "loras" / "same.safetensors"
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(
        {
            f"{stem}_A.weight": torch.randn(4, 640, generator=generator) * 0.02,
            f"{stem}_B.weight": torch.randn(128, 4, generator=generator) * 0.02,
        },
        file,
    )


def computed(server: Any, prompt: dict[str, Any]) -> set[str]:
    """Queue a graph; return the kinds of nodes that ran."""
    result = succeed(load_devtool("comfy_client").ComfyClient(server.url), prompt)
    ran = [event.data["node"] for event in result.of_kind("executing") if event.data.get("node")]
    return {prompt[node]["class_type"] for node in ran}


def test_apply_runs_again_for_another_file_only(host: Any, load_workflow: Callable[..., Any]) -> None:
    small = {name: SMALL[name] for name in ("Picture size", "Sample before", "Sample after")}
    prompt = load_workflow("apply_lora", {"Apply": {"lora_name": "same.safetensors"}, **small})
    assert "BlockSkip_ApplyLora" in computed(host, prompt)
    assert computed(host, prompt) == set()
    write_lora(host, seed=1)
    again = computed(host, prompt)
    assert {"BlockSkip_ApplyLora", "KSampler"} <= again
    assert "UNETLoader" not in again


def test_the_trainer_runs_again_for_another_start_file_only(host: Any, load_workflow: Callable[..., Any]) -> None:
    prompt = load_workflow(
        "train_lora",
        {
            **SMALL,
            "Select blocks": {"method": "manual", "front": 4, "back": 4},
            "Precompute residuals": {"draws": 2, "storage": "disk"},
            "Train": {"steps": 1, "rank": 4, "start_file": "same.safetensors", "output_name": "loras/reruns"},
        },
    )
    prompt = part_of(prompt, "Train")
    assert "BlockSkip_TrainLora" in computed(host, prompt)
    assert computed(host, prompt) == set()
    write_lora(host, seed=2)
    assert computed(host, prompt) == {"BlockSkip_TrainLora"}
