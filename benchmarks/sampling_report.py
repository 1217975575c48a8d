"""The tables of ``sampling.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

Row = dict[str, Any]
_DRAWN = {"likeness": "likeness to the prompt", "from_full": "difference from 50 plain steps"}
_KINDS = {  # kind -> colour, marker, name
    "plain": ("black", "o", "fewer plain steps"), "RALU": ("tab:blue", "s", "RALU"), "EasyCache": ("tab:green", "^", "EasyCache"),
    "every other": ("tab:red", "D", "DDiT, every other step"), "by error": ("tab:orange", "v", "DDiT, by the adapters' errors"),
    "as published": ("tab:pink", "x", "DDiT, decided as published"),
    "third difference": ("tab:brown", "X", "DDiT, decided while sampling"), "two": ("tab:purple", "P", "two of them together"),
}  # fmt: skip
_WORK = (25, 17, 10)  # plain steps of work: 1/2, 1/3 and 1/5 of 50
_NEAR = 0.08  # of it, that a way may cost more or less


def write(rows: list[Row], folder: Path) -> None:
    """Write ``sampling.md``."""
    lines = ["# All ways to sample with fewer operations", ""]
    for kind, (title, table) in _PARTS.items():
        for part in dict.fromkeys(row["part"] for row in rows if row["part"].split(",")[0] == kind):
            own = [row for row in rows if row["part"] == part]
            lines += [f"## {title.format(**own[0])}", "", *table(own), "", own[0]["about"], ""]
    (folder / "sampling.md").write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


def plot(rows: list[Row], target: Path) -> None:
    """Draw likeness and difference against operations, a column per size of the pictures."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    sides = list(dict.fromkeys(row["side"] for row in rows if row["part"].startswith("pictures")))
    if not sides:
        return
    figure, axes = pyplot.subplots(2, len(sides), figsize=(6.0 * len(sides), 8.0), sharex=True, squeeze=False)
    for column, side in enumerate(sides):
        own = [row for row in rows if row["part"] == f"pictures, {side} px"]
        for above, (measure, label) in zip(axes[:, column], _DRAWN.items(), strict=True):
            for kind, (colour, marker, name) in _KINDS.items():
                points = sorted((row["plain_steps"], row[measure]) for row in own if kind_of(row["name"]) == kind)
                line = "none" if kind == "two" else "-"
                places, values = zip(*points, strict=True) if points else ((), ())
                above.plot(places, values, linestyle=line, color=colour, marker=marker, label=name)
            above.set(xscale="log", ylabel=label)
            ticks = (5, 7, 10, 14, 17, 25, 50)
            above.set_xticks(ticks, labels=map(str, ticks), minor=False)
            above.minorticks_off()
            above.grid(alpha=0.3)
        axes[0, column].set_title(f"{side} px, {own[0]['prompts']} prompts")
        axes[-1, column].set_xlabel("operations, in plain steps")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), fontsize=8, loc="lower center", ncols=2)
    figure.tight_layout(rect=(0.0, 0.13, 1.0, 1.0))
    figure.savefig(target, dpi=110)
    pyplot.close(figure)


def kind_of(name: str) -> str:
    """Return the kind of a way by its name."""
    methods = [method for method in ("plain", "RALU", "EasyCache", "DDiT") if method in name]
    if len(methods) > 1:
        return "two"
    return next(kind for kind in _KINDS if kind in name)


def counted(rows: list[Row]) -> list[str]:
    """Return what every way costs in plain steps, a column per model."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    costs = {(row["model"], row["name"]): row["plain_steps"] for row in rows}
    sizes = {row["model"]: f"{row['model']}, {row['size']}" for row in rows}
    lines = [
        f"Operations in plain steps of the same model, counted at full size with {rows[0]['text_tokens']} text tokens. Calls that "
        "EasyCache spares: as on the demo's world. RALU's presets are published for FLUX.1-dev only, and it makes single "
        "pictures.", "",
        f"| Way | {' | '.join(sizes[model] for model in models)} |", "|---" * (len(models) + 1) + "|",
    ]  # fmt: skip
    for name in dict.fromkeys(row["name"] for row in rows):
        cells = [f"{costs[model, name]:.1f}" if (model, name) in costs else "" for model in models]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def training(rows: list[Row]) -> list[str]:
    """Return how DDiT's adapters were trained."""
    return [
        f"* Patches of {row['scale']}x: {row['prompts']} drawings of {row['side']} px, batch {row['batch']}, rate {row['rate']}, the "
        f"best after {row['steps']} steps. Relative error of the velocity on held-out drawings: {mean(row['untrained']):.3f} "
        f"without training, {mean(row['trained']):.3f} trained."
        for row in rows
    ]


def pictures(rows: list[Row]) -> list[str]:
    """Return every way's pictures, by operations."""
    full = rows[0]
    lines = [
        f"{full['prompts']} prompts, guidance 4. Operations in plain steps: of the calls that were made. Likeness to the "
        "prompt's drawing and right answers: by the demo's reader, who sees 256 px. Difference: root mean square of pixels from "
        f"{full['name']} with the same seeds. Gains of likeness are prompt by prompt, with the standard error of their "
        "mean; plain steps at equal operations are interpolated between whole ones.", "",
        f"| Way | Operations | Likeness | Against {full['name']} | Against plain at equal operations | Right | Difference | Of plain at "
        "equal operations |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    lines += [_compared(row, rows) for row in sorted(rows, key=lambda row: -row["plain_steps"])]
    for work in _WORK:
        names = [row["name"] for row in near(rows, work)]
        lines += ["", f"At the work of {work} plain steps, best likeness first: {'; '.join(names)}."]
    return lines


def earlier(rows: list[Row]) -> list[str]:
    """Return the ways of a run before there were 50 steps, which has more of the cheap ones."""
    full = rows[0]
    lines = [
        f"{full['prompts']} prompts, with the same adapters. Difference: from {full['name']}.", "",
        "| Way | Operations | Likeness | Right | Difference |", "| --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    lines += [
        f"| {row['name']} | {row['plain_steps']:.2f} | {row['likeness']:.3f} (± {row['likeness_error']:.3f}) | "
        f"{row['right']:.3f} | {row['from_full']:.3f} |"
        for row in sorted(rows, key=lambda row: -row["plain_steps"])
    ]
    return lines


def near(rows: list[Row], work: float) -> list[Row]:
    """Return the ways that cost about as much as so many plain steps, best likeness first."""
    found = [row for row in rows if abs(row["plain_steps"] / work - 1.0) <= _NEAR]
    return sorted(found, key=lambda row: -row["likeness"])


def _compared(row: Row, rows: list[Row]) -> str:
    plain = plain_at(rows, row["plain_steps"])
    cells = [
        row["name"], f"{row['plain_steps']:.2f}", f"{row['likeness']:.3f} (± {row['likeness_error']:.3f})",
        gain(row["likeness_each"], rows[0]["likeness_each"]),
        "" if kind_of(row["name"]) == "plain" else gain(row["likeness_each"], plain["likeness_each"]), f"{row['right']:.3f}",
        f"{row['from_full']:.3f}", f"{plain['from_full']:.3f}",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def gain(own: list[float], other: list[float]) -> str:
    """Return by how much a measure is higher than another, prompt by prompt: mean and its standard error."""
    apart = np.subtract(own, other)
    if not apart.any():
        return ""
    return f"{apart.mean():+.3f} (± {apart.std(ddof=1) / len(apart) ** 0.5:.3f})"


def plain_at(rows: list[Row], operations: float) -> Row:
    """Return measures of plain steps with so many operations, interpolated between whole steps."""
    own = sorted((row for row in rows if kind_of(row["name"]) == "plain"), key=lambda row: row["plain_steps"])
    steps = [row["plain_steps"] for row in own]
    each = np.array([row["likeness_each"] for row in own])
    return {
        "likeness_each": [float(np.interp(operations, steps, prompt)) for prompt in each.T],
        "from_full": float(np.interp(operations, steps, [row["from_full"] for row in own])),
    }


def lora(rows: list[Row]) -> list[str]:
    """Return how like its drawings a LoRA's subject is, with and without coarse steps."""
    lines = [
        f"The demo's LoRA of {rows[0]['subject']}, {rows[0]['prompts']} prompts on grounds that are not in its training pictures, "
        f"{rows[0]['side']} px, guidance 4; adapters were trained without it. Likeness to the subject drawn there, and how often the "
        "reader names it. Difference: from 25 plain steps with the LoRA.", "",
        "| | Way | Operations | Likeness | Against plain there | Named | Difference |", "| --- | --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for row in rows:
        plain = [other for other in rows if other["lora"] and "plain" in other["name"]]
        other = min(plain, key=lambda other: abs(other["plain_steps"] - row["plain_steps"]))
        less = "" if other is row else gain(row["likeness_each"], other["likeness_each"])
        difference = "" if row["from_full"] is None else f"{row['from_full']:.3f}"
        lines.append(
            f"| {'with' if row['lora'] else 'without'} the LoRA | {row['name']} | {row['plain_steps']:.2f} | {row['likeness']:.3f} "
            f"(± {row['likeness_error']:.3f}) | {less} | {row['recognised']:.2f} | {difference} |"
        )
    return lines


def sizes(rows: list[Row]) -> list[str]:
    """Return the errors of coarse calls by size of the pictures, means over noise levels."""
    lines = [
        f"Relative error of a coarse call's velocity, mean over noise levels of 0.05 to 0.95; {rows[0]['pictures']} drawings of "
        "prompts that were not trained on.", "",
        "| Patches | Side | Without training | With the connection | Trained | Trained, by noise level |",
        "| --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    lines += [
        f"| {row['scale']}x | {row['side']} px | {mean(row['untrained']):.3f} | {mean(row['start']):.3f} | {mean(row['trained']):.3f} | "
        f"{', '.join(f'{error:.2f}' for error in row['trained'])} |"
        for row in sorted(rows, key=lambda row: (row["scale"], row["side"]))
    ]
    return lines


def allowed(rows: list[Row]) -> list[str]:
    """Return how near runs with smaller errors come to many plain steps, and what share of the error would pay."""
    lines = [
        f"Relative difference of latents from 28 plain steps, {rows[0]['pictures']} prompts. Of a coarse call's error the given "
        "share is left. Equal: the share with which the run is as near as plain steps with the same operations.", "",
        "| Side | Run | Operations | Plain steps there | All | 1/2 | 1/4 | 1/10 | Equal |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for (side, name), run in _runs(rows).items():
        plain = difference_of_plain([row for row in rows if row["side"] == side], run[0]["plain_steps"])
        cells = " | ".join(f"{row['difference']:.3f}" for row in run)
        share = equal_share([(row["share"], row["difference"]) for row in run], plain)
        equal = "less than 1/10" if share is None else f"{share:.2f}"
        lines.append(f"| {side} px | {name} | {run[0]['plain_steps']:.2f} | {plain:.3f} | {cells} | {equal} |")
    return lines


def _runs(rows: list[Row]) -> dict[tuple[int, str], list[Row]]:
    found: dict[tuple[int, str], list[Row]] = {}
    for row in rows:
        if row["share"] is not None:
            found.setdefault((row["side"], row["name"]), []).append(row)
    return found


def difference_of_plain(rows: list[Row], operations: float) -> float:
    """Return the difference of plain steps with so many operations, interpolated between whole steps."""
    points = sorted((row["plain_steps"], row["difference"]) for row in rows if row["share"] is None)
    return float(np.interp(operations, *zip(*points, strict=True)))


def equal_share(points: list[tuple[float, float]], difference: float) -> float | None:
    """Return the share of the error with which a run has this difference; None if none of (share, difference) is as near."""
    shares, differences = zip(*sorted(points), strict=True)
    return None if difference < differences[0] else float(np.interp(difference, differences, shares))


def mean(errors: list[float]) -> float:
    """Return the mean over noise levels."""
    return sum(errors) / len(errors)


_PARTS = {
    "counted": ("Counted at full size", counted), "pictures": ("Pictures of the demo's world, {side} px", pictures),
    "earlier": ("An earlier run with fewer operations, {side} px", earlier), "lora": ("With a LoRA", lora),
    "training": ("The adapters, {side} px", training), "sizes": ("The error of coarse steps by size, trained at {trained_at} px", sizes),
    "allowed": ("The error that would pay, trained at {trained_at} px", allowed),
}  # fmt: skip
