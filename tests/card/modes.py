"""The ways in which ComfyUI's model management may treat a MODEL on a card, each as a context that yields the MODEL.

    resident             everything that is loaded fits
    low_vram             some weights stay in host memory; those layers are copied into a buffer when they run
    streamed             all weights stay in host memory (--novram)
    async_malloc         the same, but each layer is copied into its own memory, as with cudaMallocAsync
    streamed_by_trainer  the same, but only during training, because its `kept_weights` asks for it
    all_pages            weights are paged in and out ("dynamic VRAM"), and all pages fit
    few_pages            only a few fit, so pages are refused and evicted
    no_pages             none fits
    pressed_pages        pages compete with the run's own tensors for memory, give way to them, and are refused
    small_layers         weights are paged, but layers as small as a tiny model's are loaded for good

A context that ends without an error has checked that ComfyUI did treat the MODEL that way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import pytest

from ..device import devtools

Mode = Callable[[Any, Any], AbstractContextManager[Any]]  # (card, MODEL) -> the context
_NEVER_PAGED = 16 * 1024  # bytes up to which ComfyUI loads a layer permanently


@contextmanager
def resident(card: Any, patcher: Any) -> Iterator[Any]:
    """Leave everything to ComfyUI, on a card with plenty of memory."""
    with _loads() as shares:
        yield patcher
    assert set(shares) == {1.0}


@contextmanager
def low_vram(card: Any, patcher: Any) -> Iterator[Any]:
    """Leave room for half of the MODEL in addition to what ComfyUI keeps free."""
    import comfy.model_management as management

    room = 0.5 * patcher.model_size() + management.minimum_inference_memory()
    with card.memory.limited_to(int(card.memory.settled() + room)), _loads(may_be_forced=False) as shares:
        yield patcher
    assert any(0.01 < share < 0.99 for share in shares), shares


@contextmanager
def streamed(card: Any, patcher: Any) -> Iterator[Any]:
    """Make ComfyUI keep no weights on the card."""
    import comfy.model_management as management

    with pytest.MonkeyPatch.context() as patch, _loads() as shares:
        patch.setattr(management, "vram_state", management.VRAMState.NO_VRAM)
        yield patcher
    assert any(share < 0.1 for share in shares), shares


@contextmanager
def async_malloc(card: Any, patcher: Any) -> Iterator[Any]:
    """Stream without the buffers that layers share."""
    from comfy.cli_args import args

    with pytest.MonkeyPatch.context() as patch, streamed(card, patcher):
        patch.setattr(args, "cuda_malloc", True)
        yield patcher


@contextmanager
def streamed_by_trainer(card: Any, patcher: Any) -> Iterator[Any]:
    """Let the trainer request streaming through its widget."""
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
        assert not any(sum(model.pins.values()) for model in pager.models)
        assert (pager.refused > 0) == (limit is not None), vars(pager)


all_pages, few_pages, no_pages = (partial(_paged, limit) for limit in (None, 2, 0))


@contextmanager
def pressed_pages(card: Any, patcher: Any) -> Iterator[Any]:
    """Page weights on a card that has too little memory for all of them beside the run's own tensors."""
    tools, pages = devtools("card.comfyui"), devtools("card.pages")
    with pytest.MonkeyPatch.context() as patch, tools.dynamic_vram(card) as pager:
        _page_small_layers_too(patch)
        room = patcher.model_size() + pages.SPARE_PAGES * pages.PAGE
        with card.memory.limited_to(int(card.memory.settled() + room)):
            yield tools.as_dynamic(patcher)
        assert not any(sum(model.pins.values()) for model in pager.models)
        assert pager.gave_way or pager.refused, vars(pager)


@contextmanager
def small_layers(card: Any, patcher: Any) -> Iterator[Any]:
    """Page weights, with ComfyUI's own limit below which a layer is not paged: all layers are loaded."""
    tools = devtools("card.comfyui")
    with tools.dynamic_vram(card):
        yield tools.as_dynamic(patcher)
        assert not patcher.backup


MODES: dict[str, Mode] = {
    "resident": resident, "low_vram": low_vram, "streamed": streamed, "async_malloc": async_malloc,
    "streamed_by_trainer": streamed_by_trainer, "all_pages": all_pages, "few_pages": few_pages, "no_pages": no_pages,
    "pressed_pages": pressed_pages, "small_layers": small_layers,
}  # fmt: skip


@contextmanager
def _loads(*, may_be_forced: bool = True) -> Iterator[list[float]]:
    """Collect the share of a MODEL's weights that each load brings to the card.

    Args:
        may_be_forced: Whether a caller may force all weights to be loaded; if not, ComfyUI decides.
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
    """Make ComfyUI treat a tiny model's layers like those of a large one."""
    import comfy.model_management as management

    size = management.module_size
    patch.setattr(management, "module_size", lambda module, *args: size(module, *args) + _NEVER_PAGED)
