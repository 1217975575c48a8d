"""The host's EasyCache with calls of several sizes: each size gets a cache of its own.

EasyCache keeps its state in one object in transformer_options. It compares a call's latent with that of the call before,
and starts over when it notices another size. It does not notice one that changes again with the next call (then it fails on
two tensors of different shapes), and after starting over it takes the rate of change for 0, so that it spares every call
from the second on. Here it sees one size only, so none of this happens, and steps of one size reuse steps of that size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_KEY = "easycache"  # LazyCache is kept there too, but it works on whole predictions, which are all of one size


class StepCaches:
    """The caches of one run, besides the host's own."""

    def __init__(self) -> None:
        self._of_size: dict[int, Any] = {}

    def next_prediction(self) -> None:
        """Forget that the last prediction was spared, as the host does for its own cache before each."""
        for cache in self._of_size.values():
            cache.skip_current_step = False

    def options_for(self, scale: int, options: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return transformer_options in which a coarse call's cache is that of its patch size.

        Args:
            scale: s.
            options: Of the call; returned as they are if they hold no cache.
        """
        own = options.get(_KEY)
        if own is None:
            return options
        if scale not in self._of_size:
            cache = self._of_size[scale] = own.clone()
            cache.start_t, cache.end_t = own.start_t, own.end_t
        return {**options, _KEY: self._of_size[scale]}
