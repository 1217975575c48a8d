"""When losses are scaled, and what is said of skipped steps; the loops' tests show the rest."""

import pytest
import torch
from blockskip_pack.blockskip_core.training.loss_scale import LossScale, remark_on


@pytest.mark.parametrize(
    ("device", "dtype", "expected"),
    [("cpu", torch.float16, 1024.0), ("cpu", torch.bfloat16, 1.0), ("meta", torch.float16, 1.0)],
)
def test_losses_are_scaled_in_float16_and_not_while_counting(device, dtype, expected):
    """While a run is counted every number is 1, so each step would seem to overflow, and leave no moments to count."""
    scale, loss = LossScale(torch.device(device), dtype), torch.ones(())
    assert scale.scaled(loss).item() == expected
    assert bool(scale.numbers()) == (expected > 1.0)


def test_skipped_steps_are_told():
    assert remark_on(0) == []
    assert remark_on(3)[0].startswith("3 steps were skipped because gradients overflowed in float16")
