"""Twins of the shipped workflows: the same graphs with the demo's small models, so that they run anywhere.

Model loaders become the demo's loaders, texts become words that the demo's text encoder knows, and numbers that
determine the duration become small. Everything else is unchanged.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

Prompt = dict[str, dict[str, Any]]

LOADERS: dict[str, tuple[tuple[str, str, str], ...]] = {
    "UNETLoader": (("UNETLoader", "unet_name", "blockskip_world_dit.safetensors"),),
    "DualCLIPLoader": (("BlockSkipDemo_LoadTextEncoder", "text_file", "blockskip_world_text.safetensors"),),
    "VAELoader": (("VAELoader", "vae_name", "blockskip_world_vae.safetensors"),),
}
LOADERS["CLIPLoader"] = LOADERS["LTXAVTextEncoderLoader"] = LOADERS["DualCLIPLoader"]
LOADERS["CheckpointLoaderSimple"] = LOADERS["UNETLoader"] + LOADERS["DualCLIPLoader"] + LOADERS["VAELoader"]
"""Loader -> the replacement for each of its outputs: node, input, file."""
ENCODERS = ("TextEncodeQwenImageEditPlus",)
"""Nodes that encode an instruction with the pictures that it is about."""

FOLDERS = {
    "my_subject": "blockskip_toby",
    "my_second_subject": "blockskip_mila",
    "my_edit": "blockskip_toby",
    "my_edit_before": "blockskip_before",
    "my_edit_try": "blockskip_mila",
}
WORDS = {
    "": "",
    "a photo of a red fox in a snowy forest, sharp details": "a big red star on grass, left",
    "a photo of a toy on a table": "a big red star on grass, left",
    "a photo of sks toy": "a big orange toby circle",
    "a photo of sks toy on the beach": "a big orange toby circle on water, right",
    "make it a sks drawing": "a big orange toby circle",
    "a photo of sks toy beside zwx dog on the beach": "a big orange toby circle on water, right",
}
NAMES = {
    "a photo of sks toy": "toby",
    "a photo of zwx dog": "mila",
    "a photo of": "a big orange",
}  # put in front of the captions
SMALL: dict[str, dict[str, Any]] = {
    "BlockSkip_MemoryPlan": {"draws": 6, "patch_min": 64},
    "BlockSkip_PrecomputeResiduals": {"draws": 6, "patch_min": 64, "patch_max": 128},
    "BlockSkip_TrainLora": {"steps": 4},
    "BlockSkip_WriteRun": {"steps": 4},
    "BlockSkip_SampleWhileTraining": {"every": 2, "width": 64, "height": 64, "sampler_steps": 2},
    "BlockSkip_TrainWord": {
        "steps": 2,
        "resolution": 64,
        "directions": 2,
        "captions": "a big orange {word} circle",
        "like_word": "toby",
    },
    "BlockSkip_TrainDDiT": {"width": 64, "height": 64, "max_steps": 2, "sampler_steps": 2},
    "EmptySD3LatentImage": {"width": 64, "height": 64},
    "EmptyLatentImage": {"width": 64, "height": 64},
    "KSampler": {"steps": 2},
}
BLOCKS, FLUX_BLOCKS = 12, 57  # of the demo's model, and of the one that templates are made for


def twin_of(prompt: Mapping[str, Mapping[str, Any]]) -> Prompt:
    """Return the twin of a workflow's API prompt; its ids equal the prompt's ids or begin with them."""
    twin: Prompt = {}
    outputs: dict[str, list[str]] = {}
    for key, spec in json.loads(json.dumps(prompt)).items():
        stand_ins = LOADERS.get(spec["class_type"])
        if stand_ins is None:
            twin |= _encoded(key, spec) if spec["class_type"] in ENCODERS else {key: _small(spec)}
            continue
        outputs[key] = [key if len(stand_ins) == 1 else f"{key}0{place}" for place in range(len(stand_ins))]
        for name, (kind, widget, file) in zip(outputs[key], stand_ins, strict=True):
            inputs = {widget: file, **({"weight_dtype": "default"} if kind == "UNETLoader" else {})}
            twin[name] = {"class_type": kind, "inputs": inputs, "_meta": spec["_meta"]}
    for spec in twin.values():
        for name, value in spec["inputs"].items():
            if isinstance(value, list) and value[0] in outputs:
                replaced = outputs[value[0]]
                spec["inputs"][name] = [replaced[value[1]], 0]
    return twin


def _encoded(key: str, spec: dict[str, Any]) -> Prompt:
    """Return nodes that encode an instruction without its picture, and carry the picture as a reference if there is a VAE.

    The demo's text encoder cannot see.
    """
    inputs, title = spec["inputs"], spec["_meta"]
    words = inputs["prompt"]
    words = WORDS[words] if isinstance(words, str) else words
    text = {"class_type": "CLIPTextEncode", "inputs": {"text": words, "clip": inputs["clip"]}, "_meta": title}
    if "vae" not in inputs:
        return {key: text}
    latent = {"pixels": inputs["image1"], "vae": inputs["vae"]}
    return {
        f"{key}00": text,
        f"{key}01": {"class_type": "VAEEncode", "inputs": latent, "_meta": title},
        key: {
            "class_type": "ReferenceLatent",
            "inputs": {"conditioning": [f"{key}00", 0], "latent": [f"{key}01", 0]},
            "_meta": title,
        },
    }


def _small(spec: dict[str, Any]) -> dict[str, Any]:
    inputs = {**spec["inputs"], **SMALL.get(spec["class_type"], {})}
    if inputs.get("method") == "manual":
        inputs |= {end: round(inputs[end] * BLOCKS / FLUX_BLOCKS) for end in ("front", "back")}
    if isinstance(inputs.get("text"), str):
        inputs["text"] = WORDS[inputs["text"]]
    if spec["class_type"] == "StringConcatenate":
        inputs["string_a"] = NAMES[inputs["string_a"]]
    for name in ("folder", "reference_folder"):
        if name in inputs:
            inputs[name] = FOLDERS[inputs[name]]
    return {**spec, "inputs": inputs}
