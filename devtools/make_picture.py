"""Makes the README's picture, by training in the page for about an hour and a half, and that of the trainer's help page.

    python devtools/make_picture.py --comfyui DIR --base DIR [--only few | --only all]

It shows the pictures that are learned from, the trainer's node while it trains, and the same prompt before and after, also
after training all blocks for as many steps. Nothing is drawn: all of it comes from the template "Try it without a GPU" in a
real ComfyUI, with more steps, and with a twelfth of the blocks skipped and a quarter frozen as for cards of 16 and 24 GB.
It needs the test environment's Python, Chromium and playwright-core, as `browser.mjs` does.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from comfy_server import DEMO_PACK, ROOT, ComfyServer, demo_models
from PIL import Image, ImageDraw, ImageFont

SUBJECT, PICTURES = "toby", 12
TRAINER = "BlockSkip_TrainLora"
STEPS = 3000


def widgets(skipped: int, frozen: int) -> dict[str, dict[str, Any]]:
    """Values by kind of node and widget, for a number of the first blocks and one of the last."""
    return {
        "BlockSkip_SelectBlocks": {"method": "manual", "front": skipped, "back": frozen},
        "BlockSkip_MemoryPlan": {"draws": 1200},
        "BlockSkip_PrecomputeResiduals": {"draws": 1200},
        "BlockSkip_SampleWhileTraining": {"every": 500, "sampler_steps": 24, "cfg": 2.5},
        TRAINER: {"steps": STEPS, "learning_rate": 0.001, "save_every": 200},
        "KSampler": {"steps": 24, "cfg": 2.5},
    }


ARMS = {"few": widgets(1, 3), "all": widgets(0, 0)}
DONE = Path("shots", "after.png")
DRAWN = Path("drawn", f"blockskip_{SUBJECT}")
IMAGES = ROOT / "web" / "docs" / "img"
WIDTH, MARGIN, TITLE, LINE = 830, 14, 26, 20  # px
LEFT, RIGHT, COLUMNS = 186, 196, 2
TITLES = {
    ("few", "before"): "before",
    ("few", "after"): "1/12 skipped, 1/4 frozen",
    ("all", "after"): "LoRA on all blocks",
}
PROMPT = (
    f"Both after {STEPS:,} steps. Each",
    "time “a big orange toby circle",
    "on water, right”. Water is in",
    f"none of the {PICTURES} pictures.",
)
GROUND, INK = (24, 27, 33), (238, 240, 244)


def main() -> int:
    """Train and put the picture together; the status is that of the training."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--comfyui", type=Path, required=True)
    parser.add_argument(
        "--base",
        type=Path,
        required=True,
        help="where ComfyUI's folders are made; stopped trainings are resumed from it",
    )
    parser.add_argument("--only", choices=list(ARMS), help="train one of the two; the picture is made after the second")
    options = parser.parse_args()
    folders = {arm: options.base / arm for arm in ARMS}
    for arm in [options.only] if options.only else list(ARMS):
        if not (folders[arm] / DONE).exists():
            status = trained(options.comfyui, folders[arm], ARMS[arm])
            if status:
                return status
    if all((folder / DONE).exists() for folder in folders.values()):
        joined(folders).save(IMAGES / "first_lora.png", optimize=True)
        Image.open(folders["few"] / DONE).convert("RGB").save(IMAGES / "live_chart.png", optimize=True)
    return 0


def trained(comfyui: Path, base: Path, values: dict[str, dict[str, Any]]) -> int:
    """Train in the page; return the status of the script that does."""
    sys.path.append(str(ROOT / "demo"))
    import world

    shots = (base / DONE).parent
    shots.mkdir(parents=True, exist_ok=True)
    world.write_subject_folder(base / DRAWN, SUBJECT, count=PICTURES)
    chosen = shots / "widgets.json"
    chosen.write_text(json.dumps(values), encoding="utf-8")
    placed = {"packs": {DEMO_PACK: ROOT / "demo" / DEMO_PACK}, "models": demo_models(), "inputs": [base / DRAWN]}
    with ComfyServer(comfyui, base=base, **placed) as server:
        script = ROOT / "devtools" / "train_for_picture.mjs"
        command = ["node", str(script), server.url, str(chosen), str(shots), "--minutes", "100"]
        return subprocess.run(command).returncode


def joined(folders: dict[str, Path]) -> Image.Image:
    """Return what was learned from, the trainer's node, and before and after, side by side."""
    shots = {arm: (folder / DONE).parent for arm, folder in folders.items()}
    trainer = Image.open(shots["few"] / "training.png").convert("RGB")
    middle = WIDTH - LEFT - RIGHT - 4 * MARGIN
    trainer = trainer.resize((middle, round(trainer.height * middle / trainer.width)), Image.Resampling.LANCZOS)
    after = MARGIN + len(TITLES) * (RIGHT + TITLE + MARGIN)
    sheet = Image.new("RGB", (WIDTH, max(trainer.height + TITLE + 2 * MARGIN, after + len(PROMPT) * LINE)), GROUND)
    columns = (MARGIN, LEFT + 2 * MARGIN, WIDTH - RIGHT - MARGIN)
    _write(sheet, columns[0], MARGIN, f"{PICTURES} pictures")
    side = (LEFT - MARGIN // 2) // COLUMNS
    for number, file in enumerate(sorted((folders["few"] / DRAWN).glob("*.png"))):
        place = [at * (side + MARGIN // 2) for at in (number % COLUMNS, number // COLUMNS)]
        _paste(sheet, file, columns[0] + place[0], MARGIN + TITLE + place[1], side)
    _write(sheet, columns[1], MARGIN, "train")
    sheet.paste(trainer, (columns[1], MARGIN + TITLE))
    for row, ((arm, name), title) in enumerate(TITLES.items()):
        top = MARGIN + row * (RIGHT + TITLE + MARGIN)
        _write(sheet, columns[2], top, title)
        _paste(sheet, shots[arm] / f"{name}.png", columns[2], top + TITLE, RIGHT)
    for row, line in enumerate(PROMPT):
        _write(sheet, columns[2], after + row * LINE, line, 14)
    return sheet


def _paste(sheet: Image.Image, file: Path, left: int, top: int, side: int) -> None:
    sheet.paste(Image.open(file).convert("RGB").resize((side, side), Image.Resampling.LANCZOS), (left, top))


def _write(sheet: Image.Image, left: int, top: int, text: str, size: int = 16) -> None:
    ImageDraw.Draw(sheet).text((left, top), text, INK, ImageFont.load_default(size))


if __name__ == "__main__":
    sys.exit(main())
