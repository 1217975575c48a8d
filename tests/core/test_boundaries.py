"""What the shipped code must not contain, checked on its syntax trees."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CORE = ROOT / "blockskip_core"
SHIPPED = [ROOT / "__init__.py", *sorted(CORE.rglob("*.py")), *sorted((ROOT / "nodes").rglob("*.py"))]
WITHOUT_COMFYUI = sorted((CORE / "hosts" / "diffusers").glob("*.py"))
PURE = [path for path in CORE.rglob("*.py") if CORE / "hosts" not in path.parents]

HOST_MODULES = {"comfy", "comfy_api", "comfy_extras", "comfy_execution", "folder_paths", "server", "nodes", "node_helpers",
                "execution", "latent_preview", "comfyui_version"}  # fmt: skip
FORBIDDEN_MODULES = {"pickle", "subprocess", "requests", "urllib", "urllib3", "http", "httpx", "socket", "ctypes", "shelve",
                     "marshal", "huggingface_hub", "aiohttp"}  # fmt: skip
FORBIDDEN_CALLS = {"print", "eval", "exec", "compile", "__import__", "input", "breakpoint"}
FORBIDDEN_ATTRIBUTES = {
    ("os", "environ"), ("os", "getenv"), ("os", "putenv"), ("os", "system"), ("os", "popen"), ("torch", "load"),
    ("torch", "save"),
}  # fmt: skip


def relative(path):
    return str(path.relative_to(ROOT))


def imported(tree):
    """Return the top-level packages that are imported absolutely, anywhere in a module."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


def forbidden(tree):
    """Return the items of the lists above that a syntax tree contains."""
    found = imported(tree) & FORBIDDEN_MODULES
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in FORBIDDEN_CALLS:
            found.add(node.func.id)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            pair = (node.value.id, node.attr)
            if pair in FORBIDDEN_ATTRIBUTES:
                found.add(".".join(pair))
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{a.name}" for a in node.names if (node.module, a.name) in FORBIDDEN_ATTRIBUTES}
    return found


@pytest.mark.parametrize("path", SHIPPED, ids=relative)
def test_shipped_code_runs_no_foreign_code_and_reaches_no_network(path):
    assert not forbidden(ast.parse(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize("path", PURE, ids=relative)
def test_the_core_knows_no_host(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert not imported(tree) & HOST_MODULES
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert not (node.module or "").startswith("hosts")
            assert "hosts" not in {alias.name for alias in node.names}


@pytest.mark.parametrize("path", WITHOUT_COMFYUI, ids=relative)
def test_the_diffusers_host_needs_neither_comfyui_nor_its_host(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert not imported(tree) & HOST_MODULES
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level != 2, "that is another host's room"
            assert not (node.module or "").startswith("hosts")


NAMES_OF_NODES = (
    "Select Blocks", "Precompute Residuals", "Dynamic Patch Trainer", "Memory Plan", "Sample While Training",
    "Apply BlockSkip LoRA", "RALU Sampler", "Train Word", "CLIP with Embeddings", "queue", "Queue",
)  # fmt: skip


def texts(tree):
    """Return all texts of a module except its docstrings, which only developers read."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docs = {id(node.body[0].value) for node in ast.walk(tree) if isinstance(node, documented)
            and node.body and isinstance(node.body[0], ast.Expr)}  # fmt: skip
    constants = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return [node.value for node in constants if id(node) not in docs]


@pytest.mark.parametrize("path", PURE, ids=relative)
def test_the_core_speaks_of_arguments_not_of_nodes(path):
    """Only the nodes and hosts tell users what to do in which node."""
    said = texts(ast.parse(path.read_text(encoding="utf-8")))
    assert [text for text in said if any(name in text for name in NAMES_OF_NODES)] == []


def test_the_search_for_names_of_nodes_finds_one():
    tree = ast.parse('"""Select Blocks."""\nraise ValueError(f"Connect {x} to Select Blocks.")')
    assert [text for text in texts(tree) if "Select Blocks" in text] == [" to Select Blocks."]


def test_the_door_of_the_pack_imports_nothing_of_the_host():
    assert not imported(ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8"))) & HOST_MODULES


@pytest.mark.parametrize(
    "text",
    ["print(1)", "eval('1')", "import pickle", "from urllib.request import urlopen", "import os\nos.environ['A']",
     "from os import environ", "import torch\ntorch.load('x')", "def f():\n    import subprocess"],
)  # fmt: skip
def test_the_search_finds_what_it_looks_for(text):
    assert forbidden(ast.parse(text))
