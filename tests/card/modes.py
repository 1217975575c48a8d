"""How ComfyUI's model management may treat a MODEL on a card: one context each, which gives the MODEL to be used in it.

    resident             all that is loaded fits
    low_vram             a part of the weights stays in host memory; those layers are copied into a buffer when they run
    streamed             all weights stay there (--novram)
    async_malloc         the same, but each layer is copied into memory of its own, as with cudaMallocAsync
    streamed_by_trainer  the same while training only, because its `kept_weights` asks for it
    all_pages            weights are paged in and out ("dynamic VRAM"), and all pages fit
    few_pages            only a few fit, so pages are refused and taken away
    no_pages             none fits

A context that is left without an error has seen that the host did treat the MODEL that way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import pytest

from ..device import devtools

Mode = Callable[[Any, Any], AbstractContextManager[Any]]  # (card, MODEL) -> the context
_NEVER_PAGED = 16 * 1024  # bytes up to which the host loads a layer for good


@contextmanager
def resident(card: Any, patcher: Any) -> Iterator[Any]:
    """Leave everything to the host, on a card with plenty."""
    with _loads() as shares:
        yield patcher
    assert set(shares) == {1.0}


@contextmanager
def low_vram(card: Any, patcher: Any) -> Iterator[Any]:
    """Leave room for half of the MODEL beside what the host keeps free."""
    import comfy.model_management as management

    room = 0.5 * patcher.model_size() + management.minimum_inference_memory()
    with card.memory.limited_to(int(card.memory.settled() + room)), _loads(may_be_forced=False) as shares:
        yield patcher
    assert any(0.01 < share < 0.99 for share in shares), shares


@contextmanager
def streamed(card: Any, patcher: Any) -> Iterator[Any]:
    """Let the host keep no weights on the card."""
    import comfy.model_management as management

    with pytest.MonkeyPatch.context() as patch, _loads() as shares:
        patch.setattr(management, "vram_state", management.VRAMState.NO_VRAM)
        yield patcher
    assert any(share < 0.1 for share in shares), shares


@contextmanager
def async_malloc(card: Any, patcher: Any) -> Iterator[Any]:
    """Stream, without the buffers that layers share."""
    from comfy.cli_args import args

    with pytest.MonkeyPatch.context() as patch, streamed(card, patcher):
        patch.setattr(args, "cuda_malloc", True)
        yield patcher


@contextmanager
def streamed_by_trainer(card: Any, patcher: Any) -> Iterator[Any]:
    """Leave it to the trainer to ask for streaming, which it does with its widget."""
    with _loads() as shares:
        yield patcher
    assert any(share < 0.1 for share in shares), shares


@contextmanager
def _paged(limit: int | None, card: Any, patcher: Any) -> Iterator[Any]:
    tools = devtools("card.comfyui")
    with pytest.MonkeyPatch.context() as patch, tools.dynamic_vram(card, limit) as pager:
        _page_small_layers_too(patch)
        yield tools.as_dynamic(patcher)
        assert pager.faults
        assert (pager.refused > 0) == (limit is not None), vars(pager)


all_pages, few_pages, no_pages = (partial(_paged, limit) for limit in (None, 2, 0))
MODES: dict[str, Mode] = {
    "resident": resident, "low_vram": low_vram, "streamed": streamed, "async_malloc": async_malloc,
    "streamed_by_trainer": streamed_by_trainer, "all_pages": all_pages, "few_pages": few_pages, "no_pages": no_pages,
}  # fmt: skip


@contextmanager
def _loads(*, may_be_forced: bool = True) -> Iterator[list[float]]:
    """Collect which share of a MODEL's weights each load has brought to the card.

    Args:
        may_be_forced: Whether a caller may have all weights loaded; if not, the host decides.
    """
    import comfy.model_management as management

    shares, load = [], management.load_models_gpu

    def loading(models: list, *args: Any, force_full_load: bool = False, **kwargs: Any) -> None:
        load(models, *args, force_full_load=force_full_load and may_be_forced, **kwargs)
        shares.extend(_share_loaded(patcher) for patcher in models)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(management, "load_models_gpu", loading)
        yield shares


def _share_loaded(patcher: Any) -> float:
    if not patcher.model.model_lowvram:
        return 1.0
    weights = list(patcher.model.parameters())
    return sum(weight.nbytes for weight in weights if weight.is_cuda) / sum(weight.nbytes for weight in weights)


def _page_small_layers_too(patch: pytest.MonkeyPatch) -> None:
    """Let the host treat a tiny model's layers as it treats those of a large one."""
    import comfy.model_management as management

    size = management.module_size
    patch.setattr(management, "module_size", lambda module, *args: size(module, *args) + _NEVER_PAGED)
