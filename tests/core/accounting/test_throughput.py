"""The device's speed."""

import torch
from blockskip_pack.blockskip_core.accounting.throughput import operations_per_second


def test_the_speed_is_that_of_a_product():
    speed = operations_per_second(torch.device("cpu"), torch.float32, width=256, tokens=64)
    assert 1e8 < speed < 1e15
