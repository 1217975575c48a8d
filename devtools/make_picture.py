"""Makes the README's picture, by training in the page for about half an hour, and that of the trainer's help page.

    python devtools/make_picture.py --comfyui DIR --base DIR

It shows the pictures that are learned from, the trainer's node while it trains, and the same prompt before and after. Nothing is
drawn: all of it comes from the template "Try it without a GPU" in a real ComfyUI, with more steps and half of the blocks
skipped by *preset*. It needs the test environment's Python, Chromium and playwright-core, as `browser.mjs` does.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from comfy_server import DEMO_PACK, ROOT, ComfyServer, demo_models
from PIL import Image, ImageDraw, ImageFont

SUBJECT, PICTURES = "toby", 12
TRAINER = "BlockSkip_TrainLora"
WIDGETS = {
    "BlockSkip_SelectBlocks": {"method": "preset", "skip_ratio": 0.5},
    "BlockSkip_MemoryPlan": {"draws": 1200},
    "BlockSkip_PrecomputeResiduals": {"draws": 1200},
    "BlockSkip_SampleWhileTraining": {"every": 500, "sampler_steps": 24, "cfg": 2.5},
    TRAINER: {"steps": 3000, "learning_rate": 0.002, "save_every": 200},
    "KSampler": {"steps": 24, "cfg": 2.5},
}
IMAGES = ROOT / "web" / "docs" / "img"
WIDTH, MARGIN, TITLE = 830, 14, 26  # px
LEFT, RIGHT, COLUMNS = 186, 226, 2
PROMPT = "both times:", "“a big orange toby circle", "on water, right”.", "Water is in none of", "the pictures."
GROUND, INK = (24, 27, 33), (238, 240, 244)


def main() -> int:
    """Train and put the picture together; the status is that of the training."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--comfyui", type=Path, required=True)
    parser.add_argument(
        "--base", type=Path, required=True, help="ComfyUI's folder; a stopped training is resumed from it"
    )
    parser.add_argument("--only-join", action="store_true", help="put the pictures of an earlier training together")
    options = parser.parse_args()
    shots, pictures = options.base / "shots", options.base / "drawn" / f"blockskip_{SUBJECT}"
    shots.mkdir(parents=True, exist_ok=True)
    status = 0 if options.only_join else trained(options.comfyui, options.base, pictures, shots)
    if status == 0:
        joined(pictures, shots).save(IMAGES / "first_lora.png", optimize=True)
        Image.open(shots / "done.png").convert("RGB").save(IMAGES / "live_chart.png", optimize=True)
    return status


def trained(comfyui: Path, base: Path, pictures: Path, shots: Path) -> int:
    """Train in the page; return the status of the script that does."""
    sys.path.append(str(ROOT / "demo"))
    import world

    world.write_subject_folder(pictures, SUBJECT, count=PICTURES)
    widgets = shots / "widgets.json"
    widgets.write_text(json.dumps(WIDGETS), encoding="utf-8")
    placed = {"packs": {DEMO_PACK: ROOT / "demo" / DEMO_PACK}, "models": demo_models(), "inputs": [pictures]}
    with ComfyServer(comfyui, base=base, **placed) as server:
        script = ROOT / "devtools" / "train_for_picture.mjs"
        return subprocess.run(["node", str(script), server.url, str(widgets), str(shots)]).returncode


def joined(pictures: Path, shots: Path) -> Image.Image:
    """Return what was learned from, the trainer's node, and before and after, side by side."""
    trainer = Image.open(shots / "training.png").convert("RGB")
    middle = WIDTH - LEFT - RIGHT - 4 * MARGIN
    trainer = trainer.resize((middle, round(trainer.height * middle / trainer.width)), Image.Resampling.LANCZOS)
    sheet = Image.new("RGB", (WIDTH, trainer.height + TITLE + 2 * MARGIN), GROUND)
    columns = (MARGIN, LEFT + 2 * MARGIN, WIDTH - RIGHT - MARGIN)
    _write(sheet, columns[0], MARGIN, f"{PICTURES} pictures")
    side = (LEFT - MARGIN // 2) // COLUMNS
    for number, file in enumerate(sorted(pictures.glob("*.png"))):
        place = [at * (side + MARGIN // 2) for at in (number % COLUMNS, number // COLUMNS)]
        _paste(sheet, file, columns[0] + place[0], MARGIN + TITLE + place[1], side)
    _write(sheet, columns[1], MARGIN, "train")
    sheet.paste(trainer, (columns[1], MARGIN + TITLE))
    for row, (name, title) in enumerate(
        {"before": "before", "after": f"after {WIDGETS[TRAINER]['steps']:,} steps"}.items()
    ):
        top = MARGIN + row * (RIGHT + TITLE + MARGIN)
        _write(sheet, columns[2], top, title)
        _paste(sheet, shots / f"{name}.png", columns[2], top + TITLE, RIGHT)
    for row, line in enumerate(PROMPT):
        _write(sheet, columns[2], MARGIN + 2 * (RIGHT + TITLE + MARGIN) + row * 20, line, 14)
    return sheet


def _paste(sheet: Image.Image, file: Path, left: int, top: int, side: int) -> None:
    sheet.paste(Image.open(file).convert("RGB").resize((side, side), Image.Resampling.LANCZOS), (left, top))


def _write(sheet: Image.Image, left: int, top: int, text: str, size: int = 16) -> None:
    ImageDraw.Draw(sheet).text((left, top), text, INK, ImageFont.load_default(size))


if __name__ == "__main__":
    sys.exit(main())
