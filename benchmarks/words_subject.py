"""A subject of the demo's small world: its loss as a function of a word, and the likeness. Part of the benchmark ``words``."""

from __future__ import annotations

from typing import Any

import torch
from quality_world import Bench
from torch import Tensor

SIDE = 128
PICTURES = 6
HELD_OUT = 5
LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)
SAMPLED = 4
"""Pictures sampled with the learned word for the likeness."""


class Subject:
    """One subject: its loss on training and on held-out pictures, as functions of the word.

    Args:
        bench: The world.
        name: Its name.
        vectors: Vectors of the word: at the start that of the subject's name, then zeros, as the world pads captions.
    """

    def __init__(self, bench: Bench, name: str, vectors: int = 1) -> None:
        from blockskip_pack.blockskip_core.hosts.words.encoders import known_word
        from blockskip_pack.blockskip_core.zoodip.word import WordLayout

        self.bench, self.name = bench, name
        parts, first = known_word(bench.clip, " ".join([name] * vectors))
        self.layout = WordLayout(parts)
        self.first = self.layout.join({key: torch.cat([one[:1], 0 * one[1:]]) for key, one in first.items()})
        self.losses = self._losses(bench.world.subject_scenes(name, PICTURES, seed=0))
        self.held_out_scenes = bench.held_out(name, HELD_OUT)
        self.held_out = self._losses(self.held_out_scenes)

    def _losses(self, scenes: list) -> Any:
        from blockskip_pack.blockskip_core.hosts.words.captions import WordCaptions
        from blockskip_pack.blockskip_core.hosts.words.losses import WordLosses

        bench = self.bench
        texts = [bench.world.caption(scene).replace(self.name, "{word}") for scene in scenes]
        captions = WordCaptions(bench.clip, texts, self.layout.parts)
        return WordLosses(bench.model, captions, self.layout, self.latents(scenes), len(scenes))

    def latents(self, scenes: list) -> Tensor:
        """Return the scenes' clean latents."""
        from blockskip_pack.blockskip_core.hosts.words.latents import square_latents

        bench, drawn = self.bench, [self.bench._drawn(scene, SIDE) for scene in scenes]
        return square_latents(bench.vae, bench.model.model, drawn, SIDE, False, lambda done, total: None)

    @torch.no_grad()
    def held_out_loss(self, word: Tensor) -> float:
        """Return the mean loss over all held-out pictures and levels, one fixed noise each."""
        from blockskip_pack.blockskip_core.zoodip.examples import Example

        grid = [(i, level) for level in LEVELS for i in range(HELD_OUT)]
        with self.held_out.loaded(1):
            found = [self.held_out(word[None], Example(i, False, level, 1000 + n)) for n, (i, level) in enumerate(grid)]
        return torch.cat(found).mean().item()

    @torch.no_grad()
    def likeness(self, word: Tensor) -> dict[str, float]:
        """Return how the world's reader sees sampled pictures: cosine with drawn ones, share recognised."""
        import comfy.sample

        bench, empty = self.bench, torch.zeros(1, 16, SIDE // 8, SIDE // 8)
        pictures = []
        for number in range(SAMPLED):
            with self.held_out.loaded(1):
                positive = self.held_out.conditioning(word, number)
            latent = comfy.sample.sample(
                bench.model, comfy.sample.prepare_noise(empty, number), 12, 4.0, "euler", "simple", positive,
                bench.conditioning(""), empty, seed=number, disable_pbar=True,
            )  # fmt: skip
            pictures.append(bench.vae.decode(latent)[0].clamp(0, 1))
        sampled = torch.stack(pictures).permute(0, 3, 1, 2)
        drawn = torch.stack([bench._drawn(s, SIDE) for s in self.held_out_scenes[:SAMPLED]]).permute(0, 3, 1, 2)
        answers = bench.reading.read(bench.reader, sampled)
        cosine = bench.reading.similarity(bench.reader, sampled, drawn).mean().item()
        return {"cosine": cosine, "recognised": sum(a["subject"] == self.name for a in answers) / SAMPLED}
