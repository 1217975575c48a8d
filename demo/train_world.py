"""Makes the demo world's three files: autoencoder, text vectors, diffusion transformer.

    python train_world.py text --comfyui FOLDER
    python train_world.py vae  --comfyui FOLDER --steps 8000
    python train_world.py dit  --comfyui FOLDER --steps 8000 --compile

Every stage may be stopped at any time and resumes from its last checkpoint in ``--work``; without a checkpoint,
``--start FILE`` makes the transformer start from weights that an earlier run wrote.
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

import torch
from safetensors.torch import load_file
from torch import Tensor

import host
import world
from blockskip_demo_nodes.words import WordEncoder, WordTokenizer, read_text_file
from world_data import (
    BUCKETS,
    LARGE,
    SAID_SHARE,
    Bucket,
    Latents,
    random_bucket,
    random_rows,
    random_sigmas,
    to_tensor,
)
from world_files import save_checkpoint, write_atomically

logger = logging.getLogger("train_world")

POOL_PICTURES = 6000
VAE_BATCH = 16
VAE_CROP = 64
LATENT_NOISE = 0.12

SENTENCE_LENGTH = 16
FIRST_WORDS = 40  # words added later come after the positions, so that no vector changes
WORD_NORM, PLACE_NORM = 6.0, 4.0

DIT_RATE = 2e-3
EMA_DECAY = 0.998
LOGGED = 50  # steps between two lines of the log, each with a checkpoint


def learning_rate(step: int, steps: int, peak: float, warmup: int = 100) -> float:
    """Linear warm-up, then a cosine to nearly zero over all steps."""
    progress = min(1.0, step / steps)
    return peak * min(1.0, (step + 1) / warmup) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


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
        with host.half_precision(device):
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
    """Write the autoencoder for the "Load VAE" node."""
    from world_vae import full_state_dict

    slim = {key: value.detach().cpu().float() for key, value in coder.state_dict().items()}
    state = {key: value.to(torch.bfloat16) for key, value in full_state_dict(slim).items()}
    write_atomically(options.assets / host.VAE_FILE, state, {"format": "pt", "world": "blockskip demo"})


def write_text_file(options: argparse.Namespace, device: torch.device) -> None:
    """Draw orthogonal vectors for words and positions and write them with the vocabulary."""
    from world_dit import CONTEXT_DIM, POOLED_DIM

    generator = torch.Generator().manual_seed(options.seed)
    basis = torch.linalg.qr(torch.randn(CONTEXT_DIM, CONTEXT_DIM, generator=generator)).Q
    mixing = torch.linalg.qr(torch.randn(CONTEXT_DIM, POOLED_DIM, generator=generator)).Q
    first, count = FIRST_WORDS, len(world.VOCABULARY)
    words = torch.cat([basis[:first], basis[first + SENTENCE_LENGTH : count + SENTENCE_LENGTH]])
    tables = {
        "word_vectors": WORD_NORM * words,
        "place_vectors": PLACE_NORM * basis[first : first + SENTENCE_LENGTH],
        "projection": 0.5 * mixing,
    }
    metadata = {"format": "pt", "world": "blockskip demo", "words": json.dumps(world.VOCABULARY)}
    tables = {name: table.to(torch.bfloat16) for name, table in tables.items()}
    write_atomically(options.assets / host.TEXT_FILE, tables, metadata)
    logger.info("text: %d words, sentences of %d", count, SENTENCE_LENGTH)


def load_text(options: argparse.Namespace) -> tuple[WordTokenizer, WordEncoder]:
    """Load the text file as a tokenizer and an encoder."""
    tables, data = read_text_file(options.assets / host.TEXT_FILE)
    encoder = WordEncoder()
    encoder.load_sd(tables)
    return WordTokenizer(tokenizer_data=data), encoder


@torch.no_grad()
def follow(average: torch.nn.Module, model: torch.nn.Module, step: int) -> None:
    """Update the exponential moving average of the weights, which follows quickly at the start."""
    decay = min(EMA_DECAY, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)


def dit_optimisers(model: torch.nn.Module, name: str) -> list[torch.optim.Optimizer]:
    """Adam, or Muon for the blocks' matrices and Adam for everything else.

    Muon computes in bfloat16, which takes most of the time on a CPU without instructions for it.
    """
    from world_dit import hidden_matrices

    if name == "adam":
        return [torch.optim.Adam(model.parameters(), lr=DIT_RATE, betas=(0.9, 0.99))]
    matrices = hidden_matrices(model)
    known = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in known]
    return [
        torch.optim.Muon(matrices, lr=DIT_RATE, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.Adam(others, lr=DIT_RATE, betas=(0.9, 0.99)),
    ]


def frozen_coder(options: argparse.Namespace, device: torch.device) -> torch.nn.Module:
    """Load the autoencoder."""
    from world_vae import SlimCoder, slim_state_dict

    coder = SlimCoder()
    coder.load_state_dict(slim_state_dict(load_file(options.assets / host.VAE_FILE), coder.state_dict()))
    return coder.to(device).requires_grad_(False).to(memory_format=torch.channels_last)


class DitTraining:
    """The transformer's training: the model, its running average, its optimisers, and the current step."""

    def __init__(self, options: argparse.Namespace, device: torch.device) -> None:
        from world_dit import build_dit, prepare_for_training

        torch.manual_seed(options.seed)
        self.options, self.device, self.step = options, device, 0
        self.buckets = (LARGE,) if options.large else BUCKETS
        self.checkpoint = options.work / "dit.pt"
        tokenizer, self.encoder = load_text(options)
        self.model, self.average = build_dit(device), build_dit(device)
        self.optimisers = dit_optimisers(self.model, options.optimiser)
        self.latents = Latents(options.work, options.seed, frozen_coder(options, device), tokenizer.word_ids)
        self._load()
        prepare_for_training(self.model, options.compile)

    def _load(self) -> None:
        """Resume from the checkpoint if there is one, otherwise start from ``--start`` or from fresh weights."""
        from world_dit import comfy_names

        if self.checkpoint.exists():
            state = torch.load(self.checkpoint, map_location=self.device)
            self.model.load_state_dict(state["model"])
            self.average.load_state_dict(state["average"])
            for optimiser, kept in zip(self.optimisers, state["optimisers"], strict=True):
                optimiser.load_state_dict(kept)
            self.step = state["step"]
            return
        if self.options.start:
            self.model.load_state_dict(comfy_names(load_file(self.options.start)))
        self.average.load_state_dict(self.model.state_dict())

    def keep(self) -> None:
        """Write the checkpoint and the current averaged weights."""
        state = {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
            "step": self.step,
        }
        save_checkpoint(self.checkpoint, state)
        export_dit(self.average, self.options)

    def advance(self) -> tuple[Bucket, float]:
        """Do one step and return its bucket and loss. All random numbers depend only on the seed and the step, so
        that an interrupted run continues like an uninterrupted one."""
        from world_dit import flow_loss

        torch.manual_seed((self.options.seed << 32) + self.step)
        bucket, scale = random_bucket(self.buckets), self.options.scale
        pictures = self.latents.available(bucket, self.step * scale)
        said = 1.0 if bucket.plain else SAID_SHARE
        latents, ids, weights = random_rows(pictures, bucket.batch * scale, said)
        sigma = random_sigmas(bucket.batch * scale, bucket.shift)
        context, pooled = self.encoder.encode_ids(ids)
        with host.half_precision(self.device):
            inputs = (x.to(self.device) for x in (latents, sigma, context, pooled, weights))
            loss = flow_loss(self.model, *inputs).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        rate = learning_rate(self.step, self.options.steps, self.options.rate)
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = rate
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        self.step += 1
        follow(self.average, self.model, self.step)
        return bucket, loss.item()


def train_dit(options: argparse.Namespace, device: torch.device) -> None:
    """Train the transformer on views of all sizes in turn."""
    training = DitTraining(options, device)
    logger.info("dit: from step %d of %d", training.step, options.steps)
    losses: dict[str, list[float]] = {}
    started = time.monotonic()
    while training.step < options.steps:
        bucket, loss = training.advance()
        losses.setdefault("x".join(map(str, bucket.size)), []).append(loss)
        if training.step % LOGGED == 0:
            shown = ", ".join(f"{size} {sum(kept) / len(kept):.4f}" for size, kept in sorted(losses.items()))
            logger.info("dit: step %d, %.0f s, loss %s", training.step, time.monotonic() - started, shown)
            losses, started = {}, time.monotonic()
            training.keep()
    training.keep()
    logger.info("dit: done, %d steps", training.step)


def export_dit(model: torch.nn.Module, options: argparse.Namespace) -> None:
    """Write the averaged weights as the "Load Diffusion Model" node reads them.

    The file is that of the views, or with ``--large`` that of whole scenes.
    """
    from world_dit import published_names

    state = {key: value.detach().to("cpu", torch.bfloat16) for key, value in model.state_dict().items()}
    file = host.DIT_FILE if options.large else host.VIEWS_DIT_FILE
    write_atomically(
        options.assets / file, published_names(state), {"format": "pt", "world": "blockskip demo"}
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
    parser.add_argument(
        "--scale", type=int, default=1, help="the dit's batches, times this: 8 or more on a GPU"
    )
    parser.add_argument("--rate", type=float, default=DIT_RATE, help="the dit's highest learning rate")
    parser.add_argument("--optimiser", choices=["muon", "adam"], default="muon", help="the dit's")
    parser.add_argument("--large", action="store_true", help="train the dit on whole scenes at 512 px alone")
    parser.add_argument(
        "--start", type=Path, help="weights to start the dit from where there is no checkpoint"
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
