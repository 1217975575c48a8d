"""A CUDA card in host memory: ``torch.device("cuda:0")`` without a GPU or a driver.

``Card(total).install()``, called before ComfyUI is imported, makes ``cuda:0`` a device for the rest of the process. It
cannot be undone. Its tensors are in host memory and the CPU's kernels compute them, so the numbers are those of the
CPU, but everything around the numbers behaves as on a card:

    memory.py      limits and counts its bytes; can make allocations fail
    card.py        its tensors, and their conversion to and from CPU tensors over the same bytes
    kernels.py     its kernels; they refuse to mix tensors of two devices
    streams.py     which stream a kernel runs on, and whether it waited for its inputs, as judged by torch's own
    sanitizer pinned.py      which host memory is page-locked torch_cuda.py  the functions of ``torch.cuda`` guard.cpp
    what autograd's engine asks below Python; compiled once by guard.py pages.py       the virtual memory of ComfyUI's
    dynamic VRAM comfyui.py     ComfyUI on such a card shapes.py      a second kind of card, whose tensors have shapes
    but no data, for models of any size

It needs a CUDA build of torch (two of whose functions create CUDA tensors) and g++, and it refuses to run on a machine
with a real card. It cannot show timing, the fragmentation of a caching allocator, or the rounding and workspaces of
CUDA kernels.
"""

from .card import DEVICE, Card
from .guard import CardUnavailable, reason_against
from .memory import Memory

__all__ = ["DEVICE", "Card", "CardUnavailable", "Memory", "reason_against"]
