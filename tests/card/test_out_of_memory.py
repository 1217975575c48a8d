"""An allocation that fails anywhere leads to one clear sentence or the same LoRA, and leaves everything as it was."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch

from ..device import devtools
from ..hosts.sampling.test_region_adaptive import empty
from ..hosts.tiny_families import FLUX
from ..hosts.tiny_flux import tiny_flux
from .modes import MODES
from .runs import Runs, leaving_nothing
from .test_sampling import MEASURE, RALU

pytestmark = pytest.mark.emulated
ADVICE = ("Lower ", "Unload ", "Choose ", "Connect ", "Skip ", "It continued with streamed weights")


class Attempt:
    """Repeats an action, each time with a different allocation failing.

    Args:
        card: The card.
        model: The MODEL that the action uses.
        do: The action; its result can be compared.
        problems: Gets the messages about survived failures from the result.
    """

    def __init__(self, card: Any, model: Any, do: Callable[[], Any], problems: Callable[[Any], list[str]]) -> None:
        self._card, self._model, self._do, self._problems = card, model, do, problems
        self._expected = do()
        before = card.memory.allocations
        assert do() == self._expected
        self.num_allocations = card.memory.allocations - before
        devtools("card.comfyui").forget_models()

    def fail_at(self, places: int) -> dict[str, int]:
        """Let allocations fail at ``places`` places spread over the action; return how often each outcome occurred."""
        ends = {"refused": 0, "survived": 0}
        for place in range(places):
            ends[self._fail_once(place * self.num_allocations // places)] += 1
        assert self._do() == self._expected
        return ends

    def _fail_once(self, allocation: int) -> str:
        error_of_ours = self._error_type()
        with leaving_nothing(self._card, self._model), self._card.memory.failing_after(allocation):
            refused = self._card.memory.refused
            try:
                found = self._do()
            except error_of_ours as error:
                said, end = str(error), "refused"
            else:
                said, end = " ".join(self._problems(found)), "survived"
                assert found == self._expected, f"allocation {allocation} changed the result"
            devtools("card.comfyui").forget_models()
            assert self._card.memory.refused == refused + 1, f"allocation {allocation} did not fail"
        assert "out of memory" in said, f"allocation {allocation}: {said!r}"
        assert any(advice in said for advice in ADVICE), f"allocation {allocation}: {said!r}"
        return end

    def _error_type(self) -> type[Exception]:
        from blockskip_pack.blockskip_core.errors import BlockSkipError

        return BlockSkipError


class Trained:
    """A training run; equal to another if losses and LoRAs are equal. One that started over has seen more gradients."""

    def __init__(self, runs: Runs, model: Any, residuals: Any, **settings: Any) -> None:
        shutil.rmtree(runs.folder / "blockskip" / "runs", ignore_errors=True)
        self.outcome = runs.train_on(model, residuals, **settings)

    def __eq__(self, other: Any) -> bool:
        mine, its = self.outcome, other.outcome
        return mine.losses == its.losses and all(torch.equal(x, its.lora[name]) for name, x in mine.lora.items())


def problems_of(trained: Trained) -> list[str]:
    return trained.outcome.said["problems"]


def no_problems(found: Any) -> list[str]:
    return []


@pytest.fixture(autouse=True)
def _nothing_is_logged() -> Iterator[None]:
    """pytest keeps log records until a test ends, including errors and everything that their tracebacks reference."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture
def model(comfyui: Any) -> Any:
    """A small MODEL."""
    return tiny_flux(depth=1, depth_single=2)


@pytest.mark.parametrize(("mode", "places"), [("resident", 24), ("streamed", 10), ("few_pages", 10)])
def test_training(card, runs, model, mode, places):
    """Wherever that helps, a run continues with streamed weights and ends with the same LoRA."""
    enter = contextlib.nullcontext(model) if mode == "resident" else MODES[mode](card, model)
    with enter as treated:
        residuals = runs.precompute(FLUX, treated, draws=2)
        do = partial(Trained, runs, treated, residuals, steps=2)
        assert Attempt(card, treated, do, problems_of).fail_at(places)["survived"] >= 0.9 * places


def test_precomputing(card, runs, model):
    def precompute() -> list[float]:
        runs.start_over()
        residuals = runs.precompute(FLUX, model, draws=2, storage="disk")
        files = sorted(residuals.folder.glob("*.safetensors"))
        return [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]

    Attempt(card, model, precompute, no_problems).fail_at(14)


def test_measuring(card, runs, model):
    def measure() -> tuple[int, int]:
        runs.start_over()
        chosen = runs.call("SelectBlocks", model=model, positive=FLUX.captions((5,))[0], **MEASURE)[0]
        return chosen.front, chosen.back

    Attempt(card, model, measure, no_problems).fail_at(10)


def test_region_adaptive_sampling(card, runs, model):
    latent, positive = {"samples": empty(FLUX)}, FLUX.captions((5,))[0]

    def sample() -> list[float]:
        made = runs.call("RaluSampler", model=model, positive=positive, latent_image=latent, **RALU)[0]
        return made["samples"].flatten().tolist()

    Attempt(card, model, sample, no_problems).fail_at(10)
