"""LoRA files: ours load with ComfyUI's own loader; names and contents of others are not trusted."""

from pathlib import Path

import pytest
import torch
from blockskip_pack.blockskip_core.adapters.lora_formats import to_file_tensors, to_host_lora
from blockskip_pack.blockskip_core.errors import InvalidInputError, LoraFileError, StorageError
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ..hosted_runs import chosen, clean_latents, flux_lora, full_forward, hosted, replayed
from ..tiny_flux import tiny_flux

pytestmark = pytest.mark.usefixtures("comfyui")

RANK = 2


@pytest.fixture
def files(comfyui):
    from blockskip_pack.blockskip_core.hosts.files import lora_files

    return lora_files


@pytest.fixture
def output(comfyui, tmp_path):
    import folder_paths

    before = folder_paths.get_output_directory()
    folder = tmp_path / "output"
    folder.mkdir()
    folder_paths.set_output_directory(str(folder))
    yield folder
    folder_paths.set_output_directory(before)


@pytest.fixture
def loras(comfyui, tmp_path, monkeypatch):
    """The only loras folder."""
    import folder_paths

    folder = tmp_path / "loras"
    folder.mkdir()
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(folder)], {".safetensors", ".pt", ".sft"}))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return folder


# --- what we write, others read ----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["peft", "kohya", "host"])
def test_a_saved_lora_loads_through_the_hosts_loader_and_acts_as_in_training(files, output, form):
    import comfy.sd
    import comfy.utils
    from blockskip_pack.blockskip_core.hosts.files.applied_lora import apply_lora

    dit, clean = hosted(tiny_flux()), clean_latents()
    adapters = flux_lora(dit, chosen(0, 0), zero=False)
    state = adapters.state_dict()
    tensors = to_host_lora(state, adapters.scale) if form == "host" else to_file_tensors(state, adapters.scale, form)
    path = files.output_path("loras/toy")
    files.save_lora(tensors, {"steps": 3}, path)
    expected = replayed(dit, chosen(0, 0), {0: _nothing()}, clean, [0], adapters)

    loaded, _ = comfy.sd.load_lora_for_models(dit.patcher, None, comfy.utils.load_torch_file(str(path)), 1.0, 0.0)
    got = full_forward(hosted(loaded), clean, [0])
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0.0)
    ours, count, _ = apply_lora(dit.patcher, load_file(path), 1.0)
    assert count == len(adapters.names)
    assert torch.equal(full_forward(hosted(ours), clean, [0]), got)
    assert not torch.allclose(got, full_forward(dit, clean, [0]), atol=1e-3)


def _nothing():
    from blockskip_pack.blockskip_core.blocks.replay import Residual

    return Residual(None, None)


def test_metadata_is_in_the_file(files, output):
    path = files.output_path("toy")
    files.save_lora({"x": torch.ones(2)}, {"steps": 3, "text": "ünï\n"}, path)
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["format"] == "pt"
    assert files.LoraModel({}, {"a": 1}).metadata == {"a": 1}


def test_a_disk_that_refuses_leaves_nothing(files, output, monkeypatch):
    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(StorageError, match="could not be written"):
        files.save_lora({"x": torch.ones(2)}, {}, files.output_path("toy"))
    assert not list(output.iterdir())


# --- where we write ----------------------------------------------------------------------------------------------


def test_names_are_counted_up(files, output):
    first = files.output_path("loras/toy")
    assert first == output / "loras" / "toy_00001_.safetensors"
    first.write_bytes(b"")
    assert files.output_path("loras/toy").name == "toy_00002_.safetensors"


def test_two_runs_do_not_get_one_name(files, output):
    path = files.output_path("loras/toy")
    with files.ReservedName(path) as first, files.ReservedName(path) as second:
        assert (first.path.name, second.path.name) == ("toy_00001_.safetensors", "toy_00002_.safetensors")
        first.path.with_name("toy_00003_.safetensors").write_bytes(b"")
        assert files.ReservedName(path).path.name == "toy_00004_.safetensors"
        assert first.renew() == path, "nobody has put a file there"
    with files.ReservedName(path) as third:
        assert third.path == path
    assert sorted(x.name for x in path.parent.iterdir()) == ["toy_00003_.safetensors"]


def test_a_name_that_another_program_takes_is_left_to_it(files, output):
    path = files.output_path("loras/toy")
    with files.ReservedName(path) as ours, files.ReservedName(path) as second:
        path.write_bytes(b"theirs")
        assert ours.renew().name == "toy_00003_.safetensors"
        assert second.renew().name == "toy_00002_.safetensors"


def test_half_written_files_of_a_run_that_lives_stay(files, output):
    import os

    path = files.output_path("loras/toy")
    with files.ReservedName(path) as ours:
        names = ["toy_00001_step000010.safetensors.0123abcd.part", "toy_00002_.html.0123abcd.part"]
        for name in names:
            (path.parent / name).write_bytes(b"half")
            os.utime(path.parent / name, (1000, 1000))
        (path.parent / ".toy_00007_.blockskip.lock").touch()
        files.require_writable(path)
        assert sorted(x.name for x in path.parent.iterdir()) == [".toy_00001_.blockskip.lock", names[0]]
        ours.release()
        files.require_writable(path)
        assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize(
    "name",
    ["../x", "/etc/x", "a/../../x", "a\x00b", "a\nb", "..", ".", "", "C:\\x", "..\\x", "\\\\host\\x", "loras/", "~/x", "a//b",
     "x" * 100, "%2e%2e/x", "con", "-rf", "loras/../y", "\u202etxt", "%year%/x"],
    ids=repr,
)  # fmt: skip
def test_no_name_leaves_the_output_folder(files, output, name):
    try:
        path = files.output_path(name)
    except InvalidInputError:
        return
    files.save_lora({"x": torch.ones(2)}, {}, path)
    assert path.is_file()
    assert output.resolve() in path.resolve().parents
    others = [p for p in output.parent.rglob("*") if p.is_file() and output not in p.parents]
    assert others == []


@pytest.mark.parametrize("name", ["../x", "..\\x", "C:\\x", "/etc/x", "a\x00b"])
def test_names_that_would_leave_it_are_refused(files, output, name):
    with pytest.raises(InvalidInputError, match="Use a plain name"):
        files.output_path(name)


def test_a_backslash_separates_folders_on_every_system(files, output):
    assert files.output_path("loras\\toy") == output / "loras" / "toy_00001_.safetensors"


@pytest.mark.parametrize("name", ["loras/toy", "loras/sub/toy", "loras\\toy"])
def test_a_link_out_of_the_output_folder_is_named_and_not_followed(files, output, tmp_path, name):
    outside = tmp_path / "disk2"
    outside.mkdir()
    (output / "loras").symlink_to(outside)
    with pytest.raises(
        InvalidInputError, match=f"output/loras is a link to {outside}, outside ComfyUI's output folder"
    ):
        files.output_path(name)
    assert list(outside.iterdir()) == []


def test_links_that_stay_inside_and_an_output_folder_on_another_disk_are_followed(files, output, tmp_path):
    import folder_paths

    (output / "real").mkdir()
    (output / "loras").symlink_to(output / "real")
    assert files.output_path("loras/toy").parent.resolve() == output / "real"
    (tmp_path / "linked").symlink_to(output)
    folder_paths.set_output_directory(str(tmp_path / "linked"))
    assert files.output_path("other/toy").parent.resolve() == output / "other"


# --- what we read ------------------------------------------------------------------------------------------------


def test_a_file_comes_back_with_its_metadata(files, loras):
    files.save_lora({"x": torch.arange(3.0)}, {"steps": 3}, loras / "toy.safetensors")
    lora = files.load_lora_file("toy.safetensors")
    assert torch.equal(lora["x"], torch.arange(3.0))
    assert lora.metadata == {"steps": 3}


def test_what_a_file_of_others_says_of_itself_is_read(files, loras):
    save_file(
        {"x": torch.ones(2)}, loras / "toy.safetensors", metadata={"ss_network_dim": "4", "blockskip": "[" * 50_000}
    )
    assert files.load_lora_file("toy.safetensors").metadata == {"rank": "4"}


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/passwd", "absent.safetensors", "", "..", "a\x00b"], ids=repr
)
def test_names_outside_the_list_are_refused(files, loras, name):
    save_file({"x": torch.ones(2)}, loras.parent / "secret.safetensors")
    with pytest.raises(LoraFileError, match="There is no .* in ComfyUI's loras folders"):
        files.load_lora_file(name)


@pytest.mark.parametrize(
    "name", ["../toy.safetensors", "a/../toy.safetensors", "./toy.safetensors", "/toy.safetensors"]
)
def test_a_name_that_only_resolves_to_a_listed_file_is_refused(files, loras, name):
    save_file({"x": torch.ones(2)}, loras / "toy.safetensors")
    with pytest.raises(LoraFileError, match="There is no"):
        files.load_lora_file(name)


def test_an_absolute_name_is_refused(files, loras):
    save_file({"x": torch.ones(2)}, loras.parent / "secret.safetensors")
    with pytest.raises(LoraFileError):
        files.load_lora_file(str(loras.parent / "secret.safetensors"))


def test_files_that_can_carry_code_are_not_read(files, loras):
    torch.save({"x": torch.ones(2)}, loras / "toy.pt")
    with pytest.raises(LoraFileError, match="not a safetensors file; other formats can carry code"):
        files.load_lora_file("toy.pt")


@pytest.mark.parametrize("keep", [0, 3, 8, 20, -1])
def test_a_truncated_file_is_refused(files, loras, keep):
    path = loras / "toy.safetensors"
    save_file({"x": torch.ones(20)}, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(LoraFileError, match="cannot be read as a LoRA file"):
        files.load_lora_file("toy.safetensors")


def test_a_page_saved_as_a_lora_is_refused(files, loras):
    (loras / "toy.safetensors").write_text("<!DOCTYPE html>" * 20)
    with pytest.raises(LoraFileError, match="cannot be read"):
        files.load_lora_file("toy.safetensors")


def test_folders_stay_below_the_output_folder(files, output):
    from blockskip_pack.blockskip_core.hosts.files.folders import probe_file, residuals_folder

    assert residuals_folder("ab12") == Path(output) / "blockskip" / "residuals" / "ab12"
    assert probe_file("ab12") == Path(output) / "blockskip" / "probes" / "ab12.json"
