"""An allocator's error becomes one sentence, and releases the tensors that filled the memory."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from blockskip_pack.blockskip_core.errors import BlockSkipError, InvalidInputError


@pytest.fixture
def module(comfyui):
    from blockskip_pack.blockskip_core.hosts.models import out_of_memory

    return out_of_memory


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
        RuntimeError("MPS backend out of memory (MPS allocated: 18.10 GB)"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:116] data. DefaultCPUAllocator: not enough memory"),
    ],
)
def test_every_allocator_is_understood(module, error):
    with (
        pytest.raises(module.OutOfMemoryError, match=r"^Sampling ran out of memory \(.+\)\. Choose less\.$"),
        module.out_of_memory_explained("Sampling", "Choose less."),
    ):
        raise error


def test_the_host_takes_it_for_its_own_and_unloads_all_models(module):
    import comfy.model_management

    error = module.OutOfMemoryError("It is full.")
    assert isinstance(error, BlockSkipError)
    assert comfy.model_management.is_oom(error)


@pytest.mark.parametrize("error", [InvalidInputError("No."), RuntimeError("shapes differ"), KeyboardInterrupt()])
def test_other_errors_pass(module, error):
    with pytest.raises(type(error)) as caught, module.out_of_memory_explained("Sampling", "Choose less."):
        raise error
    assert caught.value is error


def test_what_filled_the_memory_is_let_go_while_the_sentence_is_kept(module):
    class Filling:
        pass

    alive = []

    def step():
        filling = Filling()
        alive.append(weakref.ref(filling))
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(module.OutOfMemoryError) as kept, module.out_of_memory_explained("Training", "Choose less."):
        step()
    gc.collect()
    assert kept.value is not None
    assert alive[0]() is None
