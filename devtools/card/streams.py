"""Streams and events of the emulated card, and a check that each kernel waited for its inputs.

Nothing runs asynchronously here, so a missing wait does not change the numbers. It is found all the same: every kernel
is reported to the analysis behind ``TORCH_CUDA_SANITIZER``, which knows which kernel last touched each storage, on
which stream.

This finds one fault more than torch's own tool. Freed memory returns to the stream that it was allocated on, and the
next allocation on that stream may get it at once, even while other streams still use it. So a freed block is reused
here under the same name, and its next owner must have waited for the last users of the previous one.

Source: ``torch/cuda/_sanitizer.py``, ``c10/cuda/CUDACachingAllocator.cpp``.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.cuda._sanitizer import EventHandler

DEVICE = torch.device("cuda", 0)
DEFAULT = 0  # number of the default stream


class _Blocks:
    """Names of pieces of memory, as a caching allocator would hand them out."""

    def __init__(self) -> None:
        self._names: dict[int, int] = {}  # of live storages, by address
        self._owners: dict[int, tuple[int, int]] = {}  # name -> (stream it was allocated on, bytes)
        self._free: dict[int, list[int]] = {}  # stream -> names
        self._numbers = itertools.count(1)

    def allocated(self, address: int, num_bytes: int, stream: int) -> None:
        """Name a new storage: reuse the smallest freed block of its stream that it fits into, if there is one."""
        fitting = [name for name in self._free.get(stream, ()) if self._owners[name][1] >= num_bytes]
        if fitting:
            name = min(fitting, key=lambda name: self._owners[name][1])
            self._free[stream].remove(name)
        else:
            name = next(self._numbers)
            self._owners[name] = stream, num_bytes
        self._names[address] = name

    def freed(self, address: int) -> None:
        """Return a storage's block to its stream."""
        name = self._names.pop(address, None)
        if name in self._owners:  # other blocks were allocated before the analysis began
            self._free.setdefault(self._owners[name][0], []).append(name)

    def name(self, address: int) -> int:
        """Return the name of the block at an address."""
        return self._names.setdefault(address, -address)


class Streams:
    """The streams of a card, and the current one of each thread.

    Attributes:
        races: The sanitizer's reports about what ran within :meth:`judged`.
    """

    def __init__(self) -> None:
        self.races: list[str] = []
        self.default = Stream(number=DEFAULT)
        self._here = threading.local()
        self._sanitizer: EventHandler | None = None
        self._blocks = _Blocks()
        self._lock = threading.RLock()

    def current(self) -> Stream:
        """Return the stream on which this thread's kernels run."""
        return getattr(self._here, "stream", self.default)

    def make_current(self, stream: Stream) -> None:
        """Run this thread's kernels on a stream."""
        self._here.stream = stream

    @contextmanager
    def judged(self) -> Iterator[list[str]]:
        """Check everything that runs in this context with the sanitizer; yields the growing list of its reports."""
        self.races, self._sanitizer, self._blocks = [], EventHandler(), _Blocks()
        try:
            yield self.races
        finally:
            self._sanitizer = None

    @property
    def are_judged(self) -> bool:
        """Whether the sanitizer is on."""
        return self._sanitizer is not None

    def launch(self, kernel: str, reads: Iterable[Tensor], writes: Iterable[Tensor]) -> None:
        """Record a kernel on the current stream with the tensors that it reads and writes."""
        if self._sanitizer is None:
            return
        with self._lock:
            read, written = self._names(reads), self._names(writes)
            names = {name: [] for name in read | written}
            found = self._sanitizer._handle_kernel_launch(
                self.current().cuda_stream, read - written, written, set(), kernel, names
            )
            self.races += map(str, found)

    def allocated(self, address: int, num_bytes: int) -> None:
        """Record that a storage was allocated at an address."""
        if self._sanitizer is not None:
            with self._lock:
                self._blocks.allocated(address, num_bytes, self.current().cuda_stream)

    def freed(self, address: int) -> None:
        """Record that the storage at an address was freed."""
        if self._sanitizer is not None:
            with self._lock:
                self._blocks.freed(address)

    def wait(self, waiting: Stream, event: Event) -> None:
        """Make later kernels on a stream wait for an event."""
        self._report("_handle_event_wait", event.number, waiting.cuda_stream)

    def record(self, event: Event, stream: Stream) -> None:
        """Complete an event once all work that is now on a stream is done."""
        self._report("_handle_event_record", event.number, stream.cuda_stream)

    def host_waits_for_event(self, event: Event) -> None:
        """Make the host, and so everything that it launches later, wait for an event."""
        self._report("_handle_event_synchronization", event.number)

    def host_waits_for(self, stream: Stream) -> None:
        """Make the host wait for a stream."""
        self._report("_handle_stream_synchronization", stream.cuda_stream)

    def synchronize(self) -> None:
        """Make the host wait for all streams."""
        self._report("_handle_device_synchronization")

    def _names(self, tensors: Iterable[Tensor]) -> set[int]:
        storages = (tensor.untyped_storage() for tensor in tensors)
        return {self._blocks.name(storage.data_ptr()) for storage in storages if storage.nbytes()}

    def _report(self, event: str, *numbers: int) -> None:
        if self._sanitizer is not None:
            with self._lock:
                getattr(self._sanitizer, event)(*numbers)


class Stream:
    """Replaces ``torch.cuda.Stream``."""

    card: ClassVar[Streams]  # set by torch_cuda.install(), because torch creates streams without naming a card
    _numbers = itertools.count(1)

    def __init__(self, device: Any = None, priority: int = 0, *, number: int | None = None) -> None:
        self.cuda_stream = self.stream_id = next(self._numbers) if number is None else number
        self.device, self.priority = DEVICE, priority
        self._entered: list[StreamContext] = []

    def wait_stream(self, other: Stream) -> None:
        """Wait for all work that is now on another stream."""
        self.wait_event(other.record_event())

    def wait_event(self, event: Event) -> None:
        """Wait for an event."""
        self.card.wait(self, event)

    def record_event(self, event: Event | None = None) -> Event:
        """Return an event that completes once all work that is now on this stream is done."""
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        """Make the host wait for this stream."""
        self.card.host_waits_for(self)

    def query(self) -> bool:
        """Return whether all work is done; here it always is."""
        return True

    def __enter__(self) -> Stream:
        self._entered.append(StreamContext(self))
        self._entered[-1].__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._entered.pop().__exit__(*error)

    def __hash__(self) -> int:
        return hash(self.cuda_stream)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream) and other.cuda_stream == self.cuda_stream


class Event:
    """Replaces ``torch.cuda.Event``."""

    _numbers = itertools.count(1)

    def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> None:
        self.number = next(self._numbers)

    def record(self, stream: Stream | None = None) -> None:
        """Complete once all work that is now on a stream is done."""
        Stream.card.record(self, stream or Stream.card.current())

    def wait(self, stream: Stream | None = None) -> None:
        """Make a stream wait for this event."""
        (stream or Stream.card.current()).wait_event(self)

    def synchronize(self) -> None:
        """Make the host wait for this event."""
        Stream.card.host_waits_for_event(self)

    def query(self) -> bool:
        """Return whether it has completed; here it always has."""
        return True

    def elapsed_time(self, other: Event) -> float:
        """Return 0.0, because times on an emulated card mean nothing."""
        return 0.0


class StreamContext:
    """Replaces ``torch.cuda.StreamContext`` and ``torch.cuda.stream``."""

    def __init__(self, stream: Stream | None) -> None:
        self.stream = stream

    def __enter__(self) -> None:
        self._before = Stream.card.current()
        if self.stream is not None:
            Stream.card.make_current(self.stream)

    def __exit__(self, *error: object) -> None:
        Stream.card.make_current(self._before)
