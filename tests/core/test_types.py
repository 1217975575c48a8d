"""mypy passes on the shipped code and on the tests' models that must fulfil the contract."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACK = "blockskip_pack"
CHECKED = (f"{PACK}.blockskip_core", f"{PACK}.nodes")

SKIPPABLE = """
from collections.abc import Callable

from blockskip_pack.blockskip_core.accounting.phase_counts import _Watched
from blockskip_pack.blockskip_core.hosts.models.hosted_dit import HostedDit
from blockskip_pack.blockskip_core.hosts.models.quantised_blocks import QuantisedDit
from blockskip_pack.blockskip_core.hosts.models.weightless_dit import WeightlessDit
from blockskip_pack.blockskip_core.model import SkippableDit, WrappedDit
from blockskip_pack.blockskip_core.torch_dit import TorchDit
from blockskip_pack.tests.core.plain_dit import PlainDit

models: list[Callable[..., SkippableDit]] = [
    HostedDit, QuantisedDit, WeightlessDit, _Watched, WrappedDit, TorchDit, PlainDit
]
"""
NOT_SKIPPABLE = """
from blockskip_pack.blockskip_core.model import SkippableDit


class Half:
    family, width, known_error = "half", 8, 0.0


model: SkippableDit = Half()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder in which the pack has a valid package name, which the checkout's name need not be."""
    made = tmp_path_factory.mktemp("types")
    (made / PACK).symlink_to(ROOT, target_is_directory=True)
    return made


def mypy(folder, *arguments):
    """Run mypy in a folder with the project's settings and cache; return its messages, or "" if there are none."""
    options = [
        "--config-file",
        ROOT / "pyproject.toml",
        "--cache-dir",
        ROOT / ".mypy_cache",
        "--explicit-package-bases",
    ]
    command = [sys.executable, "-m", "mypy", *options, "--no-error-summary", *arguments]
    surroundings = {**os.environ, "MYPYPATH": str(folder)}
    done = subprocess.run(command, cwd=folder, env=surroundings, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def test_what_ships_is_typed(folder):
    assert mypy(folder, *(argument for package in CHECKED for argument in ("--package", package))) == ""


def test_every_model_fulfils_the_contract(folder):
    (folder / "skippable.py").write_text(SKIPPABLE, encoding="utf-8")
    assert mypy(folder, "skippable.py") == ""


def test_a_model_that_lacks_something_does_not(folder):
    (folder / "not_skippable.py").write_text(NOT_SKIPPABLE, encoding="utf-8")
    assert "Incompatible types in assignment" in mypy(folder, "not_skippable.py")
