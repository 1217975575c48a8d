"""The quality benchmark's table, comparisons and plot, from its cells."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import quality_sheet
from quality_arms import ARMS, BASELINE, FULL, SMALL

MIB = 2**20
Cell = dict[str, Any]
Cells = dict[tuple[str, str, int], Cell]

CLAIMS = (  # claim, the arm that should be better, the one that should be worse
    ("residuals are needed (Table 2)", "skip 50%, patches", "no residual"),
    ("keep the middle, not only the end: the choice beats skipping only the first (Table 2)",
     "skip 50%, patches", "skip only the first"),
    ("the choice beats skipping only the last (Table 2)", "skip 50%, patches", "skip only the last"),
    ("the choice beats the paper's FLUX choice, scaled", "skip 50%, patches", "the paper's choice, scaled"),
    ("measuring on a trained model beats measuring on the base", "measured on a trained model", "skip 50%, patches"),
    ("patches beat a plain resize (Tables 2, 11)", "patches, low to high", "resize to small"),
    ("low to high beats high to low (Table 11)", "patches, low to high", "patches, high to low"),
    ("low to high beats random (Table 11)", "patches, low to high", "patches, random"),
    ("30 % beats 50 % (Table 1)", "skip 30%, patches", "skip 50%, patches"),
    ("an exact back residual beats the cached one", "on the fly (exact back residual)", "skip 50%, patches"),
    ("refreshing beats a constant", "refreshed 4 times", "skip 50%, patches"),
    ("a diagonal response beats a constant", "diagonal response", "skip 50%, patches"),
    ("a linear response beats a constant", "linear response", "skip 50%, patches"),
    ("a linear response per noise band beats a constant", "new linear", "skip 50%, patches"),
    ("it beats one matrix for all noise levels", "new linear", "linear response"),
    ("refreshing beats a linear response alone", "linear response, refreshed 4 times", "linear response"),
    ("an exact back (frozen blocks run) beats the cached one", "exact back", "skip 50%, patches"),
    ("frozen blocks in 4-bit against unquantised ones", "exact back, 4-bit", "exact back"),
    ("skipping in front of the last block beats skipping the last", "span before the last block", "skip 50%, patches"),
    ("there too a linear response per band beats a constant", "span before the last block, new linear",
     "span before the last block"),
    ("the front, by bytes, beats the paper's FLUX choice, scaled", "front only, half of the bytes",
     "the paper's choice, scaled"),
    ("cost and influence beats the measured choice", "cost and influence, half of the bytes", "skip 50%, patches"),
    ("first skipped, last frozen in 4-bit, beats the constant (full size)",
     "first and last 50%, 4-bit, full size", "first and last 50%, constant, full size"),
    ("the same in 4-bit against unquantised (full size)", "first and last 50%, 4-bit, full size",
     "first and last 50%, full size"),
    ("the same in int8 against unquantised (full size)", "first and last 50%, int8, full size",
     "first and last 50%, full size"),
    ("four bits in all blocks, corrected, against uncorrected (full size)",
     "first 3, last 6, 4-bit, trained in 4-bit, corrected, learning rate x 2, full size",
     "first 3, last 6, 4-bit, trained in 4-bit, learning rate x 2, full size"),
    ("frozen blocks in 4-bit, corrected, against uncorrected (full size)",
     "first 3, last 6, 4-bit, trained in int8, corrected, learning rate x 2, full size",
     "first 3, last 6, 4-bit, trained in int8, learning rate x 2, full size"),
    ("four bits in all blocks, corrected, against frozen blocks in int8 (full size)",
     "first 3, last 6, 4-bit, trained in 4-bit, corrected, learning rate x 2, full size",
     "first 3, last 6, int8, learning rate x 2, full size"),
    ("one skipped and three frozen: 4-bit, corrected, against int8 (full size)",
     "first 1, last 3, 4-bit, trained in 4-bit, corrected, full size",
     "first 1, last 3, int8, trained in int8, full size"),
    ("only the front, by bytes, against the same in int8 (full size)", "front only, half of the bytes, full size",
     "first and last 50%, int8, full size"),
    ("fewer skipped and more frozen, in fewer bytes, against the same in int8 (full size)",
     "first 3, last 6, int8, full size", "first and last 50%, int8, full size"),
    ("the same with patches: 4-bit against unquantised", "first and last 50%, 4-bit, patches",
     "first and last 50%, patches"),
    ("first skipped, last frozen in 4-bit, beats the paper's choice, scaled (patches)",
     "first and last 50%, 4-bit, patches", "the paper's choice, scaled"),
    ("there a doubled rank is better (full size)",
     "first and last 50%, rank x 2, full size", "first and last 50%, full size"),
    ("there a learning rate of 1.5 times is better (full size)",
     "first and last 50%, learning rate x 1.5, full size", "first and last 50%, full size"),
    ("that rate for the LoRA on all blocks", "LoRA, all blocks, learning rate x 1.5", "LoRA, all blocks, full size"),
    ("an average of the LoRA is better (full size)",
     "first and last 50%, average 0.98, full size", "first and last 50%, full size"),
    ("an average for the LoRA on all blocks", "LoRA, all blocks, average 0.98", "LoRA, all blocks, full size"),
    ("dropped captions are better (full size)",
     "first and last 50%, captions dropped 0.1, full size", "first and last 50%, full size"),
    ("dropped captions for the LoRA on all blocks", "LoRA, all blocks, captions dropped 0.1",
     "LoRA, all blocks, full size"),
    ("1.4 times the steps, which take as long as all blocks, are better (full size)",
     "first and last 50%, steps x 1.4, full size", "first and last 50%, full size"),
    ("those steps for the LoRA on all blocks", "LoRA, all blocks, steps x 1.4", "LoRA, all blocks, full size"),
    ("more draws beat fewer", "skip 50%, patches", "a quarter of the draws"),
    ("residuals in int8 against exact ones", "residuals in int8", "skip 50%, patches"),
    ("residuals in fp8 against exact ones", "residuals in fp8", "skip 50%, patches"),
    ("a doubled rank is better", "rank x 2", "skip 50%, patches"),
    ("a doubled learning rate is better", "learning rate x 2", "skip 50%, patches"),
)  # fmt: skip


def rows(folder: Path) -> list[Cell]:
    """Return all cells of all runs."""
    files = sorted(folder.glob("quality_cells*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text("utf-8").splitlines()]


def recovered(cells: Cells, arm: str, subject: str, seed: int, loss: str = "held_out_loss") -> float | None:
    """Return R = (L_base - L_arm) / (L_base - L_LoRA), or None unless all three exist."""
    found = [cells.get((name, subject, seed)) for name in ("base", arm, BASELINE)]
    if None in found:
        return None
    base, own, best = (cell[loss] for cell in found)
    return (base - own) / (base - best)


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and its standard error."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.fmean(values), error


def _plus_minus(error: float) -> str:
    """Return a standard error for the table; one value has none."""
    return "" if math.isnan(error) else f" ± {error:.3f}"


def of_arm(cells: Cells, arm: str) -> list[Cell]:
    """Return an arm's cells."""
    return [cell for (name, _, _), cell in cells.items() if name == arm]


def all_recovered(cells: Cells, arm: str, loss: str = "held_out_loss") -> dict[tuple[str, int], float]:
    """Return R for every subject and seed."""
    found = {(s, n): recovered(cells, name, s, n, loss) for name, s, n in cells if name == arm}
    return {place: value for place, value in found.items() if value is not None}


def table(cells: Cells) -> list[str]:
    """Return the arms as a Markdown table."""
    lines = [
        "| arm | paper | skipped | R, full size | R, small | subject | place | ground | saved for backward | "
        "block weights | s/step |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    base = of_arm(cells, "base")
    slowest = _least(of_arm(cells, BASELINE), "step_seconds")
    if base:
        lines.append("| base model, no LoRA | | | 0 | 0 | " + _shares(base) + " | | | |")
    part = None
    for arm in ARMS:
        own = of_arm(cells, arm.name)
        values = list(all_recovered(cells, arm.name).values())
        if not own or not values:
            continue
        if arm.part != part:
            part = arm.part
            lines.append(f"| **{part}** | | | | | | | | | | |")
        mean, error = mean_and_error(values)
        small, spread = mean_and_error(list(all_recovered(cells, arm.name, "held_out_loss_small").values()))
        spans = spans_of(own[0])
        lines.append(
            f"| {arm.name} | {arm.source} | {spans} | **{mean:.3f}**{_plus_minus(error)} | {small:.3f}{_plus_minus(spread)} | "
            f"{_shares(own)} | "
            f"{_least(own, 'saved_bytes') / MIB:.1f} MiB | {_median(own, 'block_bytes') / MIB:.1f} MiB | "
            f"{_least(own, 'step_seconds') / slowest:.2f} |"
        )
    return lines


def spans_of(cell: Cell) -> str:
    """Return which blocks were skipped: first + last, those that ran frozen, and those kept after a span."""
    frozen = f" ({cell['frozen']} frozen)" if cell.get("frozen") else ""
    tail = f", last {cell['tail']} kept" if cell.get("tail") else ""
    return f"{cell['front']} + {cell['back']}{frozen}{tail}"


def _difference(values: Iterable[float]) -> str:
    values = list(values)
    mean, error = mean_and_error(values) if values else (math.nan, math.nan)
    return f"{mean:+.3f}{_plus_minus(error)}"


def _shares(own: list[Cell]) -> str:
    return " | ".join(f"{statistics.fmean(cell[name] for cell in own):.2f}" for name in ("cosine", "place", "ground"))


def _least(own: list[Cell], name: str) -> float:
    """Return the fastest cell's value, because other load on the machine can only slow a step down."""
    return min(cell[name] for cell in own) if own else math.nan


def _median(own: list[Cell], name: str) -> float:
    return statistics.median(cell[name] for cell in own) if own else math.nan


def comparisons(cells: Cells) -> list[str]:
    """Return every claim with the differences over the cells that both arms have."""
    lines = [
        "| claim | R, full size | holds in | R, small | holds in | subject cosine |",
        "|---|---|---|---|---|---|",
    ]
    for text, better, worse in CLAIMS:
        columns = []
        for loss in ("held_out_loss", "held_out_loss_small"):
            ours, theirs = all_recovered(cells, better, loss), all_recovered(cells, worse, loss)
            gains = {place: ours[place] - theirs[place] for place in ours if place in theirs}
            columns += [_difference(gains.values()), f"{sum(gain > 0 for gain in gains.values())} of {len(gains)}"]
        if not gains:
            continue
        if not any(gains.values()):
            lines.append(f"| {text} | the same training | | | | |")
            continue
        cosines = [cells[(better, *place)]["cosine"] - cells[(worse, *place)]["cosine"] for place in gains]
        lines.append(f"| {text} | {' | '.join(columns)} | {_difference(cosines)} |")
    return lines


def write(folder: Path, key: str, settings: Any, about: str) -> None:
    """Write ``quality.md``, ``quality.png`` and ``quality_samples.jpg`` from the cells of one key."""
    cells = {(row["arm"], row["subject"], row["seed"]): row for row in rows(folder) if row["key"] == key}
    if not cells:
        raise SystemExit(f"There are no cells of these settings in {folder}.")
    subjects = sorted({subject for _, subject, _ in cells})
    seeds = sorted({seed for _, _, seed in cells})
    shared = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in dataclasses.asdict(settings).items())
    text = [
        "# Quality on the demo world",
        "",
        about,
        "",
        f"{len(cells)} cells: {len(subjects)} subjects ({', '.join(subjects)}), seeds {', '.join(map(str, seeds))}. "
        f"Shared by all arms: {shared}.",
        "",
        *table(cells),
        "",
        *comparisons(cells),
        "",
    ]
    (folder / "quality.md").write_text("\n".join(text), encoding="utf-8")
    plot(cells, folder / "quality.png")
    quality_sheet.write(folder, subjects, settings.prompts, folder / "quality_samples.jpg")


PANELS = (("held_out_loss", f"R at {FULL} px"), ("held_out_loss_small", f"R at {SMALL} px"))
SHOWN = (-1.4, 2.1)  # values outside this range are printed as numbers


def plot(cells: Cells, file: Path) -> None:
    """Plot R of every arm at both sizes, with single cells as dots."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [arm for arm in ARMS if arm.name != BASELINE and all_recovered(cells, arm.name)]
    parts = list(dict.fromkeys(arm.part for arm in shown))
    figure, panels = pyplot.subplots(
        1, 2, figsize=(12, 0.32 * len(shown) + 1.6), sharey=True, layout="constrained", squeeze=True
    )
    for axes, (loss, title) in zip(panels, PANELS, strict=True):
        for height, arm in enumerate(reversed(shown)):
            _bar(axes, height, list(all_recovered(cells, arm.name, loss).values()), f"C{parts.index(arm.part)}")
        axes.set_xlim(*SHOWN)
        axes.axvline(1.0, color="black", linewidth=0.8, linestyle="--")
        axes.axvline(0.0, color="black", linewidth=0.8)
        axes.set_xlabel(f"{title} (0: base model, 1: LoRA on all blocks at full size)", fontsize=8)
    panels[0].set_yticks(range(len(shown)), [arm.name for arm in reversed(shown)], fontsize=8)
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=f"C{i}", alpha=0.55) for i in range(len(parts))]
    figure.legend(handles, parts, fontsize=8, loc="outside lower center", ncols=3)
    figure.savefig(file, dpi=100)
    pyplot.close(figure)


def _bar(axes: Any, height: int, values: list[float], colour: str) -> None:
    mean, error = mean_and_error(values)
    if mean < SHOWN[0]:
        axes.barh(height, SHOWN[0], color=colour, alpha=0.55, height=0.7)
        axes.text(SHOWN[0] + 0.05, height, f"{mean:.1f}", va="center", fontsize=8)
        return
    axes.barh(height, mean, xerr=error, color=colour, alpha=0.55, height=0.7, ecolor="black", capsize=2)
    axes.plot(values, [height] * len(values), "o", color=colour, markersize=2.5)
