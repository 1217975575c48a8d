"""What is in a device's memory during a run, and who may write into it.

The rule for every run of a MODEL:

    Autograd only reads memory that nothing else writes into and that was created outside inference mode.

Three things follow, each with a function here:

- No module of the MODEL itself is loaded in a run: modules that the caller does not replace are replaced by copies that
  share their weights (:func:`whole_model`). Loaders run under ``torch.inference_mode``, so the MODEL's own parameters
  are inference tensors; the host moves them by assigning ``.data``, which torch refuses outside inference mode, and
  autograd refuses to save them.
- Weights that autograd saves are on the device for the whole run, in separate memory
  (:func:`keep_what_autograd_saves`). Any other weight is provided only temporarily: while its layer's forward runs it
  is copied into a buffer that is reused for the next layers, or into pages that the host reclaims. If backward reads
  such a buffer later, no error is raised (measured on a tiny FLUX.1: gradients 50 % off, losses unchanged). For linear
  layers this is safe, because autograd never saves their weights: ``lora`` detaches these layers and asks for the
  weight again in backward.
- Other models are moved off the device before its free memory is queried (:func:`evict_others`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import comfy.model_management
import torch
from torch import Tensor, nn

from ...blocks.weight_sharing import weight_sharing_alias, weight_sharing_copy
from ...devices import same_device
from ...model import is_linear

MODEL_PREFIX = "diffusion_model."


def whole_model(
    model: nn.Module, replacements: Mapping[str, nn.Module], patched: Collection[str]
) -> dict[str, nn.Module | Tensor]:
    """Return ``replacements``, and a weight-sharing copy of everything else that has weights.

    Args:
        model: The diffusion model, unloaded.
        replacements: Path -> stand-in.
        patched: Paths that another node has replaced; they and everything below them are left alone.
    """
    taken = {*replacements, *patched}
    return {**dict(_unreplaced(model, "", taken)), **replacements}


def _unreplaced(module: nn.Module, path: str, taken: Collection[str]) -> Iterator[tuple[str, nn.Module | Tensor]]:
    """Yield copies of the largest modules without any of ``taken`` inside, and of the direct tensors of the others."""
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is not None and path + name not in taken:
            yield path + name, weight_sharing_alias(tensor)
    for name, child in module._modules.items():
        place = path + name
        if child is None or place in taken:
            continue
        if any(other.startswith(f"{place}.") for other in taken):
            yield from _unreplaced(child, f"{place}.", taken)
        elif next(child.parameters(), None) is not None or next(child.buffers(), None) is not None:
            yield place, weight_sharing_copy(child)


@torch.no_grad()
def keep_what_autograd_saves(patcher: Any, replacements: Mapping[str, Any], device: torch.device) -> None:
    """Move all weights of the replacements to the device, except those of linear layers; see the rule above.

    The user's patches of these weights, which the host would apply on every use, are applied once here.

    Args:
        patcher: The loaded clone that carries the replacements.
        replacements: Path below the diffusion model -> module; tensors are skipped, because nothing runs them.
        device: The device that the model runs on.
    """
    for stem, stand in replacements.items():
        for path, layer in stand.named_modules() if isinstance(stand, nn.Module) else ():
            if is_linear(layer):
                continue
            for name, parameter in list(layer._parameters.items()):
                if parameter is None or same_device(parameter.device, device):
                    continue
                key = MODEL_PREFIX + ".".join(part for part in (stem, path, name) if part)
                if key in patcher.patches:
                    kept = patcher.patch_weight_to_device(key, device_to=device, return_weight=True)
                    _drop_patch(layer, name)
                else:
                    kept = parameter.data.to(device)
                layer._parameters[name] = nn.Parameter(kept.to(parameter.dtype), requires_grad=False)


def _drop_patch(layer: nn.Module, name: str) -> None:
    """Remove a patch that the weight already contains from a layer, in both places where the host puts one."""
    functions = getattr(layer, f"{name}_function", [])
    setattr(layer, f"{name}_function", [one for one in functions if not getattr(one, "is_lowvram_patch", False)])
    setattr(layer, f"{name}_lowvram_function", None)


def return_small_layers(patcher: Any) -> None:
    """Let the host give back, while the stand-ins are in place, the layers that it loads although it pages the others.

    With dynamic VRAM it loads layers of at most 16 KiB for good, and remembers their weights by name. Unloading puts the
    original modules back first, and would then write a stand-in's weights, perhaps quantised ones, into these.
    """
    if patcher.is_dynamic():
        patcher.partially_unload(None, 1e32)


def unload(patcher: Any) -> None:
    """Unload a model and all its clones, and nothing else; afterwards its modules and weights are the original ones."""
    management = comfy.model_management
    if not patcher.object_patches_backup and not any(_is_clone(m, patcher) for m in management.current_loaded_models):
        return
    others = [loaded for loaded in management.current_loaded_models if not _is_clone(loaded, patcher)]
    management.free_memory(1e30, patcher.load_device, keep_loaded=others)
    if patcher.model is not None and patcher.object_patches_backup:  # the host keeps models that it expects to fit
        patcher.detach()


def evict_others(patcher: Any) -> None:
    """Unload every other model from this one's device: text encoders and VAEs are no longer needed."""
    management = comfy.model_management
    own = [loaded for loaded in management.current_loaded_models if _is_clone(loaded, patcher)]
    if len(own) < len(management.current_loaded_models):
        management.free_memory(1e30, patcher.load_device, keep_loaded=own)


def drop_cast_buffers() -> None:
    """Free the buffers that streamed weights were copied into.

    The host keeps them for its next streamed model: hundreds of MiB, one layer's weight or more per stream. Only with
    dynamic VRAM does it drop them itself, after every node.
    """
    management = comfy.model_management
    if management.STREAM_CAST_BUFFERS or _paged_cast_buffers():
        management.reset_cast_buffers()


def end_prefetching() -> None:
    """Let go of the modules of forward passes that have not reached their end.

    With dynamic VRAM the host lists the blocks of every pass, to fetch each one's pages while the one before it runs, and
    clears the list after a node. Until then it would keep our blocks, and what they hold, on the device.
    """
    try:
        import comfy.model_prefetch as prefetch
    except ImportError:  # older hosts, and those without dynamic VRAM, fetch nothing ahead
        return
    prefetch.cleanup_prefetch_queues()


def _paged_cast_buffers() -> dict[Any, Any]:
    """Return the buffers of dynamic VRAM, which not every version of the host has."""
    return getattr(comfy.model_management, "STREAM_AIMDO_CAST_BUFFERS", {})


def paged_bytes(device: torch.device) -> int:
    """Return the bytes on a device that torch's allocator does not count: the pages and buffers of dynamic VRAM."""
    management = comfy.model_management
    models = [loaded.model for loaded in management.current_loaded_models if loaded.device == device]
    pages = sum(
        m.loaded_size() - m.model.model_loaded_weight_memory for m in models if m is not None and m.is_dynamic()
    )
    return pages + sum(buffer.size() for buffer in _paged_cast_buffers().values())


def _is_clone(loaded: Any, patcher: Any) -> bool:
    return loaded.model is not None and patcher.is_clone(loaded.model)
