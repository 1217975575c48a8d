"""One thread here too."""

from ..core.conftest import _one_thread  # noqa: F401  a fixture is used by being there
