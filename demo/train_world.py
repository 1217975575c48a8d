"""Make the demo world's three files: autoencoder, text vectors, diffusion transformer.

    python train_world.py text --comfyui FOLDER
    python train_world.py vae  --comfyui FOLDER --steps 8000
    python train_world.py dit  --comfyui FOLDER --steps 8000 --compile

Every stage may be stopped at any time and goes on from its last checkpoint in ``--work``; without a checkpoint,
``--start FILE`` lets the transformer go on from weights that an earlier run wrote.
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
SHARDS = {SMALL: 15, LARGE: 6}
BATCHES = {SMALL: 64, LARGE: 18}
SHIFTS = {SMALL: 1.5, LARGE: 2.0}
SHOWN = {"star": 2.5, "heart": 1.5, "ring": 1.5}  # how much more often than others; these are hard to learn
CAPTION_DROPOUT = 0.1
MAX_OBJECT_WEIGHT = 8.0
DIT_RATE = 2e-3
EMA_DECAY = 0.998


def learning_rate(step: int, steps: int, peak: float, warmup: int = 100) -> float:
    """Linear warm-up, then a cosine to nearly zero over all steps."""
    progress = min(1.0, step / steps)
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
    checkpoint, step = options.work / "vae.pt", 0
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device)
        coder.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        step = state["step"]
    generator = torch.Generator().manual_seed(options.seed + step)
    batches = pool_batches(picture_pool(POOL_PICTURES, options.seed), VAE_BATCH, generator)
    logger.info("vae: %d pictures, from step %d", POOL_PICTURES, step)

    def keep() -> None:
        save_checkpoint(
            checkpoint, {"model": coder.state_dict(), "optimiser": optimiser.state_dict(), "step": step}
        )
        export_vae(coder, options)

    while step < options.steps:
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, options.steps, 1.5e-3)
        with torch.autocast(device.type, torch.bfloat16):
            loss, parts = vae_step_loss(coder, next(batches).to(device))
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(coder.parameters(), 1.0)
        optimiser.step()
        step += 1
        if step % 100 == 0:
            shown = " ".join(f"{name} {value:.4f}" for name, value in parts.items())
            logger.info("vae: step %d, %s", step, shown)
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


def shard_scenes(size: int, number: int, seed: int) -> list[world.Scene]:
    """The ``SHARD`` scenes of one part of the training pictures."""
    rng = random.Random(f"{seed}/{size}/{number}")
    return [world.random_scene(rng) for _ in range(SHARD)]


def held_out_scenes(count: int, seed: int = 0) -> list[world.Scene]:
    """``count`` scenes whose captions are in none of the training pictures, at any size."""
    known = {
        world.caption(scene)
        for size, shards in SHARDS.items()
        for number in range(shards)
        for scene in shard_scenes(size, number, seed)
    }
    rng, chosen = random.Random(f"{seed}/held out"), {}
    while len(chosen) < count:
        scene = world.random_scene(rng)
        if world.caption(scene) not in known:
            chosen.setdefault(world.caption(scene), scene)
    return list(chosen.values())


def latent_shard(
    size: int, number: int, options: argparse.Namespace, coder: torch.nn.Module
) -> dict[str, Tensor]:
    """``SHARD`` scenes as latents ``[SHARD, 16, size/8, size/8]`` and word ids ``[SHARD, L]``, made once."""
    path = options.work / f"latents_{size}_{number:02d}.safetensors"
    if path.exists():
        return load_file(path)
    scenes = shard_scenes(size, number, options.seed)
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
    from world_vae import SlimCoder, slim_state_dict

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    coder = SlimCoder()
    coder.load_state_dict(slim_state_dict(load_file(options.assets / host.VAE_FILE), coder.state_dict()))
    coder.to(device)
    parts = [latent_shard(size, number, options, coder) for number in range(shards)]
    data = {key: torch.cat([part[key] for part in parts]) for key in ("latents", "ids")}
    scenes = [scene for number in range(shards) for scene in shard_scenes(size, number, options.seed)]
    return {
        **data,
        "weights": torch.stack([object_weights(scene, size // 8) for scene in scenes]),
        "shown": torch.tensor([SHOWN.get(scene.shape, 1.0) for scene in scenes]),
    }


def object_weights(scene: world.Scene, cells: int) -> Tensor:
    """Weights ``[cells, cells]`` of mean 1 that give a scene's object as much of the loss as its ground.

    Grounds are most of a picture, and without this the shape of small objects is learnt last. A weight per place
    does not move the optimum, which is the mean of the data at every place.
    """
    (x, y), reach = world.PLACES[scene.place], 1.2 * world.SIZES[scene.size]
    middle = (torch.arange(cells) + 0.5) / cells
    inside = ((middle - y).abs() < reach).unsqueeze(1) & ((middle - x).abs() < reach).unsqueeze(0)
    share = inside.float().mean()
    weights = torch.where(inside, min(MAX_OBJECT_WEIGHT, (1 - share) / share), 1.0)
    return (weights / weights.mean()).half()


def random_rows(data: dict[str, Tensor], batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Latents ``[batch, 16, h, w]``, word ids ``[batch, L]``, weights ``[batch, h, w]``; a tenth of the captions
    are empty."""
    rows = torch.multinomial(data["shown"], batch)
    ids = data["ids"][rows]
    kept = torch.rand(batch, 1) >= CAPTION_DROPOUT
    return data["latents"][rows].float(), ids * kept, data["weights"][rows].float()


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
    from world_dit import build_dit, comfy_names, flow_loss, prepare_for_training

    torch.manual_seed(options.seed)
    _, encoder = load_text(options)
    model, average = build_dit(device), build_dit(device)
    average.load_state_dict(model.state_dict())
    optimisers = dit_optimisers(model)
    sets = {size: latent_set(size, shards, options) for size, shards in SHARDS.items()}
    checkpoint, step = options.work / "dit.pt", 0
    if options.start and not checkpoint.exists():
        for copy in (model, average):
            copy.load_state_dict(comfy_names(load_file(options.start)))
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        for optimiser, kept in zip(optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(kept)
        step = state["step"]
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
        }
        save_checkpoint(
            checkpoint, state | {"optimisers": [optimiser.state_dict() for optimiser in optimisers]}
        )
        export_dit(average, options)

    losses: dict[int, list[float]] = {size: [] for size in sets}
    started = time.monotonic()
    while step < options.steps:
        size = LARGE if step > options.small_share * options.steps and step % 2 else SMALL
        latents, ids, weights = random_rows(sets[size], BATCHES[size])
        context, pooled = encoder.encode_ids(ids)
        sigma = random_sigmas(BATCHES[size], SHIFTS[size])
        rate = learning_rate(step, options.steps, options.rate, warmup=200)
        with torch.autocast(device.type, torch.bfloat16):
            loss = flow_loss(
                model, *(x.to(device) for x in (latents, sigma, context, pooled, weights))
            ).mean()
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
            logger.info("dit: step %d, %.0f s, loss %s", step, time.monotonic() - started, shown)
            losses, started = {size: [] for size in sets}, time.monotonic()
            keep()
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
    parser.add_argument("--steps", type=int, default=8000, help="steps of the stage, over all its runs")
    parser.add_argument("--rate", type=float, default=DIT_RATE, help="the dit's highest learning rate")
    parser.add_argument(
        "--start", type=Path, help="weights to start the dit from where there is no checkpoint"
    )
    parser.add_argument(
        "--small-share", type=float, default=0.45, help="share of the dit's steps on 128 px alone"
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
