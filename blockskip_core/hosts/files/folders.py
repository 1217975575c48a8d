"""Where this package keeps files: only below ComfyUI's output folder."""

from __future__ import annotations

from pathlib import Path

import folder_paths


def residuals_folder(key: str) -> Path:
    """Return the folder of one cache of residuals; ``key`` is a content hash, never text from a user."""
    return _root() / "residuals" / key


def run_folder(key: str) -> Path:
    """Return the folder of one training run's states; ``key`` is a content hash."""
    return _root() / "runs" / key


def probe_file(key: str) -> Path:
    """Return the file of one block selection probe; ``key`` is a content hash."""
    return _root() / "probes" / f"{key}.json"


def latents_file(key: str) -> Path:
    """Return the file of latents that a model sampled to be trained on; ``key`` is a content hash."""
    return _root() / "latents" / f"{key}.safetensors"


def _root() -> Path:
    return Path(folder_paths.get_output_directory()) / "blockskip"
