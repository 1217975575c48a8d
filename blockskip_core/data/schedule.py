"""The frozen training schedule: every random decision of a run, made up front from one seed.

A stored residual belongs to one picture, crop, caption, noise level and noise (DiT-BlockSkip, arXiv 2603.20755,
Sec. 3.3: residuals are stored "for each training iteration"). So the decisions are drawn first, written down, and
replayed identically while residuals are computed and while the LoRA is trained, at any batch size.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from random import Random

import torch
from torch import Tensor

from ..errors import CacheError, InvalidInputError
from .buckets import PATCH_SHAPES, PatchShape, training_sizes
from .patch_sampling import PatchConfig, crop_side, crop_size, reference_size
from .remarks import Labels, on_size

SCHEDULE_VERSION = 1
WITH_SIZES = 2
"""The version of a schedule whose training pictures have sizes of their own; an earlier reader must refuse it."""


@dataclass(frozen=True)
class Draw:
    """One training example.

    Attributes:
        picture: Index of the picture.
        caption: Index of the conditioning.
        sigma: Noise level in (0, 1], as passed to the model.
        side, top, left: The crop in pixels of the picture at its reference size; see ``patch_sampling.crop_size``.
        noise_seed: Seed of the noise that is mixed in.
    """

    picture: int
    caption: int
    sigma: float
    side: int
    top: int
    left: int
    noise_seed: int

    def noise(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """Return this draw's Gaussian noise, made on the CPU so that it is the same on every machine and device."""
        generator = torch.Generator(device="cpu").manual_seed(self.noise_seed)
        return torch.randn(tuple(shape), generator=generator, dtype=torch.float32).to(dtype)


@dataclass(frozen=True)
class TrainingSchedule:
    """All draws of a run, in the order in which they are used.

    Attributes:
        draws: The examples.
        patches: How crops were chosen.
        seed: The seed of all random decisions.
        timesteps: Readable name of the noise level distribution.
        sizes: Height and width in pixels of the training pictures of every picture; empty if all are the square.
    """

    draws: tuple[Draw, ...]
    patches: PatchConfig
    seed: int
    timesteps: str
    sizes: tuple[tuple[int, int], ...] = ()

    def size_of(self, picture: int) -> tuple[int, int]:
        """Return height and width in pixels of a picture's training pictures."""
        return self.sizes[picture] if self.sizes else (self.patches.patch_min, self.patches.patch_min)

    def crop_of(self, draw: Draw) -> tuple[int, int]:
        """Return height and width in pixels of a draw's crop, of the picture at its reference size."""
        return crop_size(draw.side, self.patches, self.size_of(draw.picture))

    def __len__(self) -> int:
        return len(self.draws)

    def __getitem__(self, index: int) -> Draw:
        return self.draws[index]

    def __iter__(self) -> Iterator[Draw]:
        return iter(self.draws)

    def to_json(self) -> str:
        """Return the schedule as text; equal schedules give equal text."""
        content = {
            "version": WITH_SIZES if self.sizes else SCHEDULE_VERSION,
            "seed": self.seed,
            "timesteps": self.timesteps,
            "patches": asdict(self.patches),
            "draws": [list(asdict(draw).values()) for draw in self.draws],
            **({"sizes": self.sizes} if self.sizes else {}),
        }
        return json.dumps(content, sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> TrainingSchedule:
        """Read what :meth:`to_json` wrote.

        Raises:
            CacheError: If the text is not a schedule of this version.
        """
        try:
            content = json.loads(text)
            if content["version"] not in (SCHEDULE_VERSION, WITH_SIZES):
                raise CacheError(
                    f"The training schedule has format {content['version']}, this version reads up to {WITH_SIZES}."
                )
            return cls(
                draws=tuple(Draw(*row) for row in content["draws"]),
                patches=PatchConfig(**content["patches"]),
                seed=content["seed"],
                timesteps=content["timesteps"],
                sizes=tuple((int(rows), int(columns)) for rows, columns in content.get("sizes", ())),
            )
        except CacheError:
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise CacheError("The training schedule cannot be read. Compute the residuals again.") from error

    @property
    def fingerprint(self) -> str:
        """Content hash, 32 hexadecimal digits."""
        return hashlib.blake2b(self.to_json().encode(), digest_size=16).hexdigest()


def largest_crop(height: int, width: int, patches: PatchConfig, size: tuple[int, int] | None = None) -> int:
    """Return the largest crop side in pixels that fits into a picture of this size; see ``patch_sampling.crop_size``."""
    rows, columns = size or (patches.patch_min, patches.patch_min)
    room = min(height * patches.patch_min // rows, width * patches.patch_min // columns)
    return min(patches.patch_max, room // patches.multiple * patches.multiple)


def draw_schedule(
    picture_sizes: Sequence[tuple[int, int]],
    *,
    num_captions: int,
    num_draws: int,
    patches: PatchConfig,
    sample_sigmas: Callable[[int, torch.Generator], Tensor],
    seed: int,
    timesteps: str = "model",
    labels: Labels | None = None,
    shape: PatchShape | Sequence[tuple[int, int]] = "square",
) -> TrainingSchedule:
    """Decide picture, caption, noise level, crop and noise of every training example.

    Pictures are visited in shuffled rounds, so that each is seen equally often. The crop is placed uniformly inside
    the picture (the paper does not say how it places crops).

    Args:
        picture_sizes: Height and width in pixels of each picture as given.
        num_captions: 1 (one caption for all pictures) or the number of pictures (one each).
        num_draws: How many examples to draw.
        patches: Crop sides and order.
        sample_sigmas: ``(count, generator) -> sigmas`` of shape (count,) in (0, 1].
        seed: Determines every random decision.
        timesteps: Name of the noise level distribution, recorded with the schedule.
        labels: The pictures' names in messages; their numbers if None.
        shape: Whether training pictures are squares, or as their pictures; see ``buckets``. Or height and width in pixels
            of the training pictures of every picture.

    Raises:
        InvalidInputError: If there are no pictures or draws, the number of captions does not fit, or a picture is too
            small.
    """
    if not picture_sizes:
        raise InvalidInputError("No pictures came in. Give at least one.")
    if num_captions not in (1, len(picture_sizes)):
        raise InvalidInputError(
            f"Expected one caption for all or one for each of the {len(picture_sizes)} pictures, "
            f"got {num_captions} captions."
        )
    if num_draws < 1:
        raise InvalidInputError(f"At least one training example is needed, got {num_draws}.")
    if isinstance(shape, str) and shape not in PATCH_SHAPES:
        raise InvalidInputError(f"Patch shape must be one of {', '.join(PATCH_SHAPES)}, got {shape!r}.")
    trained = training_sizes(picture_sizes, patches, shape)
    square = (patches.patch_min, patches.patch_min)
    size_of = trained or (square,) * len(picture_sizes)
    too_small = on_size(picture_sizes, size_of, labels or Labels(len(picture_sizes)))
    if too_small:
        raise InvalidInputError(too_small)
    given = [(*picture, patches, size) for picture, size in zip(picture_sizes, size_of, strict=True)]
    sizes = [reference_size(*one) for one in given]
    room = [largest_crop(*one) for one in given]

    rng = Random(seed)
    sigmas = sample_sigmas(num_draws, torch.Generator(device="cpu").manual_seed(rng.getrandbits(63)))
    order = _shuffled_rounds(len(sizes), num_draws, rng)
    draws = []
    for picture, sigma in zip(order, sigmas.tolist(), strict=True):
        height, width = sizes[picture]
        side = crop_side(sigma, patches, largest=room[picture], rng=rng)
        rows, columns = crop_size(side, patches, size_of[picture])
        draws.append(
            Draw(
                picture=picture,
                caption=picture if num_captions > 1 else 0,
                sigma=sigma,
                side=side,
                top=rng.randint(0, height - rows),
                left=rng.randint(0, width - columns),
                noise_seed=rng.getrandbits(63),
            )
        )
    return TrainingSchedule(tuple(draws), patches, seed, timesteps, trained)


def _shuffled_rounds(count: int, total: int, rng: Random) -> list[int]:
    order: list[int] = []
    for _ in range(math.ceil(total / count)):
        order.extend(rng.sample(range(count), count))
    return order[:total]
