"""Modules that stand in for a model's blocks while residuals are computed or a LoRA is trained.

    PassThrough     hands its tokens on; holds no weights
    ReplayFront     puts in the stored output of the front span; holds no weights
    AddResidual     adds the stored residual of the back span, and its linear answer if there is one; holds no weights
    RecordingBlock  runs the real block and keeps what went in and came out
    TrainedBlock    runs the real block so that gradients are right, checkpointed or not
    FoldedBlock     runs the real block in a recording pass, replays it in the training pass

Those that run the real block share its weights under the block's own names, without a copy and without touching the
block itself: see :func:`weight_sharing_copy`.

Source: arXiv 2603.20755, Sec. 3.3, Eq. 3: ``f'_{i+l} = f'_i + (f_{i+l} - f_i)``.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.checkpoint import checkpoint

from .out_of_place import OutOfPlace
from .streams import BlockIO, TokenStreams


@dataclass
class Replay:
    """What the weightless stand-ins put into the stream; set before every forward.

    Attributes:
        front: Tokens leaving the front span, or None if nothing is skipped there.
        back: Residual of the image tokens over the back span, shape (B, N, D), or None.
        response: J of ``back_response``, shape (D, D), or None if the back residual is a constant.
    """

    front: TokenStreams | None = None
    back: Tensor | None = None
    response: Tensor | None = None


class PassThrough(nn.Module):
    """Hands its tokens on unchanged."""

    def __init__(self, io: BlockIO) -> None:
        super().__init__()
        self.io = io

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.io.result(self.io.entering(args, kwargs), args, kwargs)


class ReplayFront(nn.Module):
    """Drops its tokens and puts in ``replay.front``, as clones: whoever comes next may write into them."""

    def __init__(self, io: BlockIO, replay: Replay) -> None:
        super().__init__()
        self.io = io
        self.replay = replay

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        entering = self.io.entering(args, kwargs)
        stored = self.replay.front.map(lambda x: x.to(entering.img, copy=True))
        return self.io.result(stored, args, kwargs)


class AddResidual(nn.Module):
    """Adds ``replay.back`` to the image tokens; text tokens pass, for no head reads them."""

    def __init__(self, io: BlockIO, replay: Replay) -> None:
        super().__init__()
        self.io = io
        self.replay = replay

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        entering = self.io.entering(args, kwargs)
        img = entering.img + self.replay.back.to(entering.img)
        if self.replay.response is not None:
            img = img + entering.img @ self.replay.response.to(entering.img)
        return self.io.result(TokenStreams(img, entering.txt), args, kwargs)


def weight_sharing_copy(module: nn.Module) -> nn.Module:
    """Return a copy of a module tree that owns no weights of its own: same names, same memory.

    Loaders that run under ``torch.inference_mode`` leave inference tensors behind, which autograd refuses to save. A
    tensor laid over the same memory outside inference mode is an ordinary one; the original is not touched. Quantised
    weights that can be taken apart (torch's wrapper subclasses) are put together again from such tensors. Packed bytes
    of other classes are kept as they are: the LoRA layers never save them.
    """
    twin = copy.copy(module)
    twin._parameters = {name: weight_sharing_alias(parameter) for name, parameter in module._parameters.items()}
    twin._buffers = {name: weight_sharing_alias(buffer) for name, buffer in module._buffers.items()}
    twin._modules = {name: child and weight_sharing_copy(child) for name, child in module._modules.items()}
    copy_hooks(module, twin)
    return twin


def copy_hooks(module: nn.Module, twin: nn.Module) -> None:
    """Give a copy the forward hooks of a module, in collections of its own."""
    for hooks in (
        "_forward_hooks",
        "_forward_pre_hooks",
        "_forward_hooks_with_kwargs",
        "_forward_pre_hooks_with_kwargs",
    ):
        setattr(twin, hooks, copy.copy(getattr(module, hooks)))


def weight_sharing_alias(tensor: Tensor | None) -> Tensor | None:
    """Return an ordinary tensor over the memory of one that may be an inference tensor; see :func:`weight_sharing_copy`."""
    if tensor is None or tensor.is_meta:
        return tensor
    with torch.inference_mode(False):
        if is_traceable_wrapper_subclass(tensor):
            return _alias_parts(tensor)
        if type(tensor) not in (Tensor, nn.Parameter) and not is_unpacked(tensor):
            return tensor
        plain = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        plain.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())
        return nn.Parameter(plain, requires_grad=False) if isinstance(tensor, nn.Parameter) else plain


def is_unpacked(tensor: Tensor) -> bool:
    """Tell numbers in another class, as some file formats give small tensors, from packed bytes.

    The first are used as ordinary tensors: what is computed with them would be of that class too, and such classes
    may not let themselves be detached.
    """
    return tensor.is_floating_point() and tuple(tensor.shape) == tuple(tensor.size())


def _alias_parts(tensor: Tensor) -> Tensor:
    names, context = tensor.__tensor_flatten__()
    parts = {name: weight_sharing_alias(getattr(tensor, name)) for name in names}
    twin = type(tensor).__tensor_unflatten__(parts, context, tensor.size(), tensor.stride())
    if isinstance(tensor, nn.Parameter):
        twin._is_param = True  # what nn.Parameter does, but for detaching, which copies the scales of some formats
    return twin


def frozen_copy(module: nn.Module) -> nn.Module:
    """Return a weight-sharing copy that runs without gradients; hosts may leave weights trainable.

    It is no module around the module: a host that finds a layer at this path writes its own marks onto it.
    """
    twin = weight_sharing_copy(module)
    twin.forward = torch.no_grad()(twin.forward)
    return twin


class _Stand(nn.Module):
    """A module with the parameters, buffers and children of a weight-sharing copy, under the same names."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        twin = weight_sharing_copy(block)
        self._parameters, self._buffers, self._modules = twin._parameters, twin._buffers, twin._modules
        self.__dict__["twin"] = twin  # not registered: a child would push every name one level down
        self.train(block.training)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["twin"], name)  # hosts read attributes off their blocks

    def run(self, *args: Any, **kwargs: Any) -> Any:
        with OutOfPlace():
            return self.twin(*args, **kwargs)


@dataclass
class Recording:
    """What a recording stand-in has seen in the last forward."""

    entering: TokenStreams | None = None
    leaving: TokenStreams | None = None


class RecordingBlock(_Stand):
    """Runs the block and keeps the tokens that went in and came out in ``recording``."""

    def __init__(self, block: nn.Module, io: BlockIO, recording: Recording) -> None:
        super().__init__(block)
        self.io = io
        self.recording = recording

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        result = self.run(*args, **kwargs)
        self.recording.entering = self.io.entering(args, kwargs)
        self.recording.leaving = self.io.leaving(result, args, kwargs).map(torch.clone)
        return result


class SavedBytes:
    """Counts the memory that is kept for a backward pass: each storage once, parameters not counted."""

    def __init__(self) -> None:
        self.total = 0
        self._seen: set[StorageWeakRef] = set()  # they keep an identity from being given twice

    def add(self, value: Any) -> None:
        """Count a tensor that is kept; anything else is ignored."""
        if not isinstance(value, Tensor) or isinstance(value, nn.Parameter) or isinstance(value._base, nn.Parameter):
            return
        storage = value.untyped_storage()
        identity = StorageWeakRef(storage)  # an address would do for memory, but tensors on `meta` have none
        if identity not in self._seen:
            self._seen.add(identity)
            self.total += storage.nbytes()

    @contextmanager
    def counting(self, *, dropped: bool = False) -> Iterator[None]:
        """Count what autograd saves in this context.

        Args:
            dropped: Whether nothing is to be saved, for there will be no backward pass.
        """

        def pack(tensor: Tensor) -> Tensor | None:
            self.add(tensor)
            # Detached: an operation that saves its own output would hold itself alive otherwise, out of Python's reach.
            return None if dropped else tensor.detach()

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield


class TrainedBlock(_Stand):
    """Runs the block out of place, with its activations recomputed in backward if ``checkpointed``.

    Recomputation enters the out-of-place mode again inside the checkpointed function and starts from the tensors that
    came in, which nobody has overwritten. ``transformer_options`` is copied: the host writes into it between blocks.

    Attributes:
        checkpointed: Whether activations are recomputed.
        saved: Counts what a checkpoint holds, while it is set.
        counting: Whether the next forward sets ``activation_bytes``.
        activation_bytes: What the block would keep if it were not checkpointed.
    """

    def __init__(self, block: nn.Module, *, checkpointed: bool) -> None:
        super().__init__(block)
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
        """Set ``activation_bytes`` to what the block would keep for its backward if it were not checkpointed."""
        kept = SavedBytes()
        with kept.counting(dropped=True):
            self.run(*args, **kwargs)
        self.activation_bytes = kept.total


@dataclass
class Fold:
    """State of the folded form: first a pass over the whole network that records, then one that replays.

    Attributes:
        recording: Which pass it is.
        front: Output of the front span in the recording pass.
        back: Sum of the image residuals of the back span in the recording pass.
    """

    recording: bool = False
    front: TokenStreams | None = None
    back: Tensor | None = None
    replay: Replay = field(default_factory=Replay)

    def start_recording(self) -> None:
        """Begin a pass over the whole network."""
        self.recording, self.front, self.back = True, None, None

    def start_replay(self) -> None:
        """Begin the pass that is trained."""
        self.recording = False
        self.replay.front, self.replay.back = self.front, self.back


class FoldedBlock(_Stand):
    """A skipped block of the folded form: real while ``fold`` records, ``replayed`` otherwise.

    Args:
        block: The real block.
        io: How it takes and gives tokens.
        fold: The pass that is on.
        replayed: The weightless stand-in of the training pass.
        keeps: What the recording pass keeps of this block: its output ("front"), its image residual ("back"), or
            nothing.
    """

    def __init__(
        self,
        block: nn.Module,
        io: BlockIO,
        fold: Fold,
        replayed: nn.Module,
        *,
        keeps: Literal["front", "back", "nothing"],
    ) -> None:
        super().__init__(block)
        self.io = io
        self.fold = fold
        self.__dict__["replayed"] = replayed
        self.keeps = keeps

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.fold.recording:
            return self.replayed(*args, **kwargs)
        result = self.run(*args, **kwargs)
        leaving = self.io.leaving(result, args, kwargs)
        if self.keeps == "back":
            added = leaving.img - self.io.entering(args, kwargs).img
            self.fold.back = added if self.fold.back is None else self.fold.back + added
        elif self.keeps == "front":
            self.fold.front = leaving.map(torch.clone)
        return result
