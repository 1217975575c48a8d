"""Reads a picture file as an IMAGE that looks as in an image editor."""

from __future__ import annotations

import io
import logging
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps
from torch import Tensor

from ...errors import InvalidInputError

logger = logging.getLogger(__name__)

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
OTHER_SUFFIXES = (
    ".heic",
    ".heif",
    ".avif",
    ".jxl",
    ".gif",
    ".dng",
    ".cr2",
    ".cr3",
    ".nef",
    ".arw",
    ".orf",
    ".rw2",
    ".psd",
)
"""Of pictures that are not read: phones, cameras and editors write them."""
_DEEP_GREY = ("I", "I;16", "I;16B", "I;16L", "I;16N")
_DEEPEST = 65535
_BACKGROUND = (255, 255, 255)


def read_picture(path: Path, name: str) -> tuple[Tensor, bool]:
    """Return a picture, shape (1, H, W, 3), float32 in [0, 1], and whether it had transparent parts.

    It is rotated according to its EXIF data, and its colours are those of sRGB, whatever profile it embeds. 16-bit grey keeps its
    range and is taken as it is. Transparent parts are put on white.

    Args:
        path: The file.
        name: Its name in messages.

    Raises:
        InvalidInputError: If it cannot be read as a picture.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as opened:
                return _read(ImageOps.exif_transpose(opened), name)
    except InvalidInputError:
        raise
    except Exception as error:  # with damaged files, Pillow's readers may raise anything
        raise InvalidInputError(
            f"{name} cannot be read as a picture ({type(error).__name__}: {error}). Save it again as PNG or JPEG, or "
            "take it out of the folder."
        ) from error


def _read(picture: Image.Image, name: str) -> tuple[Tensor, bool]:
    if picture.mode in _DEEP_GREY:
        return _grey(np.asarray(picture).astype(np.float32), name), False
    if picture.mode == "F":
        raise InvalidInputError(
            f"{name} contains floating-point numbers of unknown scale. Save it as PNG or JPEG, or take it out of the "
            "folder."
        )
    picture, transparent = _in_srgb(picture, name), False
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        transparent = bool(np.asarray(picture.getchannel("A")).min() < 255)
        background = Image.new("RGBA", picture.size, (*_BACKGROUND, 255))
        picture = Image.alpha_composite(background, picture)
    values = np.asarray(picture.convert("RGB"), dtype=np.float32)
    return torch.from_numpy(values / 255.0).unsqueeze(0), transparent


def _in_srgb(picture: Image.Image, name: str) -> Image.Image:
    """Return a picture in the colours that its profile means; phones save Display P3, cameras Adobe RGB."""
    profile = picture.info.get("icc_profile")
    if not profile:
        return picture
    if picture.mode == "P" or picture.has_transparency_data:
        picture = picture.convert("RGBA" if picture.has_transparency_data else "RGB")
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "srgb" in ImageCms.getProfileDescription(source).casefold():
            return picture
        target = "RGBA" if picture.mode == "RGBA" else "RGB"
        converted = ImageCms.profileToProfile(picture, source, ImageCms.createProfile("sRGB"), outputMode=target)
        return picture if converted is None else converted
    except (ImageCms.PyCMSError, OSError, ValueError) as error:  # damaged, or not for this kind of picture
        logger.warning("%s: its colour profile cannot be used (%s), so it is read as sRGB.", name, error)
        return picture


def _grey(values: np.ndarray, name: str) -> Tensor:
    if values.min() < 0 or values.max() > _DEEPEST:
        raise InvalidInputError(
            f"{name} is grey with values from {values.min():g} to {values.max():g}, beyond 16 bits. Save it as PNG or "
            "JPEG."
        )
    return torch.from_numpy(values / _DEEPEST).unsqueeze(-1).expand(-1, -1, 3).contiguous().unsqueeze(0)
