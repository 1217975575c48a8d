"""Definitions of the shipped workflows: their nodes, layout and notes.

A graph is an API prompt whose nodes have names instead of numbers. ``make_workflows.py`` writes the files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

Prompt = dict[str, dict[str, Any]]
Link = list[Any]

BLUE, GREEN, YELLOW, PURPLE = "#7ab8e0", "#9fce63", "#e0b25a", "#d78fdc"  # colours of groups and their titles


@dataclass(frozen=True)
class Column:
    """Nodes below each other in a titled group, with an optional note above them."""

    title: str
    colour: str
    nodes: tuple[str, ...]
    width: int = 400
    note: str = ""


@dataclass(frozen=True)
class Graph:
    """One workflow.

    Attributes:
        name: Name of the file, which the template browser shows.
        prompt: The nodes.
        columns: The nodes' arrangement, from left to right.
        note: Text of the note at the left.
        headline, subline: Text of the thumbnail.
        shows: A picture of the help pages and the parts of it for the thumbnail, side by side; none for the graph itself.
        twin: Name of the same graph with the demo's small models in ``tests/workflows``; "" if that is hand-written.
        muted: Nodes that do not run until the user unmutes them.
        badge: A few letters that fill the thumbnail's lower part instead of the graph, e.g. the size of a card.
        folder: Where the file is written. Only those in ``workflows`` are shipped and link to models.
    """

    name: str
    prompt: Prompt
    columns: tuple[Column, ...]
    note: str
    headline: str
    subline: str
    shows: tuple[str | tuple[int, int, int, int], ...] = ()
    twin: str = ""
    muted: frozenset[str] = field(default=frozenset())
    badge: str = ""
    folder: str = "workflows"


def node(kind: str, title: str, **inputs: Any) -> dict[str, Any]:
    """A node of a prompt."""
    return {"class_type": kind, "inputs": inputs, "_meta": {"title": title}}


def text(title: str, words: str | Link, clip: Link) -> dict[str, Any]:
    """A node that encodes a prompt."""
    return node("CLIPTextEncode", title, text=words, clip=clip)


@dataclass(frozen=True)
class Loaders:
    """The nodes that load FLUX.1-dev, and their outputs."""

    prompt: Mapping[str, dict[str, Any]]
    model: tuple[str, int]
    clip: tuple[str, int]
    vae: tuple[str, int]

    def names(self) -> tuple[str, ...]:
        """The nodes' names, for a column."""
        return tuple(self.prompt)

    def link(self, what: str) -> Link:
        """A link to ``model``, ``clip`` or ``vae``."""
        return list(getattr(self, what))


THREE_FILES = Loaders(
    {
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
    },
    model=("model", 0),
    clip=("clip", 0),
    vae=("vae", 0),
)
ONE_FP8_FILE = Loaders(
    {"checkpoint": node("CheckpointLoaderSimple", "Load FLUX.1-dev in fp8", ckpt_name="flux1-dev-fp8.safetensors")},
    model=("checkpoint", 0),
    clip=("checkpoint", 1),
    vae=("checkpoint", 2),
)

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
TRY = Column("5  Try it", BLUE, ("apply", "prompt", "guided", "negative", "size", "samples"))
LOOK = Column("6  Look", BLUE, ("sample", "decode", "picture"))


def picture(loaders: Loaders, words: str = "a photo of sks toy on the beach", side: int = 1024) -> Prompt:
    """A sampler's inputs other than the model."""
    return {
        "prompt": text("Prompt", words, loaders.link("clip")),
        "guided": node("FluxGuidance", "Guidance while sampling", conditioning=["prompt", 0], guidance=3.5),
        "negative": node("ConditioningZeroOut", "No negative prompt", conditioning=["prompt", 0]),
        "size": node("EmptySD3LatentImage", "Picture size", width=side, height=side, batch_size=1),
    }


def sampled(loaders: Loaders, *, filename: str = "my_subject", title: str = "Your subject", **shown: Any) -> Prompt:
    """Try the trained LoRA: apply, sample, decode, save."""
    return {
        **picture(loaders, **shown),
        "apply": node(
            "BlockSkip_ApplyLora", "Apply BlockSkip LoRA", model=loaders.link("model"), lora=["train", 0], strength_model=1.0
        ),
        "sample": node("KSampler", "Sample with the LoRA", model=["apply", 0], **SAMPLE),
        "decode": node("VAEDecode", "Decode", samples=["sample", 0], vae=loaders.link("vae")),
        "picture": node("SaveImage", title, images=["decode", 0], filename_prefix=filename),
    }  # fmt: skip


def chosen(
    loaders: Loaders,
    positive: Link,
    skip_ratio: float,
    method: str = "skip and freeze",
    front: int = 19,
    back: int = 10,
    **more: Any,
) -> dict[str, Any]:
    """Select Blocks."""
    return node(
        "BlockSkip_SelectBlocks",
        "Select Blocks (attention mask)",
        model=loaders.link("model"),
        positive=positive,
        method=method,
        skip_ratio=skip_ratio,
        front=front,
        back=back,
        **more,
    )


def select(loaders: Loaders, skip_ratio: float, method: str = "skip and freeze", **more: Any) -> Prompt:
    """Choose the blocks and show them."""
    title = "Probe prompt" if method == "attention mask" else "Probe prompt (only for attention mask)"
    return {
        "probe": text(title, "a photo of a toy on a table", loaders.link("clip")),
        "select": chosen(loaders, ["probe", 0], skip_ratio, method, **more),
        "heatmap": node("PreviewImage", "Which blocks are skipped", images=["select", 1]),
    }


def training_folder(title: str, folder: str = "my_subject") -> dict[str, Any]:
    """Pictures, with a caption each or without."""
    return node("BlockSkip_LoadTrainingFolder", title, folder=folder)


def dataset() -> Prompt:
    """Pictures with captions."""
    return {"dataset": training_folder("Pictures and captions of your subject")}


def captions(loaders: Loaders, words: str | Link, title: str = "Encode the captions") -> Prompt:
    """Captions, with the guidance value for training FLUX.1-dev."""
    return {
        "captions": text(title, words, loaders.link("clip")),
        "guidance": node("FluxGuidance", "Guidance while training: 1", conditioning=["captions", 0], guidance=1.0),
    }


def residuals(
    loaders: Loaders,
    images: Link,
    files: Link,
    *,
    draws: int = 500,
    seed: int = 0,
    back_residual: str = "exact",
    **more: Any,
) -> dict[str, Any]:
    """Precompute Residuals with the paper's crops."""
    return node(
        "BlockSkip_PrecomputeResiduals",
        "Precompute Residuals",
        model=loaders.link("model"),
        vae=loaders.link("vae"),
        images=images,
        positive=["guidance", 0],
        selection=["select", 0],
        draws=draws,
        patch_min=256,
        patch_max=512,
        storage="disk",
        seed=seed,
        back_residual=back_residual,
        **more,
        files=files,
    )


def prepared(loaders: Loaders, images: Link, files: Link, **more: Any) -> Prompt:
    """Compute the residuals and show the crops."""
    return {
        "residuals": residuals(loaders, images, files, **more),
        "patches": node("PreviewImage", "What training will see", images=["residuals", 1]),
    }


def trainer(loaders: Loaders, title: str = "Dynamic Patch Trainer", **settings: Any) -> dict[str, Any]:
    """Dynamic Patch Trainer with the settings that the paper reports."""
    reported = {"steps": 500, "learning_rate": 1e-4, "rank": 16, "seed": 0, "accumulation": 4}
    inputs = {"residuals": ["residuals", 0], **reported, "output_name": "loras/my_subject", **settings}
    return node("BlockSkip_TrainLora", title, model=loaders.link("model"), **inputs)


def trained(loaders: Loaders, **settings: Any) -> Prompt:
    """Train and plot the loss."""
    return {
        "train": trainer(loaders, **settings),
        "loss": node("LossGraphNode", "Plot Loss Graph", loss=["train", 1], filename_prefix="loss_graph"),
    }


def sample_request(loaders: Loaders, side: int) -> dict[str, Any]:
    """Sample While Training."""
    return node(
        "BlockSkip_SampleWhileTraining",
        "Sample While Training",
        positive=["guided", 0],
        vae=loaders.link("vae"),
        every=100,
        at_start=True,
        width=side,
        height=side,
        sampler_steps=20,
        cfg=1.0,
        scheduler="simple",
        seed=0,
    )


def watched(loaders: Loaders, side: int = 512, **settings: Any) -> Prompt:
    """Train, sample the prompt during training, and plot the loss."""
    return {
        "samples": sample_request(loaders, side),
        **trained(loaders, samples=["samples", 0], **settings),
    }


def memory_plan(
    loaders: Loaders, preset: str, *, draws: int = 500, patch_min: int = 256, trained_in: str = "off", frozen: str = ""
) -> Prompt:
    """Check before the run whether it fits a card, and adjust the following nodes so that it does."""
    return {
        "plan": node(
            "BlockSkip_MemoryPlan",
            "Memory Plan: will it fit?",
            model=loaders.link("model"),
            positive=["guidance", 0],
            selection=["select", 0],
            patch_min=patch_min,
            draws=draws,
            storage="disk",
            rank=16,
            batch_size=1,
            checkpointing=True,
            quantize_kept=trained_in,
            activation_budget=0.0,
            card_memory=0.0,
            preset=preset,
            back_residual="exact",
            **frozen_in(frozen),
        ),
    }


def frozen_in(weight_format: str) -> dict[str, str]:
    """The format of frozen blocks for the trainer and for Memory Plan, which takes it from there; "" is their default."""
    return {"quantize_frozen": weight_format} if weight_format else {}


FROM_PLAN: dict[str, Link] = {"memory_settings": ["plan", 3]}
"""Inputs of Precompute Residuals and of the trainer that come from Memory Plan ("plan"), in graphs that have one."""

PRACTICE = """Guidance 1 for training and 3.5 for sampling is common practice for FLUX.1-dev; the paper does not
specify it. FLUX.1-dev has its own licence: read it before you use the results commercially."""

TRAIN = Graph(
    "BlockSkip 8 - Train FLUX.1 LoRA (paper)",
    {
        **THREE_FILES.prompt,
        **dataset(),
        **captions(THREE_FILES, ["dataset", 1]),
        **select(THREE_FILES, 0.5, "preset"),
        **prepared(THREE_FILES, ["dataset", 0], ["dataset", 2], back_residual="constant"),
        **trained(THREE_FILES),
        **sampled(THREE_FILES),
    },
    (
        Column("1  Load", BLUE, (*THREE_FILES.names(), "dataset")),
        Column("2  Choose blocks", GREEN, ("probe", "select", "heatmap")),
        Column("3  Prepare", YELLOW, ("captions", "guidance", "residuals", "patches")),
        Column("4  Train", PURPLE, ("train", "loss")),
        Column(TRY.title, BLUE, tuple(name for name in TRY.nodes if name != "samples")),
        LOOK,
    ),
    f"""## Train a FLUX.1 LoRA with BlockSkip

1. Make a folder in ComfyUI's `input` folder with 4 to 20 pictures of your subject, 512 px or more, and for each a
   `.txt` of the same name with a caption such as *a photo of sks toy on a table*. Choose it in **Pictures and captions**.
   ComfyUI's **Generate Text** can write captions from `images`, with a CLIP that sees pictures.
2. Queue. **Precompute Residuals** runs once: 500 training examples (`draws`) take about 2.2 GiB of disk. Training then
   loads only the 28 kept blocks of 57. 500 steps with 4 examples each (`accumulation`) use every example four times;
   more examples take more disk.
3. The LoRA is saved to `output/loras` and listed in Load LoRA.

`preset` uses the paper's blocks for FLUX.1. Set **method** to *attention mask* to measure them on your model.
{PRACTICE}

Short of memory? Load the model with `weight_dtype` fp8_e4m3fn, or lower `patch_min`.
Short of disk? Set **storage** to *chunked*.""",
    headline="Train a LoRA",
    subline="FLUX.1, the paper's setting\nbf16, half of the blocks skipped",
)

FIRST = Graph(
    "BlockSkip 1 - My first LoRA",
    {
        **ONE_FP8_FILE.prompt,
        "images": training_folder("Pictures of your subject"),
        **captions(ONE_FP8_FILE, "a photo of sks toy", "One caption for all pictures"),
        "select": chosen(ONE_FP8_FILE, ["guidance", 0], 0.5),
        **memory_plan(ONE_FP8_FILE, "off", draws=200),
        "residuals": residuals(ONE_FP8_FILE, ["images", 0], ["images", 2], draws=200, **FROM_PLAN),
        "prompt": text("Prompt of the samples", "a photo of sks toy on the beach", ONE_FP8_FILE.link("clip")),
        "guided": node("FluxGuidance", "Guidance while sampling", conditioning=["prompt", 0], guidance=3.5),
        "samples": sample_request(ONE_FP8_FILE, 512),
        "train": trainer(
            ONE_FP8_FILE,
            steps=400,
            learning_rate=2e-4,
            accumulation=1,
            output_name="loras/my_first_lora",
            samples=["samples", 0],
            **FROM_PLAN,
        ),
    },
    (
        Column("1  Your pictures", BLUE, (*ONE_FP8_FILE.names(), "images", "captions", "guidance"), 340),
        Column("2  Will it fit?", GREEN, ("select", "plan"), 340),
        Column("3  Prepare", YELLOW, ("residuals", "prompt", "guided"), 340),
        Column("4  Train", PURPLE, ("samples", "train"), 420),
    ),
    f"""## My first LoRA

Teach FLUX.1 one thing that you own.

1. Is the model missing? Press *View details*, then *Download* (17 GB, with text encoders and VAE, and as much RAM; it belongs into
   `models/checkpoints`).
2. Make a folder `my_subject` inside ComfyUI's `input` folder, with 4 to 20 pictures of *one* thing: your toy, your dog.
   512 px or more, from several sides. Press **R**, then choose the folder.
3. *sks* will be its name. For a dog write *a photo of sks dog*, here and in the prompt of the samples.
   **trigger_word** and `.txt` files have no effect here: all pictures share the one caption. To use them, connect **texts** of
   *Pictures of your subject* to **text** of *One caption for all pictures*; or connect ComfyUI's **Generate Text** there, with
   **images** and a CLIP that sees pictures.
4. Press **Run**. **Memory Plan** says whether your card is large enough (8 GB or more; 6 GB with all blocks in 4-bit), and makes it fit.
5. Watch the chart: every 100 steps it shows a picture of the prompt. **Cancel** whenever you like: the LoRA so far is
   saved, and **Run** continues. It goes to `output/loras`; use it with *BlockSkip 4 - Apply and compare*.

*BlockSkip 2 - Train 6 GB*, *8 GB*, *12 GB*, *16 GB* and *24 GB* take a caption for each picture; the last three train at 512 px. On 8 GB **Memory
Plan** puts the frozen blocks into 4-bit, and the trainer undoes what that changes (`correct_4bit`). Nobody has measured on a GPU yet how long this takes, or how good the result is.
{PRACTICE}""",
    headline="My first LoRA",
    subline="start here: 11 nodes\none caption for all pictures",
    twin="my_first_lora",
    badge="1",
)


def card(
    size: int,
    loaders: Loaders,
    *,
    blocks: Prompt,
    learning_rate: float = 2e-4,
    trained_in: str = "off",
    frozen: str = "",
    room: float,
    counted: float,
    stored: float,
    summary: str,
    patch_min: int = 256,
    why: str,
) -> Graph:
    """Training on a card with ``size`` GB.

    Args:
        blocks: Select Blocks with what belongs to it.
        learning_rate: For the blocks that are trained; few blocks need twice the usual 1e-4.
        trained_in: Format of the trained blocks' weights during the training; off is that of the file.
        frozen: Format of the frozen blocks if it is not the trainer's default.
        room: GiB that Memory Plan allows the run; the rest is for the screen, other programs and the driver.
        counted: GiB that Memory Plan counts at the peak, with captions of 512 tokens.
        stored: GiB of disk for 500 training examples with captions of 256 tokens.
        summary, why: A short and a long description of the settings.
    """
    return Graph(
        f"BlockSkip 2 - Train {size} GB",
        {
            **loaders.prompt,
            **dataset(),
            **captions(loaders, ["dataset", 1]),
            **blocks,
            **memory_plan(loaders, f"{size} GB", patch_min=patch_min, trained_in=trained_in, frozen=frozen),
            **prepared(loaders, ["dataset", 0], ["dataset", 2], **FROM_PLAN),
            **watched(loaders, learning_rate=learning_rate, **frozen_in(frozen), **FROM_PLAN),
            **sampled(loaders),
        },
        (
            Column("1  Load", BLUE, (*loaders.names(), "dataset")),
            Column("2  Choose blocks", GREEN, ("probe", "select", "heatmap")),
            Column("3  Will it fit?", BLUE, ("captions", "guidance", "plan")),
            Column("4  Prepare", YELLOW, ("residuals", "patches")),
            Column("5  Train", PURPLE, ("train", "loss")),
            Column("6  Try it", BLUE, TRY.nodes),
            Column("7  Look", BLUE, LOOK.nodes),
        ),
        f"""## Train a FLUX.1 LoRA on a card with {size} GB

{why}

1. Make a folder in ComfyUI's `input` folder with 4 to 20 pictures of your subject, 512 px or more, and for each a
   `.txt` of the same name with a caption such as *a photo of sks toy on a table*. Choose it in **Pictures and captions**.
   ComfyUI's **Generate Text** can write captions from `images`, with a CLIP that sees pictures.
2. Queue. **Memory Plan** first makes the run fit into {room:g} GiB, which leaves the rest for the screen and other
   programs, and uses spare memory for speed. It counts {counted:g} GiB; no GPU has confirmed that yet.
3. Every 100 steps, the trainer shows a picture of the prompt in **6 Try it**.
4. The LoRA is saved to `output/loras` and listed in Load LoRA. **Cancel** saves too; queueing again continues.

500 training examples (`draws`) take about {stored:g} GiB of disk. 500 steps with 4 examples each (`accumulation`) use every
example four times. Set `patch_min`, storage, batch size, checkpointing and `quantize_kept` in **Memory Plan**; the
nodes after it take them from there. `quantize_frozen` is set on **Dynamic Patch Trainer**, and Memory Plan takes it from there.

{PRACTICE}""",
        headline=f"Train on {size} GB",
        subline=f"{summary}\n{counted:g} GiB counted",
        twin=f"train_{size}_gb",
        badge=f"{size} GB",
    )


def resumed(graph: Graph, size: int) -> Graph:
    """The same run with more steps: it continues where the first one ended."""
    name = f"BlockSkip 3 - Resume {size} GB"
    prompt = {**graph.prompt, "train": json.loads(json.dumps(graph.prompt["train"]))}
    prompt["train"]["inputs"]["steps"] = 1000
    prompt["train"]["_meta"]["title"] = "Continue: more steps"
    return replace(
        graph,
        name=name,
        prompt=prompt,
        note=f"""## Continue a run on a card with {size} GB

This is *{graph.name}* with one change: `steps` is 1000 instead of 500. So the run is found and continues after its last
step, also after Cancel or a crash. The result is the same LoRA as from 1000 steps at once.

All other settings, the pictures and the captions must be those of the run. Did you change any there? Change the same
here; or raise `steps` in your own copy, which is simpler.

The states of the three newest runs are kept in `output/blockskip/runs`. To train a LoRA file further, open *BlockSkip 8
- Train further (paper)*.""",
        headline=f"Resume on {size} GB",
        subline="the same run, more steps\nafter Cancel or a crash too",
        twin=f"resume_{size}_gb",
        badge=f"+ {size} GB",
    )


CARD_6 = card(
    6,
    ONE_FP8_FILE,
    blocks=select(ONE_FP8_FILE, 0.5, "manual", front=15, back=29),
    trained_in="4-bit",
    frozen="4-bit",
    room=4.75,
    counted=4.5,
    stored=1.5,
    summary="4-bit, 15 blocks skipped, 29 frozen",
    why="""The model in fp8 (one file, 17 GB, with text encoders and VAE, which takes as much RAM), 256 px. The first 15 of the 57 blocks are skipped, which
is exact; the last 29 run without adapters; the 13 between them are trained, at twice the usual rate. All of them are in 4-bit (`quantize_kept` of **Memory
Plan**, `quantize_frozen` of **Dynamic Patch Trainer**), as the card has no room for them as loaded. What that changes is computed
once per example and undone in every step (`correct_4bit`). On our small model this learns 0.95 of what a LoRA on all blocks learns, and half of the blocks skipped as in
the paper, in eight bits, 0.51.""",
)
CARD_8 = card(
    8,
    ONE_FP8_FILE,
    blocks=select(ONE_FP8_FILE, 0.5),
    frozen="4-bit",
    room=6.5,
    counted=5.9,
    stored=1.5,
    summary="fp8, 14 blocks skipped, 29 frozen in 4-bit",
    why="""The model in fp8 (one file, 17 GB, with text encoders and VAE, which takes as much RAM), 256 px. The first 14 of the 57 blocks are skipped, which
is exact; the last 29 run without adapters, in 4-bit (`quantize_frozen` of **Dynamic Patch Trainer**), as the card has no room
for them as loaded. What that changes is computed once per example and undone in every step (`correct_4bit`): on our small model this learns 0.95 of what a LoRA on all blocks
learns. The 14 between them are trained, at twice the usual rate.""",
)
CARD_12 = card(
    12,
    ONE_FP8_FILE,
    blocks=select(ONE_FP8_FILE, 0.5, "manual", front=5, back=14),
    learning_rate=1e-4,
    trained_in="4-bit",
    frozen="4-bit",
    room=10.0,
    counted=9.1,
    stored=3.7,
    patch_min=512,
    summary="4-bit, 512 px, 5 blocks skipped, 14 frozen",
    why="""The model in fp8 (one file, 17 GB, with text encoders and VAE, which takes as much RAM), squares of 512 px, as large as the picture allows. For wide
or tall pictures set `patch_shape` to *as pictures* on **Precompute Residuals**. The first 5 of the 57 blocks are skipped, which is
exact; the last 14 run without adapters (`back_residual` exact); the 38 between them are trained, at the usual rate. All of them are in 4-bit (`quantize_kept` of **Memory
Plan**, `quantize_frozen` of **Dynamic Patch Trainer**), as the card has no room for so many as loaded. What that changes is computed once per example and undone in
every step (`correct_4bit`). On our small model this learns 1.00 of what a LoRA on all blocks learns, and fewer trained blocks in eight bits 0.96. For faster steps
choose `method` skip and freeze with `quantize_kept` off, and double `learning_rate`.""",
)
CARD_16 = card(
    16,
    ONE_FP8_FILE,
    blocks=select(ONE_FP8_FILE, 0.5, "manual", front=5, back=14),
    learning_rate=1e-4,
    room=13.5,
    counted=12.3,
    stored=3.7,
    patch_min=512,
    summary="fp8, 512 px, 5 blocks skipped, 14 frozen",
    why="""The model in fp8 (one file, 17 GB, with text encoders and VAE, which takes as much RAM), squares of 512 px, as large as the picture allows. For wide
or tall pictures set `patch_shape` to *as pictures* on **Precompute Residuals**. This card has room for more than the default: the first 5 of
the 57 blocks are skipped, which is exact; the last 14 run without adapters, as loaded (`back_residual` exact). The 38 between them are trained, at the usual
rate. On our small model this learns as much as a LoRA on all blocks. For faster steps choose `method` skip and freeze, and double `learning_rate`.""",
)
CARD_24 = card(
    24,
    THREE_FILES,
    blocks=select(THREE_FILES, 0.5, "manual", front=5, back=14),
    learning_rate=1e-4,
    room=20.5,
    counted=18.9,
    stored=3.7,
    patch_min=512,
    summary="bf16, 512 px, 5 blocks skipped, 14 frozen",
    why="""The model in bf16, as published (this also needs about 24 GB of RAM), squares of 512 px, as large as the picture
allows. For wide or tall pictures set `patch_shape` to *as pictures* on **Precompute Residuals**. This card has room for more than the
default: the first 5 of the 57 blocks are skipped, which is exact; the last 14 run without adapters, in int8 (`back_residual` exact). The 38
between them are trained, at the usual rate. On our small model this learns as much as a LoRA on all blocks. For less memory and time choose
`method` skip and freeze, and double `learning_rate`.""",
)

CARDS = {6: CARD_6, 8: CARD_8, 12: CARD_12, 16: CARD_16, 24: CARD_24}
RESUMES = [resumed(CARDS[size], size) for size in (8, 12, 24)]

RESUME = Graph(
    "BlockSkip 8 - Train further (paper)",
    {
        **THREE_FILES.prompt,
        **dataset(),
        **captions(THREE_FILES, ["dataset", 1]),
        **select(THREE_FILES, 0.5, "preset"),
        **prepared(THREE_FILES, ["dataset", 0], ["dataset", 2], back_residual="constant"),
        **watched(THREE_FILES, title="Continue: more steps", steps=1000),
        "other residuals": residuals(THREE_FILES, ["dataset", 0], ["dataset", 2], seed=1, back_residual="constant"),
        "other patches": node("PreviewImage", "New crops", images=["other residuals", 1]),
        "further": trainer(
            THREE_FILES,
            "Train a LoRA file further",
            residuals=["other residuals", 0],
            steps=250,
            learning_rate=5e-5,
            start_file="none",
            output_name="loras/my_subject_further",
        ),
        "further loss": node("LossGraphNode", "Plot Loss Graph", loss=["further", 1], filename_prefix="loss_graph"),
        **sampled(THREE_FILES),
    },
    (
        Column("1  Load", BLUE, (*THREE_FILES.names(), "dataset")),
        Column("2  Choose blocks", GREEN, ("probe", "select", "heatmap")),
        Column("3  Prepare", YELLOW, ("captions", "guidance", "residuals", "patches")),
        Column(
            "A  More steps",
            PURPLE,
            ("train", "loss"),
            note="""**The same run, longer.**

Only `steps` is higher than in *BlockSkip 8 - Train FLUX.1 LoRA (paper)*. So the run is found and continues after
its last step.""",
        ),
        TRY,
        LOOK,
        Column(
            "B  New crops (muted)",
            YELLOW,
            ("other residuals", "other patches"),
            note="""**For starting from a file.**

Select these two nodes and the two on the right, and press **Ctrl+M**: they are muted until you have a file. Another
`seed` gives other crops than last time.""",
        ),
        Column(
            "B  From a LoRA file (muted)",
            PURPLE,
            ("further", "further loss"),
            note="""**Train it further.**

Choose the file in `start_file` (in Nodes 2.0 under *Show advanced inputs*) and set `rank` to the file's or more. A lower
learning rate keeps more of what the LoRA has learned.""",
        ),
    ),
    """## Train further

**A. More steps.** A run continues where it stopped: after Cancel, after a crash, or because `steps` is higher now.
You need not switch anything on; `resume` is on by default. All other settings and the pictures must be the same as in
the run. Here they are those of *BlockSkip 8 - Train FLUX.1 LoRA (paper)*, with 1000 steps instead of 500. The result is the
same LoRA as from 1000 steps at once (with `lr_schedule` constant or constant_with_warmup).

The states of the three newest runs are kept in `output/blockskip/runs`.

**B. From a LoRA file.** The file may come from this trainer or another one. It may only change linear layers of the blocks
that are trained here, and `rank` must be the file's or more; otherwise the node says so. The two columns on the right are
muted, because they need your file. The optimiser starts from scratch.""",
    headline="Resume",
    subline="more steps for a run\nor from a LoRA file",
    twin="resume",
    muted=frozenset({"other residuals", "other patches", "further", "further loss"}),
)

SEVERAL = Graph(
    "BlockSkip 5 - Several subjects",
    {
        **ONE_FP8_FILE.prompt,
        "first": training_folder("Pictures of the first subject"),
        "first name": node(
            "StringConcatenate",
            "Name of the first subject",
            string_a="a photo of sks toy",
            string_b=["first", 1],
            delimiter=", ",
        ),
        "second": training_folder("Pictures of the second subject", "my_second_subject"),
        "second name": node(
            "StringConcatenate",
            "Name of the second subject",
            string_a="a photo of zwx dog",
            string_b=["second", 1],
            delimiter=", ",
        ),
        "all images": node(
            "CreateList", "All pictures", **{"inputs.input0": ["first", 0], "inputs.input1": ["second", 0]}
        ),
        "all texts": node(
            "CreateList", "All captions", **{"inputs.input0": ["first name", 0], "inputs.input1": ["second name", 0]}
        ),
        "all files": node("CreateList", "All files", **{"inputs.input0": ["first", 2], "inputs.input1": ["second", 2]}),
        **captions(ONE_FP8_FILE, ["all texts", 0]),
        **select(ONE_FP8_FILE, 0.5),
        **prepared(ONE_FP8_FILE, ["all images", 0], ["all files", 0], draws=800),
        **watched(ONE_FP8_FILE, steps=1000, learning_rate=2e-4, rank=32, output_name="loras/my_subjects"),
        **sampled(
            ONE_FP8_FILE,
            words="a photo of sks toy beside zwx dog on the beach",
            filename="my_subjects",
            title="Both of them",
        ),
    },
    (
        Column("1  Load", BLUE, (*ONE_FP8_FILE.names(),)),
        Column(
            "2  Subjects",
            YELLOW,
            ("first", "first name", "second", "second name", "all images", "all texts", "all files"),
            note="""**One folder for each.**

Inside ComfyUI's `input` folder. The name is put in front of every caption of its folder. Pictures without a `.txt` have
only the name as their caption.""",
        ),
        Column("3  Choose blocks", GREEN, ("probe", "select", "heatmap")),
        Column("4  Prepare", YELLOW, ("captions", "guidance", "residuals", "patches")),
        Column("5  Train", PURPLE, ("train", "loss")),
        Column("6  Try it", BLUE, TRY.nodes),
        Column("7  Look", BLUE, LOOK.nodes),
    ),
    """## Several subjects in one LoRA

Two folders of pictures, each with its own name: *sks toy* and *zwx dog*. **Create List** joins them, pictures, captions
and files in the same order, so that every picture keeps its caption. For a third subject, add one more folder, one more
name, and one more link into each **Create List**.

Training examples use all pictures in turn. So the folders should contain about the same number of pictures; a subject
with twice as many is seen twice as often.

Two subjects take more to learn than one: here 800 training examples (`draws`, about 2.3 GiB of disk), 1000 steps and
rank 32. That is a starting point, not measured. If the two get mixed up, choose names that differ more.

On less than 10 GB set `quantize_frozen` (More settings) of **Dynamic Patch Trainer** to 4-bit.

A dataset in sub-folders works as well: one **Load Training Folder** reads `my_subjects/1_toy` and
`my_subjects/1_dog` together; the number says how often each picture counts.""",
    headline="Several subjects",
    subline="two folders, two names\none LoRA",
    twin="several_subjects",
)

SELECT_BLOCKS = Graph(
    "BlockSkip 7 - Select blocks",
    {
        **ONE_FP8_FILE.prompt,
        "vision": node("CLIPVisionLoader", "Load a vision encoder", clip_name="clip_vision_h.safetensors"),
        **select(ONE_FP8_FILE, 0.5, "attention mask", vae=ONE_FP8_FILE.link("vae"), clip_vision=["vision", 0]),
        "heatmap": node("PreviewImage", "Effect of the text, by block", images=["select", 1]),
        "report": node("PreviewAny", "Report", source=["select", 2]),
    },
    (
        Column("1  Load", BLUE, (*ONE_FP8_FILE.names(), "vision")),
        Column("2  Measure", GREEN, ("probe", "select")),
        Column("3  Look", YELLOW, ("heatmap", "report"), 640),
    ),
    """## Which blocks can be skipped?

The text is hidden from the picture in the first few blocks, the last few, and a sliding window in between; the more the
picture changes, the more those blocks matter for your subject.

This runs once per model and prompt, and the result is kept: any other `skip_ratio` up to the measured one is a look-up.

The paper does this with a model that already knows the subject: to do the same, put **Load LoRA** between the model and
the node. Its encoder is DINO; Load CLIP Vision reads CLIP-ViT and DINOv2. Without an encoder, latents are compared.""",
    headline="Select blocks",
    subline="which can be left out?\nmeasured on your model",
    shows=("heatmap.png", (10, 56, 836, 305)),
)

APPLY = Graph(
    "BlockSkip 4 - Apply and compare",
    {
        **ONE_FP8_FILE.prompt,
        **picture(ONE_FP8_FILE),
        "apply": node(
            "BlockSkip_ApplyLora", "Apply BlockSkip LoRA", model=ONE_FP8_FILE.link("model"), strength_model=1.0
        ),
        "info": node("PreviewAny", "About this LoRA", source=["apply", 1]),
        "sample before": node("KSampler", "Sample the plain model", model=ONE_FP8_FILE.link("model"), **SAMPLE),
        "decode before": node("VAEDecode", "Decode", samples=["sample before", 0], vae=ONE_FP8_FILE.link("vae")),
        "sample after": node("KSampler", "Sample with the LoRA", model=["apply", 0], **SAMPLE),
        "decode after": node("VAEDecode", "Decode", samples=["sample after", 0], vae=ONE_FP8_FILE.link("vae")),
        "compare": node(
            "BlockSkip_Compare", "Compare Pictures", before=["decode before", 0], after=["decode after", 0]
        ),
        "after": node("SaveImage", "Saved: with the LoRA", images=["decode after", 0], filename_prefix="after"),
    },
    (
        Column("1  Load", BLUE, ONE_FP8_FILE.names()),
        Column("2  Apply", PURPLE, ("apply", "info")),
        Column("3  Prompt", GREEN, ("prompt", "guided", "negative", "size")),
        Column("4  Sample both", YELLOW, ("sample before", "decode before", "sample after", "decode after")),
        Column("5  Compare", BLUE, ("compare", "after"), 480),
    ),
    """## Before and after

Choose your LoRA in **Apply BlockSkip LoRA** (`lora_name`); the trainer saves to `output/loras`. The same seed and
prompt are sampled from the plain model and from the model with the LoRA. Drag on **Compare Pictures** to uncover one or the other.

Nothing is skipped here: sampling uses the whole model, so the LoRA also works in every other loader.""",
    headline="Apply and compare",
    subline="the same prompt and seed\nwithout and with the LoRA",
    shows=("first_lora.png", (620, 40, 816, 236), (620, 276, 816, 472)),
)

RALU = Graph(
    "BlockSkip 6 - Fast sampling (RALU)",
    {
        **ONE_FP8_FILE.prompt,
        "prompt": text("Prompt", "a photo of a red fox in a snowy forest, sharp details", ONE_FP8_FILE.link("clip")),
        "guided": node("FluxGuidance", "Guidance", conditioning=["prompt", 0], guidance=3.5),
        "size": node("EmptySD3LatentImage", "Picture size", width=1024, height=1024, batch_size=1),
        "sample": node(
            "BlockSkip_RALUSampler",
            "RALU Sampler",
            model=ONE_FP8_FILE.link("model"),
            positive=["guided", 0],
            latent_image=["size", 0],
            seed=0,
            cfg=1.0,
            preset="FLUX 5x",
            upsample_ratio=0.2,
            regions="edges",
            vae=ONE_FP8_FILE.link("vae"),
        ),
        "early": node("PreviewImage", "Regions refined early", images=["sample", 1]),
        "report": node("PreviewAny", "Stages", source=["sample", 2]),
        "decode": node("VAEDecode", "Decode", samples=["sample", 0], vae=ONE_FP8_FILE.link("vae")),
        "picture": node("SaveImage", "Picture", images=["decode", 0], filename_prefix="ralu"),
    },
    (
        Column("1  Load", BLUE, ONE_FP8_FILE.names()),
        Column("2  Prompt", GREEN, ("prompt", "guided", "size")),
        Column("3  Sample in three stages", PURPLE, ("sample", "report")),
        Column("4  Look", BLUE, ("decode", "picture", "early"), 480),
    ),
    """## Fast sampling with RALU

**RALU Sampler** replaces KSampler. It samples at half the side first, then brings the regions with edges to full
resolution, then the rest. FLUX 5x takes 15 steps, most of them on fewer tokens: by our count, 1 / 5.4 of the
operations of 50 plain steps. FLUX 7x takes 1 / 7.3 and is rougher; FLUX 4x takes 1 / 4.4.

Width and height must be multiples of 32 px. A LoRA goes between the loader and the sampler.

For SD3.5 load its model, text encoders and VAE, set **preset** to *SD3 2x* or *SD3 3x*, connect a negative prompt, and
raise **cfg**.""",
    headline="Fast sampling",
    subline="RALU: fine tokens where they matter\n1/5 of the operations",
    shows=("ralu.png", (0, 0, 768, 384)),
)

SD15 = Loaders(
    {
        "checkpoint": node(
            "CheckpointLoaderSimple", "Load Stable Diffusion 1.5", ckpt_name="v1-5-pruned-emaonly-fp16.safetensors"
        )
    },
    model=("checkpoint", 0),
    clip=("checkpoint", 1),
    vae=("checkpoint", 2),
)


def learned_word(loaders: Loaders, sampled_with: Prompt, **sampling: Any) -> Prompt:
    """Learn a word, and sample a prompt with it.

    Args:
        loaders: The nodes that load the model.
        sampled_with: The sampler's inputs besides the prompt, and the size of the picture.
        sampling: Settings of the sampler that differ.
    """
    return {
        **loaders.prompt,
        "dataset": training_folder("Pictures of your subject"),
        "train": node(
            "BlockSkip_TrainWord",
            "Train Word (ZOODiP)",
            model=loaders.link("model"),
            clip=loaders.link("clip"),
            vae=loaders.link("vae"),
            images=["dataset", 0],
            captions="a photo of {word}",
            like_word="toy",
            name="my_word",
            steps=500,
            seed=0,
        ),
        "loss": node("LossGraphNode", "Loss of each step", loss=["train", 2], filename_prefix="word_loss"),
        "report": node("PreviewAny", "Report", source=["train", 4]),
        "embeddings": node("BlockSkip_AcceptEmbeddings", "CLIP with Embeddings", clip=loaders.link("clip")),
        "words": node(
            "StringConcatenate", "Prompt with the word", string_a="a photo of", string_b=["train", 0], delimiter=" "
        ),
        "prompt": text("Prompt", ["words", 0], ["embeddings", 0]),
        **sampled_with,
        "sample": node("KSampler", "Sample with the word", model=loaders.link("model"), **{**SAMPLE, **sampling}),
        "decode": node("VAEDecode", "Decode", samples=["sample", 0], vae=loaders.link("vae")),
        "picture": node("SaveImage", "Your subject", images=["decode", 0], filename_prefix="my_word"),
    }


def columns_of_word(loaders: Loaders, *prompt: str) -> tuple[Column, ...]:
    """The columns of :func:`learned_word`.

    Args:
        loaders: The nodes that load the model.
        prompt: The nodes in ``sampled_with``.
    """
    return (
        Column("1  Load", BLUE, (*loaders.names(), "dataset")),
        Column("2  Learn a word", PURPLE, ("train",), 480),
        Column("3  What was learned", YELLOW, ("loss", "report")),
        Column("4  Prompt", GREEN, ("embeddings", "words", "prompt", *prompt)),
        Column("5  Look", BLUE, ("sample", "decode", "picture")),
    )


WORD = Graph(
    "BlockSkip 9 - Train a word",
    learned_word(
        SD15,
        {
            "negative": text("Negative prompt", "", SD15.link("clip")),
            "size": node("EmptyLatentImage", "Picture size", width=512, height=512, batch_size=1),
        },
        positive=["prompt", 0],
        cfg=7.0,
        scheduler="normal",
    ),
    columns_of_word(SD15, "negative", "size"),
    """## Teach the model a word

**Train Word** shows the model 3 to 10 pictures and moves the vectors of one new word until they describe them. It only
runs the model forward, so it needs about the memory of sampling, and the model may be in any weight format.

1. Put the pictures into a folder `my_subject` in ComfyUI's `input` folder, and choose it.
2. Set `like_word` to what the subject is: toy, dog, backpack.
3. Press Run. The word is saved to the embeddings folder; write `embedding:my_word_00001` in any prompt.

A word is a few kilobytes and weaker than a LoRA: it can only say what the model can already paint. The paper takes
20,000 steps; 500 show whether it works. Queueing again resumes a run that was cancelled.

Other models: change the loader. FLUX.1 and other large transformers work too, but one word changes them little.""",
    headline="Train a word",
    subline="textual inversion\nwithout gradients",
    twin="train_word",
)

WORD_OF_FLUX = Graph(
    "BlockSkip 9 - Train a word (FLUX.1)",
    learned_word(
        ONE_FP8_FILE,
        {
            "guided": node("FluxGuidance", "Guidance while sampling", conditioning=["prompt", 0], guidance=3.5),
            "negative": node("ConditioningZeroOut", "No negative prompt", conditioning=["prompt", 0]),
            "size": node("EmptySD3LatentImage", "Picture size", width=1024, height=1024, batch_size=1),
        },
    ),
    columns_of_word(ONE_FP8_FILE, "guided", "negative", "size"),
    """## Teach FLUX.1 a word

As *BlockSkip 9 - Train a word*, with FLUX.1-dev in fp8. Both of its text encoders learn the word.

1. Put 3 to 10 pictures into a folder `my_subject` in ComfyUI's `input` folder, and choose it.
2. Set `like_word` to what the subject is: toy, dog, backpack. One word is enough: on our small model two learned far less.
3. Press Run. The word is saved to the embeddings folder; write `embedding:my_word_00001` in any prompt.

The node first tells what the run needs and what is free. If the text encoders do not fit beside the model, they take
turns with it in every step, which is slow: choose a smaller `resolution` or fewer `directions`.

One word changes FLUX.1 little, even with gradients. For the likeness of a thing train a LoRA: *BlockSkip 1*.""",
    headline="Train a word",
    subline="for FLUX.1 in fp8",
    badge="FLUX.1",
    twin="train_word_flux",
)


def with_coarse_steps(adapters: str) -> Prompt:
    """Return Dynamic Patches with the adapters of a node, a sampler, and its picture."""
    return {
        "patches": node(
            "BlockSkip_DDiT",
            "Dynamic Patches (DDiT)",
            model=ONE_FP8_FILE.link("model"),
            mode="every other",
            error_budget=0.1,
            patch_adapters=[adapters, 0],
        ),
        "report": node("PreviewAny", "What is planned", source=["patches", 2]),
        "sample": node("KSampler", "Sample with dynamic patches", model=["patches", 0], **SAMPLE),
        "decode": node("VAEDecode", "Decode", samples=["sample", 0], vae=ONE_FP8_FILE.link("vae")),
    }


DDIT = Graph(
    "BlockSkip 6 - Dynamic patches (DDiT)",
    {
        **ONE_FP8_FILE.prompt,
        "texts": node("BlockSkip_LoadTrainingFolder", "Prompts: the texts of a folder", folder="my_subject"),
        "prompts": text("Encode the prompts", ["texts", 1], ONE_FP8_FILE.link("clip")),
        "guidance": node("FluxGuidance", "Guidance of the prompts", conditioning=["prompts", 0], guidance=3.5),
        "teach": node(
            "BlockSkip_TrainDDiT",
            "Train Patch Adapters (DDiT)",
            model=ONE_FP8_FILE.link("model"),
            positive=["guidance", 0],
            patch_sizes="2x",
            width=512,
            height=512,
            max_steps=1000,
            peak_learning_rate=1e-4,
            batch_size=1,
            seed=0,
            adapters_name="loras/patch_adapters",
            sampler_steps=20,
        ),
        "errors": node("PreviewImage", "Errors by noise level", images=["teach", 1]),
        "prompt": text("Prompt", "a photo of a red fox in a snowy forest, sharp details", ONE_FP8_FILE.link("clip")),
        "guided": node("FluxGuidance", "Guidance", conditioning=["prompt", 0], guidance=3.5),
        "negative": node("ConditioningZeroOut", "No negative prompt", conditioning=["prompt", 0]),
        "size": node("EmptySD3LatentImage", "Picture size", width=1024, height=1024, batch_size=1),
        **with_coarse_steps("teach"),
        "picture": node("SaveImage", "Picture", images=["decode", 0], filename_prefix="dynamic_patches"),
    },
    (
        Column("1  Load", BLUE, ONE_FP8_FILE.names()),
        Column("2  Prompts to train on", GREEN, ("texts", "prompts", "guidance")),
        Column("3  Train", PURPLE, ("teach", "errors"), 480),
        Column("4  Prompt", GREEN, ("prompt", "guided", "negative", "size")),
        Column("5  Use", YELLOW, ("patches", "report", "sample", "decode", "picture"), 480),
    ),
    """## Dynamic patches (DDiT)

**On our small test model fewer plain steps are better at equal operations, at 256 px.** At 512 px *auto* with `tau` 0.02 is as good
as they are, *every other* is not. Try it on your model, and compare.

**Train Patch Adapters (DDiT)** teaches the model to make some steps with larger patches, on a quarter of the tokens. It
samples its own training pictures from the texts of a folder in ComfyUI's input folder, 30 or more. It is saved to
output/loras: use it later with *BlockSkip 6 - Use patch adapters (DDiT)*.

**Dynamic Patches (DDiT)** goes between the model and a sampler: euler or another of those that its page lists. With *every
other* every second step is coarse: it is the one mode that needs no threshold.""",
    headline="Dynamic patches",
    subline="larger patches in some steps\nadapters trained on your model",
    twin="dynamic_patches",
)

USE_PATCHES = Graph(
    "BlockSkip 6 - Use patch adapters (DDiT)",
    {
        **ONE_FP8_FILE.prompt,
        "load": node("BlockSkip_LoadPatchAdapters", "Load Patch Adapters", file="none"),
        "about": node("PreviewAny", "About these adapters", source=["load", 1]),
        **picture(ONE_FP8_FILE, "a photo of a red fox in a snowy forest, sharp details"),
        **with_coarse_steps("load"),
        "sample plain": node(
            "KSampler", "Sample plainly, with fewer steps", model=ONE_FP8_FILE.link("model"), **{**SAMPLE, "steps": 14}
        ),
        "decode plain": node("VAEDecode", "Decode", samples=["sample plain", 0], vae=ONE_FP8_FILE.link("vae")),
        "compare": node("BlockSkip_Compare", "Compare Pictures", before=["decode plain", 0], after=["decode", 0]),
        "picture": node("SaveImage", "Picture", images=["decode", 0], filename_prefix="dynamic_patches"),
    },
    (
        Column("1  Load", BLUE, (*ONE_FP8_FILE.names(), "load", "about")),
        Column("2  Prompt", GREEN, ("prompt", "guided", "negative", "size")),
        Column("3  With coarse steps", YELLOW, ("patches", "report", "sample", "decode"), 480),
        Column("4  As much work, plainly", PURPLE, ("sample plain", "decode plain")),
        Column("5  Compare", BLUE, ("compare", "picture"), 480),
    ),
    """## Use patch adapters (DDiT)

Choose a file in **Load Patch Adapters**: one that *BlockSkip 6 - Dynamic patches (DDiT)* has trained on this model, which
is in output/loras (R refreshes the list). Adapters belong to one file of weights and are refused on another.

**Dynamic Patches (DDiT)** makes every other step on a quarter of the tokens. At 1024 px the 20 steps of FLUX.1-dev are
then counted as 13.6 plain ones. So **Compare Pictures** shows the picture of 14 plain steps beside it: on our
small test model fewer plain steps were better than every other step coarse, at 256 and 512 px. See which is better on yours.""",
    headline="Use patch adapters",
    subline="coarse steps beside fewer plain ones\nwith adapters made earlier",
    twin="use_patch_adapters",
    badge="DDiT",
)

OUTSIDE = Graph(
    "BlockSkip 8 - Run outside",
    {
        **ONE_FP8_FILE.prompt,
        **dataset(),
        **captions(ONE_FP8_FILE, ["dataset", 1]),
        **select(ONE_FP8_FILE, 0.5),
        **prepared(ONE_FP8_FILE, ["dataset", 0], ["dataset", 2]),
        "outside": node(
            "BlockSkip_WriteRun",
            "Run Outside",
            model=ONE_FP8_FILE.link("model"),
            residuals=["residuals", 0],
            steps=500,
            learning_rate=2e-4,
            rank=16,
            seed=0,
            accumulation=4,
            output_name="loras/my_subject",
            run_name="runs/my_subject",
        ),
        "command": node("PreviewAny", "The command", source=["outside", 1]),
    },
    (
        Column("1  Load", BLUE, (*ONE_FP8_FILE.names(), "dataset")),
        Column("2  Choose blocks", GREEN, ("probe", "select", "heatmap")),
        Column("3  Prepare", YELLOW, ("captions", "guidance", "residuals", "patches")),
        Column("4  Write it down", PURPLE, ("outside", "command")),
    ),
    """## Run outside

**Run Outside** stands in the place of Dynamic Patch Trainer. It writes the training to *output/runs* and shows the command that
does it: in a terminal, on several GPUs, or on another machine. It starts nothing itself.

The command saves the same LoRA in the same place. With *torchrun* each GPU trains on its share of every step, so
**accumulation** must be a multiple of their number; here it is 4. On less than 10 GB set `quantize_frozen` (More settings) to 4-bit.

For another machine, copy the two files of *output/runs*, and the model. The residuals are computed there, or copy
*output/blockskip* too.""",
    headline="Run outside",
    subline="a training as a file\nfor several GPUs or another machine",
    twin="run_outside",
)

GRAPHS = (
    FIRST, *CARDS.values(), *RESUMES, APPLY, SEVERAL, RALU, DDIT, USE_PATCHES, SELECT_BLOCKS, TRAIN,
    RESUME, OUTSIDE, WORD, WORD_OF_FLUX,
)  # fmt: skip
"""The shipped workflows, in the order of use, which their names show."""
