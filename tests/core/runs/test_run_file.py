"""Run files that nobody wrote are refused with one sentence."""

from __future__ import annotations

import json

import pytest
from blockskip_pack.blockskip_core.errors import InvalidInputError
from blockskip_pack.blockskip_core.runs.run_file import ResidualRecipe, RunFile

from ..training.test_shared_residuals import residual_set

PICTURE, CAPTION, SIGMA, SIDE, TOP, LEFT, SEED = range(7)


@pytest.fixture
def path(tmp_path):
    residuals = residual_set(tmp_path)
    path = tmp_path / "run.json"
    recipe = ResidualRecipe(storage="disk", chunk_size=2, family="plain", back_residual="constant")
    RunFile(
        host="comfyui", model={}, settings={}, schedule=residuals.schedule, selection=residuals.selection,
        identity=residuals.identity, residuals=recipe, material="m.safetensors", material_hash="0",
    ).write(path)  # fmt: skip
    return path


def edited(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return path


def test_what_was_written_is_read(path, tmp_path):
    assert RunFile.read(path).schedule == residual_set(tmp_path).schedule


@pytest.mark.parametrize(
    ("place", "value", "sentence"),
    [
        (CAPTION, 0.5, "caption must be a whole number from 0 to 2147483647, got 0.5"),
        (CAPTION, 0.0, "caption must be a whole number"),
        (PICTURE, 1e300, "picture must be a whole number from 0 to 2147483647, got 1e\\+300"),
        (PICTURE, True, "picture must be a whole number"),
        (SIDE, -16, "side must be a whole number"),
        (TOP, 2**31, "top must be a whole number"),
        (LEFT, None, "left must be a whole number"),
        (SEED, 1.5, "noise_seed must be a whole number from 0 to 9223372036854775807, got 1.5"),
        (SEED, 2**70, "noise_seed must be a whole number"),
        (SEED, -1, "noise_seed must be a whole number"),
        (SIGMA, 0.0, "sigma must be a number above 0"),
        (SIGMA, 1, "sigma must be a number above 0"),
        (SIGMA, "x", "sigma must be a number above 0"),
    ],
)
def test_a_draw_that_is_none(path, place, value, sentence):
    edited(path, lambda run: run["schedule"]["draws"][1].__setitem__(place, value))
    with pytest.raises(InvalidInputError, match=rf"^The schedule of the run file cannot be read \({sentence}"):
        RunFile.read(path)


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 2**64}, {"seed": 1.0}, {"seed": None}, {"timesteps": 3}, {"patches": {"patch_min": 16, "patch_max": 32, "multiple": 0}},
        {"patches": {"patch_min": 16.0, "patch_max": 32}}, {"patches": []}, {"draws": 3}, {"draws": [[1]]},
    ],
)  # fmt: skip
def test_a_schedule_that_is_none(path, change):
    edited(path, lambda run: run["schedule"].update(change))
    with pytest.raises(InvalidInputError, match=r"^The schedule of the run file cannot be read \("):
        RunFile.read(path)


@pytest.mark.parametrize("dtype", ["torch.nope", "load", "torch.load", "int8", ""])
def test_a_dtype_that_is_none(path, dtype):
    edited(path, lambda run: run["residuals"]["identity"].update(dtype=dtype))
    with pytest.raises(
        InvalidInputError, match="Residuals have one of the dtypes float64, float32, bfloat16, float16, got"
    ):
        RunFile.read(path)
