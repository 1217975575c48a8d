"""The public interface: the four calls compared with the functions that they use, and the documented example."""

import inspect
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from blockskip_pack import blockskip_core as blockskip
from blockskip_pack.blockskip_core.errors import InvalidInputError
from blockskip_pack.blockskip_core.residuals.sources import FoldedSource
from blockskip_pack.blockskip_core.torch_dit import TorchDit
from safetensors.torch import load_file

from .plain_dit import (
    MemorySource,
    PlainDit,
    denoise,
    latents,
    lora_for,
    lora_tensors,
    reference_denoise,
    schedule,
    selection,
)
from .plain_dit import train as train_by_parts

ROOT = Path(__file__).resolve().parents[2]
WITHOUT_HOST = """
import sys


class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("comfy", "comfy_api", "folder_paths", "nodes"):
            raise ImportError(f"{name} is the host's")


sys.meta_path.insert(0, Refuse())
sys.path.insert(0, sys.argv[1])
"""
CHECKS = """
from safetensors.torch import load_file

kept = {f"diffusion_model.blocks.{index}." for index in selection.kept}
saved = load_file("lora.safetensors")
assert {name.split(".lora_")[0].rpartition(".")[0] + "." for name in saved} == kept
assert all(tensor.any() for name, tensor in saved.items() if "lora_B" in name)
assert lora.result.steps == 8 and lora.result.self_check < 1e-4
plain = clean_estimate(model, noisy, sigmas, captions[0])
assert estimate.shape == plain.shape and not estimate.equal(plain)
"""


def example():
    """The code in the package's docstring."""
    text = inspect.cleandoc(blockskip.__doc__)
    start = text.index("    import torch")
    lines = [line for line in text[start:].splitlines() if not line or line.startswith("    ")]
    return textwrap.dedent("\n".join(lines))


def examples():
    plan = schedule()
    return blockskip.Examples(plan, latents(len(plan)))


def config(**settings):
    return blockskip.TrainingConfig(**{"steps": 3, "learning_rate": 1e-2, **settings})


def no_gates(name):
    return not name.endswith("gate")


@pytest.mark.slow
def test_the_documented_example_trains_where_there_is_no_host(tmp_path):
    code = WITHOUT_HOST + example() + CHECKS
    surroundings = {name: value for name, value in os.environ.items() if name not in ("COMFYUI_PATH", "PYTHONPATH")}
    command = [sys.executable, "-c", code, str(ROOT)]
    done = subprocess.run(command, cwd=tmp_path, env=surroundings, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    statements = [line for line in example().splitlines() if line.strip() and not line.startswith(("import", "from"))]
    assert len(statements) <= 24


def test_every_exported_name_is_there_and_described():
    assert sorted(blockskip.__all__, key=str.swapcase) == sorted(set(blockskip.__all__), key=str.swapcase)
    for name in blockskip.__all__:
        exported = getattr(blockskip, name)
        if inspect.isclass(exported) or inspect.isfunction(exported):
            assert exported.__doc__, name


def test_train_is_the_loop_on_precomputed_residuals():
    dit, spans, given = PlainDit(), selection(1, 2), examples()
    lora = blockskip.train(
        dit, given, spans, config(seed=4), lora=blockskip.LoraSettings(rank=2, alpha=3.0), layers=no_gates
    )
    adapters = lora_for(dit, spans)
    source = MemorySource(dit, spans, given.schedule, given.latents)
    result, _ = train_by_parts(dit, spans, source, adapters, clean=given.latents, config=config(seed=4))
    assert lora.result.losses == result.losses
    assert lora.adapters.names == adapters.names
    ours, theirs = lora.adapters.state_dict(), adapters.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_residuals_may_be_given_from_memory_or_on_the_fly():
    dit, spans, given = PlainDit(), selection(1, 2), examples()
    computed = blockskip.precompute(dit, given, spans)
    stored = blockskip.train(dit, given, spans, config(), residuals=computed)
    assert stored.result.losses == blockskip.train(dit, given, spans, config()).result.losses
    folded = blockskip.train(dit, given, spans, config(), residuals=FoldedSource())
    assert folded.result.self_check is None
    assert folded.result.losses[0] == pytest.approx(stored.result.losses[0], rel=1e-9)


def test_apply_is_the_whole_model_with_the_lora_merged():
    dit, spans, given = PlainDit(), selection(1, 2), examples()
    before = dit.weights_hash()
    lora = blockskip.train(dit, given, spans, config(), layers=no_gates)
    noisy, sigmas = given.latents[:2] + 0.1, torch.tensor([0.4, 0.8], dtype=torch.float64)
    with blockskip.apply(dit, lora) as estimate:
        denoised = estimate(noisy, sigmas, [0, 1])
    assert not denoised.requires_grad
    expected = reference_denoise(dit, noisy, sigmas, [0, 1], lora=lora_tensors(lora.adapters))
    torch.testing.assert_close(denoised, expected.detach(), rtol=1e-9, atol=1e-9)
    assert not torch.allclose(denoised, denoise(dit.net, noisy, sigmas, torch.cat(dit.captions[:2])).detach())
    assert dit.weights_hash() == before


def test_a_lora_is_saved_with_its_scale(tmp_path):
    dit, spans = PlainDit(), selection(1, 2)
    lora = blockskip.train(dit, examples(), spans, config(), lora=blockskip.LoraSettings(rank=2, alpha=3.0))
    lora.save(tmp_path / "a" / "lora.safetensors")
    saved = load_file(tmp_path / "a" / "lora.safetensors")
    name = lora.adapters.names[0]
    torch.testing.assert_close(saved[f"diffusion_model.{name}.lora_B.weight"], lora.adapters.up(name).detach() * 1.5)


def test_examples_and_selection_must_fit():
    plan = schedule()
    with pytest.raises(InvalidInputError, match=r"shape \(4, C, H, W\), one per training example, got \(3, 3, 2, 3\)"):
        blockskip.Examples(plan, latents(3))
    with pytest.raises(InvalidInputError, match="this model has 5"):
        blockskip.train(PlainDit(), examples(), selection(1, 2, num_blocks=6), config())


def test_examples_are_encoded_crop_by_crop():
    pictures = [torch.rand(20, 24, 3), torch.rand(33, 16, 3)]
    plan = blockskip.draw_schedule(
        [(20, 24), (33, 16)], num_captions=2, num_draws=3, patches=blockskip.PatchConfig(patch_min=16, patch_max=32),
        sample_sigmas=blockskip.sigma_sampler("uniform"), seed=0,
    )  # fmt: skip
    given = blockskip.Examples.encoded(pictures, plan, encode=lambda crop: crop.movedim(-1, 0))
    assert given.latents.shape == (3, 3, 16, 16)
    assert given.latents[1].movedim(0, -1).equal(blockskip.api.TrainingCrops(pictures, plan)[1])


def test_select_is_the_papers_choice_scaled():
    chosen = blockskip.select(PlainDit(), 0.4)
    assert (chosen.front + chosen.back, chosen.num_blocks, chosen.family) == (2, 5, "plain")
    assert len(chosen.block_bytes) == 5


def test_a_model_may_stay_where_it_is_and_run_elsewhere():
    dit = PlainDit()
    elsewhere = TorchDit(
        dit.model, blocks={"double_blocks": dit.blocks[0].io, "single_blocks": dit.blocks[-1].io}, denoise=denoise,
        stem=dit.frozen_stem, head=dit.trainable_head, width=dit.width, captions=dit.captions, family="plain",
        device=torch.device("meta"),
    )  # fmt: skip
    spans, before = selection(1, 2), dit.weights_hash()
    model = blockskip.api.weight_sharing_copy(dit.module("double_blocks.1"))
    stems = {
        name: blockskip.api.weight_sharing_copy(dit.module(name)) for name in (*dit.frozen_stem, *dit.trainable_head)
    }
    with elsewhere.running({"double_blocks.1": model, **stems}):
        assert {weight.device.type for weight in model.parameters()} == {"meta"}
        assert dit.module("double_blocks.0").gate.weight.device.type == "cpu"
    assert dit.weights_hash() == before
    assert (elsewhere.device.type, list(spans.kept)) == ("meta", [1, 2])
