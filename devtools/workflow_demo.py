"""The template for the demo's small model, which runs on any computer: it comes with the demo's nodes, not with the pack."""

from __future__ import annotations

from workflow_graphs import BLUE, FROM_PLAN, GREEN, PURPLE, YELLOW, Column, Graph, Loaders, memory_plan, node, text

WORLD = Loaders(
    {
        "model": node(
            "UNETLoader", "Load the small model", unet_name="blockskip_world_dit.safetensors", weight_dtype="default"
        ),
        "clip": node(
            "BlockSkipDemo_LoadTextEncoder", "Load its text encoder", text_file="blockskip_world_text.safetensors"
        ),
        "vae": node("VAELoader", "Load its VAE", vae_name="blockskip_world_vae.safetensors"),
    },
    model=("model", 0),
    clip=("clip", 0),
    vae=("vae", 0),
)


def _plan() -> dict[str, dict]:
    plan = memory_plan(WORLD, "off", draws=120)
    plan["plan"]["inputs"] |= {"positive": ["captions", 0], "batch_size": 4}
    return plan


def _compared() -> dict[str, dict]:
    """The prompt of the samples at another seed, without and with the LoRA."""
    inputs = {
        "positive": ["prompt", 0], "negative": ["negative", 0], "latent_image": ["size", 0], "seed": 3, "steps": 12, "cfg": 4.0,
        "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0,
    }  # fmt: skip
    vae = WORLD.link("vae")
    return {
        "size": node("EmptySD3LatentImage", "Picture size", width=256, height=256, batch_size=1),
        "apply": node(
            "BlockSkip_ApplyLora", "Apply BlockSkip LoRA", model=WORLD.link("model"), lora=["train", 0], strength_model=1.0
        ),
        "sample before": node("KSampler", "Sample the plain model", model=WORLD.link("model"), **inputs),
        "decode before": node("VAEDecode", "Decode", samples=["sample before", 0], vae=vae),
        "sample after": node("KSampler", "Sample with the LoRA", model=["apply", 0], **inputs),
        "decode after": node("VAEDecode", "Decode", samples=["sample after", 0], vae=vae),
        "compare": node("BlockSkip_Compare", "Compare Pictures", before=["decode before", 0], after=["decode after", 0]),
    }  # fmt: skip


DEMO = Graph(
    "BlockSkip 0 - Try it without a GPU",
    {
        **WORLD.prompt,
        "images": node("BlockSkip_LoadTrainingFolder", "Pictures and captions of Toby", folder="blockskip_toby"),
        "captions": text("Encode the captions", ["images", 1], WORLD.link("clip")),
        "select": node(
            "BlockSkip_SelectBlocks", "Select Blocks (attention mask)", model=WORLD.link("model"),
            positive=["captions", 0], method="skip and freeze", skip_ratio=0.5, front=4, back=2,
        ),
        **_plan(),
        "residuals": node(
            "BlockSkip_PrecomputeResiduals", "Precompute Residuals", model=WORLD.link("model"), vae=WORLD.link("vae"),
            images=["images", 0], positive=["captions", 0], selection=["select", 0], draws=120, patch_min=256,
            patch_max=288, storage="disk", seed=1, files=["images", 2], **FROM_PLAN,
        ),
        "prompt": text("Prompt of the samples", "a big orange toby circle on water, right", WORLD.link("clip")),
        "negative": text("Empty prompt", "", WORLD.link("clip")),
        "samples": node(
            "BlockSkip_SampleWhileTraining", "Sample While Training", positive=["prompt", 0], vae=WORLD.link("vae"),
            every=40, at_start=True, width=256, height=256, sampler_steps=12, cfg=4.0, scheduler="simple", seed=7,
            negative=["negative", 0],
        ),
        "train": node(
            "BlockSkip_TrainLora", "Dynamic Patch Trainer", model=WORLD.link("model"), residuals=["residuals", 0],
            steps=160, learning_rate=6e-3, rank=16, seed=0, batch_size=4, lr_schedule="cosine",
            output_name="loras/toby", samples=["samples", 0], **FROM_PLAN,
        ),
        **_compared(),
    },
    (
        Column("1  Load", BLUE, (*WORLD.names(), "images", "captions"), 340),
        Column("2  Will it fit?", GREEN, ("select", "plan"), 340),
        Column("3  Prepare", YELLOW, ("residuals", "prompt", "negative"), 340),
        Column("4  Train", PURPLE, ("samples", "train"), 420),
        Column("5  Try it", BLUE, ("apply", "size", "sample before", "decode before", "sample after", "decode after"), 340),
        Column("6  Compare", GREEN, ("compare",), 480),
    ),
    """## Try it without a GPU

A small model that knows a world of coloured shapes learns a new one: *toby*. It runs on any computer; nothing has to be
downloaded. Press **Run**.

Watch the chart on **Dynamic Patch Trainer**. The first sample shows the model before it has learned anything; click a
later one and move the slider to compare. **Sample now** asks for another. **Open summary** shows everything about the run. At
the end **Compare Pictures** has a new picture of the same prompt, without and with what was learned.

Then try: **Cancel** while it trains and **Run** again (it resumes); more `steps`; *mila* or *zuzu* with
`python dev.py demo --keep --subject mila`; your own drawings with `--pictures DIR`.

The graph is that of *BlockSkip 1 - My first LoRA* with other files, and of *BlockSkip 4 - Apply and compare*.""",
    headline="Try it without a GPU",
    subline="the demo's small model\nnothing to download",
    badge="CPU",
    folder="demo/blockskip_demo_nodes/workflows",
)  # fmt: skip
