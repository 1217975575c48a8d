"""What saved workflows and other packs rely on: each node's inputs in order, its outputs, and whether it takes lists.

Never remove, rename or reorder an entry: saved workflows name inputs, and store widget values by position. A new input is
optional and goes to the end. An input is one line:

    steps INT = 500 [1, 1000000]
    patch_min INT = 256 [16, 4096] step 16
    storage COMBO = disk {disk | chunked | on the fly}

A question mark marks an optional input. ``control``: the page adds another widget, which has a position in saved
workflows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")  # inputs that need no link
HOST_DECIDES = (
    "quantize_kept",
    "quantize_frozen",
    "scheduler",
    "start_file",
    "lora_name",
    "folder",
    "reference_folder",
    "file",
)  # choices that depend on version and files


@dataclass(frozen=True)
class Contract:
    """What a node promises."""

    inputs: str
    outputs: list[tuple[str, str]]
    takes_lists: bool = True


def line(entry: Any) -> str:
    """Return an input of a schema as a line."""
    kind = entry.get_io_type()
    parts = [entry.id, kind + ("?" if entry.optional else "")]
    if kind in WIDGETS:
        parts.append(f"= {entry.default}".rstrip())
    if kind in ("INT", "FLOAT"):
        parts.append(f"[{entry.min}, {entry.max}]")
        parts += [f"{name} {getattr(entry, name)}" for name in ("step", "round") if getattr(entry, name, None)]
    if kind == "COMBO":
        parts.append("{host's}" if entry.id in HOST_DECIDES else f"{{{' | '.join(entry.options)}}}")
    if getattr(entry, "control_after_generate", None):
        parts.append("control")
    return " ".join(parts)


CONTRACT = {
    "BlockSkip_SelectBlocks": Contract(
        """
            model MODEL
            positive CONDITIONING
            method COMBO = skip and freeze {attention mask | preset | manual | cost and influence | skip and freeze}
            skip_ratio FLOAT = 0.5 [0.0, 0.9] step 0.05
            front INT = 19 [0, 1000]
            back INT = 10 [0, 1000]
            vae VAE?
            clip_vision CLIP_VISION?
            negative CONDITIONING?
            probe_size INT? = 512 [64, 4096] step 16
            probe_steps INT? = 8 [1, 100]
            probe_cfg FLOAT? = 1.0 [1.0, 30.0] step 0.1
            probe_seeds INT? = 1 [1, 64]
            seed INT? = 0 [0, 18446744073709551615] control
            window_profile BOOLEAN? = True
            tail INT? = -1 [-1, 1000]
        """,
        [("selection", "BLOCKSKIP_SELECTION"), ("heatmap", "IMAGE"), ("report", "STRING")],
    ),
    "BlockSkip_MemoryPlan": Contract(
        """
            model MODEL
            positive CONDITIONING
            selection BLOCKSKIP_SELECTION
            patch_min INT = 256 [16, 4096] step 16
            draws INT = 400 [1, 1000000]
            storage COMBO = disk {disk | chunked | on the fly}
            rank INT = 16 [1, 1024]
            batch_size INT = 1 [1, 256]
            checkpointing BOOLEAN = True
            quantize_kept COMBO = off {host's}
            activation_budget FLOAT = 0.0 [0.0, 1024.0] step 0.25
            card_memory FLOAT = 0.0 [0.0, 1024.0] step 0.5
            chunk_size INT? = 64 [1, 100000]
            back_residual COMBO? = exact {constant | linear | exact}
            residual_format COMBO? = exact {exact | int8 | fp8}
            targets COMBO? = attention and mlp {attention and mlp | attention | mlp | all linear}
            probe_size INT? = 512 [64, 4096] step 16
            preset COMBO? = off {off | 6 GB | 8 GB | 12 GB | 16 GB | 24 GB}
            use_spare BOOLEAN? = True
            quantize_frozen COMBO? = int8 {host's}
            frames INT? = 1 [1, 1001]
            references IMAGE?
            reference_size INT? = 512 [16, 4096] step 16
            reference_part COMBO? = whole {whole | same part}
            references_each INT? = 1 [1, 64]
            coarse_patches COMBO? = off {off | 2x | 4x | 2x and 4x}
            optimizer COMBO? = AdamW {AdamW | AdamW 8-bit (bitsandbytes) | Adafactor | Prodigy (prodigyopt)}
            ema FLOAT? = 0.0 [0.0, 0.9999] step 0.001 round 0.0001
        """,
        [("report", "STRING"), ("fits", "BOOLEAN"), ("chart", "IMAGE"), ("settings", "BLOCKSKIP_MEMORY")],
    ),
    "BlockSkip_PrecomputeResiduals": Contract(
        """
            model MODEL
            vae VAE
            images IMAGE,LATENT
            positive CONDITIONING
            selection BLOCKSKIP_SELECTION
            draws INT = 400 [1, 1000000]
            patch_min INT = 256 [16, 4096] step 16
            patch_max INT = 512 [16, 4096] step 16
            storage COMBO = disk {disk | chunked | on the fly}
            seed INT = 0 [0, 18446744073709551615] control
            patch_order COMBO? = low-to-high {low-to-high | high-to-low | random | fixed}
            timesteps COMBO? = model {model | uniform | logit-normal | shifted}
            timestep_shift FLOAT? = 3.0 [0.01, 100.0] step 0.01
            chunk_size INT? = 64 [1, 100000]
            back_residual COMBO? = exact {constant | linear | exact}
            residual_format COMBO? = exact {exact | int8 | fp8}
            memory_settings BLOCKSKIP_MEMORY?
            files BLOCKSKIP_FILES?
            frames INT? = 1 [1, 1001]
            noise_from FLOAT? = 0.0 [0.0, 1.0] step 0.001
            noise_to FLOAT? = 1.0 [0.0, 1.0] step 0.001
            references IMAGE?
            reference_size INT? = 512 [16, 4096] step 16
            reference_part COMBO? = whole {whole | same part}
            caption_dropout FLOAT? = 0.0 [0.0, 1.0] step 0.01
            empty_caption CONDITIONING?
            patch_shape COMBO? = square {square | as pictures}
        """,
        [("residuals", "BLOCKSKIP_RESIDUALS"), ("patches", "IMAGE")],
    ),
    "BlockSkip_SampleWhileTraining": Contract(
        """
            positive CONDITIONING
            vae VAE
            every INT = 100 [1, 1000000]
            at_start BOOLEAN = True
            width INT = 512 [16, 4096] step 16
            height INT = 512 [16, 4096] step 16
            sampler_steps INT = 20 [1, 1000]
            cfg FLOAT = 1.0 [1.0, 100.0] step 0.1 round 0.01
            scheduler COMBO = simple {host's}
            seed INT = 0 [0, 18446744073709551615] control
            negative CONDITIONING?
            memory_budget FLOAT? = 2.0 [0.0, 1024.0] step 0.25
            clip_vision CLIP_VISION?
            reference_images IMAGE?
        """,
        [("samples", "BLOCKSKIP_SAMPLES")],
    ),
    "BlockSkip_TrainLora": Contract(
        """
            model MODEL
            residuals BLOCKSKIP_RESIDUALS
            steps INT = 500 [1, 1000000]
            learning_rate FLOAT = 0.0002 [1e-08, 1.0] step 1e-06 round 1e-08
            rank INT = 16 [1, 1024]
            seed INT = 0 [0, 18446744073709551615] control
            alpha FLOAT? = 0.0 [0.0, 1024.0] step 0.5
            targets COMBO? = attention and mlp {attention and mlp | attention | mlp | all linear}
            batch_size INT? = 1 [1, 256]
            accumulation INT? = 1 [1, 256]
            lr_schedule COMBO? = constant {constant | constant_with_warmup | cosine | linear}
            warmup_steps INT? = 0 [0, 100000]
            max_grad_norm FLOAT? = 1.0 [0.0, 1000.0] step 0.1
            weight_decay FLOAT? = 0.01 [0.0, 1.0] step 0.001
            checkpointing BOOLEAN? = True
            loss_weighting COMBO? = none {none | sigma_sqrt | cosmap}
            output_name STRING? = loras/blockskip
            file_format COMBO? = diffusers {diffusers | peft | kohya}
            activation_budget FLOAT? = 0.0 [0.0, 1024.0] step 0.25
            optimizer COMBO? = AdamW {AdamW | AdamW 8-bit (bitsandbytes) | Adafactor | Prodigy (prodigyopt)}
            kept_weights COMBO? = resident {resident | streamed}
            quantize_kept COMBO? = off {host's}
            save_every INT? = 100 [0, 1000000]
            keep_last INT? = 2 [1, 1000]
            resume BOOLEAN? = True
            start_from LORA_MODEL?
            start_file COMBO? = none {host's}
            samples BLOCKSKIP_SAMPLES?
            memory_settings BLOCKSKIP_MEMORY?
            check_memory BOOLEAN? = True
            quantize_frozen COMBO? = int8 {host's}
            loss_table BOOLEAN? = False
            ema FLOAT? = 0.0 [0.0, 0.9999] step 0.001 round 0.0001
            tensorboard BOOLEAN? = False
            correct_4bit BOOLEAN? = True
        """,
        [("lora", "LORA_MODEL"), ("loss_map", "LOSS_MAP"), ("steps", "INT")],
    ),
    "BlockSkip_ApplyLora": Contract(
        """
            model MODEL
            strength_model FLOAT = 1.0 [-10.0, 10.0] step 0.01
            lora LORA_MODEL?
            lora_name COMBO? = none {host's}
        """,
        [("model", "MODEL"), ("info", "STRING")],
        takes_lists=False,
    ),
    "BlockSkip_RALUSampler": Contract(
        """
            model MODEL
            positive CONDITIONING
            latent_image LATENT
            seed INT = 0 [0, 18446744073709551615] control
            cfg FLOAT = 1.0 [0.0, 100.0] step 0.1
            preset COMBO = FLUX 5x {FLUX 4x | FLUX 5x | FLUX 7x | SD3 2x | SD3 3x | custom}
            upsample_ratio FLOAT = 0.2 [0.0, 1.0] step 0.01
            regions COMBO = edges {edges | latent gradient | edges (as published)}
            negative CONDITIONING?
            vae VAE?
            mask MASK?
            custom_steps STRING? = 5, 6, 7
            custom_ends STRING? = 0.3, 0.45, 1
            custom_shift FLOAT? = 3.0 [0.1, 100.0] step 0.01
        """,
        [("latent", "LATENT"), ("early_regions", "IMAGE"), ("report", "STRING")],
        takes_lists=False,
    ),
    "BlockSkip_LoadTrainingFolder": Contract(
        """
            folder COMBO = None {host's}
            trigger_word STRING? =
            flip BOOLEAN? = False
            frames INT? = 1 [1, 1001]
            clips_per_video INT? = 1 [1, 1000]
            reference_folder COMBO? = none {host's}
            with_pictures BOOLEAN? = False
        """,
        [("images", "IMAGE"), ("texts", "STRING"), ("files", "BLOCKSKIP_FILES"), ("references", "IMAGE")],
        takes_lists=False,
    ),
    "BlockSkip_TrainWord": Contract(
        """
            model MODEL
            clip CLIP
            vae VAE
            images IMAGE
            captions STRING = a photo of {word}
            like_word STRING = object
            name STRING = my_word
            steps INT = 500 [1, 1000000]
            seed INT = 0 [0, 18446744073709551615] control
            resolution INT? = 512 [64, 4096] step 16
            estimator COMBO? = leave-one-out {leave-one-out | forward difference | central | paper}
            directions INT? = 8 [1, 64]
            step_size FLOAT? = 0.4 [0.001, 10.0] step 0.01 round 0.001
            perturbation FLOAT? = 0.2 [0.0001, 10.0] step 0.01 round 0.0001
            check_perturbation BOOLEAN? = True
            noise_from FLOAT? = 0.0 [0.0, 1.0] step 0.001
            noise_to FLOAT? = 1.0 [0.0, 1.0] step 0.001
            fixed_examples INT? = 256 [0, 100000]
            subspace_every INT? = 0 [0, 100000]
            subspace_share FLOAT? = 0.001 [1e-06, 0.999] step 0.001 round 1e-06
            mirror BOOLEAN? = False
            guidance FLOAT? = 1.0 [0.0, 100.0] step 0.1
            residency COMBO? = auto {auto | together | in turns}
            save_every INT? = 100 [0, 1000000]
            resume BOOLEAN? = True
            tensorboard BOOLEAN? = False
            sample_prompts STRING? =
            samples BLOCKSKIP_SAMPLES?
        """,
        [("word", "STRING"), ("clip", "CLIP"), ("loss_map", "LOSS_MAP"), ("steps", "INT"), ("report", "STRING")],
    ),
    "BlockSkip_Compare": Contract("before IMAGE\nafter IMAGE", [], takes_lists=False),
    "BlockSkip_AcceptEmbeddings": Contract("clip CLIP", [("clip", "CLIP")], takes_lists=False),
    "BlockSkip_TrainDDiT": Contract(
        """
            model MODEL
            positive CONDITIONING
            patch_sizes COMBO = 2x {2x | 4x | 2x and 4x}
            width INT = 512 [16, 4096] step 16
            height INT = 512 [16, 4096] step 16
            max_steps INT = 1000 [1, 1000000]
            peak_learning_rate FLOAT = 0.0001 [1e-07, 1.0] step 1e-05 round 1e-07
            batch_size INT = 1 [1, 256]
            seed INT = 0 [0, 18446744073709551615] control
            adapters_name STRING = loras/patch_adapters
            negative CONDITIONING?
            pictures_per_prompt INT? = 2 [1, 64]
            sampler_steps INT? = 20 [1, 1000]
            cfg FLOAT? = 1.0 [0.0, 100.0] step 0.1
            scheduler COMBO? = simple {host's}
            lora_rank INT? = 32 [1, 1024]
            lora_targets COMBO? = mlp {mlp | attention and mlp | attention | all linear}
            resize COMBO? = nearest {nearest | bilinear}
            checkpointing BOOLEAN? = True
            validate_every INT? = 50 [1, 100000]
            patience INT? = 4 [0, 1000]
            save_every INT? = 100 [0, 1000000]
            resume BOOLEAN? = True
            images IMAGE?
            vae VAE?
            tensorboard BOOLEAN? = False
            frames INT? = 1 [1, 1001]
            noise_from FLOAT? = 0.0 [0.0, 1.0] step 0.001
            noise_to FLOAT? = 1.0 [0.0, 1.0] step 0.001
            train_on COMBO? = all levels {all levels | every other step | windows}
            planned_steps INT? = 20 [1, 1000]
            windows STRING? =
        """,
        [("patch_adapters", "BLOCKSKIP_PATCH_ADAPTERS"), ("errors", "IMAGE"), ("report", "STRING")],
    ),
    "BlockSkip_LoadPatchAdapters": Contract(
        """
            file COMBO = none {host's}
        """,
        [("patch_adapters", "BLOCKSKIP_PATCH_ADAPTERS"), ("info", "STRING")],
        takes_lists=False,
    ),
    "BlockSkip_DDiT": Contract(
        """
            model MODEL
            mode COMBO = every other {every other | windows | auto | off}
            error_budget FLOAT = 0.1 [0.0, 1.0] step 0.005 round 0.0001
            patch_adapters BLOCKSKIP_PATCH_ADAPTERS?
            sigmas SIGMAS?
            windows STRING? =
            tau FLOAT? = 0.001 [1e-06, 1000.0] step 0.0001 round 1e-06
            percentile FLOAT? = 0.4 [0.0, 1.0] step 0.01
            criterion COMBO? = third difference {third difference | third difference (as published)}
            hold INT? = 3 [0, 1000]
            longest_run INT? = 6 [0, 1000]
            first_own INT? = 1 [0, 1000]
            last_own INT? = 1 [0, 1000]
        """,
        [("model", "MODEL"), ("patches", "IMAGE"), ("report", "STRING")],
        takes_lists=False,
    ),
    "BlockSkip_WriteRun": Contract(
        """
            model MODEL
            residuals BLOCKSKIP_RESIDUALS
            steps INT = 500 [1, 1000000]
            learning_rate FLOAT = 0.0002 [1e-08, 1.0] step 1e-06 round 1e-08
            rank INT = 16 [1, 1024]
            seed INT = 0 [0, 18446744073709551615] control
            alpha FLOAT? = 0.0 [0.0, 1024.0] step 0.5
            targets COMBO? = attention and mlp {attention and mlp | attention | mlp | all linear}
            batch_size INT? = 1 [1, 256]
            accumulation INT? = 1 [1, 256]
            lr_schedule COMBO? = constant {constant | constant_with_warmup | cosine | linear}
            warmup_steps INT? = 0 [0, 100000]
            max_grad_norm FLOAT? = 1.0 [0.0, 1000.0] step 0.1
            weight_decay FLOAT? = 0.01 [0.0, 1.0] step 0.001
            checkpointing BOOLEAN? = True
            loss_weighting COMBO? = none {none | sigma_sqrt | cosmap}
            output_name STRING? = loras/blockskip
            file_format COMBO? = diffusers {diffusers | peft | kohya}
            activation_budget FLOAT? = 0.0 [0.0, 1024.0] step 0.25
            optimizer COMBO? = AdamW {AdamW | AdamW 8-bit (bitsandbytes) | Adafactor | Prodigy (prodigyopt)}
            kept_weights COMBO? = resident {resident | streamed}
            quantize_kept COMBO? = off {host's}
            save_every INT? = 100 [0, 1000000]
            keep_last INT? = 2 [1, 1000]
            resume BOOLEAN? = True
            start_from LORA_MODEL?
            start_file COMBO? = none {host's}
            memory_settings BLOCKSKIP_MEMORY?
            check_memory BOOLEAN? = True
            quantize_frozen COMBO? = int8 {host's}
            loss_table BOOLEAN? = False
            run_name STRING? = runs/blockskip
            ema FLOAT? = 0.0 [0.0, 0.9999] step 0.001 round 0.0001
            tensorboard BOOLEAN? = False
            correct_4bit BOOLEAN? = True
        """,
        [("run_file", "STRING"), ("command", "STRING")],
    ),
}
