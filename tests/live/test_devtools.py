"""The tools that the live tests use: the client, starting and ending the server, the cache of environments."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from ..device import devtools

FAKE_HOST = """
import http.server, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("child", child.pid, flush=True)
{line}
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), type("Handler", (http.server.BaseHTTPRequestHandler,), {{
    "do_GET": lambda self: (self.send_response(200), self.end_headers()),
}})).serve_forever()
"""
PICTURE = {
    "1": {"class_type": "EmptyImage", "inputs": {"width": 8, "height": 8, "batch_size": 1, "color": 255}},
    "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}, "_meta": {"title": "Blue"}},
}


@pytest.fixture
def fake_host(tmp_path: Path) -> Callable[[str], Path]:
    """A folder that starts like ComfyUI, runs a line of Python, and answers every request."""

    def write(line: str = "") -> Path:
        (tmp_path / "main.py").write_text(FAKE_HOST.format(line=line), encoding="utf-8")
        return tmp_path

    return write


def has_ended(pid: int) -> bool:
    """Whether the process has ended, or is a zombie that has not been collected yet."""
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
    return not state or state.startswith("Z")


def test_run_returns_outputs_and_events(client: Any) -> None:
    result = client.run(PICTURE)
    assert (result.status, result.error) == ("success", None)
    assert client.view(result.outputs["2"]["images"][0]).startswith(b"\x89PNG")
    assert "execution_start" in result.kinds()


def test_refused_prompt_names_the_input(client: Any, devtool: Callable[[str], ModuleType]) -> None:
    tools = devtool("comfy_client")
    prompt = {**PICTURE, "1": {"class_type": "EmptyImage", "inputs": {**PICTURE["1"]["inputs"], "width": 0}}}
    with pytest.raises(tools.RequestRefused, match="EmptyImage 1: .*width") as refusal:
        client.run(prompt)
    assert refusal.value.status == 400


def test_overrides_go_by_title(devtool: Callable[[str], ModuleType]) -> None:
    tools = devtool("comfy_client")
    changed = tools.with_overrides(PICTURE, {"Blue": {"images": ["9", 0]}})
    assert (changed["2"]["inputs"]["images"], PICTURE["2"]["inputs"]["images"]) == (["9", 0], ["1", 0])
    with pytest.raises(LookupError, match="No node is titled 'Red'"):
        tools.with_overrides(PICTURE, {"Red": {}})


@pytest.mark.skipif(os.name == "nt", reason="looks processes up with ps")
def test_server_and_its_children_end_with_the_block(start_server: Any, fake_host: Callable[..., Path]) -> None:
    with contextlib.suppress(ZeroDivisionError), start_server(fake_host(), cpu=True) as server:
        children = [int(line.split()[1]) for line in server.log.splitlines() if line.startswith("child")]
        assert not any(map(has_ended, [server.process.pid, *children]))
        raise ZeroDivisionError
    assert children
    assert all(map(has_ended, [server.process.pid, *children]))
    assert not server.base.exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("print('0.1 seconds (IMPORT FAILED): pack', flush=True)", "failed to import:(.|\n)*IMPORT FAILED"),
        ("print('no such model'); sys.exit(3)", "ended with status 3:(.|\n)*no such model"),
    ],
)
def test_server_that_cannot_start_says_why(
    start_server: Any, fake_host: Callable[..., Path], devtool: Callable[[str], ModuleType], line: str, message: str
) -> None:
    problem = devtool("comfy_server").ServerProblem
    with pytest.raises(problem, match=message), start_server(fake_host(line), cpu=True):
        pass


def test_interrupted_folder_is_started_over(tmp_path: Path, devtool: Callable[[str], ModuleType]) -> None:
    made_once = devtool("environment").made_once
    calls = []

    def make(folder: Path) -> None:
        assert not list(folder.iterdir())
        (folder / "half").touch()
        calls.append(folder)
        if len(calls) == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made_once(tmp_path / "env", make)
    for _ in range(2):
        made_once(tmp_path / "env", make)
    assert len(calls) == 2


def test_folder_without_comfyui_is_named(tmp_path: Path, devtool: Callable[[str], ModuleType]) -> None:
    environment = devtool("environment")
    with pytest.raises(environment.EnvironmentProblem, match="is not a ComfyUI folder: it has no main.py"):
        environment.checked_host(tmp_path)


# --- several pytest processes ------------------------------------------------------------------------------------


@pytest.fixture
def processes() -> ModuleType:
    return devtools("processes")


def says(text: str, status: int = 0, seconds: float = 0.0) -> list[str]:
    """A command that prints something, late, and ends with a status."""
    return [sys.executable, "-c", f"import time; time.sleep({seconds}); print({text!r}); raise SystemExit({status})"]


def test_commands_run_side_by_side_and_are_shown_whole_one_after_the_other(processes, capsys):
    commands = [says("slow", seconds=1.0), says("quick", status=3), says("last")]
    assert processes.run_side_by_side(commands, {}, at_once=2) == [0, 3, 0]
    assert capsys.readouterr().out.split() == ["quick", "last", "slow"]


def test_one_at_a_time_is_in_order(processes, capsys):
    assert processes.run_side_by_side([says("first", seconds=0.3), says("second")], {}, at_once=1) == [0, 0]
    assert capsys.readouterr().out.split() == ["first", "second"]


def test_programs_are_compiled_once_and_not_in_the_checkout(processes, capsys, monkeypatch):
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.delenv("PYTHONPYCACHEPREFIX", raising=False)
    ask = [sys.executable, "-c", "import sys; print(sys.pycache_prefix, sys.dont_write_bytecode)"]
    assert processes.run_side_by_side([ask], {}, at_once=1) == [0]
    assert capsys.readouterr().out.split() == [str(devtools("environment").cache_folder() / "bytecode"), "False"]


@pytest.mark.parametrize(("given", "expected"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_threads_that_wait_leave_the_cores_to_others(processes, capsys, monkeypatch, given, expected):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if given:
        monkeypatch.setenv("OMP_WAIT_POLICY", given)
    ask = [sys.executable, "-c", "import os; print(os.environ['OMP_WAIT_POLICY'])"]
    assert processes.run_side_by_side([ask], {}, at_once=1) == [0]
    assert capsys.readouterr().out.strip() == expected


def test_every_folder_of_tests_is_in_one_process():
    chosen = devtools("pytest_processes")
    processes = chosen.arguments_of_each(["-q"])
    ordinary = [arguments[1:] for arguments in processes if arguments[0] == "-q"]
    (rest,) = (paths for paths in ordinary if "tests" in paths)
    named = [path for paths in ordinary if paths is not rest for path in paths]
    folders = {f"tests/{path.name}" for path in (chosen.ROOT / "tests").iterdir() if any(path.glob("**/test_*.py"))}
    assert len(named) == len(set(named))
    assert set(named) < folders
    assert {argument.partition("=")[2] for argument in rest[1:]} == {*named, "tests/card"}
    on_card = [arguments[3:] for arguments in processes if arguments[:3] == ["--device", "card", "-q"]]
    assert len(ordinary) + len(on_card) == len(processes)
    assert ["tests/card"] in on_card


@pytest.mark.parametrize(
    ("statuses", "expected"), [([0, 0], 0), ([0, 5], 0), ([5, 5], 5), ([0, 1], 1), ([2, 1], 2), ([0, -9], -9)]
)
def test_the_status_of_several_is_that_of_the_first_that_failed(statuses, expected):
    assert devtools("pytest_processes").combined_status(statuses) == expected
