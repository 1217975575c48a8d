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
        ("SelectBlocks", {"probe_cfg": [4.0], "method": ["attention mask"]}, "`probe_cfg` is 4 and needs a `negative`"),
        ("SelectBlocks", {"probe_cfg": [4.0], "method": ["cost and influence"]}, "needs a `negative`"),
        ("SampleWhileTraining", {"cfg": [1.0], "clip_vision": [None]}, "`reference_images` is not connected"),
        ("RaluSampler", {"preset": "custom", "custom_steps": "5, six"}, "numbers separated by commas, got '5, six'"),
        ("RaluSampler", {"preset": "another"}, "preset must be one of"),
        ("ApplyLora", {}, "No LoRA was given"),
        ("ApplyLora", {"lora_name": "gone.safetensors"}, "There is no 'gone.safetensors'"),
        ("PrecomputeResiduals", {"patch_min": [512], "patch_max": [256]}, "must not be larger than patch_max"),
        ("TrainWord", {"name": ["../elsewhere"]}, "must stay inside"),
        ("TrainWord", {"name": ["my dog"]}, "at which a prompt ends a word's name"),
        (
            "TrainWord",
            {"captions": ["a {word}\na dog"]},
            "Every caption needs {word} where the new word is, got 'a dog'",
        ),
        ("TrainWord", {"captions": [" \n"]}, "captions is empty"),
        ("TrainWord", {"estimator": ["central"], "noise_from": [0.5], "noise_to": [0.2]}, "got 0.5 and 0.2"),
        ("TrainWord", {"estimator": ["newton"]}, "estimator must be one of"),
        ("TrainLora", {"optimizer": ["Lion"]}, "optimizer must be one of AdamW, "),
        ("TrainLora", {"quantize_frozen": ["int9"]}, "quantize_frozen 'int9' is not a format of this ComfyUI"),
        ("WriteRun", {"quantize_kept": ["int9"]}, "quantize_kept 'int9' is not a format of this ComfyUI"),
        ("MemoryPlan", {"quantize_frozen": "int9"}, "quantize_frozen 'int9' is not a format of this ComfyUI"),
        ("TrainPatchAdapters", {"adapters_name": ["../elsewhere"]}, "must stay inside ComfyUI's output folder"),
        (
            "DynamicPatchesNode",
            {"mode": "windows", "windows": "2 to 9"},
            "written like `2-9: 2, 12-14: 4`, got '2 to 9'",
        ),
        ("DynamicPatchesNode", {"mode": "another"}, "mode must be one of"),
        ("LoadPatchAdapters", {}, "No file was chosen"),
        ("LoadPatchAdapters", {"file": "gone.safetensors"}, "There is no 'gone.safetensors'"),
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
        ("TrainLora", {"output_name": [None], "optimizer": [None]}),
        ("TrainLora", {"optimizer": ["AdamW"]}),
        ("TrainLora", {"quantize_kept": ["off"], "quantize_frozen": [None]}),
        ("WriteRun", {"quantize_kept": [None]}),
        ("MemoryPlan", {"quantize_kept": "off", "quantize_frozen": None}),
        ("SelectBlocks", {"probe_size": [512]}),
        ("SelectBlocks", {"probe_size": [None]}),
        ("SampleWhileTraining", {"cfg": [3.5], "negative": [None]}),
        ("SampleWhileTraining", {"cfg": [1.0]}),
        ("SampleWhileTraining", {"cfg": [None]}),
        ("SelectBlocks", {"probe_cfg": [4.0], "method": ["attention mask"], "negative": [None]}),
        ("SelectBlocks", {"probe_cfg": [4.0], "method": ["preset"]}),
        ("SelectBlocks", {"probe_cfg": [1.0], "method": ["attention mask"]}),
        ("RaluSampler", {"preset": "custom"}),
        ("RaluSampler", {"preset": "custom", "custom_steps": None}),
        ("PrecomputeResiduals", {"patch_min": [512], "patch_max": [256], "memory_settings": [None]}),
        ("ApplyLora", {"lora": None}),
        ("ApplyLora", {"lora_name": None}),
        ("TrainWord", {"name": ["dogs/rex"], "captions": ["a {word}"], "estimator": ["central"]}),
        (
            "TrainWord",
            {"name": [None], "captions": [None], "estimator": [None], "noise_from": [0.5], "noise_to": [0.2]},
        ),
        ("TrainWord", {"estimator": ["paper"], "noise_from": [0.5], "noise_to": [0.2]}),  # it brings its own levels
        ("TrainPatchAdapters", {"adapters_name": [None]}),
        ("DynamicPatchesNode", {"mode": "auto", "windows": "2 to 9"}),
        ("DynamicPatchesNode", {"mode": "windows", "windows": "2-9: 2, 12: 4"}),
        ("DynamicPatchesNode", {"mode": None, "windows": "2 to 9"}),
        ("LoadPatchAdapters", {"file": None}),
    ],
    ids=str,
)
def test_what_is_fine_or_linked_is_accepted(nodes, node, widgets):
    """A linked input arrives as None; nobody knows its value yet."""
    assert getattr(nodes, node).validate_inputs(**widgets) is True
