"""Where the samples of a run are, kept beside its training states, so that a run that resumes shows them again.

Only names are kept. The pictures lie beside the LoRA, where users move and delete them, and the file may come from
anywhere with an output folder; so each name is checked, and whatever is not a sample's picture is left out.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import folder_paths

from ...files import write_atomically

logger = logging.getLogger(__name__)

VERSION = 1


class KeptSample(NamedTuple):
    """A sample and its picture.

    Attributes:
        step: Number of training steps before it.
        prompt: Number of its prompt, from 1.
        path: Its file, below the output folder.
        likeness: How alike it is to the training pictures, or None if it is not known.
    """

    step: int
    prompt: int
    path: Path
    likeness: float | None


def sample_path(lora: Path, step: int, prompt: int) -> Path:
    """Return the file of a sample beside its LoRA."""
    return lora.with_name(f"{lora.stem}step{step:06}_{prompt}.png")


def write_kept_samples(file: Path, asked: Mapping[str, str], samples: Sequence[KeptSample]) -> None:
    """Write where samples are.

    Args:
        file: The file.
        asked: What was sampled (``samples_of``), and what it was compared with (``likeness_to``), as texts.
        samples: The samples; those outside the output folder are left out.

    Raises:
        StorageError: If it cannot be written.
    """
    output = folder_paths.get_output_directory()
    names = [(sample, Path(os.path.relpath(sample.path, output)).as_posix()) for sample in samples]
    rows = [
        {"step": sample.step, "prompt": sample.prompt, "file": name, "likeness": sample.likeness}
        for sample, name in names
        if not name.startswith("../")
    ]
    text = json.dumps({"version": VERSION, **asked, "samples": rows})
    write_atomically(file, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def read_kept_samples(file: Path, asked: Mapping[str, str], last_step: int) -> list[KeptSample]:
    """Return the samples up to a step whose pictures still exist; none if others were asked for.

    Args:
        file: The file, which may be missing.
        asked: As in :func:`write_kept_samples`. Samples of other prompts, sizes or seeds cannot be compared with those
            to come, and are left out; likeness to other pictures too.
        last_step: Number of steps that the run resumes after.
    """
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    except (OSError, ValueError, RecursionError) as error:
        logger.warning("BlockSkip: the samples made before are not shown, %s cannot be read (%s)", file.name, error)
        return []
    if not isinstance(kept, dict) or kept.get("version") != VERSION or kept.get("samples_of") != asked["samples_of"]:
        return []
    rows = kept.get("samples")
    found = [_sample(row) for row in rows] if isinstance(rows, list) else []
    shown = [sample for sample in found if sample is not None and sample.step <= last_step]
    alike = kept.get("likeness_to") == asked["likeness_to"]
    return [sample if alike else sample._replace(likeness=None) for sample in shown]


def _sample(row: Any) -> KeptSample | None:
    """Return what a row names, or None if that is not the picture of such a sample below the output folder."""
    if not isinstance(row, dict) or not isinstance(row.get("file"), str):
        return None
    step, prompt, likeness = row.get("step"), row.get("prompt"), row.get("likeness")
    named = re.fullmatch(r"[^/\\]+step(\d{6,12})_(\d{1,4})\.png", row["file"].rpartition("/")[2])
    if named is None or [step, prompt] != [int(named[1]), int(named[2])]:
        return None
    output = Path(folder_paths.get_output_directory())
    path = output / row["file"]
    try:
        if not path.resolve().is_relative_to(output.resolve()) or not path.is_file():
            return None
    except (OSError, ValueError):  # a name that no file can have
        return None
    known = isinstance(likeness, float) and math.isfinite(likeness)
    return KeptSample(int(named[1]), int(named[2]), path, likeness if known else None)
