"""What else could be learned from forward passes, with about as little memory as a word. Part of the benchmark ``words``.

Each way is a row of numbers that changes the model's calls; a row of zeros changes nothing, except for vectors after the
encoder, which are there even if they are zero. Captions are encoded once, with the subject's name, so no text encoder is
in the loop. Estimator, Adam and schedules are those of words.

ContextRows   vectors after the text encoder's own, which the model reads as if they were words
PooledShift   a vector added to the pooled text
TimeShift     a vector added to what modulates all blocks, the embedded time and pooled text
Cores         a LoRA in every linear layer of the blocks of which only the middle r x r matrix is learned: W + U C V^T, where
              U and V are W's first r singular vectors
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from words_subject import Subject

Layout = Any  # zoodip.word.WordLayout, which is importable after the pack


class Way:
    """A row of numbers that changes a model's calls.

    Attributes:
        layout: Their number and units.
    """

    layout: Layout

    def conditioning(self, context: Tensor, pooled: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the text of each row, (rows, L, C) and (rows, P), from that of a caption, (1, L, C) and (1, P)."""
        return context.expand(len(rows), -1, -1), pooled.expand(len(rows), -1)

    @contextmanager
    def applied(self, model: nn.Module, rows: Tensor) -> Iterator[None]:
        """Change a diffusion model whose batch has these rows, or one row for all of a batch, for a ``with`` block."""
        yield


class ContextRows(Way):
    """Vectors after the text encoder's own."""

    def __init__(self, count: int, width: int, size: float) -> None:
        self.layout = _layout([("context", count, width, size)])

    def conditioning(self, context: Tensor, pooled: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Append the vectors."""
        context, pooled = super().conditioning(context, pooled, rows)
        return torch.cat([context, rows.view(len(rows), -1, context.shape[2])], 1), pooled


class PooledShift(Way):
    """A vector added to the pooled text."""

    def __init__(self, width: int, size: float) -> None:
        self.layout = _layout([("pooled", 1, width, size)])

    def conditioning(self, context: Tensor, pooled: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Add the vector."""
        context, pooled = super().conditioning(context, pooled, rows)
        return context, pooled + rows


class TimeShift(Way):
    """A vector added to the embedded time and pooled text of a FLUX.1-format model."""

    def __init__(self, width: int, size: float) -> None:
        self.layout = _layout([("vec", 1, width, size)])

    @contextmanager
    def applied(self, model: nn.Module, rows: Tensor) -> Iterator[None]:
        """Add the vector after ``vector_in``."""
        hook = model.vector_in.register_forward_hook(lambda _, given, output: output + rows)
        try:
            yield
        finally:
            hook.remove()


class Cores(Way):
    """r x r matrices between the first singular vectors of layers.

    Args:
        layers: Linear layers by name.
        rank: r.
        unit: The unit of a core's numbers, as a share of the mean of its layer's first r singular values.
    """

    def __init__(self, layers: dict[str, nn.Linear], rank: int, unit: float) -> None:
        self._layers, self._rank, self._bases, parts = layers, rank, {}, []
        for name, layer in layers.items():
            left, values, right = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
            self._bases[name] = left[:, :rank], right[:rank].T  # (out, r), (in, r)
            parts.append((name, rank, rank, unit * values[:rank].mean().item()))
        self.layout = _layout(parts)

    @contextmanager
    def applied(self, model: nn.Module, rows: Tensor) -> Iterator[None]:
        """Add each row's cores to the layers."""
        widths = [self._rank**2] * len(self._layers)
        hooks = [
            layer.register_forward_hook(_with_cores(cores.view(-1, self._rank, self._rank), *self._bases[name]))
            for (name, layer), cores in zip(self._layers.items(), rows.split(widths, 1), strict=True)
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _with_cores(cores: Tensor, left: Tensor, right: Tensor) -> Callable[[nn.Module, tuple, Tensor], Tensor]:
    """Return a hook that adds U C V^T x to a layer's output, (rows, L, out)."""
    return lambda _, given, output: output + given[0] @ right @ cores.mT @ left.T


def _layout(parts: Sequence[tuple[str, int, int, float]]) -> Layout:
    from blockskip_pack.blockskip_core.zoodip.word import WordLayout, WordPart

    return WordLayout([WordPart(*part) for part in parts])


def layers_of(model: nn.Module) -> dict[str, nn.Linear]:
    """Return the linear layers of the tokens in a FLUX.1-format model's blocks, without those that modulate."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and "blocks." in name and "mod" not in name
    }


class WayLosses:
    """The loss of rows of numbers on an example, through the host's model as one batch.

    Args:
        model: The MODEL.
        texts: Context and pooled text of each picture.
        latents: Clean latents, shape (pictures, C, H, W).
        way: What the numbers do.
    """

    def __init__(self, model: Any, texts: Sequence[tuple[Tensor, Tensor]], latents: Tensor, way: Way) -> None:
        self._model, self._texts, self._latents, self._way = model, texts, latents, way

    @contextmanager
    def loaded(self, rows: int) -> Iterator[None]:
        """Load the model."""
        import comfy.model_management

        comfy.model_management.load_models_gpu([self._model])
        yield

    def __call__(self, rows: Tensor, example: Any) -> Tensor:
        """Return the losses, shape (rows,)."""
        from blockskip_pack.blockskip_core.hosts.words.noise_levels import output_error, sigma_of

        model = self._model.model
        clean = self._latents[example.picture : example.picture + 1]
        sigma = torch.tensor([sigma_of(model.model_sampling, example.level)])
        noisy = model.model_sampling.noise_scaling(sigma, example.noise(clean.shape), clean)
        context, pooled = self._way.conditioning(*self._texts[example.picture], rows)
        with self._way.applied(model.diffusion_model, rows):
            denoised = model.apply_model(
                noisy.expand(len(rows), -1, -1, -1), sigma.expand(len(rows)), c_crossattn=context, y=pooled
            )
        return torch.stack([output_error(model.model_sampling, sigma, clean, each[None]) for each in denoised])

    def conditioning(self, row: Tensor, picture: int) -> list:
        """Return a CONDITIONING."""
        context, pooled = self._way.conditioning(*self._texts[picture], row[None])
        return [[context, {"pooled_output": pooled}]]


class StrongerSubject(Subject):
    """A subject that is learned in another way than as a word.

    Args:
        bench, name: As of a subject.
        make: The way, from the world's MODEL, and context and pooled text of a caption.
    """

    def __init__(self, bench: Any, name: str, make: Callable[[Any, Tensor, Tensor], Way]) -> None:
        caption = bench.conditioning(bench.world.caption(bench.held_out(name, 1)[0]))
        self.way = make(bench.model, caption[0][0], caption[0][1]["pooled_output"])
        super().__init__(bench, name)
        self.layout, self.first = self.way.layout, torch.zeros(self.way.layout.numbers)

    def _losses(self, scenes: list) -> WayLosses:
        texts = [self.bench.conditioning(self.bench.world.caption(scene))[0] for scene in scenes]
        return WayLosses(
            self.bench.model,
            [(context, more["pooled_output"]) for context, more in texts],
            self.latents(scenes),
            self.way,
        )

    def likeness(self, word: Tensor) -> dict[str, float]:
        """Sample with the model changed."""
        with self.way.applied(self.bench.model.model.diffusion_model, word[None]):
            return super().likeness(word)


def _size(tensor: Tensor) -> float:
    return tensor.square().mean().sqrt().item()


def _modulating(model: Any, context: Tensor, pooled: Tensor) -> Way:
    with torch.no_grad():
        embedded = model.model.diffusion_model.vector_in(pooled)
    return TimeShift(embedded.shape[1], _size(embedded))


def _cores(rank: int, unit: float) -> Callable[[Any, Tensor, Tensor], Way]:
    return lambda model, context, pooled: Cores(layers_of(model.model.diffusion_model), rank, unit)


WAYS: dict[str, Callable[[Any, Tensor, Tensor], Way]] = {
    "2 vectors after the encoder": lambda model, context, pooled: ContextRows(2, context.shape[2], _size(context)),
    "8 vectors after the encoder": lambda model, context, pooled: ContextRows(8, context.shape[2], _size(context)),
    "shift of the pooled text": lambda model, context, pooled: PooledShift(pooled.shape[1], _size(pooled)),
    "shift of the modulation": _modulating,
    "LoRA cores, 2 x 2": _cores(2, 0.1),
    "LoRA cores, 4 x 4": _cores(4, 0.1),
}
