"""Human-readable numbers."""

import pytest
from blockskip_pack.blockskip_core.units import format_bytes


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (5 * 2**20, "5.0 MiB"), (3 * 2**39, "1536.00 GiB")],
)
def test_bytes_are_written_for_people(count, text):
    assert format_bytes(count) == text
