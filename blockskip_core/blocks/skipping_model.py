"""A model with its skipped blocks replaced and its kept blocks made trainable: decides which stand-in goes where.

Source: arXiv 2603.20755, Sec. 3.3. The folded form is not the paper's: it takes the back residual from a pass over the
whole network with the current LoRA, in every step, and stores nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..model import SkippableDit, is_linear
from ..selection.selection import BlockSelection
from .linear_response import LinearResponse
from .replay import Replay, Residual
from .saved_bytes import SavedBytes
from .stand_ins import AddResidual, Fold, FoldedBlock, Kept, PassThrough, ReplayFront, TrainedBlock
from .weight_sharing import frozen_copy, weight_sharing_copy


class SkippingModel:
    """The stand-ins of a run, and what they replay.

    Args:
        dit: The model.
        selection: Blocks to be skipped.
        checkpointed: Recompute the kept blocks' activations in backward.
        folded: Keep the skipped blocks too, and run them in a recording pass before every batch.

    Attributes:
        modules: Path below the diffusion model -> stand-in, for :meth:`SkippableDit.running`.
    """

    def __init__(self, dit: SkippableDit, selection: BlockSelection, checkpointed: bool, *, folded: bool) -> None:
        self._dit, self._selection = dit, selection
        self._replay = Replay()
        self._sigma: Callable[[int], float] | None = None
        self._fold = Fold(replay=self._replay) if folded else None
        self.modules: dict[str, nn.Module] = {}
        for index, block in enumerate(dit.blocks):
            if index in selection.kept:
                self.modules[block.name] = TrainedBlock(dit.module(block.name), block.io, checkpointed=checkpointed)
            else:
                self.modules[block.name] = self._skipped(index)
        for name in dit.frozen_stem:
            self.modules[name] = frozen_copy(dit.module(name))
        for name in dit.trainable_head:
            self.modules[name] = _trained_head(dit.module(name))

    def _skipped(self, index: int) -> nn.Module:
        block = self._dit.blocks[index]
        if index == self._selection.front - 1:
            replayed: nn.Module = ReplayFront(block.io, self._replay)
        elif self._selection.back and index == self._selection.back_span.start:
            replayed = AddResidual(block.io, self._replay)
        else:
            replayed = PassThrough(block.io)
        if self._fold is None:
            return replayed
        keeps: Kept = "front" if isinstance(replayed, ReplayFront) else "nothing"
        if index in self._selection.back_span:
            keeps = "back with text" if self._selection.back_has_text else "back"
        return FoldedBlock(self._dit.module(block.name), block.io, self._fold, replayed, keeps=keeps)

    def linears(self) -> dict[str, nn.Module]:
        """Return the linear layers that gradients pass through, by their native names."""
        kept = (self._dit.blocks[index].name for index in self._selection.kept)
        return {
            f"{stem}.{path}".removesuffix("."): layer
            for stem in (*kept, *self._dit.trainable_head)
            for path, layer in self.modules[stem].named_modules()
            if is_linear(layer)
        }

    @property
    def trained_blocks(self) -> list[TrainedBlock]:
        """The kept blocks in execution order."""
        kept = (self.modules[self._dit.blocks[index].name] for index in self._selection.kept)
        return [block for block in kept if isinstance(block, TrainedBlock)]

    def set_response(self, response: LinearResponse | None, sigma: Callable[[int], float]) -> None:
        """Set the back span's linear response to its input for all batches; see ``residuals.back_response``.

        It is copied, because it may have been read under inference mode, and autograd saves it.

        Args:
            response: The response, or None.
            sigma: Draw -> its noise level.
        """
        self._replay.response = response and response.copied_to(self._dit.device)
        self._sigma = sigma

    def replay(
        self, residual: Callable[[int], Residual] | None, batch: Sequence[int], forward: Callable[[], Tensor]
    ) -> None:
        """Set what is replayed for a batch: stored residuals, or in the folded form those of a recording pass."""
        if residual is not None:
            self.replay_stored(residual, batch)
            return
        assert self._fold is not None, "without stored residuals the skipped blocks are needed"
        self._fold.start_recording()
        with torch.no_grad():
            forward()
        self._fold.start_replay()

    def replay_stored(self, residual: Callable[[int], Residual], batch: Sequence[int]) -> None:
        """Set what is replayed for a batch to the stored residuals."""
        stored = Residual.cat(residual(draw) for draw in batch)
        device = self._dit.device
        self._replay.front = None if stored.front is None else stored.front.map(lambda x: x.to(device))
        self._replay.back = None if stored.back is None else stored.back.to(device)
        self._replay.back_txt = None if stored.back_txt is None else stored.back_txt.to(device)
        if self._replay.response is not None:
            assert self._sigma is not None, "it is set with the response"
            self._replay.bands = self._replay.response.bands([self._sigma(draw) for draw in batch]).to(device)

    @contextmanager
    def counting_saved_bytes(self) -> Iterator[SavedBytes]:
        """Count what the forward in this context keeps for its backward."""
        saved = SavedBytes()
        trained = [module for module in self.modules.values() if isinstance(module, TrainedBlock)]
        try:
            for module in trained:
                module.saved = saved
            with saved.counting():
                yield saved
        finally:
            for module in trained:
                module.saved = None


def _trained_head(module: nn.Module) -> nn.Module:
    """Return a copy, for gradients to pass through, of a module after the blocks.

    A single layer is copied without a wrapper: a host sets attributes on layers for low memory, and reads them in their
    forward.
    """
    if next(module.children(), None) is None:
        return weight_sharing_copy(module)
    return TrainedBlock(module, checkpointed=False)
