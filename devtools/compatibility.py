#!/usr/bin/env python3
"""Write docs/compatibility.md from test results: ``python devtools/compatibility.py``.

A section's table is a file in ``tests/compatibility`` with its columns and its rows, as found by a test. That test
fails if it finds something else; with BLOCKSKIP_RECORD=1 in the environment it rewrites the file. The text around the
tables is here.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "tests" / "compatibility"
DOCUMENT = ROOT / "docs" / "compatibility.md"


@dataclass(frozen=True)
class Section:
    """A section of the document.

    Attributes:
        title: Its heading.
        results: File in ``tests/compatibility``.
        before, after: Text before and after the table.
        joined_by: If not empty, rows with equal outcomes are merged, with their first cells joined by this in the last
            column.
    """

    title: str
    results: str
    before: str
    after: str = ""
    joined_by: str = ""


INTRODUCTION = """\
# Compatibility

What works together with BlockSkip, and what does not. Every cell is a test result; `devtools/compatibility.py` writes
this file, so do not edit it.

The tests run with ComfyUI 0.30.0, and five workflows with 0.18.2 too. With 0.33.0, the newest that could be had (its source of
2026-08-22, comfy-kitchen 0.2.31, comfy-aimdo 0.4.13, frontend 1.49.6), a part ran once, on 2026-11-30: start, workflows and two copies in one
server (63 tests of `tests/live`); all of `tests/hosts`: models but GGUF and Qwen-Image 2.1 (476), families and diffusers (1,064), inputs, files and
words (421), sampling (329); all of `tests/nodes` (1,409); `tests/card` on the emulated card (216); properties, damaged and killed
runs and the demo's scripts (176); interrupts, odd inputs and reruns on a live server (8), all passed; and through its API the twins of eight templates: FLUX.1
(first LoRA, 12 and 24 GB; 8 GB as it was before its blocks were frozen in 4-bit), Z-Image Turbo, Qwen-Image, Qwen-Image-Edit and LTX-2, without a warning or an error of ours in the log. Not run
there: the chart and the templates in a browser. No newer ComfyUI was run."""

SECTIONS: Sequence[Section] = (
    Section(
        title="Models",
        results="families.json",
        before="""\
Every model in this table is trained in the tests, as a small random model of ComfyUI's own class: front exact, back within rounding,
gradients against central differences, a falling loss, and a LoRA that ComfyUI's loader patches onto every layer.""",
        after="""\
*Clips*: trained on several frames, too. *References*: edit models, trained with the pictures that they look at. *Text hidden*: Select Blocks
can measure with *attention mask*. *RALU* and *Dynamic patches*: can be sampled so. *Memory Plan*: can be counted before a run.
The last four columns: trained with its blocks in that format, in ComfyUI's own layers; from GGUF files (Q8_0, Q4_0, Q5_1) through
ComfyUI-GGUF, which runs only where it is installed, last on 2026-11-29 and 30.
LTX-2.5 needs ComfyUI 0.32; with 0.33.0 it passed the tests that stand before this table. Qwen-Image 2.1 needs 0.37; its class passed
the same tests once, on 2026-11-29, in a copy of ComfyUI 0.30.0 ([Models](models.md#every-other-diffusion-transformer)).""",
    ),
    Section(
        title="LoRA files",
        results="lora_files.json",
        before="""\
`file_format` of Dynamic Patch Trainer sets the layer names in the file. Which programs load it, by family:""",
        after="""\
*ComfyUI* is Load LoRA, LoraLoaderModelOnly and Apply BlockSkip LoRA. *diffusers* is `load_lora_weights` of 0.42.1. *peft* is
`set_peft_model_state_dict`, with the prefix before the layer's name removed, on ComfyUI's layers or, where *diffusers* names
are written, on diffusers' layers. *kohya* are the names and the alpha used by sd-scripts and musubi-tuner, derived by
their rules from ComfyUI's layer names; these programs themselves were not run.

"Loads" means that every trained layer is found, with the right numbers, at the size of the published model and with the
default targets. The rows from LTX-Video on are models without a file, tested with small models of the classes of both programs. If
diffusers is not listed for a format, it does not always raise an error: it may recognise no layer,
warn, and continue without effect.

The file contains the same information: under `loads_in` in its metadata, shown by `info` of Apply BlockSkip LoRA.""",
    ),
    Section(
        title="Pictures and captions",
        results="training_files.json",
        before="How two loaders handle a file in a folder of pictures and captions:",
        after="""\
"Refused by name": an error that names the file. Pictures from any other node can be used for training as well, if their
values are 0 to 1; Precompute Residuals names those that are not, and those of a single colour.""",
    ),
    Section(
        title="Conditionings as captions",
        results="captions.json",
        before="How Precompute Residuals handles a conditioning at `positive`, by the node that made it from a text:",
        after="""\
Settings that describe the text itself are used. Settings for a part of the picture or of the sampling mean nothing for
a training crop and are refused. Several captions must be a list, as from dataset nodes and Create List.""",
    ),
    Section(
        title="Nodes that change a MODEL",
        results="model_nodes.json",
        joined_by=", ",
        before="""\
Every node of ComfyUI 0.30.0 that takes and returns a MODEL was connected before Select Blocks, Precompute Residuals and
Dynamic Patch Trainer, and before RALU Sampler, with a small FLUX.1. Memory Plan and Sample While Training use the same rules as
training.

* *left out*: it belongs to sampling. The LoRA is the same as without the node, to the last bit, and ComfyUI's log names what is
  left out. So the node can stay connected.
* *followed*: it acts as in ComfyUI's own sampler. *followed in part*: the log names the rest.
* *no effect*: nothing changes, with this model and these settings.
* *refused*: with a message, before any work.""",
        after="""\
Weight patches (LoRAs, merges) are followed, whichever node makes them. RALU Sampler has its own noise levels, so
another schedule has no effect there.""",
    ),
    Section(
        title="Other packs",
        results="model_patches.json",
        joined_by="; ",
        before="""\
Other packs make the same kinds of changes to a MODEL. The tests make these changes in the same way; the packs
themselves were not run. Outcomes in training come from runs, those of RALU Sampler from the rules that both use.""",
        after="""\
Anything with its own model or picture is refused rather than left out, because the model would do something else without it.
Connect the MODEL from before that node.""",
    ),
)


def document() -> str:
    """Return the whole document."""
    parts = [INTRODUCTION]
    for section in SECTIONS:
        content = json.loads((RESULTS / section.results).read_text(encoding="utf-8"))
        columns, rows = content["columns"], content["rows"]
        if section.joined_by:
            columns, rows = grouped(columns, rows, section.joined_by)
        parts.extend([f"## {section.title}", section.before, table(columns, rows), section.after])
    return "\n\n".join(filter(None, parts)) + "\n"


def grouped(columns: Sequence[str], rows: Sequence[Sequence[str]], joined_by: str) -> tuple[list[str], list[list[str]]]:
    """Return columns and rows with one row per set of outcomes, sorted by outcomes."""
    together: dict[tuple[str, ...], list[str]] = {}
    for name, *outcomes in rows:
        together.setdefault(tuple(outcomes), []).append(name)
    found = [[*outcomes, joined_by.join(shortened(names))] for outcomes, names in sorted(together.items())]
    return [*columns[1:], columns[0]], found


def shortened(names: Sequence[str]) -> list[str]:
    """Return names with all merging nodes combined into one entry."""
    merging = [name for name in names if name.startswith("ModelMerge")]
    others = [name for name in names if name not in merging]
    return [*others, f"all {len(merging)} nodes ModelMerge…"] if merging else others


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    DOCUMENT.write_text(document(), encoding="utf-8")
