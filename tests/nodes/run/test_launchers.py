"""The launchers of others: SkyPilot's own parser reads our task, and Ray Train's workers train the node's LoRA."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from .outside import SECONDS, environment, newest_lora
from .test_write_run import same_file

ROOT = Path(__file__).resolve().parents[3]
LAUNCH = ROOT / "launch"


def test_the_task_for_skypilot_runs_the_command_that_there_is():
    """Every option of the command line in the task is one of the command's."""
    text = (LAUNCH / "skypilot.yaml").read_text(encoding="utf-8")
    (line,) = re.findall(r"torchrun [^|]*?-m (blockskip_core\.train (?:.*\\\n)?.*)\n", text)
    words = shlex.split(line.replace("\\\n", " "))
    from blockskip_pack.blockskip_core.runs.command import _parsed

    options = _parsed(words[1:])
    assert (str(options.run), str(options.output)) == ("/bucket/runs/$RUN", "~/output")  # no locks in a bucket


def test_skypilot_reads_the_task():
    sky = pytest.importorskip("sky", reason="skypilot is not installed: pip install skypilot==0.14.1")
    task = sky.Task.from_yaml(str(LAUNCH / "skypilot.yaml"))
    assert task.envs["RUN"]
    assert all(resources.use_spot for resources in task.resources)
    assert "blockskip_core.train" in task.run


@pytest.mark.slow
def test_workers_of_ray_train_the_same_lora(outside):
    if importlib.util.find_spec("ray") is None:
        pytest.skip("ray is not installed: pip install 'ray[train]==2.60.0'")
    given = outside.prepare()
    run = outside.write(given, resume=False, accumulation=2)
    outside.train(given, resume=False, accumulation=2)
    expected = newest_lora(outside.output)
    command = [sys.executable, str(LAUNCH / "ray_train.py"), "--workers", "2", "--cpu", "--"]
    command += outside.command.arguments(run)
    path = os.environ.get("PYTHONPATH", "")
    done = subprocess.run(
        command, cwd=outside.output, env={**environment(), "PYTHONPATH": path, "RAY_USAGE_STATS_ENABLED": "0"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=2 * SECONDS, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert newest_lora(outside.output) != expected
    assert same_file(newest_lora(outside.output), expected)
