"""A model that teaches its own coarse calls, on every family: teacher, student, gradients, and what is left behind."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from blockskip_pack.blockskip_core.adapters.lora import LoraSettings
from blockskip_pack.blockskip_core.data.flow_matching import velocity_loss
from blockskip_pack.blockskip_core.ddit.coarse_estimate import CoarseAdapter
from blockskip_pack.blockskip_core.ddit.connection import PatchStatistics
from blockskip_pack.blockskip_core.ddit.patch_adapter import PatchAdapter
from blockskip_pack.blockskip_core.ddit.patch_resizing import PatchResizing
from blockskip_pack.blockskip_core.distillation import loop
from blockskip_pack.blockskip_core.distillation.examples import Examples
from blockskip_pack.blockskip_core.distillation.loop import DistillationResult, distill
from blockskip_pack.blockskip_core.distillation.settings import DistillationSettings
from blockskip_pack.blockskip_core.errors import StorageError, TrainingError

from ..tiny_families import FAMILIES, FLUX
from ..tiny_flux import assert_same_weights, weights

pytestmark = pytest.mark.usefixtures("comfyui")
each_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


def opened(family, *, seed=0, moved=False, rank=2, frames=1, device=None, **build):
    """A model, its parts for patches of twice the side, and clean latents."""
    from blockskip_pack.blockskip_core.hosts.models.coarse_distillation import TrainedParts
    from blockskip_pack.blockskip_core.hosts.models.hosted_dit import HostedDit

    patcher = family.build(**build)
    patcher.load_device = device or patcher.load_device
    patch = 1 if family.latent_shape[1] < 6 else 2
    channels = family.latent_shape[0]
    shape = (channels * frames, 4 * patch, 6 * patch)
    dit = HostedDit(patcher.clone(), family.captions((5, 5, 5)), shape)
    clean = torch.randn(6, *shape, generator=torch.Generator().manual_seed(5))
    resizing = PatchResizing(patch, 2, "nearest", frames)
    patches = PatchAdapter(channels * resizing.side**2, dit.width, seed=seed)
    coarse = CoarseAdapter(resizing, PatchStatistics.of(clean, resizing), patches)
    parts = TrainedParts(dit, coarse, LoraSettings(rank=rank, alpha=float(rank), targets="mlp"), seed)
    if moved:
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for tensor in parts.parameters():
                tensor += torch.randn(tensor.shape, generator=generator) * 0.05
    return patcher, dit, parts, clean


def tensors(clean):
    noise = torch.randn(clean[:2].shape, generator=torch.Generator().manual_seed(9))
    return 0.4 * clean[:2] + 0.6 * noise, torch.full((2,), 0.6)


@each_family
def test_the_teacher_is_the_plain_model_and_the_student_is_what_sampling_calls(family):
    from blockskip_pack.blockskip_core.hosts.models.coarse_distillation import distilling
    from blockskip_pack.blockskip_core.hosts.models.coarse_forward import CoarseForward

    patcher, dit, parts, clean = opened(family, moved=True)
    noisy, sigmas = tensors(clean)
    prompts = family.captions((5, 5, 5))[:2]
    with distilling(dit, parts) as model, torch.no_grad():
        taught = model.teacher(noisy, sigmas, [0, 1])
        with model.attached():
            learnt = model.student(noisy, sigmas, [0, 1])
    plain = family.plain_forward(patcher, noisy, sigmas, prompts)
    torch.testing.assert_close(taught, plain, rtol=1e-4, atol=1e-5)
    fresh = family.build()
    coarse = CoarseForward(fresh)
    coarse.prepare(fresh)
    with torch.inference_mode():
        expected = coarse(
            lambda x, t: family.plain_forward(fresh, x, t, prompts), noisy, sigmas, parts.coarse, parts.low_rank(), {}
        )
    torch.testing.assert_close(learnt, expected, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(learnt, taught, atol=1e-2)


@each_family
def test_gradients_of_every_trained_tensor_against_differences(family):
    from blockskip_pack.blockskip_core.hosts.models.coarse_distillation import distilling

    _, dit, parts, clean = opened(family, moved=True)
    noisy, sigmas = tensors(clean)

    def loss(model):
        with model.attached():
            found = model.student(noisy, sigmas, [0, 1]).double().square().mean()
            if torch.is_grad_enabled():
                found.backward()
        return found.item()

    with distilling(dit, parts) as model:
        with torch.enable_grad():
            loss(model)
        without = [
            name for name, tensor in parts.patches.named_parameters() if tensor.grad is None or not tensor.grad.any()
        ]
        assert without == []
        assert [n for n in parts.lora.names if parts.lora.up(n).grad is None or not parts.lora.up(n).grad.any()] == []
        # Along the gradient of all tensors together the loss changes by its squared norm times the step.
        parameters = parts.parameters()
        gradients = [tensor.grad.clone() for tensor in parameters]
        square = sum(float(gradient.double().square().sum()) for gradient in gradients)
        step = 2e-3 / square**0.5
        with torch.no_grad():
            values = []
            for sign in (1.0, -2.0):
                for tensor, gradient in zip(parameters, gradients, strict=True):
                    tensor += sign * step * gradient
                values.append(loss(model))
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(square, rel=0.02)


def test_checkpointing_changes_no_gradient():
    from blockskip_pack.blockskip_core.hosts.models.coarse_distillation import distilling

    found = []
    for checkpointing in (True, False):
        _, dit, parts, clean = opened(FLUX, moved=True)
        noisy, sigmas = tensors(clean)
        with distilling(dit, parts, checkpointing=checkpointing) as model, torch.enable_grad(), model.attached():
            model.student(noisy, sigmas, [0, 1]).square().mean().backward()
        found.append([tensor.grad for tensor in parts.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@each_family
def test_a_training_lowers_the_held_out_error_and_leaves_the_model_as_it_was(family):
    from blockskip_pack.blockskip_core.hosts.models.coarse_distillation import distilling

    patcher, dit, parts, clean = opened(family)
    before, result = weights(patcher), DistillationResult()
    settings = DistillationSettings(steps=20, batch_size=2, learning_rate=4e-3, warmup_steps=2, validate_every=10)
    examples = Examples(clean, [0, 0, 1, 1, 2, 2], lambda u: u, 0)
    with distilling(dit, parts) as model:
        distill(model, examples, settings, result=result)
    means = [sum(errors) / len(errors) for _, errors in result.measured]
    assert means[-1] < means[0] < sum(result.untrained) / len(result.untrained)
    assert_same_weights(patcher, before)
    assert not patcher.object_patches
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in patcher.model.diffusion_model.modules())
    assert all(tensor.device.type == "cpu" for tensor in parts.parameters())


EXAMPLES = ([0, 0, 1, 1, 2, 2], lambda u: u, 0)
SETTINGS = DistillationSettings(steps=1, batch_size=2, learning_rate=4e-3, warmup_steps=0, validate_every=10)


def test_the_patches_are_trained_where_the_model_s_device_has_another_name(monkeypatch):
    """MPS is `mps` to the host and `mps:0` to a tensor; here the CPU is `cpu:0` and `cpu`."""
    from blockskip_pack.blockskip_core.hosts.models.coarse_distillation import distilling

    _, dit, parts, clean = opened(FLUX, moved=True, device=torch.device("cpu", 0))
    assert dit.device != torch.device("cpu")
    with distilling(dit, parts) as model:
        monkeypatch.setattr(torch.optim.Optimizer, "zero_grad", lambda self, **_: None)
        distill(model, Examples(clean, *EXAMPLES), SETTINGS, result=DistillationResult())
    without = [n for n, tensor in parts.patches.named_parameters() if tensor.grad is None or not tensor.grad.any()]
    assert without == []


def test_patches_that_get_no_gradient_end_the_training():
    from blockskip_pack.blockskip_core.hosts.models.coarse_distillation import distilling

    _, dit, parts, clean = opened(FLUX)
    before = parts.state_dict()
    with distilling(dit, parts) as model:
        model._adapter = copy.deepcopy(model._adapter)
        with pytest.raises(
            TrainingError, match=r"no gradient in the first step: embedding, identifier, .* flux family"
        ):
            distill(model, Examples(clean, *EXAMPLES), SETTINGS, result=DistillationResult())
    assert all(torch.equal(before[name], tensor) for name, tensor in parts.state_dict().items())


def test_patches_on_another_device_are_refused():
    from blockskip_pack.blockskip_core.hosts.models.coarse_distillation import distilling

    _, dit, parts, _ = opened(FLUX)
    parts.to = lambda device: None
    parts.patches.to("meta")
    with pytest.raises(TrainingError, match="embedding is on meta and the model on cpu"), distilling(dit, parts):
        pass


def test_gradients_in_float16_are_those_of_float32(monkeypatch):
    """With a loss as small for each number as that of a latent that is ten thousand times larger."""
    from blockskip_pack.blockskip_core.hosts.models.coarse_distillation import distilling

    monkeypatch.setattr(torch.optim.Optimizer, "zero_grad", lambda self, **_: None)
    monkeypatch.setattr(loop, "velocity_loss", lambda *given: velocity_loss(*given) / 1e4)
    found = []
    for cast_to in (None, torch.float16):
        _, dit, parts, clean = opened(FLUX, moved=True, **({"cast_to": cast_to} if cast_to else {}))
        settings = dataclasses.replace(SETTINGS, max_grad_norm=1e9)
        with distilling(dit, parts) as model:
            distill(model, Examples(clean, *EXAMPLES), settings, result=DistillationResult())
        assert model.dtype == (cast_to or torch.float32)
        found.append([tensor.grad.clone() for tensor in parts.lora.parameters()])
    exact, half = (torch.cat([gradient.reshape(-1) for gradient in each]) for each in found)
    assert ((half - exact).norm() / exact.norm()).item() < 0.01


def test_own_latents_are_the_hosts_euler_and_are_kept(tmp_path, monkeypatch):
    import folder_paths
    from blockskip_pack.blockskip_core.hosts.models.hosted_dit import HostedDit
    from blockskip_pack.blockskip_core.hosts.sampling.own_latents import OwnLatents, own_latents

    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    patcher, shape = FLUX.build(), (4, 8, 8)
    prompts, negative = FLUX.captions((5, 3), seed=2), FLUX.captions((4,), seed=3)
    request = OwnLatents(per_prompt=2, width=64, height=64, steps=3, cfg=2.5, seed=11)
    counted = []

    def made(identity="a", request=request):
        dit = HostedDit(patcher.clone(), [*prompts, *negative], shape)
        return own_latents(dit, request, shape, 2, identity, lambda done, total: counted.append((done, total)))

    found = made()
    assert found.shape == (4, *shape)
    assert (counted[0], counted[-1], len(counted)) == ((1, 12), (12, 12), 12)
    import comfy.sample
    import comfy.samplers

    sigmas = comfy.samplers.calculate_sigmas(patcher.get_model_object("model_sampling"), "simple", 3)
    for number in range(4):
        with torch.inference_mode():
            noise = comfy.sample.prepare_noise(torch.zeros(1, *shape), 11 + number)
            expected = comfy.sample.sample_custom(
                patcher, noise, 2.5, comfy.samplers.sampler_object("euler"), sigmas, prompts[number // 2], negative[0],
                torch.zeros(1, *shape), disable_pbar=True, seed=0,
            )  # fmt: skip
        own = patcher.model.process_latent_in(expected)
        torch.testing.assert_close(found[number : number + 1], own, rtol=1e-4, atol=1e-4)
    counted.clear()
    assert torch.equal(made(), found)
    assert counted == []
    made("b")
    assert len(counted) == 12
    for path in (tmp_path / "blockskip" / "latents").iterdir():
        path.write_bytes(b"damaged")
    assert torch.equal(made(), found)


def sampling_latents(tmp_path, monkeypatch, scheduler="simple"):
    """Return a function that samples four latents, of two steps each, and the folder in which they are kept."""
    import folder_paths
    from blockskip_pack.blockskip_core.hosts.models.hosted_dit import HostedDit
    from blockskip_pack.blockskip_core.hosts.sampling.own_latents import OwnLatents, own_latents

    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    patcher, prompts, shape = FLUX.build(), FLUX.captions((5, 3), seed=2), (4, 8, 8)

    def made(on_step=lambda done, total: None, steps=2):
        request = OwnLatents(per_prompt=2, width=64, height=64, steps=steps, seed=11, scheduler=scheduler)
        return own_latents(HostedDit(patcher.clone(), prompts, shape), request, shape, 2, "a", on_step)

    return made, tmp_path / "blockskip" / "latents"


def test_own_latents_that_were_cut_off_go_on_from_what_was_made(tmp_path, monkeypatch):
    expected = sampling_latents(tmp_path / "whole", monkeypatch)[0]()
    made, folder = sampling_latents(tmp_path / "cut", monkeypatch)
    counted = []

    def cut(done, total):
        counted.append(done)
        if done == 5:
            raise KeyboardInterrupt

    for steps in ([1, 2, 3, 4, 5], [5]):  # only the steps of the third latent are made again
        with pytest.raises(KeyboardInterrupt):
            made(cut)
        assert counted == steps
        counted.clear()
    (parts,) = folder.iterdir()
    assert sorted(path.name for path in parts.iterdir()) == ["000000.safetensors", "000001.safetensors"]
    (parts / "000000.safetensors").write_bytes(b"damaged")
    assert torch.equal(made(lambda done, total: counted.append(done)), expected)
    assert counted == [1, 2, 5, 6, 7, 8]
    (file,) = folder.iterdir()
    assert file.is_file(), "one file of all of them, and nothing else"


def test_own_latents_on_a_full_disk_are_only_not_kept(tmp_path, monkeypatch):
    from blockskip_pack.blockskip_core.hosts.sampling import own_latents

    made, folder = sampling_latents(tmp_path, monkeypatch)
    expected = made()
    (file,) = folder.iterdir()
    file.unlink()

    def full(path, write):
        raise StorageError("The disk is full.")

    with monkeypatch.context() as patched:
        patched.setattr(own_latents, "write_atomically", full)
        assert torch.equal(made(), expected)
    assert list(folder.iterdir()) == []


def test_own_latents_that_are_not_finite_are_refused_and_not_kept(tmp_path, monkeypatch):
    """With one step kl_optimal divides by zero."""
    made, folder = sampling_latents(tmp_path, monkeypatch, "kl_optimal")
    for _ in range(2):
        with pytest.raises(
            TrainingError, match="of prompt 1 is not finite, with `sampler_steps` 1, `scheduler` kl_optimal"
        ):
            made(steps=1)
    assert not folder.exists()


def test_stored_latents_that_are_not_finite_are_sampled_again(tmp_path, monkeypatch):
    from safetensors.torch import load_file, save_file

    made, folder = sampling_latents(tmp_path, monkeypatch)
    expected = made()
    (file,) = folder.iterdir()
    latents = load_file(file)["latents"].clone()
    latents[2, 0, 0, 0] = torch.nan
    save_file({"latents": latents}, file)
    assert torch.equal(made(), expected)
    assert torch.equal(load_file(file)["latents"], expected)
