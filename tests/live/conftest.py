"""A live ComfyUI with the pack, started once per session, and a client for it.

The helpers of ``devtools/`` are loaded from their files: the repository root must stay off ``sys.path``,
where the pack's own ``nodes`` would hide ComfyUI's.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = ROOT / "tests" / "workflows"


def load_devtool(name: str) -> ModuleType:
    """A module of ``devtools/`` under the alias ``blockskip_devtools_<name>``."""
    alias = f"blockskip_devtools_{name}"
    if alias not in sys.modules:
        spec = importlib.util.spec_from_file_location(alias, ROOT / "devtools" / f"{name}.py")
        sys.modules[alias] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[alias])
    return sys.modules[alias]


def host_or_skip(variable: str) -> Path:
    """The ComfyUI folder that the variable names; the test is skipped where it is unset."""
    if not os.environ.get(variable):
        pytest.skip(f"{variable} is unset: `python dev.py test` sets it, or point it at a ComfyUI folder")
    return Path(os.environ[variable])


@pytest.fixture(scope="session")
def devtool() -> Callable[[str], ModuleType]:
    """`load_devtool`, for tests: ``devtool("comfy_client").ComfyClient``."""
    return load_devtool


@pytest.fixture(scope="session")
def start_server() -> Callable[..., Any]:
    """`ComfyServer`, for tests that need one of their own: ``with start_server(host, ...) as server``."""
    return load_devtool("comfy_server").ComfyServer


@pytest.fixture(scope="session")
def server(start_server: Callable[..., Any]) -> Iterator[Any]:
    """The session's ComfyUI, with the pack, the demo pack and the demo models."""
    host = host_or_skip("COMFYUI_PATH")
    tools = load_devtool("comfy_server")
    models = {folder: files for folder, files in tools.demo_models().items() if all(map(Path.is_file, files))}
    with start_server(host, packs=tools.demo_pack(), models=models) as running:
        yield running


@pytest.fixture
def client(server: Any) -> Any:
    """A client with an id of its own."""
    return load_devtool("comfy_client").ComfyClient(server.url)


@pytest.fixture
def load_workflow() -> Callable[..., dict[str, Any]]:
    """Read ``tests/workflows/<name>.api.json``, with ``{node title: {input: value}}`` written into it."""
    tools = load_devtool("comfy_client")

    def load(name: str, overrides: dict[str, dict[str, Any]] | None = None) -> dict[str, Any]:
        return tools.with_overrides(tools.load_prompt(WORKFLOWS / f"{name}.api.json"), overrides or {})

    return load
