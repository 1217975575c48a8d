"""The memory benchmark's tables and plot, from its rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from memory_choices import choices

GIB, MIB = 2**30, 2**20
Row = dict[str, Any]
FLUX_PARTS = ("ComfyUI's Train LoRA", "plain LoRA (peft)", "BlockSkip", "before training")

CONVENTIONS = """\
**What the numbers are.** Bytes are exact counts of tensors alive at the same time, each storage once, from the
operation that creates it until nothing refers to it: weights, activations, gradients, LoRA (float32 in our rows,
bfloat16 in those of peft and core), optimiser, residuals, and weights unpacked for one layer's use. They are **not**
what a GPU's allocator will show: its rounding and fragmentation, kernels' workspaces and the CUDA context are not
included. No GPU was available. For full-size models the real training loop ran on torch's `meta` device (shapes without
memory); attention and RMS norm are counted as fused kernels. Operations are those of matrix products and attention, forward,
recomputed and backward, one multiply-add as 2. Batch 1, rank 16, 512 text tokens."""

LIMITS = """\
The target that is not met: without recomputation the kept blocks take 10.45 10¹² operations, forward and backward;
recomputing their forward adds 5.11, and 0.25 of the plain LoRA's 45.76 is 11.44. Also, a card needs more than the
count: 7.97 GiB and the CUDA context do not fit into 8 GiB. Quantising for the run (`quantize_kept`) also takes host
memory for the quantised copy, because the MODEL itself is not changed: 3.8 GiB in fp8, 2.2 GiB in 4-bit. A base that is
loaded quantised does not."""

OTHERS = """\
`plain LoRA` is peft's own LoRA on the same layers of all blocks, which run out of place (in place autograd raises).
Core's adapters were set up by core's own functions on a model without weights, and without autocast, which `meta` does
not support and which would keep more. Core's default `checkpoint_depth` of 1 recomputes the whole model as one piece,
which takes every operation twice and has the peak of the row without checkpointing (really run below); the rows here
use 2, per block. Core's node also makes a second copy of the model's weights in host memory. fp8, int8 and 4-bit
(NVFP4) pack the linear layers of blocks; everything else stays in bf16. Each layer is unpacked to bf16 for its use; a
format whose kernel goes through float32 needs up to 252 MiB more while FLUX.1's largest layer is unpacked."""


def gib(count: float) -> str:
    """Return bytes as text in GiB."""
    return f"{count / GIB:.2f}"


def find(rows: Iterable[Row], **wanted: Any) -> Row | None:
    """Return the row with these values."""
    rows = (row for row in rows if all(row.get(name) == value for name, value in wanted.items()))
    return next((row for row in rows if "peak" in row), None)


def cell(row: Row, name: str, size: int) -> str:
    """Return a number of a row as text, or "fails"."""
    return "fails" if "failed" in row else f"{row[name] / size:.2f}" if row[name] else ""


def place(row: Row) -> tuple:
    """Return the sort key of a row of FLUX.1-dev."""
    formats = ("bf16", "fp8", "int8", "4-bit")
    order = (FLUX_PARTS.index(row["part"]), formats.index(row["weights_format"]), -row["size"])
    return (*order, row["name"], row["source"], row["checkpointing"])


def table(rows: Sequence[Row], baseline: Row | None, unit: str = "GiB") -> list[str]:
    """Return rows as a Markdown table, with operations relative to the baseline's."""
    lines = [
        f"| | px | base | checkpointing | weights, {unit} | kept between steps, {unit} | saved for backward, {unit} | "
        f"peak, {unit} | operations, 10¹² | against plain LoRA at 512 px |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    part, size = None, {"GiB": GIB, "MiB": MIB}[unit]
    for row in rows:
        if row["part"] != part:
            part = row["part"]
            lines.append(f"| **{part}** | | | | | | | | | |")
        share = row["operations"] / baseline["operations"] if baseline and "operations" in row else None
        name = ", ".join(filter(None, (row["name"], row["source"])))
        lines.append(
            f"| {name} | {row['size']} | {row['weights_format']} | {'yes' if row['checkpointing'] else 'no'} | "
            f"{cell(row, 'weights', size)} | {cell(row, 'between', size)} | {cell(row, 'saved', size)} | **{cell(row, 'peak', size)}** | "
            f"{row.get('operations', 0) / 1e12:.2f} | {'' if share is None else f'{share:.2f}'} |"
        )
    return lines


WIDTH = 3072  # of FLUX.1; bytes below are for bf16
LARGEST_LAYER = WIDTH * 7 * WIDTH * 2  # linear1 of a single block; streamed: in the host's two buffers, and once more
DOUBLE_BLOCKS, SINGLE_BLOCKS = 19, 38


def _linears(*shapes: tuple[int, int]) -> int:
    """Return the bytes of linear layers with bias; shapes are in units of the width."""
    return 2 * sum(WIDTH * rows * WIDTH * columns + WIDTH * columns for rows, columns in shapes)


_NORMS = 2 * 2 * 128
DOUBLE_BLOCK = 2 * (_linears((1, 6), (1, 3), (1, 1), (1, 4), (4, 1)) + _NORMS)
SINGLE_BLOCK = _linears((1, 3), (1, 7), (5, 1)) + _NORMS


def targets(rows: Sequence[Row]) -> list[str]:
    """Return the targets and the counts as a table."""
    half = {"part": "BlockSkip", "name": "50% skipped", "size": 256, "source": "cached"}
    plain = {"part": "plain LoRA (peft)", "size": 512}
    bf16 = find(rows, **half, weights_format="bf16", checkpointing=True)
    fp8 = find(rows, **half, weights_format="fp8", checkpointing=True)
    four = find(rows, **half, weights_format="4-bit", checkpointing=True)
    before = {"part": "before training", "size": 256}
    run = next((row for row in rows if row["name"].startswith("a whole run")), None)
    prepared = find(rows, **before, name="precomputing, 50% skipped", weights_format="bf16")
    lines = [
        "| target, FLUX.1-dev, first 19 and last 10 blocks skipped, 256 px | aim | counted | met |",
        "|---|---|---|---|",
    ]

    def say(text: str, aim: str, counted: str, met: bool) -> None:
        lines.append(f"| {text} | {aim} | {counted} | {'yes' if met else 'no'} |")

    for text, aim, row in (("bf16", 8.0, bf16), ("fp8 base resident", 4.4, fp8), ("4-bit base resident", 2.8, four)):
        if row:
            counted = f"{row['peak'] / GIB:.3f} GiB, of which weights {row['weights'] / GIB:.3f}"
            say(f"peak device memory, {text}", f"<= {aim} GiB", counted, row["peak"] <= aim * GIB)
    if bf16:
        streamed = bf16["peak"] - bf16["weights"] + 3 * LARGEST_LAYER
        say(
            "peak device memory, bf16, kept blocks streamed",
            "<= 2 GiB",
            f"{gib(streamed)} GiB by arithmetic: all but the weights, and three times FLUX.1's largest layer",
            streamed <= 2 * GIB,
        )
    if run:
        say("host memory above the loaded model", "<= 2 GiB", f"{gib(run['host'])} GiB ({run['name']})",
            run["host"] <= 2 * GIB)  # fmt: skip
    for own, other in ((False, False), (True, True), (True, False)):
        ours = find(rows, **half, weights_format="bf16", checkpointing=own)
        theirs = find(rows, **plain, checkpointing=other)
        if ours and theirs:
            share = ours["operations"] / theirs["operations"]
            how = "both with checkpointing" if other else "only this one with checkpointing"
            how = how if own else "both without checkpointing"
            say(f"operations per step against plain LoRA at 512 px, {how}", "<= 0.25", f"{share:.3f}", share <= 0.25)
    whole = find(rows, part="before training", name="choosing blocks", weights_format="bf16")
    if prepared and whole and bf16:
        counted = (
            f"{gib(prepared['peak'])} GiB: {gib(prepared['weights'])} for one block, stem and head, "
            f"{(prepared['peak'] - prepared['weights']) / MIB:.0f} MiB of tokens"
        )
        aim = "one block and a micro-batch"
        say("precomputing, peak device memory", aim, counted, is_one_block(prepared, whole, bf16))
    lines += ["", LIMITS]
    return lines


def is_one_block(prepared: Row, whole: Row, training: Row) -> bool:
    """Return whether precomputing takes at most one block, stem and head, and the memory of a training micro-batch.

    Args:
        prepared: Row of precomputing.
        whole: Row of a pass of the whole model.
        training: Row of a training step; its peak minus the memory between steps is that of a micro-batch.
    """
    no_block = whole["weights"] - DOUBLE_BLOCKS * DOUBLE_BLOCK - SINGLE_BLOCKS * SINGLE_BLOCK
    micro_batch = training["peak"] - training["between"]
    passing = prepared["peak"] - prepared["weights"]
    return prepared["weights"] <= no_block + DOUBLE_BLOCK and passing <= micro_batch


def write(rows: list[Row], folder: Path) -> None:
    """Write ``memory.md`` and ``memory.png``."""
    flux = sorted((row for row in rows if row["part"] in FLUX_PARTS), key=place)
    real = [row for row in rows if row["part"].startswith("for real")]
    families = [row for row in rows if row not in flux and row not in real]
    baseline = find(flux, part="plain LoRA (peft)", size=512, checkpointing=False)
    text = ["# Memory and operations, counted", "", *sorted({row["about"] for row in rows}), "", CONVENTIONS, ""]
    text += ["## Targets", "", *targets(flux), "", "## FLUX.1-dev", "", *table(flux, baseline), "", OTHERS, ""]
    text += ["## Which way fits which card", "", *choices(rows), ""]
    if families:
        text += ["## Other families", "", *table(families, None), ""]
    if real:
        text += ["## Really run", "", *table(real, None, "MiB"), "", same(real), ""]
    (folder / "memory.md").write_text("\n".join(text), encoding="utf-8")
    plot(flux, folder / "memory.png")


def same(real: Sequence[Row]) -> str:
    """Return a sentence on whether real runs and runs without weights gave the same counts."""
    pairs = 0
    for row in real:
        twin = find(real, name=row["name"] + ", counted without weights", checkpointing=row["checkpointing"])
        if twin:
            names = ("weights", "peak", "between", "saved", "operations")
            if any(twin[name] != row[name] for name in names):
                return f"The counts of {row['name']} differ between the real run and the one without weights."
            pairs += 1
    return f"In all {pairs} pairs the counts of the real run and of the one without weights are equal to the byte."


def plot(rows: Sequence[Row], file: Path) -> None:
    """Plot the parts of the peak: weights, what stays between steps, and the rest."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [row for row in rows if "peak" in row and row["part"] != "before training"]
    figure, axes = pyplot.subplots(figsize=(10, 0.27 * len(shown) + 1.4), layout="constrained")
    names = []
    for height, row in enumerate(reversed(shown)):
        between = max(row["between"], row["weights"])
        edges = [0, row["weights"], between, row["peak"]]
        for index, (start, end) in enumerate(zip(edges, edges[1:], strict=False)):
            axes.barh(height, (end - start) / GIB, left=start / GIB, color=f"C{index}", height=0.75)
        axes.text(row["peak"] / GIB, height, f" {gib(row['peak'])}", va="center", fontsize=7)
        parts = (row["part"], row["name"], row["source"], row["weights_format"], f"{row['size']} px")
        names.append(", ".join(filter(None, parts)) + (", checkpointing" if row["checkpointing"] else ""))
    axes.set_yticks(range(len(shown)), names, fontsize=7)
    axes.set_xlabel("peak of live tensor bytes, FLUX.1-dev, GiB (counted, no GPU)")
    labels = ("weights", "LoRA, optimiser state, residuals", "activations, gradients, unpacked weights")
    axes.legend([pyplot.Rectangle((0, 0), 1, 1, color=f"C{i}") for i in range(3)], labels, fontsize=8)
    figure.savefig(file, dpi=110)
    pyplot.close(figure)
