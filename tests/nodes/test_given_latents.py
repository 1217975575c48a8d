"""Latents of whole pictures in place of pictures, as of core's dataset nodes."""

from __future__ import annotations

import pytest
import torch

from .conftest import Listed


def photos(*sizes):
    generator = torch.Generator().manual_seed(3)
    return Listed(torch.rand(1, height, width, 3, generator=generator) for height, width in sizes)


def encoded(vae, pictures):
    return Listed({"samples": vae.encode(picture)} for picture in pictures)


def test_whole_pictures_train_as_their_latents(bench):
    """Square pictures at training size, uncropped: what the node encodes itself is what it is given."""
    pictures = photos((64, 64), (64, 64))
    plain = {"patch_min": 64, "patch_max": 64, "patch_order": "fixed"}
    own = bench.precompute(images=pictures, **plain)[0]
    given = bench.precompute(images=encoded(bench.vae, pictures))[0]
    assert given.schedule == own.schedule
    assert torch.equal(given.latents, own.latents)
    a, b = bench.train(residuals=own)[0], bench.train(residuals=given)[0]
    assert all(torch.equal(a[name], tensor) for name, tensor in b.items())


def test_resolution_buckets_of_core_are_trained_whole(bench, tiny, run_node, comfyui):
    from comfy_extras.nodes_dataset import ResolutionBucket

    sizes = [(64, 64), (48, 96), (64, 64)]
    pictures, texts = photos(*sizes), tiny.captions((5, 3, 5))
    bucketed = run_node(ResolutionBucket, latents=encoded(bench.vae, pictures), conditioning=Listed(texts))
    latents, positive = (Listed(part) for part in bucketed.args)
    assert [len(one["samples"]) for one in latents] == [2, 1]
    residuals, sheet = bench.precompute(images=latents, positive=positive, draws=9).args
    assert residuals.schedule.sizes == ((64, 64), (64, 64), (48, 96))
    assert residuals.captions[2][0][0] is texts[1][0][0]
    for draw, latent in zip(residuals.schedule, residuals.latents, strict=True):
        own = bench.vae.encode(pictures[[0, 2, 1][draw.picture]])
        assert torch.equal(latent, bench.model.model.process_latent_in(own)[0])
    trained = bench.train(residuals=residuals, batch_size=3)
    assert trained.ui["blockskip"][0]["self_check"] < 1e-5
    assert sheet.ndim == 4
    page = (bench.folders.loras / trained.ui["blockskip"][0]["summary_file"]).read_text()
    assert "64 x 64 px (2 pictures), 96 x 48 px (1 pictures)" in page


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda latents: [*latents, torch.rand(1, 64, 64, 3)], "Input 2 of `images` is no LATENT, and others are"),
        (lambda latents: [{"samples": torch.rand(1, 6, 8, 8)}], "latents of 4 channels, this VAE makes 6"),
        (lambda latents: [{"samples": torch.rand(1, 4, 8, 9)}], r"has 9 x 8 cells, .* multiples of 2. .* of 16 px"),
        (lambda latents: [{"samples": torch.full((1, 4, 8, 8), torch.nan)}], "`images` has latents with NaN"),
    ],
)
def test_latents_that_do_not_fit_are_refused(bench, change, match):
    with pytest.raises(ValueError, match=match):
        bench.precompute(images=Listed(change(encoded(bench.vae, photos((64, 64))))))


def test_references_need_pictures(bench):
    with pytest.raises(ValueError, match="References are for pictures, and `images` has latents"):
        bench.precompute(images=encoded(bench.vae, photos((64, 64))), references=photos((64, 64)))
