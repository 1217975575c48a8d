"""Latents of a run file never get to where the host keeps those of its own pictures."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from blockskip_pack.blockskip_core.errors import CacheError
from blockskip_pack.blockskip_core.residuals.cached_set import write_cache
from blockskip_pack.blockskip_core.runs.own_residuals import kept_apart

from ..plain_dit import PlainDit
from ..training.test_shared_residuals import quiet, residual_set


def test_unknown_latents_have_a_folder_of_their_own(tmp_path):
    residuals = residual_set(tmp_path)
    first = kept_apart(residuals, "a", quiet)
    assert first.folder.parent == residuals.folder.parent
    assert len({residuals.folder, first.folder, kept_apart(residuals, "b", quiet).folder}) == 3
    assert kept_apart(residuals, "a", quiet) == first
    assert first.identity == residuals.identity
    write_cache(first, PlainDit(), quiet)
    assert kept_apart(residuals, "a", quiet).folder == first.folder


def test_finished_residuals_of_the_same_latents_are_used(tmp_path):
    residuals = residual_set(tmp_path)
    write_cache(residuals, PlainDit(), quiet)
    assert kept_apart(residuals, "a", quiet) is residuals


@pytest.mark.parametrize("change", [lambda x: x + 1e-12, lambda x: x.float()], ids=["numbers", "dtype"])
def test_finished_residuals_of_other_latents_are_refused(tmp_path, change):
    residuals = residual_set(tmp_path)
    write_cache(residuals, PlainDit(), quiet)
    forged = replace(residuals, latents=change(residuals.latents))
    with pytest.raises(CacheError, match="were computed from other latents than this run file has"):
        kept_apart(forged, "a", quiet)
    assert residuals.folder.is_dir()


@pytest.mark.parametrize("storage", ["chunked", "on the fly"])
def test_what_is_not_kept_needs_no_folder_of_its_own(tmp_path, storage):
    residuals = replace(residual_set(tmp_path), storage=storage, latents=torch.zeros(1))
    assert kept_apart(residuals, "a", quiet) is residuals
