"""ComfyUI's nodes that take and return a MODEL, found in its registry, and inputs for them.

Widgets have their defaults unless the default has no effect; other inputs get the smallest object that the node
accepts.
"""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Mapping
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch

ONLY_FOR: Mapping[str, str] = {
    "FreeU": "UNets",
    "FreeU_V2": "UNets",
    "SUPIRApply": "SDXL",
    "TripoSplatSamplingPreview": "TripoSplat",
    "WanUni3CControlnetApply": "Wan",
}
"""Node -> the only models that it supports; it fails on a FLUX.1 even without our nodes."""

NO_INPUTS: Mapping[str, str] = {
    "LTXVReferenceAudio": "a VAE for audio",
    "WanInfiniteTalkToVideo": "a model patch for speech, and encoded speech",
}
"""Node -> an input that cannot be created in a small size."""

AFTER: Mapping[str, str] = {"HiDreamO1PatchSeamSmoothing": "ModelSamplingSD3", "ModelNoiseScale": "ModelSamplingSD3"}
"""Node -> a node to connect before it, because it needs a schedule that FLUX.1 does not have."""

CHANGED: Mapping[str, Mapping[str, Any]] = {
    "ChromaRadianceOptions": {"nerf_tile_size": 64},
    "ContextWindowsManual": {"dim": 3, "context_length": 8, "context_overlap": 2},
    "EasyCache": {"reuse_threshold": 3.0, "start_percent": 0.0},
    "Epsilon Scaling": {"scaling_factor": 1.1},
    "HiDreamO1PatchSeamSmoothing": {"start_percent": 0.0},
    "HyperTile": {"tile_size": 32},
    "LazyCache": {"reuse_threshold": 3.0, "start_percent": 0.0},
    "ModelComputeDtype": {"dtype": "bf16"},
    "ModelNoiseScale": {"noise_scale": 2.0},
    "ScaleROPE": {"scale_x": 1.5, "shift_y": 0.5},
    "SkipLayerGuidanceDiT": {"double_layers": "1", "single_layers": "1", "start_percent": 0.0},
    "SkipLayerGuidanceDiTSimple": {"double_layers": "1", "single_layers": "1"},
    "SkipLayerGuidanceSD3": {"layers": "1", "start_percent": 0.0},
    "TorchCompileModel": {"backend": "eager"},
}
"""Node -> widgets with values other than their defaults."""


OPTIONAL: Mapping[str, str] = {"ZImageFunControlnet": "image"}
"""Node -> an optional input without which it has no effect."""


def registry() -> dict[str, type]:
    """Return ComfyUI's nodes by id, including those of ``comfy_extras``."""
    host = importlib.import_module("nodes")
    if "EasyCache" not in host.NODE_CLASS_MAPPINGS:
        failed = asyncio.run(host.init_builtin_extra_nodes())
        assert not {*failed} - {"nodes_replacements.py"}, failed  # it has no nodes, and needs a running server
    return host.NODE_CLASS_MAPPINGS


@cache
def nodes_on_a_model() -> dict[str, type]:
    """Return those that take and return a MODEL. Every node is asked for its inputs, so this takes a while."""
    return {
        name: node
        for name, node in registry().items()
        if "MODEL" in node.RETURN_TYPES and "MODEL" in [kind for _, kind, _ in _inputs(node, "required", "optional")]
    }


def applied(name: str, model: Any, sockets: Mapping[str, Any]) -> Any:
    """Run a node on a MODEL and return its output MODEL.

    Args:
        name: Its id.
        model: For its first input of type MODEL.
        sockets: Name or type of an input -> the connected value.
    """
    node = nodes_on_a_model()[name]
    connected = {"MODEL": model, **sockets}
    values: dict[str, Any] = {}
    required = _inputs(node, "required")
    for entry, kind, options in [*required, *(x for x in _inputs(node, "optional") if x[0] == OPTIONAL.get(name))]:
        found = [connected[key] for key in (entry, kind) if isinstance(key, str) and key in connected]
        values[entry] = found[0] if found else _widget(name, kind, options)
    values |= CHANGED.get(name, {})
    function = getattr(node, "EXECUTE_NORMALIZED", None) or getattr(node(), node.FUNCTION)
    with torch.inference_mode():
        returned = function(**values)
    return getattr(returned, "args", returned)[list(node.RETURN_TYPES).index("MODEL")]


def _inputs(node: type, *sections: str) -> list[tuple[str, Any, Mapping[str, Any]]]:
    """Return (name, type or choices, options) of a node's inputs."""
    declared = node.INPUT_TYPES()
    return [
        (name, entry[0], entry[1] if len(entry) > 1 else {})
        for section in sections
        for name, entry in declared.get(section, {}).items()
    ]


def _widget(name: str, kind: Any, options: Mapping[str, Any]) -> Any:
    if name.startswith("ModelMerge") and kind == "FLOAT":  # 1 would give only the first model
        return 0.5
    if "default" in options:
        return options["default"]
    choices = kind if isinstance(kind, (list, tuple)) else options.get("options")
    return choices[0] if choices else None


def model_patch() -> SimpleNamespace:
    """Return a MODEL_PATCH for ControlNet nodes, which read some of its numbers and keep it."""
    inner = SimpleNamespace(
        additional_in_dim=0, cond_in_channels=3, process_input_latent_image=lambda latent: latent.flatten(2).mT
    )
    return SimpleNamespace(model=inner)


def hypernetwork(width: int) -> dict[Any, Any]:
    """Return the content of a hypernetwork file for attention with a given width."""
    generator = torch.Generator().manual_seed(2)
    half = {"linear.weight": torch.randn(width, width, generator=generator), "linear.bias": torch.zeros(width)}
    return {width: [half, half]}
