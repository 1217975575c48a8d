"""Find the layout of a model of unknown class by following a few small calls.

For every list of blocks the model runs once up to that list's first block, which is tried on its own; blocks before it pass
their tokens on, and all others are replaced by modules without weights. So no more than the stem and one block is ever
loaded. What the block is given and returns shows where its tokens are (``call_layout``), and a small LoRA on it which of
its layers change the picture. A last pass, in which every block passes its tokens on, shows which modules come before and
after the blocks. Whether all this is enough is checked by ``replay_check``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from ...adapters.layer_kinds import ATTENTION
from ...adapters.lora import LinearShape, LoraAdapters, LoraSettings
from ...blocks.reading_copies import ReadingCopies
from ...blocks.stand_ins import PassThrough, TrainedBlock
from ...blocks.token_places import ListLayout, PlacedBlockIO, with_tensors
from ...errors import UnsupportedModelError
from ...model import Denoiser, is_linear
from ..families.block_lists import block_lists
from ..families.followed import ModelLayout
from ..families.hidden_text import TextKeys
from .adapted_dit import AdaptedDit
from .attention_calls import AttentionCalls
from .call_layout import ROUNDING, ROWS, CallLayout, layout_of_call, tensors_given


def follow(dit: AdaptedDit, tree: nn.Module, latent_shape: Sequence[int]) -> ModelLayout:
    """Return the layout of a model.

    Args:
        dit: The model, with at least one caption.
        tree: The diffusion model; while ``dit`` runs, its modules are the copies that run.
        latent_shape: (C, H, W) of the latents that will be denoised.

    Raises:
        UnsupportedModelError: If its blocks do not take and return tokens in a way that can be followed; the message says
            which condition fails.
    """
    calls = _Calls(dit, tree, latent_shape)
    layouts: dict[str, ListLayout] = {}
    for name in calls.lists:
        layouts[name] = calls.layout_of(name, layouts)
    stem, others = calls.order(layouts)
    first = calls.first
    assert first is not None  # there is at least one list
    return ModelLayout(
        lists=layouts,
        stem=stem,
        head=others,
        width=first.width,
        patch_size=_patch_size(first.num_img, dit.frames, latent_shape),
        text_keys=calls.text_keys,
        more_text=None if first.num_txt is None else first.num_txt - dit.text_length(0),
    )


def _patch_size(num_tokens: int, frames: int, latent_shape: Sequence[int]) -> int:
    """Return the side of a token in latent cells; a token is of one latent frame."""
    *_, rows, columns = latent_shape
    for side in range(1, min(rows, columns) + 1):
        if frames * math.ceil(rows / side) * math.ceil(columns / side) == num_tokens:
            return side
    raise UnsupportedModelError(
        f"This model has {num_tokens} image tokens for a latent of {columns} x {rows}, expected one for every square of "
        "cells, so its blocks cannot be skipped. Choose another model."
    )


class _Reached(Exception):
    """The block to be looked at has run."""


class _Unreached(nn.Module):
    """In the place of a block that no call should reach."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise UnsupportedModelError(
            "This model's blocks do not run in the order in which they are listed, so they cannot be skipped. Choose "
            "another model."
        )


class _Watched(TrainedBlock):
    """A real block that keeps what it is given and what it returns, with the graph between them, and ends the pass.

    Args:
        block: The block.
        overwrites: Whether it may overwrite what it is given; otherwise it runs out of place.

    Attributes:
        args, kwargs: The arguments of the call; what may be tokens has a graph of its own.
        plain: What the block returns if nothing is changed about how it runs.
        attention_calls: Its attention calls. Not ``attention``, as Ideogram 4 names a layer of its blocks.
        result: What it returns, with its graph.
        spoiled: Whether it has overwritten a tensor that its gradient needs.
    """

    def __init__(self, block: nn.Module, overwrites: bool) -> None:
        super().__init__(block, checkpointed=False)
        self._overwrites = overwrites
        self.args: tuple = ()
        self.kwargs: dict[str, Any] = {}
        self.plain: Any = None
        self.attention_calls = AttentionCalls()
        self.result: Any = None
        self.spoiled = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.args, self.kwargs = _with_tensors(args, kwargs, lambda x: x.detach().clone().requires_grad_())
        given, named = self.attention_calls.watched(
            *_with_tensors(self.args, self.kwargs, lambda x: x.detach().clone())
        )  # fmt: skip
        with torch.no_grad():
            self.plain = self.twin(*given, **named)
        saved: list[tuple[Tensor, int]] = []

        def save(tensor: Tensor) -> Tensor:
            alias = tensor.detach()  # an operation that keeps its own output would hold itself for ever
            saved.append((alias, alias._version))
            return alias

        # Autograd would notice by itself, but a backward that fails keeps its tensors on the device.
        with torch.enable_grad(), saved_tensors_hooks(save, lambda tensor: tensor):
            self._run_with_graph()
        self.spoiled = any(tensor._version != version for tensor, version in saved)
        raise _Reached

    def _run_with_graph(self) -> None:
        given, named = _with_tensors(self.args, self.kwargs, torch.clone)  # because a leaf must not be overwritten
        if self._overwrites:
            with ReadingCopies(list(tensors_given(given, named).values())):
                self.result = self.twin(*given, **named)
        else:
            self.result = self.run(*given, **named)


def _with_tensors(
    args: tuple, kwargs: Mapping[str, Any], function: Callable[[Tensor], Tensor]
) -> tuple[tuple, dict[str, Any]]:
    """Return the arguments of a call with ``function`` applied to what may be tokens."""
    changed = {key: function(tensor) for key, tensor in tensors_given(args, kwargs).items()}
    return with_tensors(args, kwargs, changed)


class _Calls:
    """The passes through the model.

    Args:
        dit, tree, latent_shape: See :func:`follow`.

    Attributes:
        lists: List of blocks -> number of blocks.
        first: What the first call has shown.
        text_keys: List of blocks -> where the text is among the keys of a block's attention calls, if that is known.
    """

    def __init__(self, dit: AdaptedDit, tree: nn.Module, latent_shape: Sequence[int]) -> None:
        self.dit, self._tree = dit, tree
        self.lists = {name: len(list(tree.get_submodule(name).children())) for name in block_lists(tree)}
        generator = torch.Generator().manual_seed(0)
        self._latents = torch.randn(ROWS, *latent_shape, generator=generator)
        self.first: CallLayout | None = None
        self.text_keys: dict[str, tuple[TextKeys, ...]] = {}

    def layout_of(self, name: str, known: Mapping[str, ListLayout]) -> ListLayout:
        """Return the layout of a list; those before it are known."""
        block = f"{name}.0"
        found = self._tried(block, known, overwrites=False)
        if isinstance(found, str):
            found = self._tried(block, known, overwrites=True)
        if isinstance(found, str):
            raise UnsupportedModelError(
                f"No gradient passes through the blocks of this model ({found}), so it cannot be trained. Choose another "
                "model."
            )
        self.first = self.first or found
        return found.layout

    def _tried(self, block: str, known: Mapping[str, ListLayout], *, overwrites: bool) -> CallLayout | str:
        """Return what a call of a list's first block shows, or why the block cannot be trained in this way.

        The reason is no exception: its traceback would keep what the call has put on the device.
        """
        watched = _Watched(self.dit.module(block), overwrites)
        modules = {**self._passing(known), **self._absent([other for other in self.lists if other not in known])}
        modules[block] = watched
        linears = {path: layer for path, layer in watched.named_modules() if is_linear(layer)}
        with torch.inference_mode(False), torch.enable_grad(), self.dit.running(modules) as denoise:
            adapters = _small_lora(linears)
            adapters.to(self.dit.device)
            with adapters.attached(linears, self.dit.weight_for_backward):
                try:
                    self._call(denoise)
                except _Reached:
                    found = layout_of_call(watched.args, watched.kwargs, watched.plain, block)
                    without = _without_effect(adapters, found, watched)
                else:
                    raise UnsupportedModelError(f"The block {block} was never called, so it cannot be skipped.")
        if isinstance(without, str):
            return without
        seen = watched.attention_calls.seen
        if None not in seen:
            self.text_keys[block.rpartition(".")[0]] = tuple(keys for keys in seen if keys is not None)
        has_text = found.num_txt is not None
        layout = replace(
            found.layout,
            text_outputs=without if has_text else frozenset(),
            unused=frozenset() if has_text else without,
            overwrites=overwrites,
        )
        return replace(found, layout=layout)

    def order(self, layouts: Mapping[str, ListLayout]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return the modules before the first block, and the others that run."""
        modules = self._passing(layouts)
        with torch.inference_mode(False), torch.no_grad(), self.dit.running(modules) as denoise:
            # While it runs, the tree holds copies, so the hooks do not touch the user's MODEL.
            with _order_of_calls(self._tree, set(modules)) as called:
                self._call(denoise)
            parts = _Parts(self._tree, modules, called)
        blocks = [name for name in called if name in modules]
        expected = [f"{name}.{index}" for name, count in self.lists.items() for index in range(count)]
        if blocks != expected:
            raise UnsupportedModelError(
                "This model's blocks do not run once each in the order in which they are listed, so they cannot be "
                "skipped. Choose another model."
            )
        return parts.stem, parts.others

    def _passing(self, layouts: Mapping[str, ListLayout]) -> dict[str, nn.Module]:
        return {
            f"{name}.{index}": PassThrough(PlacedBlockIO(layout, num_img=lambda: 0))
            for name, layout in layouts.items()
            for index in range(self.lists[name])
        }

    def _absent(self, lists: Sequence[str]) -> dict[str, nn.Module]:
        return {f"{name}.{index}": _Unreached() for name in lists for index in range(self.lists[name])}

    def _call(self, denoise: Denoiser) -> Tensor:
        device = self.dit.device
        with torch.no_grad():
            sigmas = torch.full((ROWS,), 0.5, device=device)
            return denoise(self._latents.to(device), sigmas, [0] * ROWS)


@contextmanager
def _order_of_calls(tree: nn.Module, blocks: set[str]) -> Iterator[list[str]]:
    """Collect the paths of the modules with weights, and of the blocks, in the order in which they are called."""
    called: list[str] = []
    handles = []
    for name, module in tree.named_modules():
        if name and (name in blocks or next(module.parameters(), None) is not None):
            handles.append(module.register_forward_pre_hook(lambda *_, name=name: called.append(name)))
    try:
        yield called
    finally:
        for handle in handles:
            handle.remove()


class _Parts:
    """The modules of a model apart from its blocks, by when they run.

    Args:
        tree: The diffusion model.
        blocks: Paths of the blocks.
        called: Paths of everything that was called, in order.

    Attributes:
        stem: The largest modules of which nothing runs after the first block has begun.
        others: The largest modules of which something does, and that are called themselves.
    """

    def __init__(self, tree: nn.Module, blocks: Collection[str], called: Sequence[str]) -> None:
        first = next((place for place, name in enumerate(called) if name in blocks), len(called))
        self._blocks, self._called, self._late = blocks, set(called), set(called[first:]) - set(blocks)
        stem: list[str] = []
        others: list[str] = []
        self._visit("", tree, stem, others)
        self.stem, self.others = tuple(stem), tuple(others)

    def _visit(self, path: str, module: nn.Module, stem: list[str], others: list[str]) -> None:
        for name, child in module.named_children():
            place = path + name
            if place in self._blocks or not any(_within(part, place) for part in self._called):
                continue
            if place not in self._called:  # a list, or a module of which only parts are called
                self._visit(f"{place}.", child, stem, others)
            elif any(_within(part, place) for part in self._late):
                others.append(place)
            else:
                stem.append(place)


def _within(path: str, place: str) -> bool:
    return path == place or path.startswith(f"{place}.")


def _small_lora(linears: Mapping[str, nn.Linear]) -> LoraAdapters:
    shapes = {name: LinearShape(layer.in_features, layer.out_features) for name, layer in linears.items()}
    return LoraAdapters(shapes, LoraSettings(rank=1, alpha=1), seed=0)


def _is_same(found: CallLayout, watched: _Watched) -> bool:
    """Return whether a block returns with a graph what it returns without."""
    for place in found.layout.places:
        plain, result = place.leaving(watched.plain), place.leaving(watched.result).detach()
        added = plain - place.entering(watched.args, watched.kwargs).detach()
        if not (result - plain).norm() <= ROUNDING * added.norm():
            return False
    return True


def _without_effect(adapters: LoraAdapters, found: CallLayout, watched: _Watched) -> frozenset[str] | str:
    """Return the linear layers that do not change the image tokens, or why no gradient can pass through the block.

    Raises:
        UnsupportedModelError: If none passes through its attention.
    """
    if watched.spoiled:
        return "a block overwrites a tensor that its gradient needs"
    if not _is_same(found, watched):
        return "a block computes something else if nothing that its gradient needs is overwritten"
    place = found.layout.img
    img = place.as_tokens(place.leaving(watched.result))
    if found.layout.joined:
        img = img[:, : found.num_img] if found.layout.joined == "image first" else img[:, -found.num_img :]
    weights = torch.randn(img.shape, generator=torch.Generator().manual_seed(1)).to(img)
    ups = [adapters.up(name) for name in adapters.names]
    wanted = [place.entering(watched.args, watched.kwargs), *ups]
    try:
        with torch.enable_grad():
            entering, *gradients = torch.autograd.grad((img * weights).sum(), wanted, allow_unused=True)
    except (RuntimeError, NotImplementedError) as problem:
        return str(problem)
    if entering is None:
        return "its tokens do not depend on those before it"
    names = zip(adapters.names, gradients, strict=True)
    without = frozenset(name for name, gradient in names if gradient is None or not gradient.any())
    attention = {name for name in adapters.names if ATTENTION.search(name)}
    if attention and attention <= without:
        raise UnsupportedModelError(
            "No gradient passes through the attention of this model, whose kernel has no backward. Start ComfyUI with "
            "--use-pytorch-cross-attention."
        )
    return without
