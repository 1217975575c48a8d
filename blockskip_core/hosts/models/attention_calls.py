"""Which keys of a block's attention are text, found from one call of the block whose two rows differ in the latent only.

Keys and queries whose rows are equal do not depend on the picture, as in ``call_layout``. The calls are seen through the host's
``optimized_attention_override``, so attention that does not ask it is not seen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from ..families.hidden_text import TextKeys
from ..families.text_masking import OVERRIDE, after
from .call_layout import ROWS, differing_rows


class AttentionCalls:
    """The attention calls of a block, in order.

    Attributes:
        seen: Where the text is among the keys of each call; None if that cannot be told.
    """

    def __init__(self) -> None:
        self.seen: list[TextKeys | None] = []

    def watched(self, args: tuple, kwargs: Mapping[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Return the arguments of a block's call with options under which its attention is seen."""

        def of(value: Any) -> Any:
            if isinstance(value, dict) and OVERRIDE in value:
                return {**value, OVERRIDE: after(value[OVERRIDE], self._see)}
            return value

        return tuple(map(of, args)), {name: of(value) for name, value in kwargs.items()}

    def _see(self, attention: Callable[..., Tensor], q: Tensor, k: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        axis = 2 if kwargs.get("skip_reshape") else 1
        self.seen.append(_text_keys(q, k, axis))
        return attention(q, k, *args, **kwargs)


def _text_keys(q: Tensor, k: Tensor, axis: int) -> TextKeys | None:
    """Return where the text is among the keys that the image's queries see; "none" if the queries are not the image's.

    Args:
        q, k: Queries and keys of two rows.
        axis: The axis of tokens.
    """
    if not q.shape[0] == k.shape[0] == ROWS:
        return None
    asking, keys = (differing_rows(*x.detach().movedim(axis, 1).flatten(2)) for x in (q, k))
    if keys.all() or not asking.any():
        return "none"
    if not keys.any():
        return "all" if asking.all() else None
    count = int(keys.sum())
    if int(asking.sum()) != count:
        return None
    return "first" if keys[-count:].all() else "last" if keys[:count].all() else None
