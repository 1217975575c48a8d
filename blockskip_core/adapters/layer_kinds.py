"""Which linear layers of a block get an adapter, told by the words in their names, which all known models use."""

from __future__ import annotations

import re

from .lora import LoraTargets

ATTENTION, MLP = re.compile(r"attn|attention"), re.compile(r"mlp|ff|feed_?forward|experts?")
MODULATION = re.compile(r"mod|ada|norm|emb|scale|shift|gate_logits|time")


def is_of_kind(layer: str, targets: LoraTargets) -> bool:
    """Return whether a layer is among the targets.

    A layer with none of the words counts as both, as do the layers of FLUX's single blocks, unless it computes a modulation.

    Args:
        layer: Its path within its block.
        targets: The kinds that are wanted.
    """
    attention, mlp = bool(ATTENTION.search(layer)), bool(MLP.search(layer))
    if not attention and not mlp:
        attention = mlp = not MODULATION.search(layer)
    wanted = {"attention and mlp": attention or mlp, "attention": attention, "mlp": mlp}
    return wanted.get(targets, True)
