"""A model of the host called on coarse tokens: its own forward on a reduced latent, with hooks for what was trained.

The model runs on a latent of H / s times W / s cells, so its own embedding and de-embedding are the initial values of the
coarse ones (``ddit.patch_resizing``). For that call, and only for it, hooks add the trained change to the embedded tokens,
keep the tokens that enter the de-embedding, add the LoRA to its layers, and give the tokens the mean place of what they
cover. Nothing is put on a model between two such calls, so a step with the model's own patches is the plain model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from ...ddit.coarse_estimate import CoarseAdapter, coarse_estimate
from ...ddit.trained_patches import ModelShape
from ...errors import InvalidInputError, UnsupportedModelError
from ...ralu.token_grid import TokenPlaces
from ..families.capabilities import EmbedsPatches, require
from ..families.patch_layers import PatchLayers, added_to
from ..families.registry import adapter_for
from ..families.sampled_families import positions_of
from ..families.token_positions import TablePositions
from ..inputs.frames import frames_in

Lora = Mapping[str, tuple[Tensor, Tensor]]
# (latent, noise levels (B,)) -> clean estimate, both (B, C, h, w)
Denoise = Callable[[Tensor, Tensor], Tensor]


class CoarseForward:
    """Coarse calls of one MODEL.

    Args:
        patcher: The MODEL.

    Raises:
        UnsupportedModelError: If the family is not known, or its patches or positions cannot be changed.
    """

    def __init__(self, patcher: Any) -> None:
        adapter = require(adapter_for(patcher), EmbedsPatches, "Sample it without dynamic patches.")
        self._patcher = patcher
        self._tree: nn.Module = patcher.model.diffusion_model
        self.layers: PatchLayers = adapter.patch_layers()
        self._positions, self._patch = positions_of(patcher)

    def renewed(self) -> CoarseForward:
        """Return coarse calls on the modules that the MODEL has now: loading it may have replaced them."""
        new = CoarseForward(self._patcher)
        if isinstance(self._positions, TablePositions):  # the patch that `prepare` has put on the MODEL asks these
            new._positions = self._positions
        return new

    def prepare(self, patcher: Any) -> None:
        """Put what the positions need onto a clone of the MODEL, before it is loaded."""
        self._positions.prepare(patcher)

    def __call__(
        self,
        denoise: Denoise,
        latent: Tensor,
        sigma: Tensor,
        adapter: CoarseAdapter,
        lora: Lora,
        options: Mapping[str, Any],
        remembered: dict[Any, Tensor] | None = None,
    ) -> Tensor:
        """Return the clean estimate of a full-size latent, (B, C, H, W); a clip's has its frames among the channels.

        Args:
            denoise: The model's own forward, for a latent of any size.
            latent, sigma, adapter: See ``ddit.coarse_estimate``.
            lora: Layer -> (A, B), added during the call; empty if the caller adds it.
            options: transformer_options of the call.
            remembered: Tokens that entered the de-embedding in earlier calls, by call. They are used again where another
                node's cache answers in the model's place, as that reuses its output.

        Raises:
            InvalidInputError: If the latent is not cut into whole coarse patches, or a cache answers a first call.
        """
        adapter = adapter.of_clips(frames_in(self._patcher.model, latent.shape[1]))
        height, width = latent.shape[-2:]
        rows, columns = adapter.resizing.places(height, width)
        places = TokenPlaces(rows, columns, (height // self._patch, width // self._patch))
        memory = {} if remembered is None else remembered

        def call(reduced: Tensor, matched: Tensor, added: Tensor | None) -> tuple[Tensor, Tensor]:
            of_the_call = (tuple(options.get("uuids", ())), reduced.shape)
            with self._hooked(added, rows.shape[1], lora) as leaving, self._positions.placed(places, options):
                clean = denoise(reduced.to(latent.dtype), matched.to(sigma))
            if leaving:
                memory[of_the_call] = leaving[-1]
            if of_the_call not in memory:
                raise InvalidInputError(
                    "Another node answered the first coarse call in the model's place, so its tokens are not known. "
                    "Remove that node, or set the mode to off."
                )
            return clean, memory[of_the_call]

        return coarse_estimate(latent, sigma, adapter, call)

    @contextmanager
    def _hooked(self, added: Tensor | None, number: int, lora: Lora) -> Iterator[list[Tensor]]:
        """Put the hooks of one call on the model, and collect the tokens that enter the de-embedding."""
        leaving: list[Tensor] = []

        def embedded(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
            return output if added is None else added_to(output, added)

        def entering_the_end(module: nn.Module, args: tuple) -> None:
            leaving.append(self.layers.image_tokens(args[0], number))

        with ExitStack() as hooks:
            embedding = self._tree.get_submodule(self.layers.embedding)
            deembedding = self._tree.get_submodule(self.layers.deembedding)
            hooks.callback(embedding.register_forward_hook(embedded).remove)
            # In front of other hooks: those of a training detach the layer's input.
            hooks.callback(deembedding.register_forward_pre_hook(entering_the_end, prepend=True).remove)
            for name, (down, up) in lora.items():
                layer = self._tree.get_submodule(name)
                hooks.callback(layer.register_forward_hook(_low_rank(down, up)).remove)
            yield leaving


def _low_rank(down: Tensor, up: Tensor) -> Callable[[nn.Module, tuple, Tensor], Tensor]:
    """Return a hook that adds a low-rank product to a linear layer's output."""

    def add(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        x = args[0]
        low = nn.functional.linear(x, down.to(x))
        return output + nn.functional.linear(low, up.to(x)).to(output)

    return add


def require_clips(patcher: Any) -> None:
    """Check that the coarse steps of a MODEL may make clips.

    Raises:
        UnsupportedModelError: If they make pictures only.
    """
    adapter = adapter_for(patcher)
    if not require(adapter, EmbedsPatches, "Sample it without dynamic patches.").patch_layers().clips:
        raise UnsupportedModelError(
            f"Dynamic patches make single pictures with {adapter.title} models, and clips with Wan. Set the length to 1."
        )


def shape_of(patcher: Any, identity: str) -> ModelShape:
    """Return what adapters for a MODEL must fit.

    Raises:
        UnsupportedModelError: If its family is not known, or its patches cannot be changed.
    """
    adapter = adapter_for(patcher)
    require(adapter, EmbedsPatches, "Sample it without dynamic patches.")
    channels = patcher.model.latent_format.latent_channels
    return ModelShape(adapter.family, identity, adapter.patch_size, channels, adapter.width)
