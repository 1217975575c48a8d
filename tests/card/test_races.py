"""No kernel of a training run reads or writes memory that another stream is still using."""

from __future__ import annotations

import pytest

from ..hosts.tiny_families import FAMILIES
from .modes import MODES
from .runs import Runs

pytestmark = pytest.mark.emulated
WITH_STREAMS = ("low_vram", "streamed", "async_malloc", "all_pages", "few_pages", "no_pages", "pressed_pages")


@pytest.mark.parametrize(
    ("family", "mode"),
    [
        pytest.param(
            family,
            WITH_STREAMS[place % len(WITH_STREAMS)],
            id=f"{family.name}-{WITH_STREAMS[place % len(WITH_STREAMS)]}",
        )
        for place, family in enumerate((*FAMILIES, *FAMILIES[:2]))
    ],
)
def test_every_kernel_waits_for_what_it_reads_and_overwrites(card, runs: Runs, family, mode):
    model = family.build()
    with MODES[mode](card, model) as treated, card.streams.judged() as races:
        runs.train(family, treated, storage="on the fly", draws=2, steps=1)
    assert not races, races[0]
