"""The run file: everything that determines a training, as JSON, without weights.

It names the model by the host's own arguments, never by a path that it chooses itself (``named_folders``), and holds a
content hash of everything that it refers to: the model's weights, the schedule, the selection, pictures, captions
(all in the identity of the residuals), and the file beside it with latents and encoded captions (``packing``). So
wherever it is carried out, it is the same training or it is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..data.latents import shapes_in_words
from ..data.patch_sampling import PatchConfig
from ..data.schedule import Draw, TrainingSchedule
from ..errors import CacheError, InvalidInputError
from ..files import write_atomically
from ..residuals.back_response import BackResidual
from ..residuals.cache import CacheIdentity
from ..residuals.residual_set import ResidualSet, Storage
from ..selection.selection import BlockSelection
from ..version import VERSION
from .packing import Material, read_material
from .typed import from_json

RUN_VERSION = 1
_FORMAT = "BlockSkip run"
_LARGEST = 256 * 2**20  # bytes; a million training examples take about 100 MB


@dataclass(frozen=True, kw_only=True)
class ResidualRecipe:
    """How residuals are made and kept; see ``residuals.residual_set``."""

    storage: Storage
    chunk_size: int
    family: str
    back_residual: BackResidual
    remarks: Sequence[str] = ()
    dropped: int = 0


@dataclass(frozen=True, kw_only=True)
class RunFile:
    """A run.

    Attributes:
        host: Name of the host that trains; see ``host``.
        model: What the host needs to load the model, in the host's own words; JSON.
        settings: The settings of the training, in the host's own words; JSON.
        schedule: The training examples.
        selection: Blocks to be skipped.
        identity: What the residuals are made from, with the hashes of model, pictures and captions.
        residuals: How they are kept.
        material: Name of the file with latents and captions.
        material_hash: Its content hash.
    """

    host: str
    model: Mapping[str, Any]
    settings: Mapping[str, Any]
    schedule: TrainingSchedule = field(repr=False)
    selection: BlockSelection
    identity: CacheIdentity
    residuals: ResidualRecipe
    material: str
    material_hash: str

    def write(self, path: Path) -> None:
        """Write the file, completely or not at all.

        Raises:
            StorageError: If the disk cannot be written.
        """
        content = {
            "format": _FORMAT,
            "version": RUN_VERSION,
            "made_by": f"BlockSkip {VERSION}",
            "host": self.host,
            "model": self.model,
            "settings": self.settings,
            "material": {"file": self.material, "hash": self.material_hash},
            "selection": asdict(self.selection),
            "residuals": {**asdict(self.residuals), "identity": asdict(self.identity)},
            "schedule": json.loads(self.schedule.to_json()),
        }
        text = json.dumps(content, indent=1, allow_nan=False)
        write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))

    @classmethod
    def read(cls, path: Path) -> RunFile:
        """Read a file that anybody may have written.

        Raises:
            InvalidInputError: If it is not a run file of this version, or its parts do not fit together.
        """
        content = _parsed(path)
        if content.get("format") != _FORMAT:
            raise InvalidInputError(f"{path.name} is not a run file. Name one that BlockSkip wrote.")
        if content.get("version") != RUN_VERSION:
            raise InvalidInputError(
                f"{path.name} has format {content.get('version')}, and this version of BlockSkip ({VERSION}) reads "
                f"{RUN_VERSION}. Write it again with this version."
            )
        residuals, material = dict(_object(content, "residuals")), _object(content, "material")
        host, named, hashed = content.get("host"), material.get("file"), material.get("hash")
        if not (isinstance(host, str) and isinstance(named, str) and isinstance(hashed, str)):
            raise InvalidInputError(f"{path.name} does not say its host and its material. Write it again.")
        run = cls(
            host=host,
            model=_object(content, "model"),
            settings=_object(content, "settings"),
            schedule=_schedule(_object(content, "schedule")),
            selection=from_json(BlockSelection, _object(content, "selection"), "selection"),
            identity=from_json(CacheIdentity, residuals.pop("identity", None), "identity of the residuals"),
            residuals=from_json(ResidualRecipe, residuals, "residuals"),
            material=named,
            material_hash=hashed,
        )
        _require_consistent(run, path.name)
        return run

    def read_material(self, path: Path) -> Material:
        """Read the file with latents and captions.

        Raises:
            InvalidInputError: If it is another file, damaged, or not for this schedule.
        """
        material = read_material(path, self.material_hash)
        latents, captions = material.latents, material.captions
        if len(latents) != len(self.schedule) or any(one.ndim != 3 for one in latents):
            raise InvalidInputError(
                f"{path.name} must have latents of shape ({len(self.schedule)}, C, H, W), got {shapes_in_words(latents)}. "
                "Write it again."
            )
        if not isinstance(captions, list) or not all(0 <= draw.caption < len(captions) for draw in self.schedule):
            raise InvalidInputError(f"{path.name} has not all captions of the schedule. Write it again.")
        return material

    def residual_set(self, material: Material, identity: CacheIdentity, folder: Path) -> ResidualSet:
        """Return the residuals of the run, with what the host says about itself and where it keeps them."""
        recipe = self.residuals
        return ResidualSet(
            schedule=self.schedule,
            latents=material.latents,
            selection=self.selection,
            captions=material.captions,
            identity=identity,
            storage=recipe.storage,
            chunk_size=recipe.chunk_size,
            folder=folder,
            family=recipe.family,
            back_residual=recipe.back_residual,
            remarks=recipe.remarks,
            dropped=recipe.dropped,
        )


def _parsed(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _LARGEST:
            raise InvalidInputError(f"{path.name} is too large for a run file.")
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidInputError(f"The run file cannot be read: {error}. Name one that BlockSkip wrote.") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, InvalidInputError):
            raise
        raise InvalidInputError(f"{path.name} is not JSON: {error}. Write it again.") from error
    return content if isinstance(content, dict) else {}


def _object(content: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = content.get(name)
    if not isinstance(found, dict):
        raise InvalidInputError(f"The run file has no {name}. Write it again.")
    return found


def _require_size(schedule: TrainingSchedule, draw: Draw) -> None:
    if schedule.sizes and not (draw.picture < len(schedule.sizes) and min(schedule.sizes[draw.picture]) > 0):
        raise ValueError(f"picture {draw.picture} has no training size")


def _schedule(content: Mapping[str, Any]) -> TrainingSchedule:
    try:
        schedule = TrainingSchedule.from_json(json.dumps(content))
        from_json(PatchConfig, content["patches"], "patches in the schedule")
        _require_whole("seed", schedule.seed, 2**64)
        for draw in schedule:
            _require_draw(draw)
            _require_size(schedule, draw)
        if not isinstance(schedule.timesteps, str):
            raise TypeError("timesteps must be a text")
    except (CacheError, TypeError, ValueError, ArithmeticError) as error:
        raise InvalidInputError(f"The schedule of the run file cannot be read ({error}). Write it again.") from error
    return schedule


def _require_draw(draw: Draw) -> None:
    """Raise an ordinary error unless a draw is whole numbers within bounds, and a noise level in (0, 1]."""
    for name, value in asdict(draw).items():
        if name != "sigma":
            _require_whole(name, value, 2**63 if name == "noise_seed" else 2**31)
    if type(draw.sigma) is not float or not 0.0 < draw.sigma <= 1.0:
        raise ValueError(f"sigma must be a number above 0, at most 1.0, got {draw.sigma!r}")


def _require_whole(name: str, value: object, end: int) -> None:
    if type(value) is not int or not 0 <= value < end:
        raise ValueError(f"{name} must be a whole number from 0 to {end - 1}, got {value!r}")


def _require_consistent(run: RunFile, name: str) -> None:
    """Check the hashes of what the file itself holds, and its dtype."""
    run.identity.token_dtype  # noqa: B018 - checks it
    if run.schedule.fingerprint != run.identity.schedule:
        raise InvalidInputError(f"{name} has another schedule than its hash says. Write it again.")
    if run.selection.fingerprint != run.identity.selection:
        raise InvalidInputError(f"{name} has another selection of blocks than its hash says. Write it again.")
