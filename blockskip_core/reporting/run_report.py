"""A summary of a training run as one HTML file that opens in any browser, without a network, even years later.

The file is self-contained: drawings are inline SVG, there are no scripts, and nothing is fetched (a content policy
tells the browser so). Names and sentences come from files and users, so all text goes through :mod:`markup`, which
escapes it.
"""

from __future__ import annotations

import math
from base64 import b64encode
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from ..data.schedule import TrainingSchedule
from ..files import write_atomically
from ..selection.selection import BlockSelection
from ..training.config import TrainingConfig
from ..training.result import TrainingResult
from ..units import format_bytes
from .loss_curve import smoothing_span
from .markup import Markup, element, joined
from .pictures import BACK, FRONT, FROZEN, KEPT, evenly
from .run_charts import WHAT, block_row, crop_chart, loss_chart

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


MAX_SAMPLES = 48
SAMPLE_SIDE = 320
"""Pixels of a sample's longer side in the summary."""


@dataclass(frozen=True)
class ReportSample:
    """A picture that was sampled during the run.

    Attributes:
        label: Readable label, e.g. "step 100".
        jpeg: Bytes of the JPEG file.
    """

    label: str
    jpeg: bytes


def sample_of(picture: Image.Image, label: str) -> ReportSample:
    """Return a picture in the size shown in the summary."""
    small, file = picture.convert("RGB"), BytesIO()
    small.thumbnail((SAMPLE_SIDE, SAMPLE_SIDE))
    small.save(file, format="JPEG", quality=88)
    return ReportSample(label, file.getvalue())


@dataclass(frozen=True, kw_only=True)
class RunReport:
    """The content of a run's summary.

    Attributes:
        file: Name of the LoRA's file.
        file_bytes: Its size.
        family: The model family, as shown to users.
        selection: Blocks that were skipped.
        block_names: Names of all blocks, in order.
        schedule: The training examples.
        num_captions: Number of captions that the examples are drawn from.
        storage: Where residuals were kept, as shown to users.
        settings: Every setting of the run, by its name on the node.
        config: The settings that the training loop uses.
        result: The training loop's result.
        peak_bytes, peak_of: Peak memory, and what it was measured on.
        kept_parameters, all_parameters: Number of weights in the blocks that ran, and in all blocks.
        kept_bytes, all_bytes: Their bytes: of the blocks that ran as they ran, of all blocks as loaded.
        lora_parameters: Number of trainable parameters.
        versions: Software -> version that the run used.
        written: Readable date of the summary.
        samples: Pictures of the run, in order; see :func:`sample_of`.
        likeness: Which of them are most like the training pictures, in words; "" if they were not compared.
    """

    file: str
    file_bytes: int
    family: str
    selection: BlockSelection
    block_names: Sequence[str]
    schedule: TrainingSchedule
    num_captions: int
    storage: Mapping[str, Any]
    settings: Mapping[str, Any]
    config: TrainingConfig
    result: TrainingResult
    peak_bytes: int
    peak_of: str
    kept_parameters: int
    all_parameters: int
    kept_bytes: int
    all_bytes: int
    lora_parameters: int
    versions: Mapping[str, str]
    written: str
    samples: Sequence[ReportSample] = ()
    likeness: str = ""


def write_report(report: RunReport, path: Path) -> None:
    """Write the summary; if that fails, an earlier file is unchanged.

    Raises:
        StorageError: If the disk cannot be written.
    """
    page = report_page(report)
    write_atomically(path, lambda temporary: temporary.write_text(page, encoding="utf-8", newline="\n"))


def report_page(report: RunReport) -> str:
    """Return the summary as an HTML document that is also well-formed XML."""
    sections = [
        _problems(report.result.problems),
        _section("Figures", _table(figures(report))),
        _section("Loss", *_loss(report)),
        _samples(report.samples, report.likeness),
        _section("Blocks", *_blocks(report)),
        _section("Crops", *_crops(report)),
        _section("Settings", _table(report.settings)),
        _section("Versions", _table({**report.versions, "this summary was written": report.written})),
    ]
    heading = element("header", element("h1", report.file), element("p", _headline(report)))
    head = joined(
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", f"{report.file} - BlockSkip run summary"),
        element("style", Markup(_STYLE)),
    )
    body = element("main", heading, *sections)
    return f"<!DOCTYPE html>\n{element('html', element('head', head), element('body', body), lang='en')}\n"


def figures(report: RunReport) -> dict[str, str]:
    """Return the figures of a run as text; a missing figure says why it is missing."""
    result, losses = report.result, [loss for loss in report.result.losses if math.isfinite(loss)]
    tenth = max(1, len(losses) // 10)
    ends = f"{_mean(losses[:tenth]):.4g}, {_mean(losses[-tenth:]):.4g}" if losses else "no loss is known"
    return {
        "Steps": f"{result.steps:,} of {report.config.steps:,}",
        "Resumed at": f"step {result.resumed_at:,}" if result.resumed_at else "not resumed: trained from the beginning",
        "Time per step": _pace(result.step_seconds),
        "Peak memory": f"{format_bytes(report.peak_bytes)} ({report.peak_of})",
        "Kept for the backward pass": _saved(result.saved_bytes),
        "Weights of the blocks that ran": f"{format_bytes(report.kept_bytes)} of {format_bytes(report.all_bytes)} "
        f"({report.kept_parameters:,} of {report.all_parameters:,} parameters)",
        "LoRA": f"{format_bytes(report.file_bytes)} on disk, {report.lora_parameters:,} parameters",
        "Loss, mean of the first and the last tenth": ends,
        **({"Likeness of the samples": report.likeness} if report.likeness else {}),
        "Self-check": "not done: no step was trained on stored residuals"
        if result.self_check is None
        else f"{result.self_check:.1e} relative difference from the full model, before the first step",
        "Problems": f"{len(set(result.problems))}, see above" if result.problems else "none",
    }


def _headline(report: RunReport) -> str:
    result, planned = report.result, report.config.steps
    done = f"{result.steps:,} of {planned:,} steps" + (" (ended early)" if result.steps < planned else "")
    if 0 < result.resumed_at == result.steps:
        done += ", all by an earlier run"
    elif result.resumed_at:
        done += f", the first {result.resumed_at:,} by an earlier run"
    trained = len(report.selection.adapted)
    return f"LoRA for {report.family}, trained on {trained} of {report.selection.num_blocks} blocks: {done}."


def _problems(problems: Sequence[str]) -> Markup:
    if not problems:
        return Markup()
    items = [element("li", problem) for problem in dict.fromkeys(problems)]
    return element("section", element("h2", "Problems"), element("ul", *items), class_="problems")


def _loss(report: RunReport) -> list[Markup]:
    losses, resumed = report.result.losses, report.result.resumed_at
    note = "By step. A single loss says little, because it depends on the noise level that was drawn."
    if len(losses) > 1:
        span = smoothing_span(len(losses) // report.config.accumulation)
        note += (
            f" Faint: the losses of single forward passes. Strong: their running mean over about {span:,.0f} steps, "
            "as in the live chart."
        )
    if 0 < resumed < report.result.steps:
        note += f" Dashed line: where the run resumed, at step {resumed:,}."
    return [loss_chart(losses, report.config.accumulation, resumed), element("p", note, class_="note")]


def _samples(samples: Sequence[ReportSample], likeness: str) -> Markup:
    if not samples:
        return Markup()
    figures = [
        element(
            "figure",
            element("img", src=f"data:image/jpeg;base64,{b64encode(sample.jpeg).decode()}", alt=sample.label),
            element("figcaption", sample.label),
        )
        for sample in (samples[place] for place in evenly(len(samples), MAX_SAMPLES))
    ]
    note = "Sampled while training, from the same noise each time."
    if likeness:
        note += (
            " Likeness: mean cosine of the vision encoder's embeddings with those of the training pictures, 1 at most. It "
            "also rises if a LoRA only repeats the training pictures, so look at the samples as well."
        )
    return _section("Samples", element("div", *figures, class_="samples"), element("p", note, class_="note"))


def _blocks(report: RunReport) -> list[Markup]:
    selection = report.selection
    legend = [
        element("span", element("span", "", class_=f"key {role}"), f" {WHAT[role]} ({count})")
        for role, count in Counter(map(selection.role_of, range(selection.num_blocks))).items()
    ]
    rows = {
        "Model family": report.family,
        "Skipped": selection.skipped_words,
        "Chosen by": selection.method,
    }
    if selection.block_bytes:
        rows["Weights left out, as loaded"] = format_bytes(selection.skipped_bytes)
    if selection.note:
        rows["Note"] = selection.note
    return [block_row(selection, report.block_names), element("p", *legend, class_="legend"), _table(rows)]


def _crops(report: RunReport) -> list[Markup]:
    schedule, patches = report.schedule, report.schedule.patches
    passes = report.result.steps * report.config.accumulation * report.config.batch_size
    used = schedule.draws[:passes]
    note = "Side of each crop in pixels, by its noise level t: 1 is pure noise."
    note += " Of a rectangle, the side of the square with the same scale." if schedule.sizes else ""
    rows = {
        "Pictures": f"{len({draw.picture for draw in schedule}):,}",
        "Captions": f"{report.num_captions:,}",
        "Training examples": f"{len(schedule):,}, of which {len(used):,} were trained on",
        "Uses of each training example": f"{passes / max(1, len(schedule)):.3g} on average",
        "Patch sizes": f"crops of {patches.patch_min} to {patches.patch_max} px, each resized to "
        + (_sizes(schedule) or f"{patches.patch_min} px"),
        "Patch order": patches.order,
        "Noise levels drawn as": schedule.timesteps,
        "Seed of the training examples": schedule.seed,
        **report.storage,
    }
    return [crop_chart(used), element("p", note, class_="note"), _table(rows)]


def _sizes(schedule: TrainingSchedule) -> str:
    """Return the sizes of training pictures that are not all squares, with the number of their pictures."""
    counted = Counter(schedule.sizes).most_common()
    return ", ".join(f"{width} x {height} px ({count} pictures)" for (height, width), count in counted)


def _section(title: str, *content: Markup) -> Markup:
    return element("section", element("h2", title), *content)


def _table(rows: Mapping[str, Any]) -> Markup:
    return element(
        "table",
        *(
            element("tr", element("th", name, scope="row"), element("td", _words(value)))
            for name, value in rows.items()
        ),
    )


def _words(value: Any) -> str:
    """Return a setting as shown on the node."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:.10g}" if isinstance(value, float) else str(value)


def _pace(seconds: Sequence[float]) -> str:
    if not seconds:
        return "no step was timed: an earlier run had made them all"
    total = timedelta(seconds=round(sum(seconds)))
    return f"{_mean(seconds):.3f} s on average, {total} in total (steps timed: {len(seconds):,})"


def _saved(count: int) -> str:
    return f"{format_bytes(count)} in a forward pass, weights not counted" if count else "not counted in this run"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _css(colour: Sequence[int]) -> str:
    return "#" + "".join(f"{part:02x}" for part in colour)


# Contains neither & nor <, so that HTML, which reads it unescaped, and XML see the same text.
_STYLE = f"""
:root {{ color-scheme: light dark; --paper: #fafafc; --ink: #202228; --faint: #666c78; --line: #d9dce2; --alarm: #b2182b;
  --card: #ffffff; --raw: #b9c4d2; --front: {_css(FRONT)}; --kept: {_css(KEPT)}; --frozen: {_css(FROZEN)};
  --back: {_css(BACK)}; }}
@media (prefers-color-scheme: dark) {{ :root {{ --paper: #16181d; --ink: #e4e6eb; --faint: #9aa1ad; --line: #343944;
  --card: #1e2127; --alarm: #ff7d85; --raw: #4d5a6b; --kept: #6aa9dd; --frozen: #43617c; --back: #a98acb; }} }}
* {{ box-sizing: border-box; }}
body {{ margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }}
main {{ max-width: 46rem; margin: 0 auto; padding: 1rem; overflow-wrap: anywhere; }}
h1 {{ font-size: 1.5rem; line-height: 1.25; margin: 0.5rem 0; }}
h2 {{ font-size: 1.1rem; margin: 0 0 0.75rem; }}
header p {{ margin: 0 0 1rem; color: var(--faint); }}
section {{ background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 1rem; margin: 0 0 1rem; }}
section.problems {{ border-color: var(--alarm); }}
section.problems h2 {{ color: var(--alarm); }}
table {{ width: 100%; border-collapse: collapse; }}
tr + tr {{ border-top: 1px solid var(--line); }}
th, td {{ text-align: left; vertical-align: top; padding: 0.35rem 0; font-weight: 400; }}
th {{ width: 40%; padding-right: 1rem; color: var(--faint); }}
.note {{ color: var(--faint); font-size: 0.9rem; margin: 0.5rem 0 0; }}
.note + table, .legend + table {{ margin-top: 0.75rem; }}
.legend {{ display: flex; flex-wrap: wrap; gap: 0.25rem 1.25rem; margin: 0.25rem 0 0; font-size: 0.9rem; }}
.key {{ display: inline-block; width: 0.8em; height: 0.8em; border-radius: 2px; }}
.key.front {{ background: var(--front); }} .key.trained {{ background: var(--kept); }}
.key.frozen {{ background: var(--frozen); }} .key.back {{ background: var(--back); }}
.samples {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); gap: 0.75rem; }}
figure {{ margin: 0; font-size: 0.9rem; color: var(--faint); }}
figure img {{ display: block; width: 100%; border-radius: 6px; }}
.drawing {{ display: block; width: 100%; height: auto; }}
.front {{ fill: var(--front); }} .trained {{ fill: var(--kept); }} .frozen {{ fill: var(--frozen); }} .back {{ fill: var(--back); }}
.label {{ fill: var(--faint); font-size: 14px; }}
.grid {{ stroke: var(--line); }} .axis {{ stroke: var(--faint); }}
.mark {{ stroke: var(--alarm); stroke-dasharray: 4 3; }}
path {{ fill: none; stroke-linecap: round; stroke-linejoin: round; }}
.raw {{ stroke: var(--raw); stroke-width: 1.5; }} .smooth {{ stroke: var(--kept); stroke-width: 2.5; }}
.dots {{ stroke: var(--kept); stroke-width: 5; opacity: 0.6; }}
.dots.single {{ stroke-width: 10; opacity: 1; }}
@media (max-width: 30rem) {{ th, td {{ display: block; width: auto; }} th {{ padding-bottom: 0; font-size: 0.85rem; }}
  td {{ padding-top: 0; }} .label {{ font-size: 17px; }} }}
@media print {{ section {{ break-inside: avoid; }} }}
"""
