"""The world of clips and its report: what is drawn is read back, and equal operations are those of a closed form."""

from __future__ import annotations

import pytest
import torch


def test_a_latent_is_the_clip_in_another_orthonormal_basis(bench):
    world = bench("clip_world")
    clips = torch.rand(2, world.FRAMES, world.SIDE, world.SIDE, generator=torch.Generator().manual_seed(0))
    latents = world.to_latents(clips)
    cells = world.SIDE // world.CELL
    assert latents.shape == (2, world.CELL**2, world.FRAMES, cells, cells)
    torch.testing.assert_close(world.to_clips(latents), clips, rtol=0, atol=1e-5)
    assert latents.norm() == pytest.approx(float(((clips - world.MIDDLE) / world.SPREAD).norm()), rel=1e-5)
    even = world.to_latents(torch.full_like(clips, 0.7))
    assert even[:, 1:].abs().max() < 1e-4 < even[:, 0].abs().min(), "the first channel is the mean of a cell"


def test_every_scene_is_drawn_inside_and_its_movement_is_read(bench):
    world, generator = bench("clip_world"), torch.Generator().manual_seed(1)
    assert not set(world.SEEN) & set(world.UNSEEN)
    assert len(world.SEEN) + len(world.UNSEEN) == 96
    clips = []
    for scene in (*world.SEEN, *world.UNSEEN):
        clips.append(world.drawn(scene, world.any_middle(scene, generator)))
        assert world.direction_of(clips[-1]) == scene.direction
        border = torch.cat([clips[-1][:, [0, -1]].flatten(), clips[-1][:, :, [0, -1]].flatten()])
        assert border.max() < world.BACKGROUND + 0.1
    assert torch.stack(clips).mean() == pytest.approx(world.MIDDLE, abs=0.01)
    assert torch.stack(clips).std() == pytest.approx(world.SPREAD, abs=0.01)


def test_prompts_are_orthogonal_words(bench):
    world = bench("clip_world")
    ((tokens, _),) = world.conditioning([world.SEEN[0], None])
    assert tokens.shape == (2, world.TEXT_TOKENS, world.TEXT_WIDTH)
    torch.testing.assert_close(tokens[0] @ tokens[0].T, world.TEXT_WIDTH * torch.eye(world.TEXT_TOKENS))
    assert not tokens[1].any()


def test_plain_steps_are_interpolated_clip_by_clip(bench):
    report = bench("ddit_report")
    rows = [
        {"scales": "1" * steps, "plain_steps": float(steps), "difference_each": each, "name": f"plain, {steps} steps"}
        for steps, each in ((4, [0.0, 0.0]), (2, [0.2, 0.4]))
    ]
    coarse = {"scales": "1212", "plain_steps": 3.0, "difference_each": [0.3, 0.3], "name": "every other of 4 steps"}
    assert report.plain_at([*rows, coarse], 3.0) == pytest.approx([0.1, 0.2])
    table = report.clips([{**row, "clips": 2, "moves": 1.0} for row in (*rows, coarse)])
    assert (
        "| every other of 4 steps | 3.00 | 0.300 (± 0.000) | 0.150 (± 0.050) | +0.150 (± 0.050) | 1.00 | `1212` |"
        in table
    )


def test_as_many_steps_as_cost_the_same(bench):
    equal_steps = bench("ddit_clips").equal_steps
    assert [equal_steps(work, 0.325) for work in (25, 17, 10)] == [37, 25, 15]  # the rows of sampling_ways
    assert equal_steps(10, 1.0) == 10
