"""The four nodes one after another on every supported family: measure, precompute to disk, train, apply."""

from __future__ import annotations

import math

import pytest
import torch

from ..hosts.followed_families import family
from ..hosts.tiny_families import FAMILIES
from ..hosts.tiny_minimax import MINIMAX
from .conftest import PATCHES, TRAINING, Listed

MEASURE = {"method": "attention mask", "skip_ratio": 0.5, "front": 0, "back": 0}
PROBE = {"probe_size": 64, "probe_steps": 1, "window_profile": False}


class FamilyVae:
    """Averages squares of pixels, with as many channels as the model needs, and with one frame if it needs frames."""

    def __init__(self, model, frames: bool) -> None:
        self.first_stage_model = torch.nn.Identity()
        self._format, self._frames = model.latent_format, frames
        self._channels = getattr(model.diffusion_model, "latents_dim", model.latent_format.latent_channels)

    def spacial_compression_encode(self) -> int:
        return self._format.spacial_downscale_ratio

    def encode(self, pixels):
        cells = torch.nn.functional.avg_pool2d(pixels.movedim(-1, 1), self._format.spacial_downscale_ratio)
        cells = cells[:, torch.arange(self._channels) % 3]
        if not self._frames:
            return cells
        return cells[:: self._format.temporal_downscale_ratio].movedim(0, 1)[None]  # one clip, as the host's video VAEs


def assert_trained_and_applied(nodes, run_node, pictures, folders, tiny, model, selection):
    """Precompute to disk, train, and apply."""
    before = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
    positive = tiny.captions((5,))[0]
    patches = {**PATCHES, "patch_min": 32, "patch_max": 64, "draws": 3}
    residuals, _ = run_node(
        nodes.PrecomputeResiduals, model=model, vae=FamilyVae(model.model, tiny.frames), images=pictures,
        positive=positive, selection=selection, **patches,
    ).args  # fmt: skip
    assert list(folders.output.glob("blockskip/residuals/*/manifest.json"))

    if tiny is MINIMAX:
        with pytest.raises(Exception, match="MiniMax H3 takes 1 example at a time, got 2. Set `batch_size` to 1"):
            run_node(nodes.TrainLora, model=model, residuals=residuals, **{**TRAINING, "batch_size": 2})
    trained = run_node(nodes.TrainLora, model=model, residuals=residuals, **TRAINING)
    lora, loss_map, steps = trained.args
    assert steps == len(loss_map["loss"]) == TRAINING["steps"]
    assert trained.ui["blockskip"][0]["self_check"] < 1e-5

    patched, info = run_node(nodes.ApplyLora, model=model, strength_model=1.0, lora=lora).args
    assert f"{len(lora) // 3} layers patched" in info
    assert len(patched.patches) == len(lora) // 3
    after = model.model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("tiny", FAMILIES, ids=lambda family: family.name)
def test_the_four_nodes_in_a_row(nodes, run_node, pictures, folders, tiny):
    model = tiny.build()
    positive = tiny.captions((5,))[0]
    selection, _, report = run_node(nodes.SelectBlocks, model=model, positive=positive, **MEASURE, **PROBE).args
    assert selection.family == tiny.family
    assert selection.front + selection.back == math.floor(0.5 * tiny.num_blocks + 0.5)
    assert "distance" in report
    assert_trained_and_applied(nodes, run_node, pictures, folders, tiny, model, selection)


@pytest.mark.parametrize(
    "tiny", [*map(family, ("krea2", "hunyuan_video", "hidream")), MINIMAX], ids=lambda tiny: tiny.name
)
def test_the_nodes_on_families_whose_text_cannot_be_hidden(nodes, run_node, pictures, folders, tiny):
    model = tiny.build()
    settings = {**MEASURE, "method": "preset"}
    selection, _, _ = run_node(
        nodes.SelectBlocks, model=model, positive=tiny.captions((5,))[0], **settings, **PROBE
    ).args
    assert selection.family == tiny.family
    assert_trained_and_applied(nodes, run_node, pictures, folders, tiny, model, selection)


@pytest.mark.parametrize(
    ("name", "beside"),
    [("wan21", False), ("wan21", True), ("ltx2", True), ("hunyuan_video15", False), ("kandinsky5_video", True)],
)
def test_the_nodes_on_clips(nodes, run_node, folders, name, beside):
    """With ``beside`` there is a picture beside the films, and training pictures are as their pictures."""
    tiny = next((one for one in FAMILIES if one.name == name), None) or family(name)
    model, positive = tiny.build(), tiny.captions((5,))[0]
    per_frame = model.model.latent_format.temporal_downscale_ratio
    length = 2 * per_frame + 1
    films = Listed([torch.rand(length + 4, 72, 96, 3), torch.rand(2 * length, 64, 64, 3)])
    films += [torch.rand(1, 70, 170, 3)] * beside
    selection, _, _ = run_node(
        nodes.SelectBlocks, model=model, positive=positive, **{**MEASURE, "method": "preset"}, **PROBE
    ).args
    patches = {**PATCHES, "patch_min": 32, "patch_max": 64, "draws": 4}
    vae = FamilyVae(model.model, frames=True)
    residuals, sheet = run_node(
        nodes.PrecomputeResiduals, model=model, vae=vae, images=films, positive=Listed([positive] * len(films)), selection=selection,
        frames=length, noise_from=0.25, noise_to=0.75, patch_shape="as pictures" if beside else "square", **patches,
    ).args  # fmt: skip
    frames = {draw.picture: len(latent) for draw, latent in zip(residuals.schedule, residuals.latents, strict=True)}
    channels = model.model.latent_format.latent_channels
    assert frames == {0: 3 * channels, 1: 3 * channels, 2: 3 * channels} | ({3: channels} if beside else {})
    assert all(0.25 <= draw.sigma <= 0.75 for draw in residuals.schedule)
    assert sheet.shape[0] == 1
    trained = run_node(nodes.TrainLora, model=model, residuals=residuals, batch_size=2, **TRAINING)
    assert trained.ui["blockskip"][0]["self_check"] < 1e-5
    plan = {
        "patch_min": 32, "draws": 4, "storage": "disk", "rank": 4, "batch_size": 1, "checkpointing": True,
        "quantize_kept": "off", "activation_budget": 0.0, "card_memory": 0.0,
    }  # fmt: skip
    peaks = []
    for frames in (1, length):
        report, *_ = run_node(
            nodes.MemoryPlan, model=model, positive=positive, selection=selection, frames=frames, **plan
        ).args
        peaks.append(report)
    assert peaks[0] != peaks[1]
    with pytest.raises(Exception, match=f"`frames` must be a multiple of {per_frame} plus 1"):
        run_node(nodes.MemoryPlan, model=model, positive=positive, selection=selection, frames=length + 1, **plan)


def test_clips_of_a_model_that_makes_pictures_are_refused(nodes, run_node, folders):
    tiny = next(one for one in FAMILIES if one.name == "flux")
    model, positive = tiny.build(), tiny.captions((5,))[0]
    settings = {**MEASURE, "method": "preset"}
    selection, *_ = run_node(nodes.SelectBlocks, model=model, positive=positive, **settings, **PROBE).args
    with pytest.raises(Exception, match="`frames` is 5, but this model makes pictures"):
        run_node(
            nodes.PrecomputeResiduals, model=model, vae=FamilyVae(model.model, False),
            images=torch.rand(5, 64, 64, 3), positive=positive, selection=selection, frames=5,
            **{**PATCHES, "patch_min": 32, "patch_max": 64, "draws": 4},
        )  # fmt: skip


def test_blocks_of_a_followed_model_are_measured(nodes, run_node):
    tiny = family("krea2")
    positive = tiny.captions((5,))[0]
    selection, _, report = run_node(
        nodes.SelectBlocks, model=tiny.build(), positive=positive, **MEASURE, **PROBE
    ).args  # fmt: skip
    assert selection.method == "attention mask"
    assert "For other budgets" in report


def test_hiding_the_text_is_refused_where_attention_cannot_be_followed(nodes, run_node):
    tiny = family("ernie")
    with pytest.raises(Exception, match="The blocks of ErnieImage models do not use .* Choose method preset"):
        run_node(nodes.SelectBlocks, model=tiny.build(), positive=tiny.captions((5,))[0], **MEASURE, **PROBE)


def test_memory_plan_says_when_a_model_cannot_be_counted(nodes, run_node):
    tiny = family("hidream")
    model, positive = tiny.build(), tiny.captions((5,))[0]
    selection, _, _ = run_node(
        nodes.SelectBlocks, model=model, positive=positive, **{**MEASURE, "method": "preset"}, **PROBE
    ).args
    with pytest.raises(Exception, match="The memory of this model's runs cannot be counted"):
        run_node(
            nodes.MemoryPlan, model=model, positive=positive, selection=selection, patch_min=64, draws=3, storage="disk", rank=4,
            batch_size=1, checkpointing=True, quantize_kept="off", activation_budget=0.0, card_memory=0.0,
        )  # fmt: skip
