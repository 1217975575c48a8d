"""Operations of every family's call by its tokens, against a count at another size."""

from __future__ import annotations

import pytest
import torch

from ..tiny_families import FAMILIES

pytestmark = pytest.mark.usefixtures("comfyui")


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_three_counts_give_the_operations_at_another_size(family):
    from blockskip_pack.blockskip_core.accounting.measuring import Counting
    from blockskip_pack.blockskip_core.hosts.models.counted_calls import counted_operations
    from blockskip_pack.blockskip_core.hosts.models.weightless_dit import WeightlessDit

    dit = family.hosted(family.build(), (5,))
    found, weightless = counted_operations(dit), WeightlessDit.of(dit)
    patch = dit.adapter.patch_size
    noisy = torch.empty(1, family.latent_shape[0], 8 * patch, 4 * patch, device="meta")
    with torch.inference_mode(False), torch.no_grad(), weightless.running({}) as denoise, Counting() as counting:
        denoise(noisy, torch.empty(1, device="meta"), [0])
    tokens = dit.image_tokens(8 * patch, 4 * patch)
    assert found.own(tokens) == pytest.approx(
        counting.operations, rel=3e-3
    )  # Z-Image embeds some tokens before it pads them
    assert found.text_tokens == dit.text_tokens(0)
