"""Errors are reported in a sentence that names the cause, and nothing is left on the disk."""

from __future__ import annotations

import os
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch


@contextmanager
def refused(bench, match, kind=ValueError):
    """Expect an error with this sentence, no file, and no folder of residuals."""
    before = bench.folders.files()
    with pytest.raises(kind, match=match):
        yield
    assert bench.folders.files() == before
    assert not list(bench.folders.output.glob("blockskip/residuals/*"))


def listed(bench, values):
    return type(bench.pictures)(values)


# --- Select Blocks -----------------------------------------------------------------------------------------------


def unsupported(tiny):
    patcher = tiny.tiny_flux()
    patcher.model.diffusion_model = torch.nn.Linear(2, 2)
    return patcher


def test_select_refuses_a_model_of_no_known_family(bench, tiny):
    with refused(bench, r"supported family \(FLUX\.1, .*\), got Linear\. Load one of these"):
        bench.select(model=unsupported(tiny))


@pytest.mark.parametrize(("front", "back"), [(6, 0), (0, 6), (4, 2), (5, 9)])
def test_select_refuses_to_leave_no_block(bench, front, back):
    with refused(bench, rf"first {front} and the last {back} of 6 blocks leaves none .* at most 5"):
        bench.select(front=front, back=back)


def test_select_refuses_negative_counts(bench):
    with refused(bench, "must not be negative, got -1 and 2"):
        bench.select(front=-1, back=2)


@pytest.mark.parametrize("method", ["preset", "attention mask"])
def test_select_refuses_a_ratio_that_leaves_no_block(bench, tiny, method):
    one_block = tiny.tiny_flux(depth=0, depth_single=1)
    with refused(bench, "skip_ratio 0.9 would skip all 1 blocks and leave none"):
        bench.select(model=one_block, method=method, skip_ratio=0.9)


@pytest.mark.parametrize("ratio", [-0.1, 0.95])
def test_select_refuses_a_ratio_out_of_range(bench, ratio):
    with refused(bench, f"skip_ratio must be between 0 and 0.9, got {ratio}"):
        bench.select(method="preset", skip_ratio=ratio)


@pytest.mark.parametrize(
    ("setting", "match"),
    [
        ({"probe_steps": 0}, "steps must be at least 1, got 0"),
        ({"probe_seeds": 0}, "num_seeds must be at least 1, got 0"),
        ({"probe_size": 100}, "multiple of 16 px, got 100"),
        ({"tail": -2}, "tail must be at least -1, got -2"),
        ({"method": "manual", "front": 2, "back": 1, "tail": 3}, "none to train between them"),
        (
            {"method": "guess"},
            "one of attention mask, preset, manual, cost and influence, skip and freeze, got 'guess'",
        ),
        ({"method": "skip and freeze", "skip_ratio": 0.7}, "between 0 and 0.6 for `skip and freeze`"),
    ],
    ids=str,
)
def test_select_refuses_settings_that_make_no_sense(bench, setting, match):
    with refused(bench, match):
        bench.select(**setting)


def test_select_refuses_prompts_that_are_not_numbers(bench, tiny):
    broken = tiny.captions((5,))[0]
    broken[0][0][0, 0, 0] = float("nan")
    with refused(bench, "Conditioning 1 contains NaN or Inf"):
        bench.select(method="attention mask", positive=broken)


def test_select_refuses_a_model_that_makes_no_picture(bench):
    with torch.inference_mode():
        bench.model.model.diffusion_model.final_layer.linear.weight.fill_(float("nan"))
    settings = {"probe_size": 32, "probe_steps": 1, "window_profile": False}
    with refused(bench, "not finite. Check that the model and its precision can sample"):
        bench.select(method="attention mask", **settings)


# --- Precompute Residuals ----------------------------------------------------------------------------------------


def test_precompute_refuses_no_pictures(bench):
    with refused(bench, "No pictures came in"):
        bench.precompute(images=listed(bench, []))


def test_precompute_refuses_captions_that_do_not_fit_the_pictures(bench, tiny):
    with refused(bench, "one for each of the 3 pictures, got 2 captions"):
        bench.precompute(positive=listed(bench, tiny.captions((5, 5))))


def test_precompute_refuses_no_captions(bench):
    with refused(bench, "No conditioning came in"):
        bench.precompute(positive=[])


def test_precompute_refuses_a_picture_smaller_than_the_patch(bench):
    with refused(bench, "1 of 1 pictures is smaller than the patch of 32 px: number 1 \\(40 x 31 px\\)"):
        bench.precompute(images=torch.rand(1, 31, 40, 3))


@pytest.mark.parametrize("which", ["patch_min", "patch_max"])
def test_precompute_refuses_sides_that_are_no_multiple(bench, which):
    with refused(bench, rf"{which} must be a positive multiple of 16 px for this model, got 40. Try 32 or 48"):
        bench.precompute(**{which: 40})


def test_precompute_refuses_sides_out_of_order(bench, nodes):
    with refused(bench, "patch_min must not be larger than patch_max, got 64 and 48"):
        bench.precompute(patch_min=64, patch_max=48)
    validate = nodes.PrecomputeResiduals.validate_inputs
    assert "must not be larger" in validate(patch_min=[64], patch_max=[48])
    assert "patch_min must be between 16 and 4096 px, got 8" in validate(patch_min=[8], patch_max=[48])
    assert "patch_max must be between 16 and 4096 px, got 8192" in validate(patch_min=[16], patch_max=[8192])
    assert validate(patch_min=[32], patch_max=[32]) is True
    assert validate(patch_min=[None], patch_max=[32]) is True  # linked


@pytest.mark.parametrize(
    ("setting", "match"),
    [
        ({"draws": 0}, "At least one training example is needed, got 0"),
        ({"storage": "cloud"}, "storage must be one of disk, chunked, on the fly, got 'cloud'"),
        ({"chunk_size": 0}, "chunk_size must be at least 1, got 0"),
        ({"back_residual": "cubic"}, "back_residual must be one of constant, linear, exact, got 'cubic'"),
        ({"residual_format": "int2"}, "residual_format must be one of exact, int8, fp8, got 'int2'"),
        ({"patch_order": "sideways"}, "Patch order must be one of .*, got 'sideways'"),
        ({"timesteps": "late"}, "timestep distribution must be one of .*, got 'late'"),
        ({"timestep_shift": 0.0, "timesteps": "shifted"}, "timestep shift must be positive, got 0.0"),
    ],
    ids=str,
)
def test_precompute_refuses_settings_that_make_no_sense(bench, setting, match):
    with refused(bench, match):
        bench.precompute(**setting)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_precompute_refuses_pictures_and_captions_that_are_not_numbers(bench, tiny, value):
    picture = torch.rand(1, 64, 64, 3)
    picture[0, 0, 0, 0] = value
    with refused(bench, "Picture 2 of 2 contains NaN or Inf"):
        bench.precompute(images=listed(bench, [torch.rand(1, 64, 64, 3), picture]))
    caption = tiny.captions((5,))[0]
    caption[0][1]["pooled_output"][0, 0] = value
    with refused(bench, "Conditioning 1 contains NaN or Inf"):
        bench.precompute(positive=caption)


def test_precompute_refuses_pictures_without_colours(bench):
    with refused(bench, r"Picture 1 must come in the shape .* 3 colours\), got \(1, 64, 64, 1\)"):
        bench.precompute(images=torch.rand(1, 64, 64, 1))


def test_precompute_refuses_a_caption_for_a_part_of_the_picture(bench, tiny):
    caption = tiny.captions((5,))[0]
    caption[0][1]["area"] = (1, 1, 0, 0)
    with refused(bench, "Conditioning 1 carries area, which training cannot follow"):
        bench.precompute(positive=caption)


def test_precompute_refuses_a_model_of_no_known_family(bench, tiny):
    with refused(bench, r"supported family \(FLUX\.1, .*\), got Linear"):
        bench.precompute(model=unsupported(tiny))


def test_precompute_refuses_the_selection_of_another_model(bench, tiny):
    foreign = bench.select(model=tiny.tiny_flux(depth=1))[0]
    with refused(bench, "made for 5 blocks of flux, this model has 6 of flux. Select blocks of the same model"):
        bench.precompute(selection=foreign)


def test_precompute_refuses_the_vae_of_another_model(bench, monkeypatch):
    encode = bench.vae.encode
    monkeypatch.setattr(bench.vae, "encode", lambda pixels: torch.cat([encode(pixels)] * 4, dim=1))
    with refused(bench, "latents of 4 channels, this VAE makes 16"):
        bench.precompute()


def test_precompute_refuses_a_vae_that_makes_no_numbers(bench, monkeypatch):
    encode = bench.vae.encode
    monkeypatch.setattr(bench.vae, "encode", lambda pixels: encode(pixels) * float("nan"))
    with refused(bench, "The VAE made latents with NaN or Inf"):
        bench.precompute()


def test_precompute_refuses_a_model_that_makes_no_numbers(bench):
    with torch.inference_mode():
        bench.model.model.diffusion_model.double_blocks[0].img_mlp[0].weight.fill_(float("nan"))
    with refused(bench, "tokens of training example 0 are not finite"):
        bench.precompute()


def test_precompute_refuses_a_full_disk_before_it_writes(bench, core, monkeypatch):
    free = SimpleNamespace(total=0, used=0, free=300 * 2**20)
    monkeypatch.setattr(core("residuals.cache").shutil, "disk_usage", lambda path: free)
    bench.precompute()  # enough for this small amount
    assert list(bench.folders.output.glob("blockskip/residuals/*"))
    free.free = 256 * 2**20
    with pytest.raises(
        ValueError, match=r"would take .* on disk, but 256\.0 MiB are free\. Use fewer training examples"
    ):
        bench.precompute(seed=9)
    assert len(list(bench.folders.output.glob("blockskip/residuals/*"))) == 1


def test_precompute_leaves_nothing_of_a_write_that_fails(bench, core, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(core("residuals.cache"), "save_file", fail)
    with refused(bench, "could not be written: .*No space left on device. Free some disk space"):
        bench.precompute()


def test_a_node_for_one_model_refuses_two(bench, tiny):
    two = listed(bench, [bench.model, tiny.tiny_flux()])
    with refused(bench, "`model` takes one value, got a list of 2"):
        bench.precompute(model=two)
    with refused(bench, "Nothing came in for `model`"):
        bench.precompute(model=listed(bench, []))


# --- Dynamic Patch Trainer ---------------------------------------------------------------------------------------


@pytest.fixture
def residuals(bench):
    """Residuals that need no file."""
    return bench.precompute(storage="on the fly")[0]


@pytest.mark.parametrize(
    ("setting", "match"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"accumulation": -1}, "accumulation must be at least 1, got -1"),
        ({"learning_rate": 0.0}, "learning_rate must be positive and finite, got 0.0"),
        ({"learning_rate": float("nan")}, "learning_rate must be positive and finite, got nan"),
        ({"optimizer": "Prodigy (prodigyopt)"}, "learning_rate must be at least 0.1 with Prodigy"),
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"alpha": -1.0}, "alpha must be positive, got -1.0"),
        ({"weight_decay": -0.1}, "weight_decay must not be negative"),
        ({"lr_schedule": "zigzag"}, "lr_schedule must be one of .*, got 'zigzag'"),
        ({"targets": "everything"}, "targets must be one of .*, got 'everything'"),
        ({"file_format": "onnx"}, "file_format must be one of diffusers, peft, kohya, got 'onnx'"),
        ({"loss_weighting": "heavy"}, "loss_weighting must be one of .*, got 'heavy'"),
    ],
    ids=str,
)
def test_the_trainer_refuses_settings_that_make_no_sense(bench, residuals, setting, match):
    with refused(bench, match):
        bench.train(residuals=residuals, **setting)


@pytest.mark.parametrize("name", ["../evil", "..\\evil", "/abs/path", "C:\\path", "a/../../b", "a/..", ".."])
def test_the_trainer_writes_nowhere_but_below_the_output_folder(bench, residuals, name):
    with refused(bench, "must stay inside ComfyUI's output folder"):
        bench.train(residuals=residuals, output_name=name)


@pytest.mark.parametrize("name", ["", ".", "./", ".\\."])
def test_the_trainer_refuses_names_that_name_no_file(bench, residuals, name):
    with refused(bench, "names no file. Use a plain name such as loras/my_lora"):
        bench.train(residuals=residuals, output_name=name)


@pytest.mark.parametrize("name", ["my:lora", "loras/toy ", "con", "loras\\aux", "what?", "toy."])
def test_the_trainer_refuses_names_that_some_system_cannot_have(bench, residuals, name):
    with refused(bench, "The file name .* Use a name such as"):
        bench.train(residuals=residuals, output_name=name)


def test_the_trainer_saves_to_the_same_folder_on_every_system(bench, residuals):
    assert (
        bench.train(residuals=residuals, output_name="loras\\toy", steps=1).ui["blockskip"][0]["file"]
        == "toy_00001_.safetensors"
    )
    assert (bench.folders.loras / "toy_00001_.safetensors").is_file()


@pytest.mark.parametrize("name", ["x" * 300, "x" * 300 + "/a"])
def test_the_trainer_refuses_names_that_are_too_long_before_it_trains(bench, residuals, name):
    with refused(bench, "File name too long.*Choose another output_name"):
        bench.train(residuals=residuals, output_name=name)


@pytest.mark.parametrize("name", ["loras/", "loras/toy", "loras//toy", "loras/toy/."])
def test_no_earlier_file_is_written_over_whatever_the_name(bench, residuals, name):
    """ComfyUI counts files by the name as typed, and finds none for a name that ends with a slash."""
    before = {}
    for seed in range(3):
        bench.train(residuals=residuals, output_name=name, seed=seed, steps=1)
        files = {path: path.read_bytes() for path in bench.folders.output.rglob("*_.safetensors")}
        assert before.items() < files.items()
        before = files
    assert len(before) == 3


def test_a_name_that_was_taken_while_it_trained_is_left_to_the_other(bench, residuals, nodes, monkeypatch):
    """Two programs may share an output folder."""
    show, other = nodes.train_lora.NodeProgress.__call__, bench.folders.loras / "toy_00001_.safetensors"

    def meanwhile(self, phase, done, total, detail=""):
        if phase == "training step" and done == 1:
            other.write_text("theirs")
        show(self, phase, done, total, detail)

    monkeypatch.setattr(nodes.train_lora.NodeProgress, "__call__", meanwhile)
    trained = bench.train(residuals=residuals, output_name="loras/toy")
    assert other.read_text() == "theirs"
    assert trained.ui["blockskip"][0]["file"] == "toy_00002_.safetensors"
    assert (bench.folders.loras / "toy_00002_.html").is_file()


def test_what_a_killed_run_left_under_a_temporary_name_is_removed(bench, residuals):
    names = ["toy_00001_.safetensors.part", "toy_00001_step000100.safetensors.part", "toy_00002_.html.part",
             "toy_00003_.safetensors.trial", "toys_00001_.safetensors.part", "toy_00001_.safetensors", "toy.part"]  # fmt: skip
    for name in names:
        (bench.folders.loras / name).write_text("half")
        os.utime(bench.folders.loras / name, (1000, 1000))
    (bench.folders.loras / "toy_00009_.safetensors.part").write_text("just now, by another program")
    bench.train(residuals=residuals, output_name="loras/toy")
    left = sorted(path.name for path in bench.folders.loras.iterdir() if "00010" not in path.name)
    assert left == ["toy.part", "toy_00001_.safetensors", "toy_00009_.safetensors.part", "toys_00001_.safetensors.part"]


def test_the_trainer_refuses_names_that_no_one_can_read(bench, residuals):
    with refused(bench, "must not contain control characters"):
        bench.train(residuals=residuals, output_name="loras/a\nb")


def test_the_trainer_refuses_the_residuals_of_another_model(bench, tiny, residuals):
    with refused(bench, "computed from another model .* Connect the same MODEL to Precompute Residuals"):
        bench.train(residuals=residuals, model=tiny.tiny_flux(seed=1))


def test_the_trainer_refuses_a_model_that_a_lora_was_put_on_in_between(bench, residuals):
    lora = bench.train(residuals=residuals)[0]
    for path in bench.folders.loras.iterdir():
        path.unlink()
    changed = bench.apply(lora=lora)[0]
    with refused(bench, "computed from another model"):
        bench.train(residuals=residuals, model=changed)


def test_the_trainer_stops_before_a_loss_that_is_not_finite_and_keeps_nothing(bench):
    with torch.inference_mode():
        bench.model.model.diffusion_model.final_layer.linear.weight.fill_(float("nan"))
    residuals = bench.precompute(storage="on the fly")[0]
    with refused(bench, "loss is not finite in step 1. The LoRA is kept as it was after step 0"):
        bench.train(residuals=residuals)


def test_the_trainer_keeps_what_it_had_when_a_later_loss_is_not_finite(bench, residuals, core):
    from safetensors.torch import load_file

    with pytest.raises(ValueError, match=r"is not finite in step 2\. The LoRA is kept as it was after step 1"):
        bench.train(residuals=residuals, learning_rate=1e30)
    (path,) = bench.folders.loras.glob("*.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in load_file(path).values())
    assert core("hosts.files.lora_files").load_lora_file(path.name).metadata["steps"] == 1


def test_cancel_keeps_what_was_learned(bench, residuals, nodes, monkeypatch, core):
    import comfy.model_management

    class Cancelled(comfy.model_management.InterruptProcessingException):
        pass

    def cancel(self, phase, done, total, detail=""):
        if phase == "training step" and done == 2:
            raise Cancelled

    monkeypatch.setattr(nodes.train_lora.NodeProgress, "__call__", cancel)
    with pytest.raises(Cancelled):
        bench.train(residuals=residuals)
    (path,) = bench.folders.loras.glob("*.safetensors")
    metadata = core("hosts.files.lora_files").load_lora_file(path.name).metadata
    assert (metadata["steps"], metadata["steps_planned"]) == (2, 3)


@pytest.mark.parametrize(("storage", "phase"), [("disk", "encoding crops"), ("disk", "computing residuals"),
                                                ("chunked", "computing residuals")])  # fmt: skip
def test_cancel_while_residuals_are_computed_leaves_nothing(bench, nodes, monkeypatch, storage, phase):
    import comfy.model_management

    class Cancelled(comfy.model_management.InterruptProcessingException):
        pass

    def cancel(self, now, done, total, detail=""):
        if now == phase and done >= 2:
            raise Cancelled("by hand")

    monkeypatch.setattr(nodes.precompute_residuals.NodeProgress, "__call__", cancel)
    with refused(bench, "by hand", Cancelled):
        bench.train(residuals=bench.precompute(storage=storage, chunk_size=4)[0])


def test_damaged_residuals_are_removed_and_said(bench):
    residuals = bench.precompute()[0]
    shard = next(bench.folders.output.glob("blockskip/residuals/*/shard-00000.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 0xFF
    shard.write_bytes(content)
    with pytest.raises(
        ValueError, match=r"are damaged \(shard-00000\.safetensors\)\. They have been removed; run again"
    ):
        bench.train(residuals=residuals, steps=6)
    assert not list(bench.folders.output.glob("blockskip/residuals/*"))
    assert bench.train(residuals=bench.precompute()[0])[2] == 3


# --- Apply BlockSkip LoRA ----------------------------------------------------------------------------------------


@pytest.fixture
def lora_file(bench):
    """Write a file into the loras folder."""
    from safetensors.torch import save_file

    def write(name, tensors):
        save_file(tensors, bench.folders.loras / name)
        return name

    return write


def pair(layer, rows, columns):
    return {
        f"diffusion_model.{layer}.lora_A.weight": torch.ones(2, columns),
        f"diffusion_model.{layer}.lora_B.weight": torch.ones(rows, 2),
    }


def test_apply_refuses_nothing(bench):
    with refused(bench, "No LoRA was given. Connect `lora` from the trainer, or choose `lora_name`"):
        bench.apply()


@pytest.mark.parametrize("name", ["absent.safetensors", "../absent.safetensors", "/etc/hostname"])
def test_apply_refuses_a_file_that_is_not_in_the_list(bench, name):
    with refused(bench, "in ComfyUI's loras folders. Refresh the list"):
        bench.apply(lora_name=name)


def test_apply_reads_nothing_beside_the_loras_folders(bench, lora_file):
    lora_file("../outside.safetensors", pair("single_blocks.0.linear1", 320, 64))
    with refused(bench, "There is no '../outside.safetensors' in ComfyUI's loras folders"):
        bench.apply(lora_name="../outside.safetensors")


def test_apply_reads_no_format_that_can_carry_code(bench):
    torch.save({}, bench.folders.loras / "old.pt")
    with refused(bench, "old.pt is not a safetensors file"):
        bench.apply(lora_name="old.pt")


def test_apply_refuses_a_damaged_file(bench):
    (bench.folders.loras / "half.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    with refused(bench, "half.safetensors cannot be read as a LoRA file"):
        bench.apply(lora_name="half.safetensors")


def test_apply_refuses_a_lora_for_another_kind_of_model(bench, lora_file):
    name = lora_file("other.safetensors", pair("input_blocks.1.1.proj_in", 64, 64))
    with refused(bench, "has nothing for Flux: it was trained for another kind"):
        bench.apply(lora_name=name)


def test_apply_refuses_a_lora_of_another_size(bench, lora_file):
    name = lora_file("large.safetensors", pair("single_blocks.0.linear1", 640, 128))
    with refused(bench, r"single_blocks\.0\.linear1\.weight it has 640 x 128, the model has .* another size"):
        bench.apply(lora_name=name)


def test_training_refuses_a_format_that_this_comfyui_does_not_have(bench, monkeypatch):
    import comfy.quant_ops

    residuals = bench.precompute(storage="chunked")[0]
    monkeypatch.delitem(comfy.quant_ops.QUANT_ALGOS, "int8_tensorwise")
    with refused(bench, r"quantize_kept 'int8' is not a format of this ComfyUI .*Choose one of these, or update"):
        bench.train(residuals=residuals, quantize_kept="int8")
