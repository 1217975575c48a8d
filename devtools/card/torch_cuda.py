"""The functions of ``torch.cuda`` for an emulated card."""

from __future__ import annotations

import types
from typing import Any, Protocol

import torch

from . import streams
from .memory import Memory
from .pinned import PinnedMemory


class AnswersForCuda(Protocol):
    """What every kind of card must have, however it stores its tensors.

    Attributes:
        name: As ``torch.cuda.get_device_name`` gives it.
        capability: Major and minor compute capability.
        memory: Its bytes.
        streams: Its streams.
        pinned: The page-locked memory of its host.
        generator: Its random numbers.
    """

    name: str
    capability: tuple[int, int]
    memory: Memory
    streams: streams.Streams
    pinned: PinnedMemory
    generator: torch.Generator


def install(card: AnswersForCuda) -> None:
    """Make ``torch.cuda`` describe this card for the rest of the process."""
    streams.Stream.card = card.streams
    for name, answer in {
        **_presence(card),
        **_memory(card.memory),
        **_streams(card),
        **_random(card.generator),
    }.items():
        setattr(torch.cuda, name, answer)
    torch.cuda.memory.memory_stats = torch.cuda.memory_stats
    torch.cuda.random.manual_seed_all = torch.cuda.manual_seed_all


def _presence(card: AnswersForCuda) -> dict[str, Any]:
    properties = _Properties(card)
    return {
        "is_available": lambda: True,
        "_is_compiled": lambda: True,
        "is_initialized": lambda: True,
        "_is_in_bad_fork": lambda: False,
        "init": lambda: None,
        "_lazy_init": lambda: None,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "get_device_name": lambda device=None: card.name,
        "get_device_capability": lambda device=None: card.capability,
        "get_device_properties": lambda device=None: properties,
        "is_bf16_supported": lambda including_emulation=True: card.capability[0] >= 8,
        "is_current_stream_capturing": lambda: False,
        "get_allocator_backend": lambda: "native",
        "cudart": lambda: card.pinned,
    }


class _Properties(types.SimpleNamespace):
    """Replaces ``torch.cuda.get_device_properties``, with the properties that ComfyUI and its kernels read."""

    def __init__(self, card: AnswersForCuda) -> None:
        super().__init__(
            name=card.name,
            major=card.capability[0],
            minor=card.capability[1],
            multi_processor_count=28,
            warp_size=32,
            shared_memory_per_block_optin=101376,
            L2_cache_size=2 * 2**20,
            gcnArchName="",
        )
        self._memory = card.memory

    @property
    def total_memory(self) -> int:
        """Bytes of the card, which may change."""
        return self._memory.total


def _memory(memory: Memory) -> dict[str, Any]:
    """Return the memory functions. This allocator keeps no freed memory, so reserved and allocated bytes are equal."""

    def stats(device: Any = None) -> dict[str, int]:
        kinds = ("allocated", "active", "reserved")
        current = {f"{kind}_bytes.all.current": memory.used for kind in kinds}
        peak = {f"{kind}_bytes.all.peak": memory.peak for kind in kinds}
        return {**current, **peak, "num_alloc_retries": 0, "num_ooms": memory.refused}

    return {
        "mem_get_info": lambda device=None: (memory.free(), memory.total),
        "memory_stats": stats,
        "memory_allocated": lambda device=None: memory.used,
        "memory_reserved": lambda device=None: memory.used,
        "max_memory_allocated": lambda device=None: memory.peak,
        "max_memory_reserved": lambda device=None: memory.peak,
        "reset_peak_memory_stats": lambda device=None: memory.reset_peak(),
        "memory_summary": lambda device=None, abbreviated=False: f"{memory.used} of {memory.total} bytes are taken",
        "empty_cache": lambda: None,
        "ipc_collect": lambda: None,
    }


def _streams(card: AnswersForCuda) -> dict[str, Any]:
    return {
        "Stream": streams.Stream,
        "Event": streams.Event,
        "StreamContext": streams.StreamContext,
        "stream": streams.StreamContext,
        "set_stream": card.streams.make_current,
        "current_stream": lambda device=None: card.streams.current(),
        "default_stream": lambda device=None: card.streams.default,
        "synchronize": lambda device=None: card.streams.synchronize(),
    }


def _random(generator: torch.Generator) -> dict[str, Any]:
    return {
        "get_rng_state": lambda device="cuda": generator.get_state(),
        "set_rng_state": lambda state, device="cuda": generator.set_state(state),
        "manual_seed": lambda seed: generator.manual_seed(int(seed)),
        "manual_seed_all": lambda seed: generator.manual_seed(int(seed)),
    }
