"""A room imports only what its row allows, and a row allows only rooms further up, so there are no import cycles."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CORE = "blockskip_core"

# Room: the rooms that it may import, from the bottom up. A folder is a room, and so are the single files named here.
# Add a row for a new room. Think twice before adding an import: it brings in everything that the imported room imports.
TABLE = {
    "errors": "",
    "units": "",
    "devices": "",
    "version": "",
    "names": "",
    "files": "errors",
    "locks": "errors files",
    "selection": "errors units",
    "data": "errors",
    "adapters": "errors",
    "ralu": "errors",
    "ddit": "errors devices",
    "model": "selection",
    "blocks": "selection model",
    "residuals": "errors units files locks selection data model blocks",
    "training": "errors files locks selection data adapters model blocks residuals",
    "zoodip": "errors training",
    "distillation": "errors data training",
    "runs": "errors version files selection data residuals training",
    "train": "runs",
    "torch_dit": "adapters model blocks",
    "examples": "model",
    "api": "errors files selection data adapters model blocks residuals training",
    "accounting": "errors units selection data adapters model blocks residuals training",
    "reporting": "errors units files selection data ddit training",
    "hosts": "",
    "hosts/families": "errors selection data adapters ralu model blocks accounting",
    "hosts/inputs": "errors data",
    "hosts/files": "errors names files locks adapters ddit",
    "hosts/models": "errors devices selection data adapters ralu ddit model blocks residuals training distillation accounting hosts/families "
    "hosts/inputs hosts/files",
    "hosts/sampling": "errors units files locks selection data adapters ralu ddit model blocks training distillation hosts/families hosts/inputs hosts/files "
    "hosts/models",
    "hosts/words": "errors zoodip accounting hosts/inputs hosts/models hosts/sampling",
    "hosts/runs": "errors units version data adapters model residuals training runs accounting reporting hosts/families "
    "hosts/inputs hosts/files hosts/models hosts/sampling",
    "hosts/diffusers": "errors version names files locks selection data adapters model blocks residuals training runs api",
    "nodes/types": "",
    "nodes/inputs": "errors selection ddit residuals reporting hosts/files hosts/models hosts/runs",
    "nodes/page": "reporting",
    "nodes/run": "errors files adapters residuals training reporting hosts/files hosts/models hosts/sampling hosts/runs nodes/page",
    "nodes/words": "errors units version training zoodip reporting hosts/inputs hosts/files hosts/models hosts/sampling hosts/words "
    "hosts/runs nodes/page nodes/run",
    "nodes": "errors selection data adapters ralu ddit residuals training distillation accounting reporting hosts/inputs hosts/files "
    "hosts/models hosts/sampling hosts/words hosts/runs nodes/types nodes/inputs nodes/page nodes/run nodes/words",
}
ROOMS = {room: row.split() for room, row in TABLE.items()}
MODULES = [path for folder in (CORE, "nodes") for path in sorted((ROOT / folder).rglob("*.py"))]


def room_of(path):
    """Return the room of a module: itself if the table names it, otherwise its folder; "" for the public interface."""
    name = path.relative_to(ROOT).with_suffix("").as_posix().removeprefix(f"{CORE}/")
    return name if name in ROOMS else name.rpartition("/")[0]


def imported_files(path):
    """Return the pack's modules that a module imports anywhere in it; imports inside the pack are relative."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            for alias in node.names:
                candidates = (base / f"{alias.name}.py", base / alias.name / "__init__.py", base.with_suffix(".py"))
                found.add(next((file for file in candidates if file.is_file()), base / "__init__.py"))
    return found


def arrows():
    """Return (importing room, imported room) -> the importing modules."""
    found = {}
    for path in MODULES:
        for target in imported_files(path):
            assert target.is_file(), f"{path} imports {target}"
            pair = room_of(path), room_of(target)
            if pair[0] != pair[1]:
                found.setdefault(pair, []).append(path.relative_to(ROOT).as_posix())
    return found


ARROWS = arrows()


def test_every_room_has_a_row_and_every_row_a_room():
    assert {room_of(path) for path in MODULES} == {"", *ROOMS}


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_what_its_row_allows_and_nothing_else(room):
    assert {pair: modules for pair, modules in ARROWS.items() if pair[0] == room and pair[1] not in ROOMS[room]} == {}
    assert [allowed for allowed in ROOMS[room] if (room, allowed) not in ARROWS] == [], "allowed and not used"


@pytest.mark.parametrize("room", ROOMS)
def test_a_row_names_only_rooms_further_up(room):
    above = list(ROOMS)[: list(ROOMS).index(room)]
    assert [name for name in ROOMS[room] if name not in above] == []


def test_the_face_of_the_core_is_the_only_file_outside_a_room():
    assert [path.name for path in MODULES if room_of(path) == ""] == ["__init__.py"]


FOLDERS = [path.parent for path in MODULES if path.name == "__init__.py"]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_every_folder_says_what_belongs_there(folder):
    assert ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8")))


def test_the_hosts_say_which_rooms_they_have():
    text = ast.get_docstring(ast.parse((ROOT / CORE / "hosts" / "__init__.py").read_text(encoding="utf-8")))
    named = {line.split()[0] for line in text.splitlines() if "   " in line}
    assert {f"hosts/{name}" for name in named} == {room for room in ROOMS if room.startswith("hosts/")}


@pytest.mark.parametrize(("tests", "code"), [("core", CORE), ("hosts", f"{CORE}/hosts"), ("nodes", "nodes")])
def test_tests_are_in_the_folders_of_the_code(tests, code):
    folders = {path.parent.name for path in (ROOT / "tests" / tests).glob("*/test_*.py")}
    assert folders
    assert folders <= {path.parent.name for path in (ROOT / code).glob("*/__init__.py")}
