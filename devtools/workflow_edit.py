"""Definition of the shipped workflow for an edit model, on the files of ComfyUI's own template."""

from __future__ import annotations

from typing import Any

from workflow_families import three_files
from workflow_graphs import (
    BLUE,
    FROM_PLAN,
    GREEN,
    PURPLE,
    YELLOW,
    Column,
    Graph,
    chosen,
    memory_plan,
    node,
    residuals,
    sample_request,
    trainer,
    training_folder,
)

FILES = three_files(
    "qwen_image_edit_2509_fp8_e4m3fn.safetensors",
    "qwen_2.5_vl_7b_fp8_scaled.safetensors",
    "qwen_image",
    "qwen_image_vae.safetensors",
    "Qwen-Image-Edit 2509",
)
BEFORE = {"references": ["images", 3]}


def instruction(title: str, words: Any, picture: Any, **more: Any) -> dict[str, Any]:
    """An instruction, encoded together with the picture that it is about."""
    return node(
        "TextEncodeQwenImageEditPlus", title, clip=FILES.link("clip"), prompt=words, image1=picture, **more
    )  # fmt: skip


def _folder() -> dict[str, Any]:
    loaded = training_folder("Pictures after the edit, and instructions", "my_edit")
    loaded["inputs"]["reference_folder"] = "my_edit_before"
    return loaded


def _plan() -> dict[str, Any]:
    plan = memory_plan(FILES, "off", draws=200)
    plan["plan"]["inputs"] |= BEFORE
    return plan


def _samples() -> dict[str, Any]:
    request = sample_request(FILES, 512)
    request["inputs"] |= {"sampler_steps": 20, "cfg": 2.5, "negative": ["negative", 0]}
    return request


EDIT = Graph(
    "BlockSkip 2 - Train Qwen-Image-Edit",
    {
        **FILES.prompt,
        "images": _folder(),
        # the key that the shared parts link to
        "guidance": instruction("Instruction and picture before the edit", ["images", 1], ["images", 3]),
        "select": chosen(FILES, ["guidance", 0], 0.5, front=1, back=1),
        **_plan(),
        "residuals": residuals(FILES, ["images", 0], ["images", 2], draws=200, **FROM_PLAN, **BEFORE),
        "try": training_folder("Pictures to try it on", "my_edit_try"),
        "guided": instruction("What to do with them", "make it a sks drawing", ["try", 0], vae=FILES.link("vae")),
        "negative": instruction("Negative prompt", "", ["try", 0], vae=FILES.link("vae")),
        "samples": _samples(),
        "train": trainer(
            FILES,
            steps=800,
            learning_rate=2e-4,
            accumulation=1,
            output_name="loras/my_edit",
            samples=["samples", 0],
            **FROM_PLAN,
        ),
    },
    (
        Column("1  Before, after, instruction", BLUE, (*FILES.names(), "images", "guidance"), 340),
        Column("2  Will it fit?", GREEN, ("select", "plan"), 340),
        Column("3  Prepare", YELLOW, ("residuals", "try", "guided", "negative"), 340),
        Column("4  Train", PURPLE, ("samples", "train"), 420),
    ),
    """## Teach Qwen-Image-Edit an edit

1. Are files missing? Press *View details*, then *Download*. They are those of ComfyUI's own template.
2. Make three folders inside ComfyUI's `input` folder. `my_edit`: 10 or more pictures as they are *after* the edit, and for each a
   text file of the same name with the instruction, for example *make it a sks drawing*. `my_edit_before`: the same pictures *before*
   the edit, under the same names. `my_edit_try`: one or two other pictures to watch the training on. Press **R**.
3. Press **Run**. **Memory Plan** counts the pictures before the edit too, says whether your card is large enough, and makes it fit.
4. The chart shows the pictures of `my_edit_try` every 100 steps. **Cancel** saves the LoRA so far, and **Run** continues. It goes to
   `output/loras`; load it with Load LoRA.

The model sees every picture before the edit whole (`reference_size`, 512 px). If before and after match point by point, set
`reference_part` to *same part* on **Precompute Residuals**: less memory, and exact places. Memory Plan takes it from there. For FLUX.1 Kontext and
FLUX.2 the graph is the same with CLIP Text Encode for the instructions.

The first quarter of the blocks is skipped, which is exact, and the last half runs without adapters. Of all choices
that save as much memory, this learned the most on our small model; on this one nobody has measured it, and nothing here has been tried
on a GPU yet: please tell us how it went.""",
    headline="Qwen-Image-Edit",
    subline="before, after\nand an instruction",
    twin="qwen_image_edit",
    badge="Edit",
)
