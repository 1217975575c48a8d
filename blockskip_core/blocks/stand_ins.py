"""Modules that stand in for a model's blocks while residuals are computed or a LoRA is trained.

    PassThrough     passes its tokens on; holds no weights
    ReplayFront     inserts the stored output of the front span; holds no weights
    AddResidual     adds the stored residual of the back span, and its linear response if there is one; holds no weights
    RecordingBlock  runs the real block and keeps its input and output tokens
    TrainedBlock    runs the real block so that gradients are correct, checkpointed or not
    FoldedBlock     runs the real block in a recording pass, replays it in the training pass

The stand-ins that run the real block share its weights under the block's own names, without copying them or touching
the block itself: see ``weight_sharing``.

Source: arXiv 2603.20755, Sec. 3.3, Eq. 3: ``f'_{i+l} = f'_i + (f_{i+l} - f_i)``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..model import BlockIO, OverwritingIO, TokenStreams
from .out_of_place import OutOfPlace
from .reading_copies import ReadingCopies
from .replay import Replay
from .saved_bytes import SavedBytes
from .weight_sharing import weight_sharing_copy

Kept = Literal["front", "back", "back with text", "nothing"]


class PassThrough(nn.Module):
    """Passes its tokens on unchanged."""

    def __init__(self, io: BlockIO) -> None:
        super().__init__()
        self.io = io

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.io.result(self.io.entering(args, kwargs), args, kwargs)


class _Replaying(nn.Module):
    """Writes what ``replay`` holds into the stream; has no weights."""

    def __init__(self, io: BlockIO, replay: Replay) -> None:
        super().__init__()
        self.io = io
        self.replay = replay


class ReplayFront(_Replaying):
    """Replaces its tokens by clones of ``replay.front``; clones, because the next module may write into them."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        entering = self.io.entering(args, kwargs)
        assert self.replay.front is not None, "nothing was set to be replayed"
        stored = self.replay.front.map(lambda x: x.to(entering.img, copy=True))
        return self.io.result(stored, args, kwargs)


class AddResidual(_Replaying):
    """Adds ``replay.back`` to the image tokens, and ``replay.back_txt`` to the text tokens if it is set.

    Otherwise text tokens pass unchanged, because no head reads them.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        entering = self.io.entering(args, kwargs)
        assert self.replay.back is not None, "nothing was set to be replayed"
        img = entering.img + self.replay.back.to(entering.img)
        if self.replay.response is not None:
            assert self.replay.bands is not None, "a response depends on the noise level"
            img = img + self.replay.response.added(entering.img, self.replay.bands)
        txt = entering.txt
        if txt is not None and self.replay.back_txt is not None:
            txt = txt + self.replay.back_txt.to(txt)
        return self.io.result(TokenStreams(img, txt), args, kwargs)


class _StandIn(nn.Module):
    """A module with the parameters, buffers and children of a weight-sharing copy, under the same names."""

    def __init__(self, block: nn.Module, io: BlockIO | None) -> None:
        super().__init__()
        self.io = io
        twin = weight_sharing_copy(block)
        self._parameters, self._buffers, self._modules = twin._parameters, twin._buffers, twin._modules
        self.__dict__["twin"] = twin  # not registered: a child would push every name one level down
        self.train(block.training)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # A stand-in takes the block's place, and hosts and other nodes read attributes of the blocks they find. We
            # cannot know which ones, so the stand-in has every attribute that the block has.
            return getattr(self.__dict__["twin"], name)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        copied = self.io.copied(args, kwargs) if isinstance(self.io, OverwritingIO) else None
        if copied is None:
            with OutOfPlace():
                return self.twin(*args, **kwargs)
        with ReadingCopies(copied.tokens):
            return self.twin(*copied.args, **copied.kwargs)


@dataclass
class Recording:
    """Input and output tokens of a recording stand-in's last forward."""

    entering: TokenStreams = field(init=False)
    leaving: TokenStreams = field(init=False)


class RecordingBlock(_StandIn):
    """Runs the block and keeps its input and output tokens in ``recording``."""

    io: BlockIO

    def __init__(self, block: nn.Module, io: BlockIO, recording: Recording) -> None:
        super().__init__(block, io)
        self.recording = recording

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        result = self.run(*args, **kwargs)
        self.recording.entering = self.io.entering(args, kwargs)
        self.recording.leaving = self.io.leaving(result, args, kwargs).map(torch.clone)
        return result


class TrainedBlock(_StandIn):
    """Runs the block so that nothing that backward reads is overwritten, and recomputes its activations if ``checkpointed``.

    Recomputation enters the same mode again inside the checkpointed function and starts from the input tensors, which
    nothing has overwritten. ``transformer_options`` is copied because the host writes into it between blocks.

    Args:
        block: The real block, or another module that a gradient passes through.
        io: How the block takes and returns tokens; None for other modules.
        checkpointed: Whether activations are recomputed.

    Attributes:
        checkpointed: Whether activations are recomputed.
        saved: If set, counts what a checkpoint holds.
        counting: Whether the next forward sets ``activation_bytes``.
        activation_bytes: Bytes that the block would keep if it were not checkpointed.
    """

    def __init__(self, block: nn.Module, io: BlockIO | None = None, *, checkpointed: bool) -> None:
        super().__init__(block, io)
        self.checkpointed = checkpointed
        self.saved: SavedBytes | None = None
        self.counting = False
        self.activation_bytes = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not (self.checkpointed and torch.is_grad_enabled()):
            return self.run(*args, **kwargs)
        if self.saved is not None:  # what a checkpoint holds does not pass through saved-tensor hooks
            for value in (*args, *kwargs.values()):
                self.saved.add(value)
        if isinstance(kwargs.get("transformer_options"), dict):
            kwargs["transformer_options"] = kwargs["transformer_options"].copy()
        if self.counting:
            self._count(args, kwargs)
        return checkpoint(self.run, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    def _count(self, args: tuple, kwargs: dict[str, Any]) -> None:
        """Set ``activation_bytes`` to the bytes that the block would keep for its backward without checkpointing."""
        kept = SavedBytes()
        with kept.counting(dropped=True):
            self.run(*args, **kwargs)
        self.activation_bytes = kept.total


@dataclass
class Fold:
    """State of the folded form: first a pass over the whole network that records, then one that replays.

    Attributes:
        recording: Whether this is the recording pass.
        front: Output of the front span in the recording pass.
        back: Sum of the residuals of the back span in the recording pass, of image and text tokens.
    """

    recording: bool = False
    front: TokenStreams | None = None
    back: TokenStreams | None = None
    replay: Replay = field(default_factory=Replay)

    def start_recording(self) -> None:
        """Begin a pass over the whole network."""
        self.recording, self.front, self.back = True, None, None

    def start_replay(self) -> None:
        """Begin the training pass."""
        self.recording = False
        self.replay.front = self.front
        self.replay.back = self.back.img if self.back else None
        self.replay.back_txt = self.back.txt if self.back else None


class FoldedBlock(_StandIn):
    """A skipped block of the folded form: real while ``fold`` records, ``replayed`` otherwise.

    Args:
        block: The real block.
        io: How the block takes and returns tokens.
        fold: State of the two passes.
        replayed: The weightless stand-in of the training pass.
        keeps: What the recording pass keeps of this block: its output ("front"), its residual ("back", of image tokens alone
            or "back with text"), or nothing.
    """

    io: BlockIO

    def __init__(
        self,
        block: nn.Module,
        io: BlockIO,
        fold: Fold,
        replayed: nn.Module,
        *,
        keeps: Kept,
    ) -> None:
        super().__init__(block, io)
        self.fold = fold
        self.__dict__["replayed"] = replayed
        self.keeps = keeps

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.fold.recording:
            return self.replayed(*args, **kwargs)
        result = self.run(*args, **kwargs)
        leaving = self.io.leaving(result, args, kwargs)
        if self.keeps in ("back", "back with text"):
            added = leaving.minus(self.io.entering(args, kwargs))
            added = added if self.keeps == "back with text" else added.without_text()
            self.fold.back = added if self.fold.back is None else self.fold.back.plus(added)
        elif self.keeps == "front":
            self.fold.front = leaving.map(torch.clone)
        return result
