"""Whether two devices are one."""

import pytest
import torch
from blockskip_pack.blockskip_core.devices import same_device


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [("mps", "mps:0", True), ("mps:0", "mps", True), ("cuda:1", "cuda:1", True), ("cuda:0", "cuda:1", False),
     ("cpu", "cuda", False)],
)  # fmt: skip
def test_a_device_without_an_index_is_any_of_its_kind(one, other, expected):
    assert same_device(torch.device(one), torch.device(other)) is expected
