"""The smaller FLUX.1 on this machine's card: bytes from torch's allocator, compared with the count without a card."""

from __future__ import annotations

import gc
import json
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from memory_real import SIZE, SKIPPED, WIDTH, Lab

MIB = 2**20
Row = dict[str, Any]
logger = logging.getLogger("memory")


def rows_of(lab: Lab, about: str) -> Iterator[Row]:
    """Train two steps in each of several ways."""
    for spans in ((0, 0), SKIPPED):
        for checkpointing in (True, False):
            row = {
                "skipped": spans,
                "checkpointing": checkpointing,
                "about": about,
                **measured(lab, spans, checkpointing),
            }
            logger.info("%s skipped: %.1f MiB, counted %.1f", spans, row["allocated"] / MIB, row["counted"] / MIB)
            yield row


def measured(lab: Lab, spans: tuple[int, int], checkpointing: bool) -> Row:
    """Return the peak of a training in bytes: counted, allocated, and reserved from the card by torch."""
    counted = lab.ours(spans, checkpointing, weightless=True)
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    lab.ours(spans, checkpointing, weightless=False)
    torch.cuda.synchronize()
    return {
        "counted": counted.peak,
        "allocated": torch.cuda.max_memory_allocated() - before,
        "reserved": torch.cuda.max_memory_reserved(),
    }


def write(rows: Iterable[Row], folder: Path) -> None:
    """Write ``memory_gpu.jsonl`` and ``memory_gpu.md``."""
    rows = list(rows)
    (folder / "memory_gpu.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    lines = [
        "# Memory, measured on a card", "", rows[0]["about"], "",
        f"A FLUX.1 of ComfyUI's own class, {WIDTH} wide, in float32, trained for two steps at {SIZE} px. Counted: live "
        "tensors, without a card. Allocated: the same with the allocator's rounding, plus workspaces of kernels. "
        "Reserved: what torch reserved on the card.", "",
        "| blocks skipped | checkpointing | counted, MiB | allocated, MiB | reserved, MiB | allocated against counted "
        "|",
        "|---|---|---|---|---|---|",
    ]  # fmt: skip
    lines += [
        f"| {sum(row['skipped'])} | {'yes' if row['checkpointing'] else 'no'} | {row['counted'] / MIB:.1f} | "
        f"{row['allocated'] / MIB:.1f} | {row['reserved'] / MIB:.1f} | {row['allocated'] / row['counted'] - 1:+.1%} |"
        for row in rows
    ]
    (folder / "memory_gpu.md").write_text("\n".join([*lines, ""]), encoding="utf-8")
