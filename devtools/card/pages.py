"""The virtual memory of ComfyUI's dynamic VRAM (comfy-aimdo), on the emulated card.

A model's weights have addresses for good, and pages behind them that come and go. A page that is not there when a layer
asks for it is *faulted* in, or refused when the card is full; the host then copies the layer into a buffer that it uses
again and again. A page that is taken away is filled with NaN here, so whoever still reads it shows in the result.

Differs from comfy-aimdo: pages can have 64 KiB instead of 32 MiB, so that a tiny model has several; files are not read into
buffers; watermarks are not kept.
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
FULL_PAGE = 32 * 2**20  # comfy-aimdo's own
CHUNK = 16 * 2**20  # by which cast buffers grow
ALIGNMENT = 512
_MAP_NORESERVE = 0x4000  # of Linux; the addresses may be more than the machine has memory
Allocation = tuple["ModelVBAR", int, int]  # whose it is, address, bytes


class Region:
    """Addresses that take memory only where something was written."""

    def __init__(self, size: int) -> None:
        self.size = max(int(size), mmap.PAGESIZE)
        self._map = mmap.mmap(-1, self.size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))

    def tensor(self, address: int, size: int) -> Tensor:
        """Return bytes of the region as a tensor of the CPU that keeps the region."""
        made = torch.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype=torch.uint8)
        made.keeps = self
        return made

    def __contains__(self, address: int) -> bool:
        """Tell whether an address is in the region."""
        return self.address <= address < self.address + self.size

    def spoil(self, offset: int, size: int) -> None:
        """Fill bytes with what is NaN in every format of numbers."""
        ctypes.memset(self.address + offset, 0xFF, min(size, self.size - offset))


class Pager:
    """All models' pages on a card.

    Args:
        card: The card.
        page: Bytes of a page.

    Attributes:
        limit: The most pages that one model may have; None for as many as fit.
        faults, refused, evictions: How often pages were asked for, refused, and taken away again.
        models, regions: All models' pages; the addresses of these and of the buffers for layers without pages.
    """

    def __init__(self, card: Card, page: int = PAGE) -> None:
        self.card, self.page = card, page
        self.limit: int | None = None
        self.faults = self.refused = self.evictions = 0
        self.models: weakref.WeakSet[ModelVBAR] = weakref.WeakSet()
        self.regions: weakref.WeakSet[Region] = weakref.WeakSet()
        self._signature = 0

    def owns(self, address: int) -> bool:
        """Tell whether an address is in pages or in a buffer for layers without pages."""
        return any(address in region for region in self.regions)

    def next_signature(self) -> int:
        """Return a number that no page had before."""
        self._signature += 1
        return self._signature

    def give_page(self, asking: ModelVBAR) -> bool:
        """Take a page's bytes, from another model if the card is full; tell whether there are any."""
        if self.limit is not None and len(asking.resident) >= self.limit:
            return False
        while True:
            try:
                self.card.memory.take(self.page)
                return True
            except torch.OutOfMemoryError:
                if not self._evict_one(asking):
                    return False

    def forget(self, region: Region, resident: dict[int, int]) -> None:
        """Take all pages of a model that is gone."""
        self.card.memory.give_back(len(resident) * self.page)
        resident.clear()
        self.spoil(region, 0, region.size)

    def spoil(self, region: Region, offset: int, size: int) -> None:
        """Let whoever still reads bytes of a region show it, if the card has bytes at all."""
        if self.card.where.type == "cpu":
            region.spoil(offset, size)

    def _evict_one(self, asking: ModelVBAR) -> bool:
        for model in sorted(self.models, key=lambda model: model.priority):
            if model is not asking and model.evict_last():
                return True
        return False


class ModelVBAR:
    """In the place of ``comfy_aimdo.model_vbar.ModelVBAR``: the addresses of a model's weights, and their pages.

    Attributes:
        resident: Page number -> signature, which changes whenever the page comes anew.
        pins: Page number -> by how many layers it is being used.
    """

    pager: ClassVar[Pager]  # set by installed: the host makes these without naming a card

    def __init__(self, size: int, device: int) -> None:
        self.device, self.max_size, self.offset, self.priority = device, size, 0, 0
        self.resident: dict[int, int] = {}
        self.pins: dict[int, int] = {}
        self._region = Region(size)
        self.base_addr = self._region.address
        self.pager.models.add(self)
        self.pager.regions.add(self._region)
        weakref.finalize(self, self.pager.forget, self._region, self.resident).atexit = False

    def prioritize(self, malloc_async_clamp: int | None = None) -> None:
        """Let this model's pages be taken away last."""
        for model in self.pager.models:
            model.priority = 0
        self.priority = 1

    def deprioritize(self) -> None:
        """Let this model's pages be taken away like others'."""
        self.priority = 0

    def alloc(self, num_bytes: int) -> Allocation:
        """Return addresses for a layer; they are never given back."""
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
        """Let a layer's pages be there and stay until :meth:`unpin`; return their signature, or None if refused."""
        self.pager.faults += 1
        pages = self._pages(address, size)
        for page in pages:
            if page not in self.resident:
                if not self.pager.give_page(self):
                    self.pager.refused += 1
                    return None
                self.resident[page] = self.pager.next_signature()
        for page in pages:
            self.pins[page] = self.pins.get(page, 0) + 1
        return tuple(self.resident[page] for page in pages)

    def unpin(self, address: int, size: int) -> None:
        """Tell that a layer's pages are no longer being used."""
        for page in self._pages(address, size):
            self.pins[page] = max(0, self.pins.get(page, 0) - 1)

    def evict_last(self) -> bool:
        """Take away the last page that nobody is using; tell whether there was one."""
        page = max((page for page in self.resident if not self.pins.get(page)), default=None)
        if page is not None:
            self._evict(page)
        return page is not None

    def free_memory(self, size_bytes: int) -> int:
        """Take pages away, the last ones first; return how many bytes that gave."""
        pages = sorted(self.resident, reverse=True)[: -(-int(min(size_bytes, self.max_size)) // self.pager.page)]
        for page in pages:
            self._evict(page)
        return len(pages) * self.pager.page

    def loaded_size(self) -> int:
        """Return the bytes of the pages that are there."""
        return len(self.resident) * self.pager.page

    def get_nr_pages(self) -> int:
        """Return the number of all pages."""
        return -(-self.max_size // self.pager.page)

    def get_residency(self) -> list[int]:
        """Return for each page 1 if it is there, and 2 more if it is being used."""
        return [(page in self.resident) + 2 * bool(self.pins.get(page)) for page in range(self.get_nr_pages())]

    def get_watermark(self) -> int:
        """Return up to which page they may be there: all."""
        return self.get_nr_pages()

    def set_watermark(self, size_bytes: int) -> None:
        """Do nothing: watermarks are not kept."""

    def set_watermark_limit(self, size_bytes: int) -> None:
        """Do nothing: watermarks are not kept."""

    def _pages(self, address: int, size: int) -> range:
        first = address - self.base_addr
        return range(first // self.pager.page, (first + size - 1) // self.pager.page + 1)

    def _evict(self, page: int) -> None:
        del self.resident[page]
        self.pager.spoil(self._region, page * self.pager.page, self.pager.page)
        self.pager.evictions += 1
        self.pager.card.memory.give_back(self.pager.page)


class VRAMBuffer:
    """In the place of ``comfy_aimdo.vram_buffer.VRAMBuffer``: where layers are copied that have no pages."""

    def __init__(self, max_size: int, device: int) -> None:
        self.device, self.max_size = device, max_size
        self._memory = ModelVBAR.pager.card.memory
        self._region = Region(min(max_size, 2**30))
        self.base_addr = self._region.address
        ModelVBAR.pager.regions.add(self._region)
        self._taken = [0]
        weakref.finalize(self, _give_back_all, self._memory, self._taken).atexit = False

    def size(self) -> int:
        """Return the bytes that are taken."""
        return sum(self._taken)

    def get(self, size: int, offset: int = 0) -> tuple[VRAMBuffer, int, int]:
        """Return so many bytes, from an offset on; the next caller gets the same ones."""
        needed = -(-(int(size) + int(offset)) // CHUNK) * CHUNK
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
    """In the place of ``comfy_aimdo.host_buffer.HostBuffer``: host memory that grows, for page-locking."""

    def __init__(self, size: int, prewarm: int = 0, max_grow_size: int = 0, mark_cold: bool = True) -> None:
        self._region = Region(max(int(size), int(max_grow_size)))
        self.size, self.prewarm = 0, prewarm
        address, pinned = self._region.address, ModelVBAR.pager.card.pinned
        weakref.finalize(self, pinned.forget_within, address, address + self._region.size).atexit = False
        if size:
            self.extend(size)

    def get_raw_address(self) -> int:
        """Return where it begins."""
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
        """Refuse: models of the tests come from no file."""
        raise NotImplementedError("The emulated card reads no files into buffers.")


@contextmanager
def installed(card: Card, page: int = PAGE) -> Iterator[Pager]:
    """Put these in the place of comfy-aimdo's, whose library asks a driver."""
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
        (comfy_aimdo.host_buffer, "HostBuffer"): HostBuffer,
        (comfy_aimdo.vram_buffer, "VRAMBuffer"): VRAMBuffer,
        (comfy_aimdo.torch, "aimdo_to_tensor"): lambda allocation, device: allocation[0].tensor(*allocation[1:]),
    }
    before = {(module, name): getattr(module, name) for module, name in replaced}
    try:
        for (module, name), value in replaced.items():
            setattr(module, name, value)
        yield ModelVBAR.pager
    finally:
        for (module, name), value in before.items():
            setattr(module, name, value)
