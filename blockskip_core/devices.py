"""Whether two devices are one."""

from __future__ import annotations

import torch


def same_device(one: torch.device, other: torch.device) -> bool:
    """Return whether two devices are the same one: ``mps`` is ``mps:0``, though torch calls them unequal.

    A device without an index is the current one of its kind, and is taken for any of them.
    """
    return one.type == other.type and (one.index == other.index or None in (one.index, other.index))
