"""A live ComfyUI with the pack, started once per session, and a client for it.

The helpers of ``devtools/`` are loaded from their files: the repository root must stay off ``sys.path``,
where the pack's own ``nodes`` would hide ComfyUI's.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = ROOT / "tests" / "workflows"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


def load_devtool(name: str) -> ModuleType:
    """Load a module of ``devtools/`` under the alias ``blockskip_devtools_<name>``."""
    return load_file("devtools", name)


def load_file(folder: str, name: str) -> ModuleType:
    """Load a module of one of the repository's folders under a separate alias; it may import the others of that folder."""
    alias = f"blockskip_{folder.replace('/', '_')}_{name}"
    if alias not in sys.modules:
        if str(ROOT / folder) not in sys.path:
            sys.path.append(str(ROOT / folder))  # last, so that it hides nothing
        spec = importlib.util.spec_from_file_location(alias, ROOT / folder / f"{name}.py")
        sys.modules[alias] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[alias])
    return sys.modules[alias]


def browser_or_skip() -> None:
    """Skip the test where the real frontend cannot be opened."""
    modules = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "blockskip" / "node" / "node_modules"
    if not (shutil.which("node") and any(map(shutil.which, BROWSERS)) and (modules / "playwright-core").is_dir()):
        pytest.skip("needs node, a Chromium and playwright-core: see devtools/browser.mjs")


def host_or_skip(variable: str) -> Path:
    """The ComfyUI folder that the variable names; the test is skipped if it is not set."""
    if not os.environ.get(variable):
        pytest.skip(f"{variable} is unset: `python dev.py test` sets it, or point it at a ComfyUI folder")
    return Path(os.environ[variable])


@pytest.fixture(scope="session")
def devtool() -> Callable[[str], ModuleType]:
    """`load_devtool`, for tests: ``devtool("comfy_client").ComfyClient``."""
    return load_devtool


@pytest.fixture(scope="session")
def start_server() -> Callable[..., Any]:
    """A watched `ComfyServer` for tests that need a separate one: ``with start_server(host, ...) as server``."""

    @contextmanager
    def watched(host: Path, *, packs: Mapping[str, Path] | None = None, **options: Any) -> Iterator[Any]:
        packs = {**(packs or {}), "log_watch": Path(__file__).parent / "log_watch"}
        with load_devtool("comfy_server").ComfyServer(host, packs=packs, **options) as server:
            yield server
            assert complaints(server) == []

    return watched


def node_classes() -> list[str]:
    """The names in ``NODE_CLASSES`` of the pack, from the source: only a ComfyUI can import it."""
    source = (ROOT / "nodes" / "__init__.py").read_text(encoding="utf-8")
    (listed,) = (line.value for line in ast.parse(source).body if isinstance(line, ast.AnnAssign))
    return [name.id for name in listed.elts]


PACK_NAMES = re.compile("|".join(("block[_-]?skip", "RALU", *node_classes())), re.IGNORECASE)
ANSWERS = re.compile(  # refused prompts and exceptions in nodes, which tests check in the response itself
    r"!!! Exception during processing !!!|Traceback \(most recent call last\)|"
    r"Failed to validate prompt|\* \(prompt\):|\* \w+ [\w:]+:|  - |invalid prompt"
)


def complaints(server: Any) -> list[str]:
    """ComfyUI's warnings and errors that name the pack, apart from those of the pack's own loggers."""
    file = Path(server.base) / "warnings.jsonl"
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    for folder in (server.host, server.base, sys.prefix):  # our name is in these paths too
        text = text.replace(str(folder), "")
    records = [json.loads(line) for line in text.splitlines()]
    return [
        record["message"]
        for record in records
        if PACK_NAMES.search(record["message"])
        and not PACK_NAMES.search(record["logger"])
        and not ANSWERS.match(record["message"])
    ]


# The files that the shipped workflows name: empty ones, so that the frontend finds every choice. Nothing loads them.
NAMED_MODELS = {
    "checkpoints": ["flux1-dev-fp8.safetensors", "v1-5-pruned-emaonly-fp16.safetensors"],
    "diffusion_models": ["flux1-dev.safetensors"],
    "text_encoders": ["clip_l.safetensors", "t5xxl_fp16.safetensors"],
    "vae": ["ae.safetensors"],
    "clip_vision": ["clip_vision_h.safetensors"],
}
FOLDERS = {
    "blockskip_toby": "toby", "blockskip_mila": "mila", "blockskip_before": "zuzu", "my_subject": "toby", "my_second_subject": "mila",
    "my_edit": "toby", "my_edit_before": "zuzu", "my_edit_try": "mila",
}  # fmt: skip


@pytest.fixture(scope="session")
def demo_parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a server needs besides the pack to show and run the workflows: the demo's nodes, models and pictures."""
    tools = load_devtool("comfy_server")
    inputs = tmp_path_factory.mktemp("inputs")
    for folder, subject in FOLDERS.items():
        load_file("demo", "world").write_subject_folder(inputs / folder, subject, count=2, size=256, seed=0)
    models = tools.demo_models()
    empty = tmp_path_factory.mktemp("models")
    for folder, names in NAMED_MODELS.items():
        (empty / folder).mkdir()
        for name in names:
            (empty / folder / name).touch()
            models.setdefault(folder, []).append(empty / folder / name)
    return {"packs": tools.demo_pack(), "models": models, "inputs": [inputs / folder for folder in FOLDERS]}


@pytest.fixture(scope="session")
def server(start_server: Callable[..., Any], demo_parts: dict[str, Any]) -> Iterator[Any]:
    """The session's ComfyUI, with the pack and the demo's parts."""
    with start_server(host_or_skip("COMFYUI_PATH"), **demo_parts) as running:
        yield running


@pytest.fixture(scope="session")
def older(start_server: Callable[..., Any], demo_parts: dict[str, Any]) -> Iterator[Any]:
    """The oldest supported ComfyUI, with the same parts; one server for the session too."""
    with start_server(host_or_skip("BLOCKSKIP_COMFYUI_0_18"), **demo_parts) as running:
        yield running


@pytest.fixture
def client(server: Any) -> Any:
    """A client with a new id."""
    return load_devtool("comfy_client").ComfyClient(server.url)


@pytest.fixture
def load_workflow() -> Callable[..., dict[str, Any]]:
    """Read ``tests/workflows/<name>.api.json``, with ``{node title: {input: value}}`` written into it."""
    tools = load_devtool("comfy_client")

    def load(name: str, overrides: dict[str, dict[str, Any]] | None = None) -> dict[str, Any]:
        return tools.with_overrides(tools.load_prompt(WORKFLOWS / f"{name}.api.json"), overrides or {})

    return load
