"""The quality benchmark's sheet: each subject as it is drawn, and as the model samples it after a training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw
from quality_arms import BASELINE

DRAWN = "drawn"
ROWS = {
    DRAWN: "the subject, drawn\nnot in the training",
    "base": "no LoRA",
    BASELINE: "LoRA on all blocks",
    "first 1, last 3, int8, full size": "16, 24 GB: first 1 of 12\nskipped, last 3 frozen",
    "first 3, last 6, int8, learning rate x 2, full size": "default: first 3 of 12\nskipped, last 6 frozen",
    "first and last 50%, int8, full size": "preset: first 4 skipped,\nlast 2 frozen",
    "first and last 50%, constant, full size": "the paper's way: first 4\nand last 2 skipped",
}  # arm -> what the sheet calls it
SIDE, LABEL, HEAD = 104, 150, 16


def file_of(folder: Path, arm: str, subject: str, seed: int, prompt: int, small: bool = False) -> Path:
    """Return where a cell's sample is kept."""
    name = f"{arm}_{subject}_{seed}{'_small' if small else ''}_{prompt}"
    return folder / "quality_samples" / ("".join(c if c.isalnum() else "-" for c in name) + ".jpg")


def write(folder: Path, subjects: Sequence[str], prompts: int, file: Path, seed: int = 0) -> None:
    """Draw all samples of a seed, arms in rows and subjects in columns; arms that lack one are left out."""
    columns = [(subject, prompt) for subject in subjects for prompt in range(prompts)]
    found = {arm: [file_of(folder, arm, subject, seed, prompt) for subject, prompt in columns] for arm in ROWS}
    found = {arm: paths for arm, paths in found.items() if all(path.is_file() for path in paths)}
    if found.keys() <= {DRAWN}:
        return
    canvas = Image.new("RGB", (LABEL + SIDE * len(columns), HEAD + SIDE * len(found)), "white")
    pen = ImageDraw.Draw(canvas)
    for column, (subject, prompt) in enumerate(columns):
        if prompt == 0:
            pen.text((LABEL + column * SIDE + 4, 2), subject, fill="black")
    for row, (arm, paths) in enumerate(found.items()):
        top = HEAD + row * SIDE
        pen.multiline_text((6, top + SIDE // 2 - 12), ROWS[arm], fill="black")
        for column, path in enumerate(paths):
            with Image.open(path) as picture:
                canvas.paste(picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS), (LABEL + column * SIDE, top))
    canvas.save(file, quality=88)
