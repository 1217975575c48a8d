#!/usr/bin/env python3
"""What a LoRA of Qwen-Image 2.1 takes at half a megapixel, where another trainer has published its memory.

Every arm is the nodes' own run at full size on an emulated card, in a separate process (``rival_runs.py``), beside the
count that Memory Plan makes before it. Needs a ComfyUI with the model's class (0.37 or newer); without one nothing is
run. Every finished arm is a line in ``results/rival.jsonl``.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

import command_line
from rival_runs import MODEL, SIDE, Arm

RUN = Path(__file__).with_name("rival_runs.py")
SPAN = 8  # blocks skipped at each end
ARMS = tuple(
    Arm(front=span, back=span, back_residual=back, weights=weights)
    for weights in ("int8", "4-bit")
    for span, back in ((0, "constant"), (SPAN, "constant"), (SPAN, "exact"))
)
PUBLISHED = {"int8": 9.9, "4-bit": 7.3}  # GB on a card, all blocks, 704 px
HAS_CLASS = "comfy/ldm/qwen_image21"  # in ComfyUI's folder
GIB = 2**30
logger = logging.getLogger(__name__)

TEXT = """\
# Qwen-Image 2.1 beside another trainer

{about}

`python dev.py benchmark rival`. **Emulated**: Precompute Residuals and Dynamic Patch Trainer ran at full size with ComfyUI's own
model management, on a card whose tensors have shapes but no data. **Counted**: Memory Plan's count of the same run. Whole
pictures of {side} px, batch 1, rank 16, AdamW, checkpointing, 512 text tokens; the weights were loaded in bf16 and trained in the given
format, the frozen ones in the same. Bytes are those of all tensors alive on the card at the same time. A real allocator's rounding and
fragmentation, kernels' workspaces and the CUDA context are not included; quantised weights are unpacked by torch's own operations,
which take more than a card's kernels. The other trainer is [Fizgig](https://github.com/shootthesound/Fizgig) (its page on Qwen-Image 2.1),
whose figures are **measured on a card**, LoRA on all blocks, int8 and NF4; our 4-bit is NVFP4. All are in GB (10⁹ bytes).

Counted and emulated are those of training. Before it, the base model is read to compute what the skipped blocks give, one block at a time
if memory is short: that is the count. This card had 80 GiB, so ComfyUI kept the whole model in bf16 there meanwhile.

| Blocks, of 32 | weights | training: counted, GB | emulated, GB | of that, weights | the other trainer's, GB | before it: counted, GB | emulated on 80 GiB, GB |
| --- | --- | --- | --- | --- | --- | --- | --- |
{rows}

"""


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = command_line.parser(__doc__, "where rows and table go")
    parser.add_argument("--again", action="store_true", help="run everything again")
    return parser.parse_args()


def rows_in(file: Path) -> list[dict[str, Any]]:
    """Return the last row of every arm, in the order of the arms."""
    found = {arm_of(row): row for row in command_line.rows_in(file)}
    return [found[arm] for arm in ARMS if arm in found]


def arm_of(row: dict[str, Any]) -> Arm:
    """Return the arm of a row."""
    return Arm(**{name: row[name] for name in Arm.__dataclass_fields__})


def table_row(row: dict[str, Any]) -> str:
    """Return the row of the table."""
    arm, run = arm_of(row), row["resident"]
    blocks = "LoRA on all"
    if arm.front:
        blocks = f"first {arm.front} skipped, last {arm.back} {'frozen' if arm.back_residual == 'exact' else 'skipped'}"
    published = "" if arm.front else PUBLISHED[arm.weights]
    numbers = (f"{run[name] / 1e9:.2f}" for name in ("counted", "peak", "resident"))
    before = row["precompute"]
    counted = f"{before['counted'] / 1e9:.2f}" if before["counted"] else "-"
    return (
        f"| {blocks} | {arm.weights} | {' | '.join(numbers)} | {published} | {counted} | {before['peak'] / 1e9:.2f} |"
    )


def report(rows: list[dict[str, Any]]) -> str:
    """Return the report in Markdown."""
    about = "\n".join(sorted({row["about"] for row in rows}))
    return TEXT.format(about=about, side=SIDE, rows="\n".join(map(table_row, rows))).rstrip() + "\n"


def main() -> None:
    """Run the arms that are not in the file yet, then write the report."""
    options = parse()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    options.results.mkdir(parents=True, exist_ok=True)
    file = options.results / "rival.jsonl"
    if options.again:
        file.unlink(missing_ok=True)
    if not options.report:
        if options.comfyui is None or not (Path(options.comfyui) / HAS_CLASS).is_dir():
            logger.warning("Nothing was run: %s needs ComfyUI 0.37 or newer. Pass its folder with --comfyui.", MODEL)
            return
        done = {arm_of(row) for row in rows_in(file)}
        for arm in ARMS:
            if arm not in done:
                command_line.add_row(file, row := command_line.row_of_process(RUN, arm, options.comfyui))
                logger.info("%s", table_row(row))
    file.with_suffix(".md").write_text(report(rows_in(file)), encoding="utf-8")


if __name__ == "__main__":
    main()
