"""The examples of docs/diffusers.md, run as they are printed on a tiny pipeline, where there is no ComfyUI."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from blockskip_pack.blockskip_core.hosts import diffusers as host
from PIL import Image

from ...core.test_public_face import WITHOUT_HOST
from .tiny_pipelines import build

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "docs" / "diffusers.md").read_text(encoding="utf-8")
SHORTER = {
    "torch.bfloat16": "torch.float32",
    "num_draws=500": "num_draws=2",
    "steps=500": "steps=2",
    "num_inference_steps=20": "num_inference_steps=1",
}
SMALLER = {"budget=10": "budget=1", "10 / len": "1 / len", "rows=16, columns=16": "rows=4, columns=4, num_steps=2"}
CHECKS = """
from safetensors.torch import load_file

from blockskip_core.runs.run_file import RunFile

kept = {f"transformer.{dit.blocks[index].name}." for index in before.kept}
saved = load_file("sks_dog.safetensors")
assert {next(name for name in kept if key.startswith(name)) for key in saved} == kept
assert all(tensor.any() for tensor in saved.values())
assert lora.result.steps == 2 and lora.result.self_check < 1e-4
assert RunFile.read(Path("runs/sks_dog.json")).selection == selection
assert Image.open("sks_dog.png").size == (512, 512)
assert selection.front + selection.back == 1 and selection.method == "attention mask"
"""


def examples():
    """The code of the page."""
    return re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def replaced(code, words):
    for old, new in words.items():
        assert old in code, old
        code = code.replace(old, new)
    return code


@pytest.mark.slow
def test_the_documented_examples_run(tmp_path):
    complete, choosing, writing = examples()
    build("flux").save_pretrained(tmp_path / "FLUX.1-dev")
    (tmp_path / "pictures").mkdir()
    for number, colour in enumerate(("white", "red")):
        Image.new("RGB", (512, 640), colour).save(tmp_path / "pictures" / f"{number}.png")
    code = (
        replaced(complete, SHORTER)
        + "before = selection\npipeline.unload_lora_weights()\n"
        + replaced(choosing, SMALLER)
        + writing
    )
    surroundings = {name: value for name, value in os.environ.items() if name not in ("COMFYUI_PATH", "PYTHONPATH")}
    surroundings["OMP_NUM_THREADS"] = "1"
    command = [sys.executable, "-c", WITHOUT_HOST + code + CHECKS, str(ROOT)]
    done = subprocess.run(command, cwd=tmp_path, env=surroundings, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_exported_name_is_there_and_described():
    assert sorted(host.__all__) == list(host.__all__)
    for name in host.__all__:
        exported = getattr(host, name)
        if inspect.isclass(exported) or inspect.isfunction(exported):
            assert exported.__doc__, name
