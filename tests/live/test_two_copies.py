"""The pack twice in one server, as after two ways of installing it: one copy works, undisturbed.

Both contain only the files of a release, so what works here works with these.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from .conftest import ROOT, browser_or_skip, host_or_skip, load_devtool, load_file
from .test_workflows import output_of, succeed

COPIES = ("dit-blockskip", "dit-blockskip-copy")


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files of a release."""
    folder = tmp_path_factory.mktemp("release") / "dit-blockskip"
    for name in load_file("tests/nodes", "test_packaging").shipped_files():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def crowded(start_server: Callable[..., Any], demo_parts: dict[str, Any], release: Path) -> Iterator[Any]:
    """A server with two copies of a release in the place of the working copy."""
    packs = {**demo_parts["packs"], **dict.fromkeys(COPIES, release)}
    with start_server(host_or_skip("COMFYUI_PATH"), **{**demo_parts, "packs": packs}) as running:
        yield running


@pytest.fixture
def client(crowded: Any) -> Any:
    """A client of that server."""
    return load_devtool("comfy_client").ComfyClient(crowded.url)


def test_the_server_starts_and_both_copies_load(crowded: Any) -> None:
    assert "IMPORT FAILED" not in crowded.log
    assert "Traceback" not in crowded.log
    for folder in COPIES:
        assert f"custom_nodes/{folder}\n" in crowded.log, "the list of import times"


@pytest.mark.parametrize("folder", COPIES)
def test_help_pages_scripts_and_templates_of_both_are_served(client: Any, folder: str) -> None:
    ours = [name for name in client.object_info() if name.startswith("BlockSkip_")]
    assert len(ours) >= 5
    for name in ours:
        for page in (f"{name}.md", f"{name}/zh.md"):
            assert client.status(f"/extensions/{folder}/docs/{page}") == 200
    assert client.status(f"/extensions/{folder}/js/live_chart.js") == 200
    templates = client.get_json("/workflow_templates")[folder]
    assert len(templates) == len(list(ROOT.glob("workflows/*.json")))
    for template in templates:
        assert client.status(f"/api/workflow_templates/{folder}/{template}.json") == 200


def test_the_nodes_of_one_copy_are_there_and_the_frontend_finds_their_pages(client: Any) -> None:
    modules = {info["python_module"] for name, info in client.object_info().items() if name.startswith("BlockSkip_")}
    assert len(modules) == 1, "nodes of two copies cannot work together"
    assert modules.pop().removeprefix("custom_nodes.") in COPIES


def test_the_files_of_a_release_are_enough_for_a_workflow(client: Any, load_workflow: Callable[..., Any]) -> None:
    prompt = load_workflow("my_first_lora")
    summary = output_of(succeed(client, prompt), prompt, "Dynamic Patch Trainer")["blockskip"][0]
    assert (summary["steps"], summary["problems"]) == (4, [])


def test_the_frontend_opens_a_workflow_without_a_complaint(crowded: Any) -> None:
    browser_or_skip()
    template = ROOT / "workflows" / "BlockSkip 1 - My first LoRA.json"
    command = ["node", str(ROOT / "devtools" / "check_workflow.mjs"), crowded.url, str(template)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
