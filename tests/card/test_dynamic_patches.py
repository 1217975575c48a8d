"""Dynamic patches on a card: coarse steps and the training of adapters give the same results as on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from ..device import devtools
from ..hosts.sampling.test_dynamic_patches import adapters, dynamic, empty, sampled
from ..hosts.tiny_families import FAMILIES
from .modes import MODES
from .runs import leaving_nothing, on_cpu
from .test_sampling import ROUNDING, in_turn

TRAINED = 1e-3  # two optimiser steps amplify rounding


@pytest.mark.parametrize(("family", "mode"), in_turn(FAMILIES))
def test_a_picture_with_coarse_steps(card: Any, runs: Any, family: Any, mode: str) -> None:
    model = on_cpu(family.build())
    trained = adapters(model, family, (2,))
    latent = empty(family, batch=2, patch=trained.base.patch, scale=2)
    expected = sampled(dynamic(model, "2-3: 2", trained), family, latent=latent, cfg=3.0, steps=4)
    runs.start_over()
    model = family.build()
    with MODES[mode](card, model) as treated, leaving_nothing(card, treated):
        found = sampled(dynamic(treated, "2-3: 2", trained), family, latent=latent, cfg=3.0, steps=4)
        devtools("card.comfyui").forget_models()
    torch.testing.assert_close(found.cpu(), expected.cpu(), rtol=10 * ROUNDING, atol=10 * ROUNDING)
    assert all(tensor.device.type == "cpu" for tensor in trained.tensors().values())


@contextmanager
def room_beside_weights(kept: list[int]) -> Iterator[None]:
    """Note the bytes that the host is asked to keep free with each load."""
    import comfy.model_management

    load = comfy.model_management.load_models_gpu

    def watched(models: Any, memory_required: int = 0, **more: Any) -> Any:
        kept.append(memory_required)
        return load(models, memory_required=memory_required, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comfy.model_management, "load_models_gpu", watched)
        yield


@pytest.mark.parametrize(("family", "mode"), in_turn(FAMILIES))
def test_adapters_are_trained_as_on_the_cpu(card: Any, runs: Any, family: Any, mode: str) -> None:
    from blockskip_pack.blockskip_core.distillation.settings import DistillationSettings
    from blockskip_pack.blockskip_core.hosts.sampling.own_latents import OwnLatents
    from blockskip_pack.blockskip_core.hosts.sampling.patch_training import PatchTraining, counted_peak, train_patches
    from blockskip_pack.blockskip_core.units import format_bytes

    told = []

    def train(model: Any) -> Any:
        cells = model.model.latent_format.spacial_downscale_ratio
        side = 16 * cells if family.latent_shape[1] >= 6 else 8 * cells
        side = side if family.name != "flux" else 128
        request = PatchTraining(
            scales=(2,), latents=OwnLatents(per_prompt=1, width=side, height=side, steps=2),
            settings=DistillationSettings(steps=2, batch_size=2, learning_rate=1e-3, validate_every=2), resume=False,
        )  # fmt: skip
        captions = family.captions((5, 5, 5))
        counted = format_bytes(counted_peak(model, captions, None, request))  # as Memory Plan counts it
        trained = train_patches(model, captions, None, request, lambda *_: None, told=told.append)
        assert [sentence.split(";")[0] for sentence in told] in ([], [f"Counted before the training: {counted}"])
        return trained

    expected = train(on_cpu(family.build()))
    runs.start_over()
    model = family.build()
    kept: list[int] = []
    with MODES[mode](card, model) as treated, leaving_nothing(card, treated), room_beside_weights(kept):
        found = train(treated)
    assert told, "the CPU is told nothing, a card is"
    assert kept[0] > 0, "while the pictures are sampled"
    assert kept[-1] > 0, "while it trains"
    torch.testing.assert_close(
        found.scales[2].errors.errors, expected.scales[2].errors.errors, rtol=TRAINED, atol=TRAINED
    )
    for name, tensor in expected.tensors().items():
        if "statistics" not in name:  # eigenvectors may change their sign
            torch.testing.assert_close(found.tensors()[name], tensor, rtol=TRAINED, atol=TRAINED, msg=name)
