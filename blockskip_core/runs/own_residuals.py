"""Where a run file's residuals are kept on disk: never where its latents could be mistaken for those of other pictures.

Residuals are known by the pictures that the host encoded, and the host reads latents back from a finished cache instead
of encoding again. The latents of a run file may come from anybody, and nothing ties them to those pictures. So a
finished cache is used if its latents are the run file's, bit for bit, and everything else is computed into a folder whose
name also contains the hash of the run file's material, where no host looks.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace

from ..data.latents import are_equal
from ..errors import CacheError
from ..residuals.cache import is_finished
from ..residuals.cached_set import stored_latents
from ..residuals.residual_set import PhaseProgress, ResidualSet


def kept_apart(residuals: ResidualSet, material_hash: str, progress: PhaseProgress) -> ResidualSet:
    """Return residuals in the folder that they may be kept in.

    Args:
        residuals: What to train on, with the host's own folder for it.
        material_hash: Content hash of the file with the latents.
        progress: Called while another process computes the same residuals; may raise to interrupt.

    Raises:
        CacheError: If there are finished residuals of other latents, or they are damaged.
    """
    if residuals.storage != "disk":
        return residuals  # nothing is kept beyond the run
    if not is_finished(residuals.folder):
        return _apart(residuals, material_hash)
    stored = stored_latents(residuals, progress)
    if stored is None:
        return _apart(residuals, material_hash)
    if not are_equal(stored, residuals.latents):
        raise CacheError(
            f"The residuals in {residuals.folder.name} were computed from other latents than this run file has, for the same "
            "pictures. Write the run again where these residuals are, or move their folder away."
        )
    return residuals


def _apart(residuals: ResidualSet, material_hash: str) -> ResidualSet:
    key = hashlib.blake2b(f"{residuals.identity.key} {material_hash}".encode(), digest_size=16).hexdigest()
    return replace(residuals, folder=residuals.folder.with_name(key))
