"""Fixtures for every layer of the tests.

The pack's root is a package whose name is not ours to choose, and its ``nodes`` folder has the name of a ComfyUI
module. So the root must not be on ``sys.path``, ComfyUI comes first on it, and the pack is loaded the way ComfyUI
loads it: from its path, under a name of our choosing.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACK = "blockskip_pack"


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


@pytest.fixture(scope="session")
def comfyui() -> Path:
    """The folder of the host; its modules can be imported, on the CPU."""
    path = os.environ.get("COMFYUI_PATH")
    if not path:
        pytest.skip("COMFYUI_PATH is not set; `python dev.py test` sets it")
    from comfy.cli_args import args

    args.cpu = True
    return Path(path)
