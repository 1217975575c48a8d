"""Samples a sheet of captions with ComfyUI's own loaders and sampler.

    python sample_world.py sheet.png --comfyui FOLDER "a big red star on grass, left" "a big orange toby circle on sand, right"

Without captions, it uses random ones of the world.
"""

from __future__ import annotations

import argparse
import logging
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

import host
import world

logger = logging.getLogger("sample_world")
LABEL_HEIGHT = 14


def load_world(assets: Path, dit: str = "scenes") -> tuple[Any, Any, Any]:
    """Model, CLIP and VAE, as from the loader nodes."""
    import comfy.sd
    import comfy.utils

    from blockskip_demo_nodes import load_text_encoder

    model = comfy.sd.load_diffusion_model(str(assets / host.DITS[dit]))
    vae = comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(assets / host.VAE_FILE)))
    return model, load_text_encoder(str(assets / host.TEXT_FILE)), vae


def encode(clip: Any, text: str) -> list:
    """Conditioning of a caption, as from the "CLIP Text Encode" node."""
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))


def sample(world_parts: tuple, text: str, options: argparse.Namespace, seed: int) -> Tensor:
    """Sample one picture ``[H, W, 3]`` in [0, 1] of a caption."""
    import comfy.sample

    model, clip, vae = world_parts
    empty = torch.zeros(1, 16, options.size // 8, options.size // 8)
    noise = comfy.sample.prepare_noise(empty, seed)
    latent = comfy.sample.sample(
        model, noise, options.steps, options.cfg, options.sampler, options.scheduler,
        encode(clip, text), encode(clip, ""), empty, seed=seed, disable_pbar=True,
    )  # fmt: skip
    return vae.decode(latent)[0]


def to_picture(values: Tensor) -> Image.Image:
    """``[H, W, 3]`` in [0, 1] to a PIL picture."""
    return Image.fromarray((values.clamp(0, 1) * 255).round().to(torch.uint8).numpy())


def sheet(pictures: list[Image.Image], labels: list[str], columns: int) -> Image.Image:
    """Arrange pictures in rows with their captions above."""
    width, height = pictures[0].size
    rows = -(-len(pictures) // columns)
    canvas = Image.new("RGB", (columns * width, rows * (height + LABEL_HEIGHT)), "white")
    pen = ImageDraw.Draw(canvas)
    for i, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
        x, y = (i % columns) * width, (i // columns) * (height + LABEL_HEIGHT)
        canvas.paste(picture, (x, y + LABEL_HEIGHT))
        pen.text((x + 2, y + 1), label[: width // 6], fill="black")
    return canvas


def reconstruct(vae: Any, picture: Image.Image) -> tuple[Tensor, Tensor]:
    """Encode and decode a picture with the VAE: ``[H, W, 3]`` and its latent as the model sees it."""
    import comfy.latent_formats

    pixels = torch.from_numpy(np.asarray(picture)).float()[None] / 255
    latent = vae.encode(pixels)
    return vae.decode(latent)[0], comfy.latent_formats.Flux().process_in(latent)


def main() -> None:
    """Write one sheet of samples, or of reconstructions."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path)
    parser.add_argument("captions", nargs="*")
    host.add_comfyui_argument(parser)
    parser.add_argument("--assets", type=Path, default=host.ASSETS)
    host.add_dit_argument(parser)
    parser.add_argument("--count", type=int, default=12, help="random captions where none are given")
    parser.add_argument("--columns", type=int, default=4)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--cfg", type=float, default=3.0)
    parser.add_argument("--sampler", default="euler")
    parser.add_argument("--scheduler", default="simple")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--reconstruct", action="store_true", help="show drawn pictures and the VAE's copies instead"
    )
    options = parser.parse_intermixed_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    host.use_comfyui(options.comfyui)
    (write_copies if options.reconstruct else write_samples)(options)
    logger.info("wrote %s", options.output)


def write_samples(options: argparse.Namespace) -> None:
    """Sample every caption once."""
    parts = load_world(options.assets, options.dit)
    rng = random.Random(options.seed)
    captions = options.captions or [world.caption(world.random_scene(rng)) for _ in range(options.count)]
    pictures = [to_picture(sample(parts, text, options, options.seed + i)) for i, text in enumerate(captions)]
    sheet(pictures, captions, options.columns).save(options.output)


def write_copies(options: argparse.Namespace) -> None:
    """Show every subject and some scenes, each beside its reconstruction."""
    import comfy.sd
    import comfy.utils

    vae = comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(options.assets / host.VAE_FILE)))
    rng = random.Random(options.seed)
    scenes: list = [world.subject_scenes(subject, 1, options.seed)[0] for subject in world.SUBJECTS]
    scenes += [world.random_scene(rng) for _ in range(max(0, options.count - len(scenes)))]
    pictures, labels, latents = [], [], []
    for scene in scenes:
        drawn = world.render(scene, options.size)
        copy, latent = reconstruct(vae, drawn)
        pictures += [drawn, to_picture(copy)]
        labels += [world.caption(scene), f"copy, mean error {error(drawn, copy):.3f}"]
        latents.append(latent)
    spread = torch.cat(latents).std(dim=(0, 2, 3))
    logger.info(
        "latents: mean %.2f, std per channel %s",
        torch.cat(latents).mean(),
        [round(s.item(), 2) for s in spread],
    )
    sheet(pictures, labels, options.columns).save(options.output)


def error(drawn: Image.Image, copy: Tensor) -> float:
    """Mean absolute difference on a scale of 0 to 1."""
    return (torch.from_numpy(np.asarray(drawn)).float() / 255 - copy).abs().mean().item()


if __name__ == "__main__":
    main()
