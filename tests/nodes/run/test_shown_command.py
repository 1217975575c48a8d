"""The command that Run Outside shows: quoted as the system's shell reads it, with the flags that this ComfyUI has."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from .outside import PROGRAM, SECONDS, environment, newest_lora
from .test_write_run import same_file


@pytest.fixture
def module(core):
    return core("hosts.runs.shown_command")


@pytest.fixture
def shown(module, monkeypatch):
    """Flags as ComfyUI has parsed them -> the arguments that are passed on."""

    def show(**flags):
        monkeypatch.setattr(module, "args", SimpleNamespace(**{"cuda_device": None, **flags}))
        return module.comfyui_arguments()

    return show


def parsed(arguments):
    """The flags as this ComfyUI parses them from a command line."""
    from comfy.cli_args import PerformanceFeature, parser

    found = vars(parser.parse_args(arguments))
    return {**found, "fast": set(PerformanceFeature) if found["fast"] == [] else set(found["fast"] or ())}


@pytest.mark.parametrize(
    ("started", "passed_on"),
    [
        ([], []),
        (["--cpu", "--port", "8000"], ["--cpu"]),
        (["--bf16-unet", "--cuda-device", "1"], ["--bf16-unet", "--cuda-device", "1"]),
        (["--fp8_e4m3fn-unet", "--force-fp16"], ["--force-fp16", "--fp8_e4m3fn-unet"]),
        (["--force-fp32", "--fp64-unet"], ["--force-fp32", "--fp64-unet"]),
        (["--fp8_e5m2-unet", "--supports-fp8-compute"], ["--fp8_e5m2-unet", "--supports-fp8-compute"]),
        (["--default-device", "2"], ["--cuda-device", "2"]),
        (["--default-device", "2", "--cuda-device", "0"], ["--cuda-device", "0"]),
        (["--fast", "fp16_accumulation"], ["--fast", "fp16_accumulation"]),
        (["--fast"], ["--fast", "autotune", "cublas_ops", "fp16_accumulation", "fp8_matrix_mult"]),
        (["--directml"], ["--directml"]),
        (["--directml", "1"], ["--directml", "1"]),
    ],
    ids=" ".join,
)
def test_flags_for_device_and_dtype_are_passed_on(comfyui, shown, started, passed_on):
    assert shown(**parsed(started)) == passed_on
    assert shown(**parsed(passed_on)) == passed_on  # and ComfyUI understands them


def test_all_flags_are_this_comfyuis_own(comfyui, module):
    assert all(parsed([flag])[flag.strip("-").replace("-", "_")] is True for flag in module.FLAGS)


def test_flags_that_another_comfyui_lacks_are_not_missed(comfyui, shown):
    assert shown() == []
    assert shown(cuda_device=1) == ["--cuda-device", "1"]


@pytest.mark.parametrize(
    ("argument", "quoted"),
    [
        (r"C:\ComfyUI_windows_portable\python_embeded\python.exe", None),
        ("--cuda-device", None),
        ("D:\\", None),
        (r"C:\Programme (x86)\run.json", r'"C:\Programme (x86)\run.json"'),
        (r"C:\cats&dogs\run.json", r'"C:\cats&dogs\run.json"'),
        (r"C:\50%^2\run.json", r'"C:\50%^2\run.json"'),
        ("E:\\two words\\", r'"E:\two words\\"'),
        (r"C:\图片\run.json", None),
        ("0,1", '"0,1"'),  # two things for PowerShell
    ],
)
def test_arguments_for_windows_are_quoted(comfyui, module, argument, quoted):
    assert module.quoted_for_windows(argument) == (quoted or argument)


def train(outside, run, folder, *flags):
    """Carry out the shown command in a folder, with a Python that does not look into it; return the LoRA's file."""
    before = newest_lora(outside.output)
    done = subprocess.run(
        [sys.executable, "-I", str(PROGRAM), *outside.command.arguments(run), *flags], cwd=folder, env=environment(),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=SECONDS, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert newest_lora(outside.output) != before
    return newest_lora(outside.output)


def test_the_shown_command_trains_from_any_folder(outside, tmp_path):
    given = outside.prepare()
    run = outside.write(given, resume=False)  # checks the command that is shown
    outside.train(given, resume=False)
    expected = newest_lora(outside.output)
    assert same_file(train(outside, run, tmp_path), expected)


def test_a_comfyui_with_another_dtype_of_weights(outside, tmp_path, monkeypatch):
    from comfy.cli_args import args

    monkeypatch.setattr(args, "bf16_unet", True)
    given = outside.prepare(checkpoint=True)
    assert {p.dtype for p in given.model.model.diffusion_model.parameters()} == {torch.bfloat16}
    run = outside.write(given, flags=("--bf16-unet",), resume=False)
    outside.train(given, resume=False)
    expected = newest_lora(outside.output)
    (refused,) = outside.server.train(outside.command.arguments(run))
    assert refused.code == 1
    assert "the flags that ComfyUI had when it was written (such as --bf16-unet)" in refused.said
    assert same_file(train(outside, run, tmp_path, "--bf16-unet"), expected)
