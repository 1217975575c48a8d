"""A CUDA card in host memory: ``torch.device("cuda:0")`` without a GPU or a driver.

``Card(total).install()``, before ComfyUI is imported, makes ``cuda:0`` a device for the rest of the process. It cannot be
taken back. Tensors there are in host memory and are computed by the CPU's kernels, so the numbers are those of the CPU, but
everything around the numbers is a card's:

    memory.py      its bytes are limited and counted; allocations can be made to fail
    card.py        its tensors, and the way between one of them and the same bytes as a tensor of the CPU
    kernels.py     what computes on it; tensors of two devices are refused
    streams.py     which stream a kernel goes to, and whether it waited for what it reads: torch's own sanitizer judges
    pinned.py      which host memory is page-locked
    torch_cuda.py  what ``torch.cuda`` answers
    guard.cpp      what autograd's engine asks below Python; compiled once by guard.py
    pages.py       the virtual memory of ComfyUI's dynamic VRAM
    comfyui.py     ComfyUI on such a card
    shapes.py      another kind of card, whose tensors have shapes and no bytes, for models of any size

It needs a CUDA build of torch (two of its functions make tensors of a card) and g++, and it refuses a machine with a real
card. What it cannot show: time, a caching allocator's fragmentation, the CUDA kernels' own rounding and workspaces.
"""

from .card import DEVICE, Card
from .guard import CardUnavailable, reason_against
from .memory import Memory

__all__ = ["DEVICE", "Card", "CardUnavailable", "Memory", "reason_against"]
