"""Read the residuals of the next draws while the current ones are trained on.

The order of draws is known for the whole run, so one thread can stay a few draws ahead of the training loop. According
to the paper, reading is most of the method's extra time (arXiv 2603.20755, as noted by third parties); a read that is
finished before it is needed costs none.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice

from ..blocks.replay import Residual

ReadResidual = Callable[[int], Residual]


@contextmanager
def prefetched(read: ReadResidual, order: Iterable[int], ahead: int) -> Iterator[ReadResidual]:
    """Provide a reader that stays ``ahead`` draws ahead of its caller; its thread ends with the context.

    The next few draws may be requested in any order; any other draw is read on request. An error in ``read`` is raised
    when the draw is requested.

    Args:
        read: Draw index -> residual. Only called from one thread at a time.
        order: Draws in the order in which they will be requested.
        ahead: Maximum number of draws to hold, at least 1.
    """
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="blockskip-prefetch") as pool:
        coming = iter(order)
        waiting: deque[tuple[int, Future[Residual]]] = deque()

        def fill() -> None:
            for draw in islice(coming, ahead - len(waiting)):
                waiting.append((draw, pool.submit(read, draw)))

        def get(draw: int) -> Residual:
            fill()
            found = next((pair for pair in waiting if pair[0] == draw), None)
            if found is None:
                return pool.submit(read, draw).result()
            waiting.remove(found)
            fill()
            return found[1].result()

        try:
            yield get
        finally:
            for _, future in waiting:
                future.cancel()
            waiting.clear()  # what was read keeps its file mapped
