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
from blockskip_pack.blockskip_core.hosts.diffusers import DiffusersDit
from blockskip_pack.blockskip_core.hosts.models.hosted_dit import HostedDit
from blockskip_pack.blockskip_core.hosts.models.quantised_blocks import QuantisedDit
from blockskip_pack.blockskip_core.hosts.models.weightless_dit import WeightlessDit
from blockskip_pack.blockskip_core.model import SkippableDit, WrappedDit
from blockskip_pack.blockskip_core.torch_dit import TorchDit
from blockskip_pack.tests.core.plain_dit import PlainDit

models: list[Callable[..., SkippableDit]] = [
    HostedDit, QuantisedDit, WeightlessDit, _Watched, WrappedDit, TorchDit, PlainDit, DiffusersDit
]
"""
NOT_SKIPPABLE = """
from blockskip_pack.blockskip_core.model import SkippableDit


class Half:
    family, width, known_error = "half", 8, 0.0


model: SkippableDit = Half()
"""
MODULES = {"skippable": SKIPPABLE, "not_skippable": NOT_SKIPPABLE}


@pytest.fixture(scope="module")
def messages(tmp_path_factory):
    """What mypy says about the shipped code and the two modules, with the project's settings: one run for all tests.

    It runs in a folder in which the pack has a valid package name, which the checkout's name need not be.
    """
    folder = tmp_path_factory.mktemp("types")
    (folder / PACK).symlink_to(ROOT, target_is_directory=True)
    for name, text in MODULES.items():
        (folder / f"{name}.py").write_text(text, encoding="utf-8")
    cache = os.environ.get("MYPY_CACHE_DIR", ROOT / ".mypy_cache")
    options = ["--config-file", ROOT / "pyproject.toml", "--cache-dir", cache, "--explicit-package-bases"]
    options += [argument for package in CHECKED for argument in ("--package", package)]
    options += [argument for name in MODULES for argument in ("--module", name)]
    command = [sys.executable, "-m", "mypy", *options, "--no-error-summary"]
    surroundings = {**os.environ, "MYPYPATH": str(folder)}
    done = subprocess.run(command, cwd=folder, env=surroundings, capture_output=True, text=True, check=False)
    return (done.stdout + done.stderr).splitlines()


def about(module):
    """The beginning of messages about one of the modules."""
    return f"{module}.py:"


def test_what_ships_is_typed(messages):
    assert [message for message in messages if not message.startswith(tuple(map(about, MODULES)))] == []


def test_every_model_fulfils_the_contract(messages):
    assert [message for message in messages if message.startswith(about("skippable"))] == []


def test_a_model_that_lacks_something_does_not(messages):
    (problem, *_) = [message for message in messages if message.startswith(about("not_skippable"))]
    assert "Incompatible types in assignment" in problem
