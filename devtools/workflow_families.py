"""Definitions of the shipped workflows for models other than FLUX.1, on the files of ComfyUI's own templates."""

from __future__ import annotations

from dataclasses import dataclass

from workflow_graphs import (
    BLUE,
    FROM_PLAN,
    GREEN,
    PURPLE,
    YELLOW,
    Column,
    Graph,
    Loaders,
    chosen,
    memory_plan,
    node,
    residuals,
    sample_request,
    text,
    trainer,
    training_folder,
)


def three_files(model: str, encoder: str, kind: str, vae: str, title: str) -> Loaders:
    """A diffusion model, its text encoder and its VAE in a file each."""
    return Loaders(
        {
            "model": node("UNETLoader", f"Load {title}", unet_name=model, weight_dtype="default"),
            "clip": node("CLIPLoader", "Load its text encoder", clip_name=encoder, type=kind, device="default"),
            "vae": node("VAELoader", "Load its VAE", vae_name=vae),
        },
        model=("model", 0),
        clip=("clip", 0),
        vae=("vae", 0),
    )


LTX_2 = "ltx-2-19b-dev-fp8.safetensors"
LTX_2_FILES = Loaders(
    {
        "checkpoint": node("CheckpointLoaderSimple", "Load LTX-2", ckpt_name=LTX_2),
        "clip": node(
            "LTXAVTextEncoderLoader",
            "Load its text encoder",
            text_encoder="gemma_3_12B_it_fp4_mixed.safetensors",
            ckpt_name=LTX_2,
            device="default",
        ),
    },
    model=("checkpoint", 0),
    clip=("clip", 0),
    vae=("checkpoint", 2),
)


@dataclass(frozen=True)
class Family:
    """What differs between the workflows.

    Attributes:
        name: Name of the model for users, also in the file's name.
        loaders: The nodes that load it.
        twin: Name of the twin.
        steps, cfg: Of the samples while training.
        about: What to know about training it, one or two sentences.
        badge: Its name on the thumbnail, if not the name's first word.
    """

    name: str
    loaders: Loaders
    twin: str
    steps: int
    cfg: float
    about: str
    badge: str = ""

    def graph(self) -> Graph:
        """The workflow."""
        loaders, with_negative = self.loaders, self.cfg > 1.0
        request = sample_request(loaders, 512)
        request["inputs"] |= {"sampler_steps": self.steps, "cfg": self.cfg}
        if with_negative:
            request["inputs"]["negative"] = ["negative", 0]
        negative = {"negative": text("Negative prompt", "", loaders.link("clip"))} if with_negative else {}
        return Graph(
            f"BlockSkip 2 - Train {self.name}",
            {
                **loaders.prompt,
                "images": training_folder("Pictures of your subject"),
                # the keys that the shared parts link to
                "guidance": text("One caption for all pictures", "a photo of sks toy", loaders.link("clip")),
                "select": chosen(loaders, ["guidance", 0], 0.5, front=1, back=1),
                **memory_plan(loaders, "off", draws=200),
                "residuals": residuals(loaders, ["images", 0], ["images", 2], draws=200, **FROM_PLAN),
                "guided": text("Prompt of the samples", "a photo of sks toy on the beach", loaders.link("clip")),
                **negative,
                "samples": request,
                "train": trainer(
                    loaders,
                    steps=800,
                    learning_rate=2e-4,
                    accumulation=1,
                    output_name=f"loras/my_{self.twin}",
                    samples=["samples", 0],
                    **FROM_PLAN,
                ),
            },
            (
                Column("1  Your pictures", BLUE, (*loaders.names(), "images", "guidance"), 340),
                Column("2  Will it fit?", GREEN, ("select", "plan"), 340),
                Column("3  Prepare", YELLOW, ("residuals", "guided", *negative), 340),
                Column("4  Train", PURPLE, ("samples", "train"), 420),
            ),
            f"""## Train a LoRA for {self.name}

{self.about}

1. Are files missing? Press *View details*, then *Download*. They are those of ComfyUI's own templates, and take about as much RAM as disk.
2. Make a folder `my_subject` inside ComfyUI's `input` folder, with 4 to 20 pictures of *one* thing. Press **R**, then choose
   the folder.
3. *sks* will be its name. For a dog write *a photo of sks dog*, here and in the prompt of the samples.
   **trigger_word** and `.txt` files have no effect here: all pictures share the one caption. To use them, connect **texts** of
   *Pictures of your subject* to **text** of *One caption for all pictures*; or connect ComfyUI's **Generate Text** there, with
   **images** and a CLIP that sees pictures.
4. Press **Run**. **Memory Plan** says whether your card is large enough, and makes it fit.
5. The chart shows a picture of the prompt every 100 steps. **Cancel** saves the LoRA so far, and **Run** continues. It goes to
   `output/loras`; load it with Load LoRA.

A quarter of the blocks, the first, are skipped, which is exact; the last half run without adapters, in eight bits or fewer. Of all
choices that save as much memory, this learned the most on our small model; what blocks in 4-bit would change is undone. On this one nobody has
measured it, and nothing here has been tried on a GPU yet: please tell us how it went.""",
            headline=self.name,
            subline="a first LoRA\non ComfyUI's own files",
            twin=self.twin,
            badge=self.badge or self.name.split()[0],
        )


FAMILIES = tuple(
    family.graph()
    for family in (
        Family(
            "Z-Image Turbo",
            three_files(
                "z_image_turbo_bf16.safetensors", "qwen_3_4b.safetensors", "lumina2", "ae.safetensors", "Z-Image"
            ),
            "z_image_turbo",
            8,
            1.0,
            "Z-Image Turbo is distilled to few steps. Training on it slowly undoes that: if samples blur, stop earlier or put a "
            "training adapter (a LoRA made for this) on the model with LoraLoaderModelOnly, in front of all nodes that take the model. The "
            "chart's samples then contain the adapter, so at few steps they look worse than the result: judge that with Load LoRA on "
            "the model without it.",
        ),
        Family(
            "Qwen-Image",
            three_files(
                "qwen_image_fp8_e4m3fn.safetensors",
                "qwen_2.5_vl_7b_fp8_scaled.safetensors",
                "qwen_image",
                "qwen_image_vae.safetensors",
                "Qwen-Image",
            ),  # fmt: skip
            "qwen_image",
            20,
            2.5,
            "20 billion weights, in fp8. On 16 GB Memory Plan puts the frozen blocks into 4-bit, on 12 GB the trained ones too. On 8 GB "
            "nothing fits: weights are moved in every step, which is slow; take Z-Image or FLUX.1 there.",
        ),
        Family(
            "Qwen-Image 2.1",
            three_files(
                "qwen_image_2.1_int8_convrot.safetensors",
                "qwen3vl_8b_int8_convrot.safetensors",
                "qwen_image",
                "qwen_image_2.1_vae_bf16.safetensors",
                "Qwen-Image 2.1",
            ),  # fmt: skip
            "qwen_image_21",
            25,
            1.0,
            "**Needs ComfyUI 0.37 or newer**; an older one opens this, but cannot load the model. 7 billion weights, in int8. How its "
            "blocks are laid out is found by a few small calls first, which takes some seconds.",
            "Qwen 2.1",
        ),
        Family(
            "Krea 2",
            three_files(
                "krea2_turbo_int8_convrot.safetensors",
                "qwen3vl_4b_fp8_scaled.safetensors",
                "krea2",
                "qwen_image_vae.safetensors",
                "Krea 2 Turbo",
            ),  # fmt: skip
            "krea_2",
            8,
            1.0,
            "The Turbo model, in int8. It is distilled: if samples blur, stop earlier. How its blocks are laid out is found by a few "
            "small calls first, which takes some seconds.",
        ),
        Family(
            "FLUX.2 Klein",
            three_files(
                "flux-2-klein-base-4b-fp8.safetensors",
                "qwen_3_4b.safetensors",
                "flux2",
                "flux2-vae.safetensors",
                "FLUX.2 Klein 4B base",
            ),  # fmt: skip
            "flux2_klein",
            20,
            4.0,
            "The base model, which is not distilled and made for training. The LoRA usually works on the distilled Klein 4B too; nobody has tried it here.",
        ),
        Family(
            "Wan 2.2",
            three_files(
                "wan2.2_ti2v_5B_fp16.safetensors",
                "umt5_xxl_fp8_e4m3fn_scaled.safetensors",
                "wan",
                "wan2.2_vae.safetensors",
                "Wan 2.2 5B",
            ),  # fmt: skip
            "wan_22",
            20,
            5.0,
            "This trains on pictures. To train on clips, put videos into the folder and set `frames` (More settings) to 17 on **Load "
            "Training Folder** and **Precompute Residuals**; Memory Plan takes it from there.",
        ),
        Family(
            "LTX-2",
            LTX_2_FILES,
            "ltx_2",
            20,
            3.0,
            "This trains on pictures, without sound. To train on clips, put videos into the folder and set `frames` (More settings) to "
            "17 on **Load Training Folder** and **Precompute Residuals**; Memory Plan takes it from there.",
        ),
        Family(
            "MiniMax H3",
            three_files(
                "minimax_h3_fl2va_pruned_int8_convrot.safetensors",
                "qwen3vl_32b_minimax_h3_nvfp4_awq.safetensors",
                "minimax",
                "minimax_h3_video_vae_fp16.safetensors",
                "MiniMax H3",
            ),  # fmt: skip
            "minimax_h3",
            20,
            1.0,
            "33 billion weights, in int8. This trains on pictures, with silence for their sound, one at a time (`batch_size` 1). To "
            "train on clips, put videos into the folder and set `frames` (More settings) to 22 on **Load Training Folder** "
            "and **Precompute Residuals**; Memory Plan takes it from there.",
        ),
    )
)
