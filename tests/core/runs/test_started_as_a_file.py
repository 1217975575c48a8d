"""The command as a file: for a Python that does not look into the current folder, as ComfyUI's portable one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
PROGRAM = ROOT / "blockskip_core" / "train.py"


def said(*command, cwd):
    done = subprocess.run(
        [sys.executable, *command, "--help"], cwd=cwd, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("isolated", [["-I"], []], ids=["isolated", "plain"])
def test_the_file_starts_from_anywhere(tmp_path, isolated):
    assert "Train a LoRA as a run file says." in said(*isolated, str(PROGRAM), cwd=tmp_path)


def test_the_module_starts_in_the_folder_of_the_pack():
    assert "Train a LoRA as a run file says." in said("-m", "blockskip_core.train", cwd=ROOT)


def test_the_file_hides_no_modules_of_others(tmp_path):
    """Beside it are modules with common names, ``files`` and ``model`` among them."""
    look = f"import runpy, sys; sys.path.insert(0, {str(PROGRAM.parent)!r}); sys.argv = ['train', '--help']\n"
    look += f"try:\n    runpy.run_path({str(PROGRAM)!r}, run_name='__main__')\nfinally:\n    print(sys.path[0])"
    done = subprocess.run(
        [sys.executable, "-I", "-c", look], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout.splitlines()[-1] == str(ROOT)
    assert str(PROGRAM.parent) not in done.stdout.splitlines()
