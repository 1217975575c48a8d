"""The card benchmark's tables, from its rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

GIB, MIB = 2**30, 2**20
PHASES = ("precompute", "resident", "streamed")
Row = dict[str, Any]

CONVENTIONS = """\
`python dev.py benchmark card`. **Emulated**: the pack's nodes ran at full size with ComfyUI's own model management on
a card whose tensors have shapes but no data; *paged* with its dynamic VRAM, the default on NVIDIA cards, in pages of
32 MiB that fill the free memory and give way when anything else needs it, so that their peak says little. Bytes are
those of all tensors alive on the card at the same time, each with its exact size. A real allocator's rounding and
fragmentation, kernels' workspaces and the CUDA context are not included. Quantised weights are unpacked by torch's
own operations here, with up to two copies of a layer's weight in fp8 and int8 and six in 4-bit; a card's kernels make
one. **Counted**: Memory Plan's count before the run. An eighth and 0.5 GiB of each card belong to other programs, as
in Memory Plan's presets. Batch 1, crops of 256 px, rank 16, AdamW, 512 text tokens, half of the blocks skipped
(preset). If a card has room for all activations, larger ones were not run. GiB unless stated otherwise."""


def text(rows: Sequence[Row]) -> str:
    """Return the whole report in Markdown."""
    models = [row["model"] for row in rows]
    good = [row for row in rows if "failed" not in row]
    good.sort(key=lambda row: (models.index(row["model"]), row["weights"], row["paged"], row["card"]))
    lines = ["# Models on emulated cards", "", *sorted({row["about"] for row in good}), "", CONVENTIONS, ""]
    lines += ["## In short", "", *in_few_sentences(good), ""]
    for title, among, head, cells in (
        ("Training with Memory Plan's settings", good, _TRAINING_HEAD, _training),
        ("The same with `kept_weights` streamed", _with_streaming(good), _STREAMED_HEAD, _streamed),
        ("Precomputing, and host memory", good, _PRECOMPUTING_HEAD, _precomputing),
    ):
        lines += [f"## {title}", "", *_table(among, head, cells), ""]
    lines += ["## Said by the trainer", "", *(_sentences(good) or ["Nothing."]), ""]
    failed = [f"* {_name(row)}, {row['card']:g} GiB: {row['failed']}" for row in rows if "failed" in row]
    if failed:
        lines += ["## Cells that failed", "", *failed, ""]
    return "\n".join(lines)


def _with_streaming(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if "streamed" in row]


def in_short(row: Row) -> str:
    """Return a cell in a few words."""
    if "failed" in row:
        return f"failed, {row['failed']}"
    run = row["resident"]
    return "refused" if "refused" in run else f"{_gib(run['peak'])} GiB, {_error(run)}"


def in_few_sentences(rows: Sequence[Row]) -> list[str]:
    """Return a summary of all cells."""
    lines = []
    paged = [row for row in rows if row["paged"]]
    planned = [row for row in rows if row["plan"]["settings_fit"] and not row["paged"]]
    for placement, among in (("resident", planned), ("streamed", _with_streaming(rows))):
        runs = [row[placement] for row in among if "refused" not in row[placement]]
        errors = [run["peak"] / run["counted"] - 1 for run in runs]
        if errors:
            lines.append(
                f"* {placement}: {len(runs)} of {len(among)} cells ran; emulated against counted "
                f"{min(errors):+.1%} to {max(errors):+.1%}"
            )
    if paged:
        ran = sum("refused" not in row["resident"] for row in paged)
        lines.append(f"* paged: {ran} of {len(paged)} cells ran")
    moved = [row for row in planned if row["resident"].get("offloaded")]
    lines.append(f"* weights were streamed in {len(moved)} of {len(planned)} cells whose settings fit by Memory Plan")
    left = max((row[phase]["left"] for row in rows for phase in PHASES if phase in row), default=0)
    lines.append(f"* left on the card after a run: at most {left / MIB:.1f} MiB")
    return lines


_TRAINING_HEAD = (
    "card", "plan, as set", "plan's settings", "counted", "emulated", "of that, optimiser", "error",
    "weights on the card", "in host memory",
)  # fmt: skip
_STREAMED_HEAD = ("card", "counted", "emulated", "error", "weights on the card", "in host memory", "left, MiB")
_PRECOMPUTING_HEAD = (
    "card", "counted, one block at a time", "emulated", "host memory besides the model, counted",
    "emulated, precomputing", "emulated, training", "left after precomputing, MiB", "left after training, MiB",
)  # fmt: skip


def _training(row: Row) -> list[str]:
    run, plan = row["resident"], row["plan"]
    said = "fits" if plan["fits"] else "too large"
    given = plan["settings"].removesuffix(".") if plan["settings_fit"] else "none fit"
    if "refused" in run:
        return [said, given, _gib(run["counted"]), "refused", "", "", "", ""]
    return [
        said, given, _gib(run["counted"]), f"**{_gib(run['peak'])}**", _gib(run["optimiser"]), "" if row["paged"] else _error(run),
        _gib(run["resident"]), _gib(run["offloaded"]),
    ]  # fmt: skip


def _streamed(row: Row) -> list[str]:
    run = row["streamed"]
    if "refused" in run:
        return [_gib(run["counted"]), "refused", "", "", "", _mib(run["left"])]
    numbers = _gib(run["resident"]), _gib(run["offloaded"])
    return [_gib(run["counted"]), f"**{_gib(run['peak'])}**", _error(run), *numbers, _mib(run["left"])]


def _precomputing(row: Row) -> list[str]:
    run, trained = row["precompute"], row["resident"]
    return [
        _gib(run["counted"]), f"**{_gib(run['peak'])}**", _gib(run["counted_host"]), _gib(run["host"]),
        _gib(trained["host"]), _mib(run["left"]), _mib(trained["left"]),
    ]  # fmt: skip


def _table(rows: Iterable[Row], head: Sequence[str], cells: Callable[[Row], list[str]]) -> list[str]:
    """Return rows as a Markdown table, grouped by model."""
    lines = [_line(["", *head]), _line(["---"] * (len(head) + 1))]
    above = None
    for row in rows:
        front, back, blocks = row["selection"]
        name = f"**{_name(row)}**, {front} + {back} of {blocks} skipped"
        card = f"{row['card']:g}{' and more' * row['plan']['keeps_all']}"
        lines.append(_line(["" if name == above else name, card, *cells(row)]))
        above = name
    return lines


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _name(row: Row) -> str:
    return f"{row['model']}, {row['weights']}{', paged' * row['paged']}"


def _sentences(rows: Iterable[Row]) -> list[str]:
    """Return each sentence of the trainer once, and the cells that it was said in."""
    said: dict[str, list[str]] = {}
    for row in rows:
        for placement in PHASES[1:]:
            run = row.get(placement, {"problems": []})
            for sentence in [run["refused"]] if "refused" in run else run["problems"]:
                said.setdefault(sentence, []).append(f"{_name(row)}, {row['card']:g} GiB, {placement}")
    return [f"* {sentence} ({'; '.join(cells)})" for sentence, cells in said.items()]


def _gib(count: int) -> str:
    return f"{count / GIB:.2f}"


def _mib(count: int) -> str:
    return f"{count / MIB:.0f}"


def _error(run: Row) -> str:
    return f"{run['peak'] / run['counted'] - 1:+.1%}"
