"""The demo world as a test bench: its model loaded by ComfyUI, a subject's pictures, and measures of a LoRA."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "demo"


def use_pack(comfyui: Path | None) -> None:
    """Make ``comfy``, the demo's modules and ``blockskip_pack`` importable; the pack as ComfyUI loads it."""
    sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != ROOT]
    sys.path.insert(0, str(DEMO))
    import host

    host.use_comfyui(comfyui)
    name = "blockskip_pack"
    spec = importlib.util.spec_from_file_location(name, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])


@dataclass(frozen=True)
class Settings:
    """The settings that all arms share.

    Attributes:
        steps, batch_size, rank, learning_rate, lr_schedule: Settings of the training.
        draws: Number of different training examples; a longer run starts over.
        pictures: Number of training pictures of a subject.
        held_out: Number of pictures of the subject on unseen grounds, for the loss.
        levels, noises: The grid of noise levels and noises for the loss.
        prompts: Number of pictures sampled for the fidelities.
        sampling_steps, cfg: How they are sampled.
    """

    steps: int = 200
    batch_size: int = 4
    rank: int = 16
    learning_rate: float = 1e-3
    lr_schedule: str = "cosine"
    draws: int = 200
    pictures: int = 6
    held_out: int = 5
    levels: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
    noises: int = 1
    prompts: int = 2
    sampling_steps: int = 12
    cfg: float = 4.0


def batched(items: Iterable, count: int) -> Iterator[list]:
    """Yield lists of up to ``count`` items."""
    waiting = list(items)
    return (waiting[start : start + count] for start in range(0, len(waiting), count))


class Bench:
    """The loaded world, and the folder for results."""

    def __init__(self, assets: Path, results: Path, dit: str = "scenes") -> None:
        import host
        import sample_world
        import world
        import world_reader

        self.results = results
        results.mkdir(parents=True, exist_ok=True)
        self.world, self.reading = world, world_reader
        self.model, self.clip, self.vae = sample_world.load_world(assets, dit)
        self.reader = world_reader.load_reader(assets / host.READER_FILE)
        self._sample_world = sample_world
        self._latents: dict[tuple, Tensor] = {}

    @cached_property
    def identity(self) -> str:
        """Content hash of the model and the VAE."""
        from blockskip_pack.blockskip_core.hosts.models.identity import model_identity, module_identity

        return model_identity(self.model)[:12] + module_identity(self.vae.first_stage_model)[:4]

    @property
    def num_blocks(self) -> int:
        """Number of blocks in the model."""
        from blockskip_pack.blockskip_core.hosts.models.hosted_dit import HostedDit

        return len(HostedDit(self.model).blocks)

    @property
    def block_bytes(self) -> tuple[int, ...]:
        """Weight bytes of each block."""
        from blockskip_pack.blockskip_core.hosts.models.hosted_dit import HostedDit

        return HostedDit(self.model).block_bytes

    def encoded(self, subject: str, photos: list[Tensor], schedule: Any) -> Tensor:
        """Return clean latents of all draws, shape (draws, C, h, w); every crop is encoded once."""
        from blockskip_pack.blockskip_core.data.crops import TrainingCrops

        crops = TrainingCrops(photos, schedule)
        size = schedule.patches.patch_min
        wanted = [(subject, size, draw.picture, draw.side, draw.top, draw.left) for draw in schedule]
        fresh = {place: i for i, place in enumerate(wanted) if place not in self._latents}
        for some in batched(fresh.items(), 16):
            pixels = torch.stack([crops[i] for _, i in some])
            latents = self.model.model.process_latent_in(self.vae.encode(pixels)).float()
            self._latents.update(zip([place for place, _ in some], latents, strict=True))
        self._latents = {place: latent for place, latent in self._latents.items() if place[0] == subject}
        return torch.stack([self._latents[place] for place in wanted])

    def conditioning(self, text: str) -> list:
        """Return the CONDITIONING of a caption."""
        return self._sample_world.encode(self.clip, text)

    def sample(self, model: Any, text: str, seed: int, size: int, settings: Settings) -> Tensor:
        """Return a picture ``[H, W, 3]`` in [0, 1] from ComfyUI's own sampler."""
        import comfy.sample

        side = size // 8
        empty = torch.zeros(1, 16, side, side)
        latent = comfy.sample.sample(
            model, comfy.sample.prepare_noise(empty, seed), settings.sampling_steps, settings.cfg, "euler", "simple",
            self.conditioning(text), self.conditioning(""), empty, seed=seed, disable_pbar=True,
        )  # fmt: skip
        return self.vae.decode(latent)[0].clamp(0, 1)

    def training_set(self, subject: str, settings: Settings) -> tuple[list[Tensor], list[list]]:
        """Return pictures ``[H, W, 3]`` of a subject and a CONDITIONING for each."""
        scenes = self.world.subject_scenes(subject, settings.pictures, seed=0)
        return [self._drawn(scene, 256) for scene in scenes], [self._captioned(scene) for scene in scenes]

    def held_out(self, subject: str, count: int) -> list:
        """Return scenes of the subject on unseen grounds."""
        return self.world.subject_scenes(subject, count, seed=1, held_out=True)

    def _drawn(self, scene: Any, size: int) -> Tensor:
        return torch.from_numpy(np.array(self.world.render(scene, size))).float() / 255

    def _captioned(self, scene: Any) -> list:
        return self.conditioning(self.world.caption(scene))

    def held_out_loss(self, model: Any, subject: str, size: int, settings: Settings) -> float:
        """Return a MODEL's mean velocity error on held-out pictures, over a fixed grid of noise levels and noises."""
        from blockskip_pack.blockskip_core.data.flow_matching import velocity_loss
        from blockskip_pack.blockskip_core.hosts.models.hosted_dit import HostedDit

        captions, clean = self._held_out_latents(subject, size, settings.held_out)
        generator = torch.Generator().manual_seed(20260320)
        dit = HostedDit(model, captions, clean.shape[1:])
        losses = []
        with torch.inference_mode(False), torch.no_grad(), dit.running({}) as denoise:
            for sigma in settings.levels:
                for _ in range(settings.noises):
                    noise = torch.randn(clean.shape, generator=generator)
                    noisy = (1 - sigma) * clean + sigma * noise
                    sigmas = torch.full((len(clean),), sigma)
                    losses.append(velocity_loss(denoise(noisy, sigmas, range(len(clean))), clean, sigmas).mean().item())
        return sum(losses) / len(losses)

    @lru_cache(maxsize=16)  # noqa: B019 - there is one bench
    def _held_out_latents(self, subject: str, size: int, count: int) -> tuple[list, Tensor]:
        scenes = self.held_out(subject, count)
        pixels = torch.stack([self._drawn(scene, size) for scene in scenes])
        clean = self.model.model.process_latent_in(self.vae.encode(pixels)).float()
        return [self._captioned(scene) for scene in scenes], clean

    def fidelity(
        self, model: Any, subject: str, seed: int, size: int, settings: Settings
    ) -> tuple[dict[str, float], list[Tensor], list[Tensor]]:
        """Return subject and prompt fidelity of pictures sampled on held-out grounds, these pictures, and the subject drawn there."""
        scenes = self.held_out(subject, 10)
        chosen = [scenes[(seed * settings.prompts + i) % len(scenes)] for i in range(settings.prompts)]
        pictures = [
            self.sample(model, self.world.caption(scene), 1000 * seed + i, size, settings)
            for i, scene in enumerate(chosen)
        ]
        sampled = torch.stack(pictures).permute(0, 3, 1, 2)
        drawn = [self._drawn(scene, size) for scene in chosen]
        pairs = list(zip(self.reading.read(self.reader, sampled), chosen, strict=True))
        share = {
            measure: sum(answer[name] == getattr(scene, name) for answer, scene in pairs) / len(pairs)
            for measure, name in (("ground", "ground"), ("place", "place"), ("recognised", "subject"))
        }
        cosine = self.reading.similarity(self.reader, sampled, torch.stack(drawn).permute(0, 3, 1, 2)).mean().item()
        return {"cosine": cosine, **share}, pictures, drawn
