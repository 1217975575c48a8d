"""Metadata of a LoRA file, in our own keys and in those that other programs read and write.

Our own metadata is JSON under "blockskip". Programs that list and sort LoRAs read "modelspec.*" (Stability AI's
ModelSpec 1.0.1) and "ss_*" (kohya's sd-scripts); we write those whose values we know.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from datetime import datetime
from typing import Any

_OF_KOHYA = {  # name there -> name here
    "ss_base_model_version": "base_model_version",
    "ss_network_dim": "rank",
    "ss_network_alpha": "alpha",
    "ss_steps": "steps",
    "ss_max_train_steps": "steps_planned",
    "ss_learning_rate": "learning_rate",
    "ss_batch_size_per_device": "batch_size",
    "ss_gradient_accumulation_steps": "accumulation",
    "ss_seed": "seed",
    "ss_training_comment": "trained_with",
}
_WORTH_READING = {  # in the order in which they are shown
    "modelspec.title": "title",
    "modelspec.architecture": "architecture",
    "ss_base_model_version": "base model version",
    "ss_sd_model_name": "base model",
    "modelspec.trigger_phrase": "trigger phrase",
    "modelspec.usage_hint": "usage hint",
    "modelspec.description": "description",
    "modelspec.tags": "tags",
    "modelspec.author": "author",
    "modelspec.license": "license",
    "modelspec.date": "date",
    "modelspec.resolution": "resolution",
    "ss_output_name": "name",
    "ss_network_module": "network module",
    "ss_network_dim": "rank",
    "ss_network_alpha": "alpha",
    "ss_num_train_images": "pictures",
    "ss_steps": "steps",
    "ss_epoch": "epochs",
    "ss_learning_rate": "learning rate",
    "ss_optimizer": "optimizer",
    "ss_seed": "seed",
    "ss_training_comment": "comment",
    "software": "trained with",
    "training_info": "training",
}
_LONGEST = 200  # characters of another program's value
_NUM_WORDS = 12


def metadata_to_strings(metadata: Mapping[str, Any], title: str = "") -> dict[str, str]:
    """Return metadata as strings, which is all that safetensors stores.

    Args:
        metadata: Our run's metadata; "architecture" and "base_model_version" are also written in other programs' keys.
        title: Readable title of the file.
    """
    strings = {"format": "pt", "blockskip": json.dumps(metadata, sort_keys=True)}
    if "architecture" in metadata:
        strings |= {
            "modelspec.sai_model_spec": "1.0.1",
            "modelspec.architecture": f"{metadata['architecture']}/lora",
            "modelspec.implementation": "https://github.com/comfyanonymous/ComfyUI",
            "modelspec.title": title,
            "modelspec.date": datetime.now().astimezone().isoformat(timespec="seconds"),
            "ss_output_name": title,
        }
    if "patch_max" in metadata:
        strings["modelspec.resolution"] = f"{metadata['patch_max']}x{metadata['patch_max']}"
    strings |= {theirs: str(metadata[ours]) for theirs, ours in _OF_KOHYA.items() if ours in metadata}
    return strings


def metadata_from_strings(strings: Mapping[str, str] | None) -> dict[str, Any]:
    """Return what :func:`metadata_to_strings` packed; empty if another program wrote the file."""
    return _json_object((strings or {}).get("blockskip", ""))


def metadata_of_others(strings: Mapping[str, str] | None) -> dict[str, str]:
    """Return the metadata of another program's file, as name -> one short line of text."""
    strings = strings or {}
    found = {name: _short(strings[key]) for key, name in _WORTH_READING.items() if strings.get(key, "None") != "None"}
    if words := _frequent_words(strings.get("ss_tag_frequency", "")):
        found["words of the captions"] = words
    known = {*_WORTH_READING, "ss_tag_frequency", "format", "blockskip"}
    if more := sorted(strings.keys() - known):
        found["further entries"] = _short(f"{len(more)} ({', '.join(more)})")
    return found


def _frequent_words(text: str) -> str:
    """Return the captions' most frequent words from kohya's list: folder -> word -> count."""
    counted: Counter[str] = Counter()
    for words in _json_object(text).values():
        if isinstance(words, dict):
            counted.update({word: count for word, count in words.items() if isinstance(count, int)})
    return _short(", ".join(word.strip() for word, _ in counted.most_common(_NUM_WORDS)))


def _json_object(text: str) -> dict[str, Any]:
    try:
        content = json.loads(text or "{}")
    except (ValueError, RecursionError):  # a file can say anything
        return {}
    return content if isinstance(content, dict) else {}


def _short(text: str) -> str:
    line = " ".join("".join(char if char.isprintable() else " " for char in text[: 4 * _LONGEST]).split())
    return line if len(line) <= _LONGEST else line[: _LONGEST - 1] + "…"


def describe(metadata: Mapping[str, Any], num_tensors: int, num_patched: int, passed_over: str = "") -> str:
    """Return a LoRA's metadata and how it was applied, as several lines.

    Args:
        metadata: Our metadata or another program's.
        num_tensors: Number of tensors in the file.
        num_patched: Number of the model's weights that it changes.
        passed_over: A sentence on the parts that are not used.
    """
    lines = [f"{num_patched} layers patched, {num_tensors} tensors.", *([passed_over] if passed_over else [])]
    if not metadata:
        return "\n".join([*lines, "The file has no metadata."])
    lines.extend(f"{name.replace('_', ' ')}: {value}" for name, value in metadata.items())
    return "\n".join(lines)
