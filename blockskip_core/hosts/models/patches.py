"""How this pack treats what other nodes have put on a MODEL: one list for all our nodes.

Training calls the model itself, once per example, with its own blocks in the middle; the host's samplers call it step
by step. So everything that belongs to sampling (guidance, caches, compilation) is left out of training: a MODEL with
EasyCache on it is trained, and identified in files, like one without. Anything that changes the model itself is either
followed or refused before any work. Region-adaptive sampling uses the host's sampler and follows nearly everything; it
refuses what would treat tokens of two sizes as a picture.

Not listed, and followed by both: weight patches (LoRA, merges), weight wrappers, callbacks, the compute dtype, another
schedule of a flow-matching model, scaled or shifted positions, and modules that replace one of the host's outside the
blocks.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import comfy.patcher_extension
import comfy.utils
import torch
from torch import nn

from ...errors import UnsupportedModelError
from ..families.registry import adapter_for
from .residency import MODEL_PREFIX, unload

logger = logging.getLogger(__name__)

Verdict = Literal["followed", "left out", "refused"]

FOLLOWED_OPTIONS = ("rope_options",)
"""Keys of ``transformer_options`` that the model itself reads, without another node's function."""

_COMPILED = "torch.compile"  # key of the host's wrapper that puts compiled modules into the model for a call
_AROUND_THE_MODEL = (
    comfy.patcher_extension.WrappersMP.APPLY_MODEL,
    comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL,
)
_SILENT = ("disable_cfg1_optimization", "torch_compile_kwargs")  # they accompany a function that is named anyway


@dataclass(frozen=True)
class PatchKind:
    """A kind of change that other nodes make to a MODEL.

    Attributes:
        title: Its description in messages.
        found: MODEL -> names of the changes of this kind.
        training: How training treats it: Select Blocks, Memory Plan, Precompute Residuals, the trainer and its samples.
        ralu: How region-adaptive sampling treats it.
        instead: What to do if it is refused.
    """

    title: str
    found: Callable[[Any], Iterable[str]]
    training: Verdict
    ralu: Verdict
    instead: str = "Connect the MODEL without it."


def for_training(patcher: Any) -> Any:
    """Return the MODEL to train: this one, or a clone without what only belongs to sampling.

    The log names what is left out. The clone has nothing more to leave out, so this may be called again.

    Raises:
        UnsupportedModelError: If no adapter knows the model, or it has a change that training cannot follow.
    """
    if patcher.object_patches_backup:  # while it is loaded, the patches replace the model's own modules
        unload(patcher)
    adapter_for(patcher)  # an unknown family is reported first
    _refuse(patcher, "Training", lambda kind: kind.training)
    left_out = [name for kind in PATCH_KINDS if kind.training == "left out" for name in kind.found(patcher)]
    if not left_out:
        return patcher
    names = ", ".join(dict.fromkeys(left_out))
    logger.warning("BlockSkip: left out of training, because it belongs to sampling: %s", names)
    clone = patcher.clone()
    options = clone.model_options["transformer_options"]
    clone.model_options = {
        "transformer_options": {key: options[key] for key in FOLLOWED_OPTIONS if key in options},
    }
    clone.wrappers, clone.additional_models = {}, {}
    for name in {*_compiled_patches(patcher), *_replaced_functions(patcher)}:
        del clone.object_patches[name]
    clone.patches_uuid = uuid.uuid4()  # with the same id, the host would keep what it has loaded
    return clone


def require_sampled_in_stages(patcher: Any) -> None:
    """Check that region-adaptive sampling can follow all changes to a MODEL.

    Raises:
        UnsupportedModelError: If not.
    """
    _refuse(patcher, "Region-adaptive sampling", lambda kind: kind.ralu)


def require_coarse_steps(patcher: Any) -> None:
    """Check that sampling with coarse patches can follow all changes to a MODEL: as in stages, but nothing compiled.

    Raises:
        UnsupportedModelError: If not.
    """
    # Hooks inside a compiled module do not run.
    _refuse(
        patcher, "Sampling with dynamic patches", lambda kind: "refused" if kind.found is _compilation else kind.ralu
    )


def _refuse(patcher: Any, who: str, verdict: Callable[[PatchKind], Verdict]) -> None:
    for kind in PATCH_KINDS:
        if verdict(kind) != "refused":
            continue
        names = list(dict.fromkeys(kind.found(patcher)))
        if names:
            raise UnsupportedModelError(
                f"{who} cannot follow {kind.title} on the MODEL, got {', '.join(names)}. {kind.instead}"
            )


# --- finding --------------------------------------------------------------------------------------------------------


def _other_sampling(patcher: Any) -> Iterator[str]:
    """Yield the kind of sampling unless picture = x - sigma * output with x = (1 - sigma) picture + sigma noise."""
    sampling = patcher.get_model_object("model_sampling")
    with torch.inference_mode():
        sigma, picture, noise, output = (
            torch.tensor([0.25, 0.75]),
            *torch.tensor([[2.0, 3.0], [5.0, 7.0], [11.0, 13.0]]),
        )
        noisy = (1.0 - sigma) * picture + sigma * noise
        found = (
            sampling.noise_scaling(sigma, noise.clone(), picture),
            sampling.calculate_input(sigma, noisy),
            sampling.calculate_denoised(sigma, output, noisy),
        )
    if not all(map(torch.allclose, found, (noisy, noisy, noisy - sigma * output))):
        yield from (base.__name__ for base in type(sampling).__bases__)  # the class itself is created per model


def _other_latents(patcher: Any) -> Iterator[str]:
    if "latent_format" in patcher.object_patches:
        yield type(patcher.object_patches["latent_format"]).__name__


def _functions(patcher: Any) -> Iterator[Any]:
    """Yield the functions that are called in or around the model's blocks."""
    options = patcher.model_options["transformer_options"]
    for patches in options.get("patches", {}).values():
        yield from patches
    for replacements in options.get("patches_replace", {}).values():
        yield from replacements.values()
    yield from filter(None, [patcher.model_options.get("model_function_wrapper")])


def _has_a_model(function: Any) -> bool:
    """Whether it has its own weights or picture; the host moves such a patch to the device, or loads its models."""
    return any(hasattr(function, name) for name in ("models", "model_patch", "to"))


def _models_in_patches(patcher: Any) -> Iterator[str]:
    return (_name(function) for function in _functions(patcher) if _has_a_model(function))


def _patches_without_a_model(patcher: Any) -> Iterator[str]:
    return (_name(function) for function in _functions(patcher) if not _has_a_model(function))


def _weight_hooks(patcher: Any) -> Iterator[str]:
    yield from map(str, patcher.injections)
    if patcher.hook_patches or patcher.forced_hooks:
        yield "weight hooks"


def _compiled_patches(patcher: Any) -> Iterator[str]:
    """Yield paths of modules that are replaced by their compiled versions."""
    for path, value in patcher.object_patches.items():
        original = getattr(value, "_orig_mod", None)
        if original is not None and original is comfy.utils.get_attr(patcher.model, path):
            yield path


def _replaced_functions(patcher: Any) -> Iterator[str]:
    """Yield paths of functions that are replaced by others, as by nodes that change attention."""
    for path, value in patcher.object_patches.items():
        if callable(value) and not isinstance(value, (nn.Module, type)) and path.startswith(MODEL_PREFIX):
            yield path


def _replaced_blocks(patcher: Any) -> Iterator[str]:
    """Yield paths in or around the blocks at which there is a module other than the host's."""
    left_out = {*_compiled_patches(patcher), *_replaced_functions(patcher)}
    lists = {block.name.partition(".")[0] for block in adapter_for(patcher).blocks()}
    for path in patcher.object_patches.keys() - left_out:
        first, _, rest = path.partition(".")
        if first == MODEL_PREFIX[:-1] and (not rest or rest.partition(".")[0] in lists):
            yield path
    for path, module in patcher.model.diffusion_model.named_modules():
        if hasattr(module, "_orig_mod") and path.partition(".")[0] in lists:
            yield f"{MODEL_PREFIX}{path} (compiled in place)"


def _compilation(patcher: Any) -> Iterator[str]:
    if any(_compiled_patches(patcher)) or any(_COMPILED in of_kind for of_kind in patcher.wrappers.values()):
        yield _COMPILED


def _all_wrappers(patcher: Any) -> Iterator[tuple[str, str]]:
    """Yield (where, name) of every wrapper except the host's for compilation."""
    in_options = patcher.model_options["transformer_options"].get("wrappers", {})
    for wrappers in (patcher.wrappers, in_options):
        for where, of_kind in wrappers.items():
            for key, functions in of_kind.items():
                if functions and key != _COMPILED:
                    yield where, key or _name(functions[0])


def _wrappers_around_the_model(patcher: Any) -> Iterator[str]:
    return (name for where, name in _all_wrappers(patcher) if where in _AROUND_THE_MODEL)


def _wrappers_around_sampling(patcher: Any) -> Iterator[str]:
    return (name for where, name in _all_wrappers(patcher) if where not in _AROUND_THE_MODEL)


def _guidance(patcher: Any) -> Iterator[str]:
    """Yield the functions of a sampler: those that combine predictions, and those called between steps."""
    for key, value in patcher.model_options.items():
        if key not in ("transformer_options", "model_function_wrapper", "context_handler", *_SILENT):
            functions = value if isinstance(value, list) and value else [value]
            yield from (_name(function) if callable(function) else key for function in functions)


def _context_windows(patcher: Any) -> Iterator[str]:
    if patcher.model_options.get("context_handler") is not None:
        yield "context windows"


def _other_models(patcher: Any) -> Iterator[str]:
    return (str(key) for key, models in patcher.additional_models.items() if models and key != "multigpu")


def _several_gpus(patcher: Any) -> Iterator[str]:
    if patcher.additional_models.get("multigpu"):
        yield "several GPUs"


def _other_options(patcher: Any) -> Iterator[str]:
    """Yield all other options of a call; only another node's function would read them."""
    options: Mapping[str, Any] = patcher.model_options["transformer_options"]
    known = ("patches", "patches_replace", "wrappers", "callbacks", *FOLLOWED_OPTIONS)
    return (key for key, value in options.items() if key not in known and value is not None)


def _name(function: Any) -> str:
    """Return a readable name for a node's function: that of the class or function that created it."""
    if hasattr(function, "__qualname__"):
        return function.__qualname__.partition(".")[0]
    return type(function).__name__


PATCH_KINDS: tuple[PatchKind, ...] = (
    PatchKind(
        "another kind of prediction than flow matching", _other_sampling, "refused", "refused",
        "Remove the node that changes the model's sampling, or load a flow-matching model.",
    ),
    PatchKind("another latent format", _other_latents, "refused", "refused"),
    PatchKind("a ControlNet or another model in its blocks", _models_in_patches, "refused", "refused"),
    PatchKind(
        "a LoRA in bypass mode or weight hooks", _weight_hooks, "refused", "followed",
        "Apply the LoRA with Load LoRA, and connect the MODEL without hooks.",
    ),
    PatchKind("other modules instead of its blocks", _replaced_blocks, "refused", "followed"),
    PatchKind("work split across several GPUs", _several_gpus, "left out", "refused"),
    PatchKind("context windows", _context_windows, "left out", "refused"),
    PatchKind("compiled modules", _compilation, "left out", "followed"),
    PatchKind("functions that replace the model's own", _replaced_functions, "left out", "followed"),
    PatchKind("functions in its blocks", _patches_without_a_model, "left out", "followed"),
    PatchKind("wrappers around the model, such as caches", _wrappers_around_the_model, "left out", "followed"),
    PatchKind("wrappers around sampling", _wrappers_around_sampling, "left out", "followed"),
    PatchKind("guidance and other functions of a sampler", _guidance, "left out", "followed"),
    PatchKind("other models loaded with it", _other_models, "left out", "followed"),
    PatchKind("other options of a call", _other_options, "left out", "followed"),
)  # fmt: skip
