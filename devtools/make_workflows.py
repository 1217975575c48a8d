"""Makes the shipped workflows: ``python devtools/make_workflows.py SERVER`` (the address of a ComfyUI with the pack).

The graphs are written down here as API prompts with a place on the canvas; ``check_workflow.mjs`` lets ComfyUI's real
frontend turn them into its own format, and this adds positions, groups, notes and model links. Run it again whenever
a node's inputs change, then look at the thumbnails.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CHECKER = ROOT / "devtools" / "check_workflow.mjs"
GAP, GROUP_TOP = 40, 60

MODELS = {
    "UNETLoader": [("flux1-dev.safetensors", "Comfy-Org/flux1-dev/resolve/main/flux1-dev.safetensors", "diffusion_models")],
    "DualCLIPLoader": [
        ("clip_l.safetensors", "comfyanonymous/flux_text_encoders/resolve/main/clip_l.safetensors", "text_encoders"),
        ("t5xxl_fp16.safetensors", "comfyanonymous/flux_text_encoders/resolve/main/t5xxl_fp16.safetensors", "text_encoders"),
    ],
    "VAELoader": [
        (
            "ae.safetensors",
            "Comfy-Org/Lumina_Image_2.0_Repackaged/resolve/main/split_files/vae/ae.safetensors",
            "vae",
        )
    ],
}  # fmt: skip
MODEL_SITE = "https://huggingface.co/"


@dataclass(frozen=True)
class Column:
    """Nodes under each other, in a group of that title."""

    title: str
    colour: str
    nodes: tuple[str, ...]
    width: int = 400


@dataclass(frozen=True)
class Graph:
    """One workflow: its prompt, its columns from left to right, and the note at its left."""

    name: str
    prompt: dict[str, Any]
    columns: tuple[Column, ...]
    note: str


def node(kind: str, title: str, **inputs: Any) -> dict[str, Any]:
    """A node of a prompt."""
    return {"class_type": kind, "inputs": inputs, "_meta": {"title": title}}


def text(title: str, words: str) -> dict[str, Any]:
    """A prompt's text."""
    return node("CLIPTextEncode", title, text=words, clip=["clip", 0])


LOADERS = {
    "model": node("UNETLoader", "Load FLUX.1-dev", unet_name="flux1-dev.safetensors", weight_dtype="default"),
    "clip": node(
        "DualCLIPLoader",
        "Load text encoders",
        clip_name1="clip_l.safetensors",
        clip_name2="t5xxl_fp16.safetensors",
        type="flux",
        device="default",
    ),
    "vae": node("VAELoader", "Load VAE", vae_name="ae.safetensors"),
}
SELECT = {"model": ["model", 0], "positive": ["probe", 0], "skip_ratio": 0.5, "front": 19, "back": 10}
SAMPLE = {
    "positive": ["guided", 0],
    "negative": ["negative", 0],
    "latent_image": ["size", 0],
    "seed": 0,
    "steps": 20,
    "cfg": 1.0,
    "sampler_name": "euler",
    "scheduler": "simple",
    "denoise": 1.0,
}
PICTURE = {
    "prompt": text("Prompt", "a photo of sks toy on the beach"),
    "guided": node("FluxGuidance", "Guidance while sampling", conditioning=["prompt", 0], guidance=3.5),
    "negative": node("ConditioningZeroOut", "No negative prompt", conditioning=["prompt", 0]),
    "size": node("EmptySD3LatentImage", "Picture size", width=1024, height=1024, batch_size=1),
}

TRAIN = Graph(
    "BlockSkip - Train FLUX.1 LoRA",
    {
        **LOADERS,
        "dataset": node("LoadImageTextDataSetFromFolder", "Pictures and captions of your subject", folder="my_subject"),
        "captions": node("CLIPTextEncode", "Encode the captions", text=["dataset", 1], clip=["clip", 0]),
        "training guidance": node(
            "FluxGuidance", "Guidance while training: 1", conditioning=["captions", 0], guidance=1.0
        ),
        "probe": text("Probe prompt", "a photo of a toy on a table"),
        "select": node("BlockSkip_SelectBlocks", "Select Blocks (attention mask)", method="preset", **SELECT),
        "heatmap": node("PreviewImage", "Which blocks are skipped", images=["select", 1]),
        "residuals": node(
            "BlockSkip_PrecomputeResiduals",
            "Precompute Residuals",
            model=["model", 0],
            vae=["vae", 0],
            images=["dataset", 0],
            positive=["training guidance", 0],
            selection=["select", 0],
            draws=500,
            patch_min=256,
            patch_max=512,
            storage="disk",
            seed=0,
        ),
        "patches": node("PreviewImage", "What training will see", images=["residuals", 1]),
        "train": node(
            "BlockSkip_TrainLora",
            "Dynamic Patch Trainer",
            model=["model", 0],
            residuals=["residuals", 0],
            steps=500,
            learning_rate=1e-4,
            rank=16,
            seed=0,
            accumulation=4,
            output_name="loras/my_subject",
        ),
        "loss": node("LossGraphNode", "Plot Loss Graph", loss=["train", 1], filename_prefix="loss_graph"),
        **PICTURE,
        "apply": node(
            "BlockSkip_ApplyLora", "Apply BlockSkip LoRA", model=["model", 0], lora=["train", 0], strength_model=1.0
        ),
        "sample": node("KSampler", "Sample with the LoRA", model=["apply", 0], **SAMPLE),
        "decode": node("VAEDecode", "Decode", samples=["sample", 0], vae=["vae", 0]),
        "picture": node("SaveImage", "Your subject", images=["decode", 0], filename_prefix="my_subject"),
    },
    (
        Column("1  Load", "#3f789e", ("model", "clip", "vae", "dataset")),
        Column("2  Choose blocks", "#8a5", ("probe", "select", "heatmap")),
        Column("3  Prepare", "#b58b2a", ("captions", "training guidance", "residuals", "patches")),
        Column("4  Train", "#a1309b", ("train", "loss")),
        Column("5  Try it", "#3f789e", ("apply", "prompt", "guided", "negative", "size")),
        Column("6  Look", "#3f789e", ("sample", "decode", "picture")),
    ),
    """## Train a FLUX.1 LoRA with BlockSkip

1. Make a folder in ComfyUI's `input` folder with 4 to 20 pictures of your subject, 512 px or more, and for each a
   `.txt` of the same name with a caption such as *a photo of sks toy on a table*. Choose it in **Pictures and captions**.
2. Queue. **Precompute Residuals** runs once: 500 draws take about 2.2 GiB of disk. Training then loads only the 28
   kept blocks of 57. 500 steps of 4 draws each (`accumulation`) use every draw four times; more draws take more disk.
3. The LoRA is saved to `output/loras` and listed in Load LoRA.

`preset` uses the paper's choice of blocks for FLUX.1. Set **method** to *attention mask* to measure it on your model.
Guidance 1 while training and 3.5 while sampling is common practice for FLUX.1-dev; the paper does not say.

Short of memory? Load the model with `weight_dtype` fp8_e4m3fn, or lower `patch_min`.
Short of disk? Set **storage** to *chunked*.""",
)

SELECT_BLOCKS = Graph(
    "BlockSkip - Select blocks",
    {
        **LOADERS,
        "vision": node("CLIPVisionLoader", "Load a vision encoder", clip_name="clip_vision_h.safetensors"),
        "probe": text("Probe prompt", "a photo of a toy on a table"),
        "select": node(
            "BlockSkip_SelectBlocks",
            "Select Blocks (attention mask)",
            method="attention mask",
            vae=["vae", 0],
            clip_vision=["vision", 0],
            **SELECT,
        ),
        "heatmap": node("PreviewImage", "How much the text matters where", images=["select", 1]),
        "report": node("PreviewAny", "Report", source=["select", 2]),
    },
    (
        Column("1  Load", "#3f789e", ("model", "clip", "vae", "vision")),
        Column("2  Measure", "#8a5", ("probe", "select")),
        Column("3  Look", "#b58b2a", ("heatmap", "report"), 640),
    ),
    """## Which blocks can be skipped?

The text is hidden from the picture in the first few, the last few, and a sliding run of blocks; the more the picture
changes, the more those blocks matter for your subject.

Runs once per model and prompt, then it is remembered: any other `skip_ratio` up to the measured one is a look-up.

The paper does this with a model that already knows the subject: put **Load LoRA** between the model and the node to
do the same. Its encoder is DINO; Load CLIP Vision reads CLIP-ViT and DINOv2. Without one, latents are compared.""",
)

APPLY = Graph(
    "BlockSkip - Apply and compare",
    {
        **LOADERS,
        **PICTURE,
        "apply": node("BlockSkip_ApplyLora", "Apply BlockSkip LoRA", model=["model", 0], strength_model=1.0),
        "info": node("PreviewAny", "What the LoRA says of itself", source=["apply", 1]),
        "sample before": node("KSampler", "Sample the plain model", model=["model", 0], **SAMPLE),
        "decode before": node("VAEDecode", "Decode", samples=["sample before", 0], vae=["vae", 0]),
        "before": node("SaveImage", "Before: the plain model", images=["decode before", 0], filename_prefix="before"),
        "sample after": node("KSampler", "Sample with the LoRA", model=["apply", 0], **SAMPLE),
        "decode after": node("VAEDecode", "Decode", samples=["sample after", 0], vae=["vae", 0]),
        "after": node("SaveImage", "After: with the LoRA", images=["decode after", 0], filename_prefix="after"),
    },
    (
        Column("1  Load", "#3f789e", ("model", "clip", "vae")),
        Column("2  Apply", "#a1309b", ("apply", "info")),
        Column("3  Prompt", "#8a5", ("prompt", "guided", "negative", "size")),
        Column("4  Before", "#b58b2a", ("sample before", "decode before", "before")),
        Column("5  After", "#b58b2a", ("sample after", "decode after", "after")),
    ),
    """## Before and after

Choose your LoRA in **Apply BlockSkip LoRA** (`lora_name`); the trainer saves to `output/loras`. The same seed and
prompt are sampled from the plain model and from the model with the LoRA.

Nothing is skipped here: sampling uses the whole model, so the LoRA also works in every other loader.""",
)

RALU = Graph(
    "BlockSkip - Fast sampling (RALU)",
    {
        **LOADERS,
        "prompt": text("Prompt", "a photo of a red fox in a snowy forest, sharp details"),
        "guided": node("FluxGuidance", "Guidance", conditioning=["prompt", 0], guidance=3.5),
        "size": node("EmptySD3LatentImage", "Picture size", width=1024, height=1024, batch_size=1),
        "sample": node(
            "BlockSkip_RALUSampler",
            "RALU Sampler",
            model=["model", 0],
            positive=["guided", 0],
            latent_image=["size", 0],
            seed=0,
            cfg=1.0,
            preset="FLUX 5x",
            upsample_ratio=0.2,
            regions="edges",
            vae=["vae", 0],
        ),
        "early": node("PreviewImage", "What became fine early", images=["sample", 1]),
        "report": node("PreviewAny", "Stages", source=["sample", 2]),
        "decode": node("VAEDecode", "Decode", samples=["sample", 0], vae=["vae", 0]),
        "picture": node("SaveImage", "Picture", images=["decode", 0], filename_prefix="ralu"),
    },
    (
        Column("1  Load", "#3f789e", ("model", "clip", "vae")),
        Column("2  Prompt", "#8a5", ("prompt", "guided", "size")),
        Column("3  Sample in three stages", "#a1309b", ("sample", "report")),
        Column("4  Look", "#3f789e", ("decode", "picture", "early"), 480),
    ),
    """## Fast sampling with RALU

**RALU Sampler** takes the place of KSampler. It samples at half the side first, then brings the regions with edges to
full resolution, then all the rest. FLUX 5x takes 15 steps, most of them on fewer tokens: counted, 1 / 5.4 of the
operations of 50 plain steps. FLUX 7x takes 1 / 7.3 and is rougher; FLUX 4x takes 1 / 4.4.

Width and height must be multiples of 32 px. A LoRA goes between **Load FLUX.1-dev** and the sampler.

For SD3.5 load its model, text encoders and VAE, set **preset** to *SD3 2x* or *SD3 3x*, connect a negative prompt, and
raise **cfg**.""",
)

GRAPHS = (TRAIN, SELECT_BLOCKS, APPLY, RALU)


def convert(server: str, graph: Graph, folder: Path) -> dict[str, Any]:
    """Let the frontend turn the prompt into a workflow."""
    numbers = {name: str(number) for number, name in enumerate(graph.prompt, 1)}
    prompt = {numbers[name]: _renumbered(spec, numbers) for name, spec in graph.prompt.items()}
    api, out = folder / "prompt.json", folder / "workflow.json"
    api.write_text(json.dumps(prompt), encoding="utf-8")
    # Models and folders of the user are not among this server's choices: the checker's notes on them are expected.
    subprocess.run(
        ["node", str(CHECKER), server, "--from-api", str(api), "--out", str(out), "--pack-version", _version()],
        check=False,
        capture_output=True,
    )
    workflow = json.loads(out.read_text(encoding="utf-8"))
    places = {numbers[name]: name for name in graph.prompt}
    for made in workflow["nodes"]:
        made["name"] = places[str(made["id"])]
    return workflow


def _renumbered(spec: dict[str, Any], numbers: dict[str, str]) -> dict[str, Any]:
    inputs = {k: [numbers[v[0]], v[1]] if isinstance(v, list) else v for k, v in spec["inputs"].items()}
    return {**spec, "inputs": inputs}


def _version() -> str:
    scope: dict[str, str] = {}
    for line in (ROOT / "blockskip_core" / "version.py").read_text(encoding="utf-8").splitlines():
        if line.startswith("VERSION"):
            scope["version"] = line.split('"')[1]
    return scope["version"]


def arrange(workflow: dict[str, Any], graph: Graph) -> dict[str, Any]:
    """Put the nodes into their columns, add groups, the note and the model links."""
    by_name = {made.pop("name"): made for made in workflow["nodes"]}
    left = _add_note(workflow, graph.note)
    workflow["groups"] = []
    for column in graph.columns:
        top = GROUP_TOP
        for name in column.nodes:
            made = by_name[name]
            height = _height(made)
            made["pos"], made["size"] = [left, top], [column.width, height]
            top += height + GAP + 30
        workflow["groups"].append(
            {
                "id": len(workflow["groups"]) + 1,
                "title": column.title,
                "bounding": [left - 15, -15, column.width + 30, top - 25],
                "color": column.colour,
                "flags": {},
            }
        )
        left += column.width + 30 + GAP
    for made in workflow["nodes"]:
        values = made.get("widgets_values") or []
        made["widgets_values"] = ["fixed" if value == "randomize" else value for value in values]  # seeds stay
        links = MODELS.get(made["type"])
        if links:
            made["properties"]["models"] = [
                {"name": name, "url": MODEL_SITE + path, "directory": directory} for name, path, directory in links
            ]
    workflow["extra"] = {
        "ds": {"scale": 0.55, "offset": [60, 120]},
        "frontendVersion": workflow["extra"]["frontendVersion"],
    }
    return workflow  # fmt: skip


def _height(made: dict[str, Any]) -> int:
    by_kind = {"PreviewImage": 300, "SaveImage": 420, "CLIPTextEncode": 130, "PreviewAny": 260, "LossGraphNode": 300}
    return max(by_kind.get(made["type"], 0), int(made["size"][1])) if made["type"] != "CLIPTextEncode" else 130


def _add_note(workflow: dict[str, Any], words: str) -> int:
    """Add the note at the left; return where the first column starts."""
    workflow["last_node_id"] += 1
    workflow["nodes"].append(
        {
            "id": workflow["last_node_id"],
            "type": "MarkdownNote",
            "pos": [0, GROUP_TOP],
            "size": [460, 560],
            "flags": {},
            "order": 0,
            "mode": 0,
            "inputs": [],
            "outputs": [],
            "title": "Read me",
            "properties": {},
            "widgets_values": [words],
            "color": "#432",
            "bgcolor": "#653",
        }
    )
    return 460 + 2 * GAP


def main(server: str) -> None:
    """Write every workflow and its thumbnail."""
    for graph in GRAPHS:
        with tempfile.TemporaryDirectory() as folder:
            workflow = arrange(convert(server, graph, Path(folder)), graph)
        target = ROOT / "workflows" / f"{graph.name}.json"
        target.write_text(json.dumps(workflow, indent=1) + "\n", encoding="utf-8")
        subprocess.run(
            ["node", str(CHECKER), server, str(target), "--screenshot", str(target.with_suffix(".jpg")), "--size", "1400x800"],
            check=False,
        )  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1])
