"""Prompts with odd values, as sent by programs: the server refuses them, or a node explains the problem in a sentence.

NaN and infinities are not valid JSON. ``tests/properties`` tests that nodes refuse them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest

from .conftest import WORKFLOWS
from .test_workflows import SMALL, part_of

SEED = 7
PROMPTS = 60
NAMES = ["../x", "/etc/x", "a\0b", "a" * 300, "", ".", "loras/", "con", "\u202ex", "%year%/x", "blockskip/runs"]
VALUES = [None, -1, 0, 1e30, 10**30, 2**64, "", "abc", True, [], {}, ["1", 0], ["1", 7], ["99", 0],
          {"__value__": []}, {"__value__": [1, 2]}, {"__value__": {}}, {"__type__": "x"}, *NAMES]  # fmt: skip
SLOW = {
    "steps",
    "draws",
    "probe_steps",
    "probe_seeds",
    "accumulation",
    "sampler_steps",
    "batch_size",
    "rank",
    "patch_max",
}
SETTINGS = {
    **SMALL,
    "Select blocks": {"method": "manual", "front": 4, "back": 2},
    "Precompute residuals": {"draws": 2, "storage": "on the fly"},
    "Train": {"steps": 1, "output_name": "loras/odd"},
}


def files_outside(base: Path) -> list[str]:
    """Every file except those in the folders that ComfyUI writes to; links are not followed."""
    own = {base / name for name in ("output", "temp", "user", "server.log", "models", "custom_nodes")}
    return sorted(str(path) for path in base.rglob("*") if not own & {path, *path.parents})


@pytest.fixture(scope="module")
def prompt(server: Any, devtool: Callable[[str], Any]) -> dict[str, Any]:
    """The training workflow up to the trainer, small."""
    tools = devtool("comfy_client")
    whole = tools.with_overrides(tools.load_prompt(WORKFLOWS / "train_lora.api.json"), SETTINGS)
    return part_of(whole, "Train")


def test_odd_values_are_refused_or_explained(
    server: Any, prompt: dict[str, Any], devtool: Callable[[str], Any]
) -> None:
    tools = devtool("comfy_client")
    client, random, base = tools.ComfyClient(server.url), Random(SEED), Path(server.base)
    before = files_outside(base)
    ours = sorted(key for key, node in prompt.items() if node["class_type"].startswith("BlockSkip_"))
    outcomes = []
    for _ in range(PROMPTS):
        odd = json.loads(json.dumps(prompt))
        inputs = odd[random.choice(ours)]["inputs"]
        name = random.choice(sorted(inputs))
        value = random.choice(NAMES if name == "output_name" else VALUES)
        if name in SLOW and value in (1e30,):
            continue
        inputs[name] = value
        try:
            result = client.run(odd, timeout=120)
        except tools.RequestRefused as refusal:
            outcomes.append(refusal.status)
            continue
        if result.status == "error":
            kind = result.error["exception_type"]
            assert kind.startswith("BlockSkip."), (name, value, kind, result.error["exception_message"])
        outcomes.append(result.status)
    assert set(outcomes) == {400, "error", "success"}
    assert files_outside(base) == before
