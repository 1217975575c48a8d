"""Cancelled through the API in any phase, a run resumes to the same LoRA, and the model samples the same picture."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from .conftest import WORKFLOWS
from .test_workflows import SMALL, output_of, part_of, pixels, succeed

STEPS, CHUNKS, BLOCKS = 8, 3, 12
SETTINGS = {
    **SMALL,
    "Select blocks": {
        "method": "attention mask", "skip_ratio": 0.3, "probe_size": 64, "probe_steps": 2, "window_profile": False, "seed": 91,
    },
    "Precompute residuals": {"draws": 4 * CHUNKS, "chunk_size": 4, "seed": 91},
    "Train": {"steps": STEPS, "seed": 91, "save_every": 3, "output_name": "loras/interrupted"},
}  # fmt: skip
MOMENTS = {  # node, value of its progress bar, and maximum of the bar
    "selecting": ("Select blocks", 5, None),
    "encoding": ("Precompute residuals", 3, None),  # of all crops that differ
    "precomputing": ("Precompute residuals", BLOCKS + 4, BLOCKS * CHUNKS),
    "training": ("Train", 5, STEPS),
    "saving": ("Train", STEPS, STEPS),
}
RECOMPUTED = {"selecting": ("residuals", "probes"), "encoding": ("residuals",), "precomputing": ("residuals",)}


@pytest.fixture(scope="module")
def run(server: Any, devtool: Callable[[str], Any]) -> SimpleNamespace:
    """An uninterrupted run: its LoRA, and a picture of the plain model sampled after it."""
    tools = devtool("comfy_client")
    client = tools.ComfyClient(server.url)
    prompt = tools.with_overrides(tools.load_prompt(WORKFLOWS / "train_lora.api.json"), SETTINGS)
    output = Path(server.base) / "output"

    def forget(*stored: str) -> None:
        """Remove the training states of earlier runs, and the stored results of the named kinds."""
        client.free()
        for folder in ("runs", *stored):
            shutil.rmtree(output / "blockskip" / folder, ignore_errors=True)

    def lora() -> dict[str, torch.Tensor]:
        saved = (output / "loras").glob("interrupted_?????_.safetensors")
        return load_file(max(saved, key=lambda path: path.stat().st_mtime_ns))

    def picture() -> Any:
        plain = part_of(prompt, "Before")
        client.free()
        return pixels(client.view(output_of(succeed(client, plain), prompt, "Before")["images"][0]))

    forget("residuals", "probes")
    graph = part_of(prompt, "Train")
    succeed(client, graph)
    return SimpleNamespace(
        client=client, prompt=prompt, graph=graph, forget=forget, lora=lora, picture=picture, output=output,
        expected=lora(), plain=picture(),
    )  # fmt: skip


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("moment", MOMENTS)
def test_cancelled_and_queued_again_it_ends_with_the_same_lora(run: SimpleNamespace, moment: str) -> None:
    title, value, length = MOMENTS[moment]
    node = next(key for key, entry in run.prompt.items() if entry["_meta"]["title"] == title)
    seen = []

    def cancel_when_it_is_there(event: Any) -> None:
        state = event.data["nodes"].get(node, {}) if event.kind == "progress_state" else {}
        if not seen and state.get("value", 0) >= value and length in (None, state["max"]):
            seen.append(state)
            run.client.interrupt()

    run.forget(*RECOMPUTED.get(moment, ()))
    result = run.client.run(run.graph, on_event=cancel_when_it_is_there, timeout=300)
    assert seen, "the run never got there"
    # A Cancel during the last step has nothing left to stop: the run is saved and has succeeded.
    assert result.status in (("interrupted", "success") if moment == "saving" else ("interrupted",))
    assert not list(run.output.rglob("*.part"))
    if moment == "saving":
        assert_same(run.lora(), run.expected)
    assert (run.picture() == run.plain).all()

    again = succeed(run.client, run.graph)
    assert_same(run.lora(), run.expected)
    summary = output_of(again, run.prompt, "Train")["blockskip"][0]
    assert summary["steps"] == STEPS
    if moment == "training":
        assert value - 1 <= summary["resumed_at"] < STEPS
