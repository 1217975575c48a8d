"""Nodes are thin: a node unpacks, makes a call and returns; the code that it calls is typed and in short functions."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODULES = sorted((ROOT / "nodes").rglob("*.py"))
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
WORK = (ast.For, ast.While, ast.If, ast.Try, ast.ListComp, ast.DictComp, ast.SetComp, *FUNCTIONS, ast.Lambda)
MOST_STATEMENTS = 9
MOST_LINES = 40
"""Limit for nine of ten functions."""
MOST_LINES_OF_A_MODULE = 400


def name(path):
    return path.relative_to(ROOT).as_posix()


def functions(path):
    return [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, FUNCTIONS)]


def executes():
    return [(path, node) for path in MODULES for node in functions(path) if node.name == "execute"]


def statements(node):
    return [inner for inner in ast.walk(node) if isinstance(inner, ast.stmt) and inner is not node]


def unannotated(node):
    arguments = node.args
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
    named = [argument for argument in every if argument is not None and argument.arg not in ("self", "cls")]
    return node.returns is None or any(argument.annotation is None for argument in named)


@pytest.mark.parametrize(("path", "node"), executes(), ids=[name(path) for path, _ in executes()])
def test_a_node_unpacks_calls_and_returns(path, node):
    del path
    assert len(statements(node)) <= MOST_STATEMENTS
    work = [inner for inner in ast.walk(node) if isinstance(inner, WORK) and inner is not node]
    assert [inner for inner in work if not filters_what_is_handed_on(inner)] == []


def filters_what_is_handed_on(node):
    """The sampler passes its latent on without the entries that belong to the previous size."""
    return isinstance(node, ast.DictComp) and ast.unparse(node).endswith("startswith('downscale_ratio')}")


def test_there_is_an_execute_for_every_node(nodes):
    assert len(executes()) == len(nodes.NODE_CLASSES)


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_every_function_of_the_nodes_is_annotated(path):
    assert [node.name for node in functions(path) if unannotated(node)] == []


def test_functions_are_short_schemas_too():
    lengths = sorted(node.end_lineno - node.lineno + 1 for path in MODULES for node in functions(path))
    assert lengths[len(lengths) * 9 // 10] < MOST_LINES


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_no_module_is_long(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) < MOST_LINES_OF_A_MODULE
