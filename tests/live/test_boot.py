"""The pack in a running ComfyUI: it loads, its nodes are listed, its help pages and templates are served."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDER = "dit-blockskip"
HEADLINE_NODES = (
    "BlockSkip_SelectBlocks",
    "BlockSkip_PrecomputeResiduals",
    "BlockSkip_TrainLora",
    "BlockSkip_ApplyLora",
    "BlockSkip_RALUSampler",
    "BlockSkip_TrainWord",
    "BlockSkip_AcceptEmbeddings",
)
TEMPLATES = sorted(ROOT.glob("workflows/*.json"))


@pytest.fixture(scope="module")
def pack_nodes(server: Any, devtool: Callable[[str], ModuleType]) -> dict[str, Any]:
    """The descriptions of this pack's nodes."""
    listed = devtool("comfy_client").ComfyClient(server.url).object_info()
    return {name: info for name, info in listed.items() if info["python_module"] == f"custom_nodes.{FOLDER}"}


def test_no_pack_fails_to_import(server: Any) -> None:
    assert "IMPORT FAILED" not in server.log


@pytest.mark.parametrize("node_id", HEADLINE_NODES)
def test_headline_node_is_listed(pack_nodes: dict[str, Any], node_id: str) -> None:
    assert node_id in pack_nodes


def test_every_node_has_a_help_page(client: Any, pack_nodes: dict[str, Any]) -> None:
    statuses = {name: client.status(f"/extensions/{FOLDER}/docs/{name}.md") for name in pack_nodes}
    assert statuses == dict.fromkeys(pack_nodes, 200)


def test_every_node_is_there_in_chinese(client: Any, pack_nodes: dict[str, Any]) -> None:
    """At the frontend's addresses: ``/i18n`` for the texts, and a page for each node in a folder of its name."""
    texts = client.get_json("/i18n")["zh"]["nodeDefs"]
    assert pack_nodes.keys() <= texts.keys()
    assert pack_nodes
    statuses = {name: client.status(f"/extensions/{FOLDER}/docs/{name}/zh.md") for name in pack_nodes}
    assert statuses == dict.fromkeys(pack_nodes, 200)


def test_every_script_is_served(client: Any) -> None:
    scripts = [path for path in client.get_json("/extensions") if path.startswith(f"/extensions/{FOLDER}/")]
    assert len(scripts) == len(list(ROOT.glob("web/**/*.js")))
    assert {path: client.status(path) for path in scripts} == dict.fromkeys(scripts, 200)


def test_templates_are_listed(client: Any) -> None:
    listed = client.get_json("/workflow_templates").get(FOLDER, [])
    assert sorted(listed) == sorted(path.stem for path in TEMPLATES)


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.stem)
def test_template_and_its_thumbnail_are_served(client: Any, template: Path) -> None:
    address = f"/api/workflow_templates/{FOLDER}/{template.stem}"
    assert client.get(f"{address}.json") == template.read_bytes()
    assert client.status(f"{address}.jpg") == 200
