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
    return load_file("devtools", name)


def load_file(folder: str, name: str) -> ModuleType:
    """A module of one of the repository's folders, under an alias of its own."""
    alias = f"blockskip_{folder}_{name}"
    if alias not in sys.modules:
        spec = importlib.util.spec_from_file_location(alias, ROOT / folder / f"{name}.py")
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
def demo_parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a server needs beside the pack to run the workflows: the demo's nodes, models and pictures."""
    tools = load_devtool("comfy_server")
    dataset = tmp_path_factory.mktemp("inputs") / "blockskip_toby"
    load_file("demo", "world").write_subject_folder(dataset, "toby", count=2, size=256, seed=0)
    return {"packs": tools.demo_pack(), "models": tools.demo_models(), "inputs": [dataset]}


@pytest.fixture(scope="session")
def server(start_server: Callable[..., Any], demo_parts: dict[str, Any]) -> Iterator[Any]:
    """The session's ComfyUI, with the pack and the demo's parts."""
    with start_server(host_or_skip("COMFYUI_PATH"), **demo_parts) as running:
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
