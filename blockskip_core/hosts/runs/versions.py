"""The software versions and the device of a run."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import torch
from comfyui_version import __version__ as comfyui_version

from ...version import VERSION


def software_versions(device: torch.device) -> dict[str, str]:
    """Return name -> version of all software that affects a run's numbers, and the name of the device."""
    on_gpu = device.type == "cuda"
    return {
        "BlockSkip": VERSION,
        "ComfyUI": comfyui_version,
        "torch": torch.__version__,
        "peft": version_of("peft"),
        "diffusers": version_of("diffusers"),
        "Python": platform.python_version(),
        "Device": torch.cuda.get_device_name(device) if on_gpu else f"{device.type}, {platform.machine()}",
    }


def version_of(package: str) -> str:
    """Return an installed package's version."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
