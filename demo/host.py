"""Finds ComfyUI and makes ``import comfy`` work in a command-line script."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch

DEMO = Path(__file__).resolve().parent
ASSETS = DEMO / "assets"
DIT_FILE = "blockskip_world_dit.safetensors"
VIEWS_DIT_FILE = "blockskip_world_views_dit.safetensors"
DITS = {"scenes": DIT_FILE, "views": VIEWS_DIT_FILE}  # what they were trained on last
VAE_FILE = "blockskip_world_vae.safetensors"
TEXT_FILE = "blockskip_world_text.safetensors"
READER_FILE = "blockskip_world_reader.safetensors"


def add_comfyui_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--comfyui``, the folder of a ComfyUI checkout; ``COMFYUI_PATH`` is its default."""
    parser.add_argument(
        "--comfyui", type=Path, default=os.environ.get("COMFYUI_PATH"), help="ComfyUI's folder"
    )


def add_dit_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--dit``, which of the transformers is used."""
    parser.add_argument("--dit", choices=list(DITS), default="scenes", help="which transformer")


def use_comfyui(folder: Path | None) -> torch.device:
    """Put ComfyUI first on the path, choose the CPU if there is no GPU, and return the device."""
    if folder is None or not (Path(folder) / "comfy").is_dir():
        raise SystemExit("say where ComfyUI is: --comfyui FOLDER or the environment variable COMFYUI_PATH")
    sys.path.insert(0, str(Path(folder).resolve()))
    from comfy.cli_args import args

    args.cpu = not torch.cuda.is_available()
    args.use_pytorch_cross_attention = True
    import comfy.model_management

    return comfy.model_management.get_torch_device()


def half_precision(device: torch.device) -> torch.autocast:
    """Compute in bfloat16 where that is faster: on a GPU, and on CPUs with instructions for it."""
    fast = device.type != "cpu" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.autocast(device.type, torch.bfloat16, enabled=fast)
