"""The figures and pictures of a run as TensorBoard's event files, written by torch's own writer.

The Python package tensorboard is an extra that users install themselves; it is only imported when a run asks for it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from ..errors import InvalidInputError

PICTURE_SIDE = 512
"""Longest side in pixels of a picture in an event file; the files themselves are beside the LoRA."""
SECONDS_TO_DISK = 10


def require_tensorboard() -> None:
    """Check that event files can be written, without importing what writes them.

    Raises:
        InvalidInputError: If the extra package is not installed.
    """
    if importlib.util.find_spec("tensorboard") is None:
        raise InvalidInputError(
            "`tensorboard` is on, but the Python package tensorboard is not installed. Install it into ComfyUI's Python "
            "with `pip install tensorboard`, or turn `tensorboard` off."
        )


class EventFiles:
    """Writes one more event file into a folder; TensorBoard reads all files of a folder as one run.

    Args:
        folder: The folder, which is created.
        first_step: Figures of this step and later ones in earlier files are void: a run that resumes makes them again.

    Attributes:
        continues: Whether the folder had files before.

    Raises:
        InvalidInputError: If the package tensorboard cannot be imported.
        OSError: From every method, if the disk cannot be written.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        require_tensorboard()
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise InvalidInputError(
                f"The Python package tensorboard could not be imported ({error}). Reinstall it in ComfyUI's Python, or "
                "turn `tensorboard` off."
            ) from error
        self.continues = any(folder.glob("events.out.tfevents.*"))
        self._writer = SummaryWriter(
            str(folder), purge_step=first_step if self.continues else None, flush_secs=SECONDS_TO_DISK
        )

    def add(self, step: int, figures: Mapping[str, float | None]) -> None:
        """Write figures by their names, except those that are not known."""
        for name, value in figures.items():
            if value is not None:
                self._writer.add_scalar(name, value, step)

    def add_picture(self, step: int, name: str, path: Path) -> None:
        """Write a picture in at most ``PICTURE_SIDE`` pixels."""
        with Image.open(path) as file:
            picture = file.convert("RGB")
        picture.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
        self._writer.add_image(name, np.asarray(picture), step, dataformats="HWC")

    def close(self) -> None:
        """Write everything to the disk."""
        self._writer.close()
