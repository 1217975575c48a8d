"""What this package must know about a family of diffusion transformers: one file per family, and nowhere else."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...accounting.weight_formats import stored_bytes
from ...adapters.lora import LoraTargets
from ...adapters.lora_formats import LoraFileFormat
from ...data.clip_lengths import ClipLengths
from ...errors import InvalidInputError
from ...model import BlockInfo, BlockIO, TokenStreams

TEXT_TOKENS = (
    "blockskip_text_tokens"  # in transformer_options: text tokens of the stream, for families whose calls do not say
)
REFERENCE_TOKENS = "blockskip_reference_tokens"  # in transformer_options: tokens of a call's reference pictures, if any


class FamilyAdapter(ABC):
    """A family's blocks, tokens and layers, as laid out in its ComfyUI class; optional features: ``capabilities``.

    Attributes:
        family: Short name, stored in files.
        title: Name shown to users.
        stem: Modules before the first block; a variant of the family may lack some.
        trainable_head: Modules after the last block.
        attention_layers, mlp_layers: Suffixes of the names of a block's linear layers.
        text_output_layers: Suffixes of the layers that change a block's text tokens and nothing else.
        text_entry: The linear layer that takes in a text's tokens.
        pooled_entry: The linear layer that takes in a text's pooled vector, if there is one.
        architecture: The model's name in "modelspec.architecture", where kohya's programs define one.
        base_model_version: The model's name in "ss_base_model_version".
        read_by_diffusers: Formats of our LoRA files that diffusers 0.42.1 loads.
        has_names_of_diffusers: Whether the host reads "transformer." and diffusers' names for this family's layers.
        most_rows: The most examples that the model takes at once; None if any number.
        clip_lengths: Lengths of its clips, if the host's format of its latents does not say them.
        call_options: Options of every call, which turn off what a model would keep from one call to the next.
        reads_noise_levels: Whether the model computes with noise levels as numbers, so that a pass without values needs some.
        takes_references: Whether its models look at reference pictures.
        reference_argument: The argument of the host's models that holds them beside the text.
    """

    family: ClassVar[str]
    title: ClassVar[str]
    stem: ClassVar[tuple[str, ...]]
    trainable_head: ClassVar[tuple[str, ...]]
    attention_layers: ClassVar[tuple[str, ...]]
    mlp_layers: ClassVar[tuple[str, ...]]
    text_output_layers: ClassVar[tuple[str, ...]] = ()
    text_entry: ClassVar[str]
    pooled_entry: ClassVar[str] = ""
    architecture: str
    base_model_version: str
    read_by_diffusers: frozenset[LoraFileFormat] = frozenset({"diffusers", "kohya"})
    has_names_of_diffusers: bool = True
    most_rows: int | None = None
    clip_lengths: ClassVar[ClipLengths | None] = None
    call_options: ClassVar[Mapping[str, Any]] = MappingProxyType({})
    reads_noise_levels: bool = False
    takes_references: bool = False
    reference_argument: ClassVar[str] = "ref_latents"

    def __init__(self, diffusion_model: nn.Module) -> None:
        self._model: Any = diffusion_model  # of the host's class, which is untyped

    @classmethod
    @abstractmethod
    def matches(cls, diffusion_model: Any) -> bool:
        """Return whether the model belongs to this family."""

    @abstractmethod
    def blocks(self) -> Sequence[BlockInfo]:
        """Return all blocks in execution order."""

    @property
    def frozen_stem(self) -> Sequence[str]:
        """The modules before the first block that this model has."""
        return [name for name in self.stem if isinstance(getattr(self._model, name, None), nn.Module)]

    @property
    def patch_size(self) -> int:
        """Side of a token in latent cells."""
        return self._model.patch_size

    @property
    def width(self) -> int:
        """Width of a token."""
        return self._model.hidden_size

    def image_tokens(self, rows: int, columns: int) -> int:
        """Return the number of image tokens of a latent; the host pads to whole patches."""
        patch = self.patch_size
        return -(-rows // patch) * -(-columns // patch)

    def reference_tokens(self, latents: Sequence[Tensor]) -> int:
        """Return the number of tokens of reference latents, each (B, C, H, W) or (B, C, frames, H, W)."""
        frames = [1 if latent.ndim == 4 else latent.shape[2] for latent in latents]
        return sum(n * self.image_tokens(*latent.shape[-2:]) for n, latent in zip(frames, latents, strict=True))

    def references_among(self, arguments: Mapping[str, Any]) -> Sequence[Tensor]:
        """Return the reference latents among the arguments of a model, each (B, C, H, W) or (B, C, frames, H, W)."""
        return arguments.get(self.reference_argument) or ()

    def as_the_host_reads(self, settings: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the settings of a conditioning with its reference latents where the host's model looks for them."""
        return settings

    def prepare_call(  # noqa: B027  # most calls say it themselves
        self, frames: int, rows: int, columns: int, references: int = 0
    ) -> None:
        """Note the size of the latents of the next call, and its number of tokens of reference pictures."""

    def text_tokens(self, text_length: int) -> int:
        """Return the number of text tokens in the stream for a text of this length."""
        return text_length

    def sound_tokens(self, frames: int) -> int:
        """Return the number of tokens of sound, which are in the stream with the text's, for a clip."""
        return 0

    def sound(self, frames: int, sigmas: Tensor) -> Tensor | None:
        """Return the latents of sound that the model is given with a clip at a noise level; None if it takes none.

        Args:
            frames: Number of latent frames.
            sigmas: Noise level of each row, shape (B,).
        """
        return None

    def require_rows(self, rows: int) -> None:
        """Check that the model takes so many examples at once.

        Raises:
            InvalidInputError: If not.
        """
        if self.most_rows is not None and rows > self.most_rows:
            raise InvalidInputError(
                f"{self.title} takes {self.most_rows} example at a time, got {rows}. Set `batch_size` to "
                f"{self.most_rows}, and `accumulation` to {rows} for the same steps."
            )

    def require_texts(self, conditionings: Sequence[list]) -> None:
        """Check that texts come from the text encoder of this family.

        Args:
            conditionings: Each ``[[tensor, settings]]``.

        Raises:
            InvalidInputError: If one does not have the width that the model reads.
        """
        width, pooled_width = self._features(self.text_entry), self._features(self.pooled_entry)
        for number, [[embedding, settings]] in enumerate(conditionings, 1):
            pooled = settings.get("pooled_output")
            if width and embedding.shape[-1] != width:
                self._refuse_text(number, embedding.shape[-1], width)
            if pooled_width and pooled is not None and pooled.shape[-1] < pooled_width:  # any more is not read
                self._refuse_text(number, pooled.shape[-1], pooled_width)

    def _features(self, name: str) -> int | None:
        layer = dict(self._model.named_modules()).get(name) if name else None
        return getattr(layer, "in_features", None)

    def _refuse_text(self, number: int, got: int, expected: int) -> None:
        raise InvalidInputError(
            f"Conditioning {number} has width {got}, {self.title} needs {expected}. Encode the text with the text "
            "encoder that belongs to the model."
        )

    def is_lora_target(self, name: str, targets: LoraTargets) -> bool:
        """Return whether the linear layer of this native name gets an adapter."""
        suffixes = {
            "attention and mlp": self.attention_layers + self.mlp_layers,
            "attention": self.attention_layers,
            "mlp": self.mlp_layers,
        }.get(targets)
        return suffixes is None or name.endswith(suffixes)

    def is_text_output(self, name: str) -> bool:
        """Return whether a layer changes only the text tokens that leave its block.

        No head reads those, so in the last trained block such a layer gets no gradient.
        """
        return name.endswith(self.text_output_layers)


class JoinedBlockIO:
    """``block(tokens, ...) -> tokens``, text first; each call's options give the number of text tokens."""

    def __init__(self, num_text: Callable[[Mapping[str, Any]], int]) -> None:
        self._num_text = num_text

    def entering(self, args: tuple, kwargs: Mapping[str, Any]) -> TokenStreams:
        return self._split(args[0], kwargs)

    def leaving(self, result: Any, args: tuple, kwargs: Mapping[str, Any]) -> TokenStreams:
        return self._split(result, kwargs)

    def result(self, streams: TokenStreams, args: tuple, kwargs: Mapping[str, Any]) -> Any:
        assert streams.txt is not None  # they were split from the text by :meth:`entering`
        return torch.cat((streams.txt, streams.img), dim=1)

    def _split(self, tokens: Tensor, kwargs: Mapping[str, Any]) -> TokenStreams:
        num_text = self._num_text(kwargs["transformer_options"])
        return TokenStreams(tokens[:, num_text:], tokens[:, :num_text])


def block_info(diffusion_model: nn.Module, list_name: str, io: BlockIO) -> list[BlockInfo]:
    """Return the blocks of one module list."""
    infos = []
    for index, block in enumerate(diffusion_model.get_submodule(list_name).children()):
        parameters = list(block.parameters())
        infos.append(
            BlockInfo(
                name=f"{list_name}.{index}",
                io=io,
                num_parameters=sum(math.prod(p.shape) for p in parameters),  # packed formats have fewer elements
                num_bytes=sum(stored_bytes(p) for p in parameters),
            )
        )
    return infos
