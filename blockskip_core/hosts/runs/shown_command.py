"""The command that Run Outside shows: it trains a run file in one process, on this machine, with this ComfyUI's flags."""

from __future__ import annotations

import os
import re
import shlex
import sys
from pathlib import Path

import folder_paths
from comfy.cli_args import args

from ..models.model_file import ModelFile

PROGRAM = Path(__file__).resolve().parents[2] / "train.py"
"""Started as a file, because the Python of ComfyUI's portable version finds no module in the current folder."""

FLAGS = (
    "--cpu", "--force-fp32", "--force-fp16", "--fp32-unet", "--fp64-unet", "--bf16-unet", "--fp16-unet",
    "--fp8_e4m3fn-unet", "--fp8_e5m2-unet", "--fp8_e8m0fnu-unet", "--supports-fp8-compute",
)  # fmt: skip
"""ComfyUI's flags on which the dtype of a model's weights depends, and with it what the weights are."""

_PLAIN = re.compile(r"[\w.:/\\-]+")


def command_for(path: Path, file: ModelFile) -> str:
    """Return the command that trains a run file in one process, on this machine, from any folder."""
    comfyui = Path(folder_paths.__file__).parent
    output = Path(folder_paths.get_output_directory())
    own = comfyui_arguments()
    arguments = [
        sys.executable or "python", str(PROGRAM), str(path), "--comfyui", str(comfyui), *_folders(file),
        "--output", str(output), *(["--", *own] if own else []),
    ]  # fmt: skip
    return " ".join(map(quoted_for_windows, arguments)) if os.name == "nt" else shlex.join(arguments)


def comfyui_arguments() -> list[str]:
    """Return those of this ComfyUI's own arguments that decide on the device and on the dtype of weights.

    ``--fast`` is one of them: with fp16_accumulation, ComfyUI prefers weights in float16. Other versions of ComfyUI may lack
    some of them.
    """
    flags = [flag for flag in FLAGS if getattr(args, flag.strip("-").replace("-", "_"), False)]
    fast = sorted(each.value for each in getattr(args, "fast", ()))
    return [*flags, *(["--fast", *fast] if fast else []), *_device()]


def _device() -> list[str]:
    """Return the arguments that choose this ComfyUI's GPU.

    ComfyUI's ``main`` puts ``--default-device`` first among the GPUs; for one process that is the same as naming it.
    """
    if (directml := getattr(args, "directml", None)) is not None:
        return ["--directml", *([str(directml)] if directml >= 0 else [])]
    named = next((each for each in (args.cuda_device, getattr(args, "default_device", None)) if each is not None), None)
    return [] if named is None else ["--cuda-device", str(named)]


def quoted_for_windows(argument: str) -> str:
    """Return an argument as cmd.exe and Windows' programs read it, in quotes if it has more than plain characters.

    Within quotes cmd.exe leaves all but ``%NAME%`` of a variable that exists; quotes themselves are in no name of a file.
    """
    if _PLAIN.fullmatch(argument):
        return argument
    ends_with = len(argument) - len(argument.rstrip("\\"))  # otherwise the last one would escape the quote
    return f'"{argument}{argument[len(argument) - ends_with :]}"'


def _folders(file: ModelFile) -> list[str]:
    """Return the options that let the command read the model: a link's target may be in another folder."""
    folder = Path(file.folder)
    there = (folder / file.file).resolve()
    beyond = [] if there.is_relative_to(folder.resolve()) else ["--models", str(there.parent)]
    return ["--models", str(folder), *beyond]
