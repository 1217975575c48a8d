"""Sampling on a card gives the same results as on the CPU: Select Blocks, an applied LoRA, RALU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ..device import devtools
from ..hosts.sampled_families import SAMPLED
from ..hosts.sampling.test_region_adaptive import empty
from ..hosts.tiny_families import FAMILIES, TinyFamily
from .modes import MODES
from .runs import Runs, leaving_nothing, on_cpu

MEASURE = {
    "method": "attention mask", "skip_ratio": 0.5, "front": 0, "back": 0, "probe_size": 64, "probe_steps": 1,
    "window_profile": False,
}  # fmt: skip
RALU = {"seed": 7, "cfg": 1.0, "preset": "FLUX 7x", "upsample_ratio": 0.34, "regions": "latent gradient"}
ROUNDING = 1e-5  # a fused norm kernel rounds differently from the steps that it replaces
MERGED_IN_FLOAT16 = 1e-2  # on a card ComfyUI merges a LoRA in half precision, on the CPU in full
WAYS = ("resident", "streamed", "few_pages")
of_families = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


def in_turn(families: tuple[TinyFamily, ...]) -> list[Any]:
    """Each family in one of the modes."""
    return [
        pytest.param(family, WAYS[place % len(WAYS)], id=f"{family.name}-{WAYS[place % len(WAYS)]}")
        for place, family in enumerate(families)
    ]


@pytest.fixture
def agree(card: Any, runs: Runs) -> Callable[..., None]:
    """Run a function with a family's MODEL on the CPU and in a mode, and compare the resulting tensors."""

    def compare(family: TinyFamily, mode: str, do: Callable[[Any], Tensor], rounding: float = ROUNDING) -> None:
        expected = do(on_cpu(family.build()))
        runs.start_over()
        model = family.build()
        with MODES[mode](card, model) as treated, leaving_nothing(card, treated):
            found = do(treated)
            devtools("card.comfyui").forget_models()  # a sampler leaves its MODEL loaded for the next one
        torch.testing.assert_close(found.cpu(), expected, rtol=rounding, atol=rounding)
        assert found.std() > 0

    return compare


@pytest.mark.parametrize(("family", "mode"), in_turn(FAMILIES))
def test_which_blocks_matter(agree, runs, family, mode):
    def measure(model: Any) -> Tensor:
        chosen, heatmap, _ = runs.call("SelectBlocks", model=model, positive=family.captions((5,))[0], **MEASURE).args
        return torch.cat([heatmap.flatten(), torch.tensor([chosen.front, chosen.back])])

    agree(family, mode, measure)


@pytest.mark.parametrize(("family", "mode"), in_turn(FAMILIES[1:]))
def test_a_picture_with_a_lora_that_was_applied(agree, runs, family, mode):
    import comfy.sample

    trained = runs.train(family, on_cpu(family.build()), steps=1)
    latent, positive = empty(family), family.captions((5,))[0]

    def sample(model: Any) -> Tensor:
        noise = comfy.sample.prepare_noise(latent, 3)
        with torch.inference_mode():
            return comfy.sample.sample(
                runs.apply(model, trained), noise, 2, 1.0, "euler", "simple", positive, positive, latent,
                disable_pbar=True, seed=3,
            )  # fmt: skip

    agree(family, mode, sample, MERGED_IN_FLOAT16)


@pytest.mark.parametrize(("family", "mode"), in_turn(SAMPLED))
def test_region_adaptive_sampling(agree, runs, family, mode):
    latent, positive = empty(family), family.captions((5,))[0]

    def sample(model: Any) -> Tensor:
        return runs.call("RaluSampler", model=model, positive=positive, latent_image={"samples": latent}, **RALU)[0][
            "samples"
        ]

    agree(family, mode, sample)
