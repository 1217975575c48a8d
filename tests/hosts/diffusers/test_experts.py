"""Wan 2.2 A14B: each transformer is trained on the noise levels with which the pipeline calls it, and on no others."""

from __future__ import annotations

import pytest
import torch
from blockskip_pack import blockskip_core as blockskip
from blockskip_pack.blockskip_core.errors import InvalidInputError
from blockskip_pack.blockskip_core.hosts import diffusers as host
from blockskip_pack.blockskip_core.runs.command import main

from .tiny_models import WAN
from .tiny_pipelines import build, wan_pair

SIDE = 32


@pytest.fixture(scope="module")
def pair():
    return wan_pair()


def schedule(pipeline, within):
    return blockskip.draw_schedule(
        [(SIDE, SIDE)], num_captions=1, num_draws=8, seed=0,
        patches=blockskip.PatchConfig(patch_min=SIDE, patch_max=SIDE, multiple=host.crop_multiple(pipeline)),
        sample_sigmas=blockskip.sigma_sampler("shifted", shift=5.0, within=within),
    )  # fmt: skip


def test_the_ranges_are_those_of_the_pipelines_own_calls(pair):
    """A hook on each transformer hears at which times the pipeline calls it."""
    for name in ("transformer", "transformer_2"):
        called = []
        model = getattr(pair, name)
        hook = model.register_forward_pre_hook(
            lambda module, args, kwargs, called=called: called.append(float(kwargs["timestep"][0]) / 1000),
            with_kwargs=True,
        )
        pair(
            "a cat", height=SIDE, width=SIDE, num_frames=1, num_inference_steps=12, guidance_scale=1.0,
            output_type="latent",
        )  # fmt: skip
        hook.remove()
        low, high = host.noise_range(pair, name)
        assert called
        assert all(low <= time <= high for time in called), name


def test_one_transformer_has_all_noise_levels():
    assert host.noise_range(build("wan")) == host.noise_range(build("sana")) == (0.0, 1.0)
    with pytest.raises(InvalidInputError, match="This WanPipeline has one transformer only. Leave out `component`"):
        host.noise_range(build("wan"), "transformer_2")


def test_noise_levels_of_the_other_transformer_are_refused(pair):
    picture = [torch.zeros(SIDE, SIDE, 3)]
    ranges = {name: host.noise_range(pair, name) for name in ("transformer", "transformer_2")}
    for name, within in ranges.items():
        host.encode_examples(pair, picture, schedule(pair, within), component=name)
    wrong = [((0.0, 1.0), "transformer"), ((0.0, 1.0), "transformer_2"), (ranges["transformer"], "transformer_2")]
    for within, name in wrong:
        with pytest.raises(InvalidInputError, match=f"calls its {name} with noise levels of .* within=noise_range"):
            host.encode_examples(pair, picture, schedule(pair, within), component=name)
    with pytest.raises(InvalidInputError, match="calls its transformer with noise levels of 0.9 to 1 only"):
        host.encode_examples(pair, picture, schedule(pair, ranges["transformer_2"]))


def test_a_run_file_names_the_transformer(pair, tmp_path):
    for name in ("models", "output"):
        (tmp_path / name).mkdir()
    pair.save_pretrained(tmp_path / "models" / "tiny")
    captions = host.encode_captions(pair, ["a cat"])
    dit, plan = host.DiffusersDit(pair.transformer_2, captions), schedule(pair, (0.0, 0.9))
    examples = host.encode_examples(pair, [torch.zeros(SIDE, SIDE, 3)], plan, component="transformer_2")
    spans = blockskip.BlockSelection(front=1, back=1, num_blocks=WAN.num_blocks, family="wan")
    config = blockskip.TrainingConfig(steps=1)
    host.write_run(tmp_path / "run.json", dit, examples, spans, config, folder="tiny", component="transformer_2")
    assert (
        main([str(tmp_path / "run.json"), "--models", str(tmp_path / "models"), "--output", str(tmp_path / "output")])
        == 0
    )
    assert [path.name for path in (tmp_path / "output" / "loras").iterdir()] == ["blockskip_00001.safetensors"]
