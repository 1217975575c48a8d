"""Fixtures for every layer of the tests.

The pack's root is a package whose name the user chooses, and its ``nodes`` folder has the name of a ComfyUI
module. So the root must not be on ``sys.path``, ComfyUI comes first on it, and the pack is loaded the way ComfyUI
loads it: from its path, under a name chosen here.
"""

from __future__ import annotations

import gc
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

from .device import KINDS, Device, choose, devtools

ROOT = Path(__file__).resolve().parents[1]
PACK = "blockskip_pack"
DEVICE = pytest.StashKey[Device]()


def _load_pack() -> ModuleType:
    if PACK not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            PACK, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
        )
        module = importlib.util.module_from_spec(spec)
        sys.modules[PACK] = module
        spec.loader.exec_module(module)
    return sys.modules[PACK]


def _put_comfyui_first() -> None:
    root, comfyui = str(ROOT), os.environ.get("COMFYUI_PATH")
    sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != ROOT]
    assert root not in sys.path
    if comfyui and comfyui not in sys.path:
        sys.path.insert(0, comfyui)


_put_comfyui_first()
_load_pack()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option for the device."""
    parser.addoption(
        "--device", choices=KINDS, default="cpu", help="what models run on: cpu, an emulated card, or a real gpu"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Set up the device before anything imports ComfyUI."""
    config.stash[DEVICE] = choose(config.getoption("--device"))


def pytest_report_header(config: pytest.Config) -> str:
    """Show the device in the header."""
    device = config.stash[DEVICE]
    return f"device: {device.kind}" + (f" ({device.card.name})" if device.card else "")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip tests that this device cannot run."""
    device = config.stash[DEVICE]
    for item in items:
        if device.obstacle:
            item.add_marker(pytest.mark.skip(reason=device.obstacle))
        elif device.kind == "cpu" and ROOT / "tests" / "card" in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="needs a card, in a separate process: python dev.py test --card"))
        elif device.kind == "gpu" and item.get_closest_marker("emulated"):
            item.add_marker(pytest.mark.skip(reason="only an emulated card can do this"))


@pytest.fixture(scope="module", autouse=True)
def _imports_are_for_good() -> None:
    """Exclude everything imported so far from later garbage collections, which many tests do: that is half a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def comfyui(pytestconfig: pytest.Config) -> Path:
    """ComfyUI's folder; its modules can be imported and use this process's device."""
    path = os.environ.get("COMFYUI_PATH")
    if not path:
        pytest.skip("COMFYUI_PATH is not set; `python dev.py test` sets it")
    from comfy.cli_args import args

    kind = pytestconfig.stash[DEVICE].kind
    args.cpu = kind == "cpu"
    if kind == "card":
        devtools("card.comfyui").disable_kernels()
    return Path(path)
