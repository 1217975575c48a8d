"""Reads the beginning of a video file as an IMAGE."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import torch
from torch import Tensor

from ...data.patch_sampling import resize
from ...errors import InvalidInputError

SUFFIXES = (".mp4", ".mov", ".webm", ".mkv", ".avi")
LARGEST_SHORTER_SIDE = 768
"""In pixels. Ten seconds of HD would take 6 GB as an IMAGE, and training scales pictures down anyway."""


def read_film(path: Path, name: str, pictures: int) -> Tensor:
    """Return the first pictures of a video, upright, shape (pictures, H, W, 3), float32 in [0, 1].

    There are fewer if the video is shorter. The shorter side is scaled down to :data:`LARGEST_SHORTER_SIDE`.

    Args:
        path: The file.
        name: Its name in messages.
        pictures: Number of pictures, at the video's own rate.

    Raises:
        InvalidInputError: If it cannot be read as a video, or its size changes.
    """
    read: list[Tensor] = []
    try:
        with av.open(str(path)) as container:
            for frame in container.decode(video=0):
                read.append(_read(frame))
                if len(read) == pictures or read[-1].shape != read[0].shape:
                    break
    except Exception as error:  # with damaged files, the decoders may raise anything
        raise InvalidInputError(
            f"{name} cannot be read as a video ({type(error).__name__}: {error}). Save it again as MP4, or take it out of "
            "the folder."
        ) from error
    if not read:
        raise InvalidInputError(f"{name} holds no picture. Save it again as MP4, or take it out of the folder.")
    if read[-1].shape != read[0].shape:
        raise InvalidInputError(
            f"{name} changes its size at picture {len(read)}. Save it again as MP4 of one size, or take it out of the folder."
        )
    return torch.stack(read)


def _read(frame: av.VideoFrame) -> Tensor:
    values = frame.to_ndarray(format="rgb24")
    upright = np.ascontiguousarray(np.rot90(values, round(frame.rotation / 90)))  # in degrees, counter-clockwise
    picture = torch.from_numpy(upright).float() / 255.0
    height, width, _ = picture.shape
    scale = LARGEST_SHORTER_SIDE / min(height, width)
    return picture if scale >= 1.0 else resize(picture, round(height * scale), round(width * scale))
