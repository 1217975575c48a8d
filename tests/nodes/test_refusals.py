"""Mistakes that only concern widgets are refused when the graph is queued, with the sentence that the node would raise."""

from __future__ import annotations

import pytest


@pytest.mark.parametrize(
    ("node", "widgets", "match"),
    [
        ("TrainLora", {"output_name": ["../elsewhere"]}, "must stay inside ComfyUI's output folder"),
        ("TrainLora", {"output_name": ["a<b"]}, "not every system allows"),
        ("SelectBlocks", {"probe_size": [100]}, "multiple of 16 px, got 100"),
        ("SampleWhileTraining", {"cfg": [3.5]}, "cfg above 1 needs a `negative`"),
        ("SampleWhileTraining", {"cfg": [0.5], "negative": [None]}, "between 1 and 100"),
        ("SampleWhileTraining", {"cfg": [1.0], "clip_vision": [None]}, "`reference_images` is not connected"),
        ("RaluSampler", {"preset": "custom", "custom_steps": "5, six"}, "numbers separated by commas, got '5, six'"),
        ("RaluSampler", {"preset": "another"}, "preset must be one of"),
        ("ApplyLora", {}, "No LoRA was given"),
        ("ApplyLora", {"lora_name": "gone.safetensors"}, "There is no 'gone.safetensors'"),
        ("PrecomputeResiduals", {"patch_min": [512], "patch_max": [256]}, "must not be larger than patch_max"),
    ],
    ids=str,
)
def test_refused_with_a_sentence(nodes, node, widgets, match):
    answer = getattr(nodes, node).validate_inputs(**widgets)
    assert isinstance(answer, str)
    assert match in answer


@pytest.mark.parametrize(
    ("node", "widgets"),
    [
        ("TrainLora", {"output_name": ["loras/toy"]}),
        ("TrainLora", {}),
        ("TrainLora", {"output_name": [None]}),
        ("SelectBlocks", {"probe_size": [512]}),
        ("SelectBlocks", {"probe_size": [None]}),
        ("SampleWhileTraining", {"cfg": [3.5], "negative": [None]}),
        ("SampleWhileTraining", {"cfg": [1.0]}),
        ("SampleWhileTraining", {"cfg": [None]}),
        ("RaluSampler", {"preset": "custom"}),
        ("RaluSampler", {"preset": "custom", "custom_steps": None}),
        ("PrecomputeResiduals", {"patch_min": [512], "patch_max": [256], "memory_settings": [None]}),
        ("ApplyLora", {"lora": None}),
        ("ApplyLora", {"lora_name": None}),
    ],
    ids=str,
)
def test_what_is_fine_or_linked_is_accepted(nodes, node, widgets):
    """A linked input arrives as None; nobody knows its value yet."""
    assert getattr(nodes, node).validate_inputs(**widgets) is True
