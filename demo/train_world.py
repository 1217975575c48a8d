"""Make the demo world's three files: autoencoder, text vectors, diffusion transformer.

    python train_world.py text --comfyui FOLDER
    python train_world.py vae  --comfyui FOLDER --minutes 28
    python train_world.py dit  --comfyui FOLDER --minutes 80 --compile

Every stage may be stopped at any time and goes on from its last checkpoint in ``--work``.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import host
import world
from blockskip_demo_nodes.words import WordEncoder, WordTokenizer, read_text_file

logger = logging.getLogger("train_world")

POOL_PICTURES = 6000
VAE_BATCH = 16
VAE_CROP = 64
LATENT_NOISE = 0.12

SENTENCE_LENGTH = 16
WORD_NORM, PLACE_NORM = 6.0, 4.0

SMALL, LARGE = 128, 256
SHARD = 2000
SHARDS = {SMALL: 15, LARGE: 4}
BATCHES = {SMALL: 64, LARGE: 18}
SHIFTS = {SMALL: 1.0, LARGE: 1.5}
CAPTION_DROPOUT = 0.1
DIT_RATE = 2e-3
EMA_DECAY = 0.998


class Clock:
    """Training time that survives restarts; progress runs from 0 to 1 over the budget."""

    def __init__(self, minutes: float, spent: float = 0.0) -> None:
        self.budget, self.before, self.start = 60 * minutes, spent, time.monotonic()

    @property
    def spent(self) -> float:
        """Seconds trained so far, over all runs."""
        return self.before + time.monotonic() - self.start

    @property
    def progress(self) -> float:
        """Share of the budget that is used."""
        return min(1.0, self.spent / self.budget)


def learning_rate(progress: float, step: int, peak: float, warmup: int = 100) -> float:
    """Linear warm-up over steps, then a cosine to nearly zero over the time budget."""
    return peak * min(1.0, (step + 1) / warmup) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def write_atomically(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file under another name, then rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file({key: value.contiguous() for key, value in tensors.items()}, partial, metadata=metadata)
    os.replace(partial, path)


def save_checkpoint(path: Path, state: dict) -> None:
    """Write a checkpoint so that a kill never leaves half a file."""
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def to_tensor(pictures: list) -> Tensor:
    """PIL pictures of one size to ``[B, 3, H, W]`` bytes."""
    return torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).permute(0, 3, 1, 2)


def picture_pool(count: int, seed: int) -> Tensor:
    """``[count, 3, 128, 128]`` bytes: whole scenes, parts of larger scenes, and doodles."""
    rng = random.Random(seed)
    pictures = []
    for i in range(count):
        if i % 3 == 0:
            pictures.append(world.render(world.random_scene(rng), 128))
            continue
        large = (
            world.render(world.random_scene(rng), 256)
            if i % 3 == 1
            else world.doodle(rng, rng.choice((128, 256)))
        )
        x, y = (round(rng.random() * (large.width - 128)) for _ in range(2))
        pictures.append(large.crop((x, y, x + 128, y + 128)))
    return to_tensor(pictures).contiguous()


def pool_batches(pool: Tensor, batch: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Endless batches ``[batch, 3, VAE_CROP, VAE_CROP]`` in [0, 1], cut and mirrored at random."""
    room = pool.shape[-1] - VAE_CROP
    while True:
        for rows in torch.randperm(len(pool), generator=generator).split(batch):
            places = torch.randint(room + 1, (len(rows), 2), generator=generator).tolist()
            parts = [
                pool[row, :, y : y + VAE_CROP, x : x + VAE_CROP]
                for row, (y, x) in zip(rows, places, strict=True)
            ]
            pictures = torch.stack(parts).float() / 255
            yield pictures.flip(-1) if torch.rand((), generator=generator) < 0.5 else pictures


def vae_step_loss(coder: torch.nn.Module, pictures: Tensor) -> tuple[Tensor, dict[str, float]]:
    """Reconstruct through noisy latents, at full and half size, with latents of unit variance."""
    from torch.nn.functional import avg_pool2d

    from world_vae import moment_loss, reconstruction_loss

    latents = coder.encode(pictures).float()
    noisy = latents + LATENT_NOISE * torch.randn_like(latents)
    whole = reconstruction_loss(coder.decode(noisy).float(), pictures)
    small = reconstruction_loss(coder.decode(avg_pool2d(latents, 2)).float(), avg_pool2d(pictures, 2))
    moments = moment_loss(latents)
    return whole + 0.25 * small + 0.05 * moments, {
        "whole": whole.item(),
        "small": small.item(),
        "moments": moments.item(),
    }


def train_vae(options: argparse.Namespace, device: torch.device) -> None:
    """Train the slim autoencoder and write it in the full layout."""
    from world_vae import SlimCoder

    torch.manual_seed(options.seed)
    coder = SlimCoder().to(device)
    optimiser = torch.optim.AdamW(coder.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=1e-4)
    checkpoint, step, clock = options.work / "vae.pt", 0, Clock(options.minutes)
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device)
        coder.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        step, clock = state["step"], Clock(options.minutes, state["spent"])
    generator = torch.Generator().manual_seed(options.seed + step)
    batches = pool_batches(picture_pool(POOL_PICTURES, options.seed), VAE_BATCH, generator)
    logger.info("vae: %d pictures, from step %d", POOL_PICTURES, step)

    def keep() -> None:
        state = {
            "model": coder.state_dict(),
            "optimiser": optimiser.state_dict(),
            "step": step,
            "spent": clock.spent,
        }
        save_checkpoint(checkpoint, state)
        export_vae(coder, options)

    while clock.progress < 1.0:
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(clock.progress, step, 1.5e-3)
        with torch.autocast(device.type, torch.bfloat16):
            loss, parts = vae_step_loss(coder, next(batches).to(device))
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(coder.parameters(), 1.0)
        optimiser.step()
        step += 1
        if step % 100 == 0:
            shown = " ".join(f"{name} {value:.4f}" for name, value in parts.items())
            logger.info("vae: step %d, %.1f min, %s", step, clock.spent / 60, shown)
        if step % 1000 == 0:
            keep()
    keep()
    logger.info("vae: done, %d steps", step)


def export_vae(coder: torch.nn.Module, options: argparse.Namespace) -> None:
    """Write the autoencoder as the "Load VAE" node reads it."""
    from world_vae import full_state_dict

    slim = {key: value.detach().cpu().float() for key, value in coder.state_dict().items()}
    state = {key: value.to(torch.bfloat16) for key, value in full_state_dict(slim).items()}
    write_atomically(options.assets / host.VAE_FILE, state, {"format": "pt", "world": "blockskip demo"})


def write_text_file(options: argparse.Namespace, device: torch.device) -> None:
    """Draw orthogonal vectors for words and places and write them with the vocabulary."""
    from world_dit import CONTEXT_DIM, POOLED_DIM

    generator = torch.Generator().manual_seed(options.seed)
    basis = torch.linalg.qr(torch.randn(CONTEXT_DIM, CONTEXT_DIM, generator=generator)).Q
    mixing = torch.linalg.qr(torch.randn(CONTEXT_DIM, POOLED_DIM, generator=generator)).Q
    count = len(world.VOCABULARY)
    tables = {
        "word_vectors": WORD_NORM * basis[:count],
        "place_vectors": PLACE_NORM * basis[count : count + SENTENCE_LENGTH],
        "projection": 0.5 * mixing,
    }
    metadata = {"format": "pt", "world": "blockskip demo", "words": json.dumps(world.VOCABULARY)}
    tables = {name: table.to(torch.bfloat16) for name, table in tables.items()}
    write_atomically(options.assets / host.TEXT_FILE, tables, metadata)
    logger.info("text: %d words, sentences of %d", count, SENTENCE_LENGTH)


def load_text(options: argparse.Namespace) -> tuple[WordTokenizer, WordEncoder]:
    """The written text file as a tokenizer and an encoder."""
    tables, data = read_text_file(options.assets / host.TEXT_FILE)
    encoder = WordEncoder()
    encoder.load_sd(tables)
    return WordTokenizer(tokenizer_data=data), encoder


def latent_shard(
    size: int, number: int, options: argparse.Namespace, coder: torch.nn.Module
) -> dict[str, Tensor]:
    """``SHARD`` scenes as latents ``[SHARD, 16, size/8, size/8]`` and word ids ``[SHARD, L]``, made once."""
    path = options.work / f"latents_{size}_{number:02d}.safetensors"
    if path.exists():
        return load_file(path)
    rng = random.Random(f"{options.seed}/{size}/{number}")
    scenes = [world.random_scene(rng) for _ in range(SHARD)]
    tokenizer, _ = load_text(options)
    device = next(coder.parameters()).device
    latents = []
    for start in range(0, SHARD, 50):
        pictures = to_tensor([world.render(scene, size) for scene in scenes[start : start + 50]])
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16):
            latents.append(coder.encode(pictures.to(device).float() / 255).half().cpu())
    ids = torch.tensor([tokenizer.word_ids(world.caption(scene)) for scene in scenes])
    write_atomically(path, {"latents": torch.cat(latents), "ids": ids}, {})
    logger.info("dit: wrote %s", path.name)
    return load_file(path)


def latent_set(size: int, shards: int, options: argparse.Namespace) -> dict[str, Tensor]:
    """All scenes of one picture size."""
    from world_vae import SlimCoder

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    coder = SlimCoder().to(device)
    coder.load_state_dict(torch.load(options.work / "vae.pt", map_location=device)["model"])
    parts = [latent_shard(size, number, options, coder) for number in range(shards)]
    return {key: torch.cat([part[key] for part in parts]) for key in ("latents", "ids")}


def random_rows(data: dict[str, Tensor], batch: int) -> tuple[Tensor, Tensor]:
    """Latents ``[batch, 16, h, w]`` and word ids ``[batch, L]``; a tenth of the captions are empty."""
    rows = torch.randint(len(data["latents"]), (batch,))
    ids = data["ids"][rows]
    kept = torch.rand(batch, 1) >= CAPTION_DROPOUT
    return data["latents"][rows].float(), ids * kept


def random_sigmas(batch: int, shift: float) -> Tensor:
    """Noise levels ``[batch]``: logit-normal, moved towards noise by ``shift``, one in ten uniform."""
    sigma = torch.randn(batch).sigmoid()
    sigma = shift * sigma / (1 + (shift - 1) * sigma)
    return torch.where(torch.rand(batch) < 0.1, torch.rand(batch), sigma)


@torch.no_grad()
def follow(average: torch.nn.Module, model: torch.nn.Module, step: int) -> None:
    """Exponential moving average of the weights, quick at the start."""
    decay = min(EMA_DECAY, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)


def dit_optimisers(model: torch.nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, Adam for all else."""
    from world_dit import hidden_matrices

    matrices = hidden_matrices(model)
    known = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in known]
    return [
        torch.optim.Muon(matrices, lr=DIT_RATE, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.Adam(others, lr=DIT_RATE, betas=(0.9, 0.99)),
    ]


def train_dit(options: argparse.Namespace, device: torch.device) -> None:
    """Train the transformer on cached latents: small pictures first, then both sizes in turn."""
    from world_dit import build_dit, flow_loss, prepare_for_training

    torch.manual_seed(options.seed)
    _, encoder = load_text(options)
    model, average = build_dit(device), build_dit(device)
    average.load_state_dict(model.state_dict())
    optimisers = dit_optimisers(model)
    sets = {size: latent_set(size, shards, options) for size, shards in SHARDS.items()}
    checkpoint, step, clock = options.work / "dit.pt", 0, Clock(options.minutes)
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        for optimiser, kept in zip(optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(kept)
        step, clock = state["step"], Clock(options.minutes, state["spent"])
        torch.manual_seed(options.seed + step)
    prepare_for_training(model, options.compile)
    logger.info(
        "dit: %s pictures, from step %d", {size: len(data["ids"]) for size, data in sets.items()}, step
    )

    def keep() -> None:
        state = {
            "model": model.state_dict(),
            "average": average.state_dict(),
            "step": step,
            "spent": clock.spent,
        }
        save_checkpoint(
            checkpoint, state | {"optimisers": [optimiser.state_dict() for optimiser in optimisers]}
        )
        export_dit(average, options)

    losses: dict[int, list[float]] = {size: [] for size in sets}
    kept_at = clock.spent
    while clock.progress < 1.0:
        size = LARGE if clock.progress > options.small_share and step % 2 else SMALL
        latents, ids = random_rows(sets[size], BATCHES[size])
        context, pooled = encoder.encode_ids(ids)
        sigma = random_sigmas(BATCHES[size], SHIFTS[size])
        rate = learning_rate(clock.progress, step, DIT_RATE, warmup=200)
        with torch.autocast(device.type, torch.bfloat16):
            loss = flow_loss(model, *(x.to(device) for x in (latents, sigma, context, pooled))).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser in optimisers:
            for group in optimiser.param_groups:
                group["lr"] = rate
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        step += 1
        follow(average, model, step)
        losses[size].append(loss.item())
        if step % 100 == 0:
            shown = ", ".join(
                f"{size} px {sum(kept) / len(kept):.4f}" for size, kept in losses.items() if kept
            )
            logger.info("dit: step %d, %.1f min, loss %s", step, clock.spent / 60, shown)
            losses = {size: [] for size in sets}
        if clock.spent - kept_at > 180:
            keep()
            kept_at = clock.spent
    keep()
    logger.info("dit: done, %d steps", step)


def export_dit(model: torch.nn.Module, options: argparse.Namespace) -> None:
    """Write the averaged weights as the "Load Diffusion Model" node reads them."""
    from world_dit import published_names

    state = {key: value.detach().to("cpu", torch.bfloat16) for key, value in model.state_dict().items()}
    write_atomically(
        options.assets / host.DIT_FILE, published_names(state), {"format": "pt", "world": "blockskip demo"}
    )


STAGES = {"vae": train_vae, "text": write_text_file, "dit": train_dit}


def main() -> None:
    """Run one stage."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", choices=list(STAGES))
    host.add_comfyui_argument(parser)
    parser.add_argument("--work", type=Path, default=Path.home() / ".cache" / "blockskip" / "world")
    parser.add_argument("--assets", type=Path, default=host.ASSETS)
    parser.add_argument(
        "--minutes", type=float, default=20.0, help="time budget of the stage, over all its runs"
    )
    parser.add_argument(
        "--small-share", type=float, default=0.45, help="share of the dit's time on 128 px alone"
    )
    parser.add_argument(
        "--compile", action="store_true", help="use torch.compile, which needs a C++ compiler"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    handlers = [logging.StreamHandler(), logging.FileHandler(options.work / f"{options.stage}.log")]
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", handlers=handlers)
    torch.set_num_threads(options.threads)
    device = host.use_comfyui(options.comfyui)
    STAGES[options.stage](options, device)


if __name__ == "__main__":
    main()
