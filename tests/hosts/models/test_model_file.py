"""The file of a MODEL is found on it, written down as JSON, and loads the same MODEL again."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from ..stored_flux import StoredAs, load, plain_tensors, write


@pytest.fixture
def files(comfyui):
    from blockskip_pack.blockskip_core.hosts.models import model_file

    return model_file


@pytest.fixture
def folder(tmp_path, comfyui, monkeypatch):
    """A folder of models, which ComfyUI knows."""
    import folder_paths

    for kind in ("diffusion_models", "checkpoints"):
        monkeypatch.setitem(folder_paths.folder_names_and_paths, kind, ([str(tmp_path)], {".safetensors"}))
    (tmp_path / "below").mkdir()
    return tmp_path


def identity(model):
    from blockskip_pack.blockskip_core.hosts.models.identity import model_identity

    return model_identity(model)


def reloaded(files, found, folder):
    """The MODEL of what was written down, read by another process."""
    return files.ModelFile(**json.loads(json.dumps(found.arguments()))).load(folder / found.file)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_a_diffusion_model(files, folder, dtype):
    path = folder / "below" / "tiny.safetensors"
    write(path, StoredAs(dtype=dtype), plain_tensors())
    model = load(path, StoredAs(dtype=dtype))
    found = files.model_file_of(model)
    assert (found.loader, found.file, found.folder) == ("diffusion model", "below/tiny.safetensors", str(folder))
    assert found.dtype == str(dtype).removeprefix("torch.")
    assert identity(reloaded(files, found, folder)) == identity(model)


def test_a_checkpoint(files, folder):
    import comfy.sd

    path = folder / "all.safetensors"
    save_file({f"model.diffusion_model.{name}": x.contiguous() for name, x in plain_tensors().items()}, path)
    with torch.inference_mode():
        model = comfy.sd.load_checkpoint_guess_config(str(path), output_vae=False, output_clip=False)[0]
    found = files.model_file_of(model)
    assert (found.loader, found.file, found.dtype) == ("checkpoint", "all.safetensors", "")
    assert identity(reloaded(files, found, folder)) == identity(model)


def test_a_file_outside_all_folders_of_models(files, tmp_path, comfyui):
    path = tmp_path / "tiny.safetensors"
    write(path, StoredAs(dtype=torch.float32), plain_tensors())
    found = files.model_file_of(load(path, StoredAs(dtype=torch.float32)))
    assert (found.file, found.folder) == ("tiny.safetensors", str(tmp_path))


def test_what_cannot_be_written_down(files, folder):
    import comfy.sd

    path = folder / "tiny.safetensors"
    write(path, StoredAs(dtype=torch.float32), plain_tensors())
    model = load(path, StoredAs(dtype=torch.float32))
    with torch.inference_mode():
        odd = comfy.sd.load_diffusion_model(str(path), model_options={"load_device": torch.device("cpu")})
    with pytest.raises(ValueError, match="was loaded with load_device, which a run file cannot keep"):
        files.model_file_of(odd)
    patched = model.clone()
    patched.add_object_patch("model_sampling", model.get_model_object("model_sampling"))
    with pytest.raises(ValueError, match="The MODEL has model_sampling on it, which is not in its file"):
        files.model_file_of(patched)
    for origin in (None, (print, (str(path),))):
        model.cached_patcher_init = origin
        with pytest.raises(ValueError, match="It is not known from which file the MODEL was loaded"):
            files.model_file_of(model)


def test_only_safetensors_is_loaded(files, tmp_path):
    with pytest.raises(ValueError, match="is not a safetensors file; other formats can carry code"):
        files.ModelFile(loader="checkpoint", file="a.ckpt").load(tmp_path / "a.ckpt")
