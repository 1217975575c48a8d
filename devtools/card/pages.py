"""The virtual memory of ComfyUI's dynamic VRAM (comfy-aimdo), on the emulated card.

A model's weights have permanent addresses, but the pages behind them come and go. A page that is missing when a layer
needs it is *faulted* in, or refused when the card is full; ComfyUI then copies the layer into a buffer that it reuses.
Here, an evicted page is filled with NaN, so that a stale read shows in the result.

Pages give way to every other allocation, torch's own included: those of the models that were prioritised longest ago
first, each model's last pages first, until eight pages' bytes remain free. Below a model's *watermark* all of its pages
may be resident, and from it on all are refused; it falls with every eviction and rises again when the host prioritises
the model. (Read in the source of comfy-aimdo 0.4, July 2026: ``model-vbar.c``, ``vrambuf.c``, ``plat.h``.)

Differences from comfy-aimdo: pages can be 64 KiB instead of 32 MiB, so that a tiny model has several; files are not
read into buffers; a page that another model needs is not chosen by what that model lacks, but by the same order.
"""

from __future__ import annotations

import ctypes
import mmap
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import Tensor

from .card import Card

PAGE = 64 * 1024
FULL_PAGE = 32 * 2**20  # as in comfy-aimdo
SPARE_PAGES = 8  # pages give way until this many pages' bytes are free: 256 MiB in comfy-aimdo
ALIGNMENT = 512
_MAP_NORESERVE = 0x4000  # Linux; the address range may be larger than the machine's memory
Allocation = tuple["ModelVBAR", int, int]  # owner, address, bytes


class Region:
    """A range of addresses that takes memory only where something has been written."""

    def __init__(self, size: int) -> None:
        self.size = max(int(size), mmap.PAGESIZE)
        self._map = mmap.mmap(-1, self.size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))

    def tensor(self, address: int, size: int) -> Tensor:
        """Return bytes of the region as a CPU tensor that keeps the region alive."""
        made = torch.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype=torch.uint8)
        made.keeps = self
        return made

    def __contains__(self, address: int) -> bool:
        """Return whether an address is in the region."""
        return self.address <= address < self.address + self.size

    def spoil(self, offset: int, size: int) -> None:
        """Fill bytes with a value that is NaN in every floating-point format."""
        ctypes.memset(self.address + offset, 0xFF, min(size, self.size - offset))


class Pager:
    """The pages of all models on a card.

    Args:
        card: The card.
        page: Bytes of a page.

    Attributes:
        limit: The maximum number of pages per model; None for as many as fit.
        faults, refused, evictions: How often pages were requested, refused, and evicted.
        gave_way: How many of the evicted pages made room for another allocation.
        models, regions: The models' pages; their addresses and those of the buffers for layers without pages.
    """

    def __init__(self, card: Card, page: int = PAGE) -> None:
        self.card, self.page = card, page
        self.limit: int | None = None
        self.faults = self.refused = self.evictions = self.gave_way = 0
        self.models: weakref.WeakSet[ModelVBAR] = weakref.WeakSet()
        self.regions: weakref.WeakSet[Region] = weakref.WeakSet()
        self._number = 0

    def owns(self, address: int) -> bool:
        """Return whether an address is in a page or in a buffer for layers without pages."""
        return any(address in region for region in self.regions)

    def next_number(self) -> int:
        """Return a number larger than all before."""
        self._number += 1
        return self._number

    def resident_bytes(self, *_: object) -> int:
        """Return the bytes of all resident pages."""
        return sum(model.loaded_size() for model in self.models)

    def make_room(self, num_bytes: int) -> None:
        """Evict pages until ``num_bytes`` and :data:`SPARE_PAGES` fit, or no page is left that may go."""
        memory = self.card.memory
        missing = memory.used + num_bytes + SPARE_PAGES * self.page - memory.total
        for model in sorted(self.models, key=lambda model: model.priority):
            if missing <= 0:
                return
            freed = model.free_memory(missing)
            missing -= freed
            self.gave_way += freed // self.page

    def give_page(self, asking: ModelVBAR) -> bool:
        """Take a page's bytes; return whether they were free."""
        if self.limit is not None and len(asking.resident) >= self.limit:
            return False
        try:
            self.card.memory.take(self.page)
        except torch.OutOfMemoryError:
            return False
        return True

    def forget(self, region: Region, resident: dict[int, int]) -> None:
        """Free all pages of a model that no longer exists."""
        self.card.memory.give_back(len(resident) * self.page)
        resident.clear()
        self.spoil(region, 0, region.size)

    def spoil(self, region: Region, offset: int, size: int) -> None:
        """Make a later read of these bytes show in the result, if the card's tensors have data at all."""
        if self.card.where.type == "cpu":
            region.spoil(offset, size)


class ModelVBAR:
    """Replaces ``comfy_aimdo.model_vbar.ModelVBAR``: the addresses of a model's weights, and their pages.

    Attributes:
        resident: Page number -> signature, which changes each time the page is loaded.
        pins: Page number -> number of layers that are using it.
        watermark: The number of pages, counted from the first, that may be resident.
        watermark_limit: How far the watermark may fall.
        priority: Models with lower values lose their pages first.
    """

    pager: ClassVar[Pager]  # set by installed(), because ComfyUI creates these objects without naming a card

    def __init__(self, size: int, device: int) -> None:
        self.device, self.max_size, self.offset = device, size, 0
        self.resident: dict[int, int] = {}
        self.pins: dict[int, int] = {}
        self._num_pages = min(-(-int(size) // self.pager.page), self.pager.card.memory.total // self.pager.page)
        self.watermark, self.watermark_limit = self._num_pages, 0
        self.priority = self.pager.next_number()
        self._region = Region(size)
        self.base_addr = self._region.address
        self.pager.models.add(self)
        self.pager.regions.add(self._region)
        weakref.finalize(self, self.pager.forget, self._region, self.resident).atexit = False

    def prioritize(self, malloc_async_clamp: int | None = None) -> None:
        """Evict this model's pages last, and allow all of them again."""
        self.priority, self.watermark = self.pager.next_number(), self._num_pages

    def deprioritize(self) -> None:
        """Evict this model's pages first."""
        self.priority = -self.pager.next_number()

    def alloc(self, num_bytes: int) -> Allocation:
        """Return addresses for a layer; they are never freed."""
        self.offset = -(-self.offset // ALIGNMENT) * ALIGNMENT
        if self.offset + num_bytes > self.max_size:
            raise MemoryError("VBAR OOM")
        address = self.base_addr + self.offset
        self.offset += num_bytes
        return self, address, num_bytes

    def tensor(self, address: int, size: int) -> Tensor:
        """Return bytes as a tensor of the card."""
        return self.pager.card.over_pages(self._region.tensor(address, size))

    def fault(self, address: int, size: int) -> tuple[int, ...] | None:
        """Load a layer's pages and keep them until :meth:`unpin`; return their signature, or None if refused."""
        self.pager.faults += 1
        pages = self._pages(address, size)
        if not all(page in self.resident for page in pages) and pages.stop <= self.watermark:
            self.pager.make_room(sum(page not in self.resident for page in pages) * self.pager.page)
        if not self._load(pages):
            self.pager.refused += 1
            return None
        for page in pages:
            self.pins[page] = self.pins.get(page, 0) + 1
        return tuple(self.resident[page] for page in pages)

    def _load(self, pages: range) -> bool:
        """Take memory for the pages that are missing; return whether all are there."""
        for page in pages:
            if pages.stop > self.watermark:
                return False
            if page not in self.resident:
                if not self.pager.give_page(self):
                    return False
                self.resident[page] = self.pager.next_number()
        return pages.stop <= self.watermark

    def unpin(self, address: int, size: int) -> None:
        """Record that a layer's pages are no longer in use."""
        for page in self._pages(address, size):
            self.pins[page] = max(0, self.pins.get(page, 0) - 1)
            if page >= self.watermark:
                self._evict_if_unused(page)

    def free_memory(self, size_bytes: int) -> int:
        """Evict pages, the last ones first; return the number of bytes freed."""
        freed = 0
        while freed < size_bytes and self.watermark > self.watermark_limit:
            self.watermark -= 1
            freed += self._evict_if_unused(self.watermark)
        return freed

    def loaded_size(self) -> int:
        """Return the bytes of the resident pages."""
        return len(self.resident) * self.pager.page

    def get_nr_pages(self) -> int:
        """Return the number of all pages."""
        return self._num_pages

    def get_residency(self) -> list[int]:
        """Return for each page 1 if it is resident, plus 2 if it is in use."""
        return [(page in self.resident) + 2 * bool(self.pins.get(page)) for page in range(self._num_pages)]

    def get_watermark(self) -> int:
        """Return the page up to which pages may be resident."""
        return self.watermark

    def set_watermark(self, size_bytes: int) -> None:
        """Allow only the pages of the first ``size_bytes``."""
        new = min(-(-int(size_bytes) // self.pager.page), self._num_pages)
        for page in range(new, self.watermark):
            self._evict_if_unused(page)
        self.watermark = new

    def set_watermark_limit(self, size_bytes: int) -> None:
        """Never evict the pages of the first ``size_bytes``."""
        self.watermark_limit = -(-int(size_bytes) // self.pager.page)

    def _pages(self, address: int, size: int) -> range:
        first = address - self.base_addr
        return range(first // self.pager.page, (first + size - 1) // self.pager.page + 1)

    def _evict_if_unused(self, page: int) -> int:
        """Return the bytes freed."""
        if page not in self.resident or self.pins.get(page):
            return 0
        del self.resident[page]
        self.pager.spoil(self._region, page * self.pager.page, self.pager.page)
        self.pager.evictions += 1
        self.pager.card.memory.give_back(self.pager.page)
        return self.pager.page


class VRAMBuffer:
    """Replaces ``comfy_aimdo.vram_buffer.VRAMBuffer``, into which layers without pages are copied."""

    def __init__(self, max_size: int, device: int) -> None:
        self.device, self.max_size = device, max_size
        self._memory = ModelVBAR.pager.card.memory
        self._region = Region(min(max_size, 2**30))
        self.base_addr = self._region.address
        ModelVBAR.pager.regions.add(self._region)
        self._taken = [0]
        weakref.finalize(self, _give_back_all, self._memory, self._taken).atexit = False

    def size(self) -> int:
        """Return the bytes in use."""
        return sum(self._taken)

    def get(self, size: int, offset: int = 0) -> tuple[VRAMBuffer, int, int]:
        """Return ``size`` bytes starting at ``offset``; the next caller gets the same bytes."""
        chunk = ModelVBAR.pager.page // 2  # 16 MiB in comfy-aimdo
        needed = -(-(int(size) + int(offset)) // chunk) * chunk
        if needed > self.size():
            self._memory.take(needed - self.size())
            self._taken[:] = [needed]
        return self, self.base_addr + int(offset), int(size)

    def tensor(self, address: int, size: int) -> Tensor:
        """Return bytes as a tensor of the card."""
        return ModelVBAR.pager.card.over_pages(self._region.tensor(address, size))


def _give_back_all(memory, taken: list[int]) -> None:
    memory.give_back(sum(taken))
    taken.clear()


class HostBuffer:
    """Replaces ``comfy_aimdo.host_buffer.HostBuffer``: growing host memory for page-locking."""

    def __init__(self, size: int, prewarm: int = 0, max_grow_size: int = 0, mark_cold: bool = True) -> None:
        self._region = Region(max(int(size), int(max_grow_size)))
        self.size, self.prewarm = 0, prewarm
        address, pinned = self._region.address, ModelVBAR.pager.card.pinned
        weakref.finalize(self, pinned.forget_within, address, address + self._region.size).atexit = False
        if size:
            self.extend(size)

    def get_raw_address(self) -> int:
        """Return its start address."""
        return self._region.address

    def extend(self, size: int, reallocate: bool = False, register: bool = True) -> int:
        """Grow."""
        if self.size + size > self._region.size:
            raise RuntimeError("HostBuffer.extend failed")
        self.size += int(size)
        return self._region.address

    def truncate(self, size: int, do_unregister: bool = True) -> None:
        """Shrink."""
        if do_unregister:
            end = self._region.address + self._region.size
            ModelVBAR.pager.card.pinned.forget_within(self._region.address + int(size), end)
        self.size = int(size)

    def register(self, offset: int, size: int) -> None:
        """Page-lock a part."""
        ModelVBAR.pager.card.pinned.cudaHostRegister(self._region.address + offset, size, 0)

    def unregister(self, offset: int) -> None:
        """Undo :meth:`register`."""
        ModelVBAR.pager.card.pinned.cudaHostUnregister(self._region.address + offset)

    def read_file_slice(self, *_: object, **__: object) -> None:
        """Refuse, because the tests' models do not come from files."""
        raise NotImplementedError("The emulated card reads no files into buffers.")


@contextmanager
def installed(card: Card, page: int = PAGE) -> Iterator[Pager]:
    """Replace comfy-aimdo's classes, whose library needs a driver."""
    import comfy_aimdo.host_buffer
    import comfy_aimdo.model_vbar
    import comfy_aimdo.torch
    import comfy_aimdo.vram_buffer

    ModelVBAR.pager = Pager(card, page)
    replaced = {
        (comfy_aimdo.model_vbar, "ModelVBAR"): ModelVBAR,
        (comfy_aimdo.model_vbar, "vbar_fault"): lambda allocation: allocation[0].fault(*allocation[1:]),
        (comfy_aimdo.model_vbar, "vbar_unpin"): lambda allocation: allocation and allocation[0].unpin(*allocation[1:]),
        (comfy_aimdo.model_vbar, "vbar_signature_compare"): lambda one, other: one is not None and one == other,
        (comfy_aimdo.model_vbar, "vbars_analyze"): ModelVBAR.pager.resident_bytes,
        (comfy_aimdo.host_buffer, "HostBuffer"): HostBuffer,
        (comfy_aimdo.vram_buffer, "VRAMBuffer"): VRAMBuffer,
        (comfy_aimdo.torch, "aimdo_to_tensor"): lambda allocation, device: allocation[0].tensor(*allocation[1:]),
    }
    before = {(module, name): getattr(module, name) for module, name in replaced}
    card.memory.before_take = ModelVBAR.pager.make_room
    try:
        for (module, name), value in replaced.items():
            setattr(module, name, value)
        yield ModelVBAR.pager
    finally:
        card.memory.before_take = None
        for (module, name), value in before.items():
            setattr(module, name, value)
