"""Embedding files: names, numbers, keys, and that they are whole."""

import json
import os

import pytest
import torch
from blockskip_pack.blockskip_core.errors import InvalidInputError, StorageError
from safetensors import safe_open
from safetensors.torch import save_file

pytestmark = pytest.mark.usefixtures("comfyui")
WORD = {"clip_l": torch.arange(6.0).view(2, 3), "t5xxl": torch.arange(4.0).view(1, 4) / 3}


@pytest.fixture
def folder(comfyui, tmp_path, monkeypatch):
    import folder_paths

    found = tmp_path / "embeddings"
    found.mkdir()
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "embeddings", ([str(found)], {".safetensors"}))
    return found


@pytest.fixture
def module(comfyui):
    from blockskip_pack.blockskip_core.hosts.files import embedding_files

    return embedding_files


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_a_word_is_read_by_the_host_under_the_name_that_is_returned(module, folder):
    import comfy.sd1_clip

    said = module.EmbeddingName("my_word").save(WORD, {"steps": 3})
    assert said == "embedding:my_word_00001"
    for key, tensor in WORD.items():
        found = comfy.sd1_clip.load_embed("my_word_00001", [str(folder)], 3, key)
        assert found.dtype == torch.float32
        assert torch.equal(found, tensor)
    with safe_open(folder / "my_word_00001.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["blockskip_word"]) == {"steps": 3}
    assert files(folder) == ["my_word_00001.safetensors"]


def test_every_file_has_a_new_number_and_none_is_overwritten(module, folder):
    name = module.EmbeddingName("toys/my-word")
    said = [name.save({"clip_l": torch.full((1, 3), float(number))}, {}) for number in range(3)]
    assert said == [f"embedding:toys/my-word_{number:05}" for number in (1, 2, 3)]
    os.remove(folder / "toys" / "my-word_00001.safetensors")
    assert name.save(WORD, {}) == "embedding:toys/my-word_00001"


@pytest.mark.parametrize(
    "name",
    ["", "/", "../up", "a/../../up", "/etc/word", "C:/word", "\\\\host\\word", "con", "a/nul.x", "word ", "my word", "word,",
     "a:b", "(word)", "wo[rd", "<word>", "word\n", "wort\0", "word.", "a\tb"],
)  # fmt: skip
def test_a_hostile_or_useless_name_is_refused(module, folder, name):
    with pytest.raises(InvalidInputError, match="name"):
        module.EmbeddingName(name)
    assert files(folder.parent) == []


def test_a_name_in_another_alphabet_is_fine(module, folder):
    assert module.EmbeddingName("мой_пёс").save(WORD, {}) == "embedding:мой_пёс_00001"


def test_a_folder_that_leads_out_is_refused(module, folder, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (folder / "link").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    with pytest.raises(InvalidInputError, match="link is a link out of ComfyUI's embeddings folder"):
        module.EmbeddingName("link/word")
    assert files(tmp_path / "elsewhere") == []


def test_a_folder_that_cannot_be_written_is_refused_before_the_run(module, folder):
    (folder / "toys").write_text("")
    with pytest.raises(StorageError, match="cannot be written"):
        module.EmbeddingName("toys/word")


def test_a_file_is_written_completely_or_not_at_all(module, folder, monkeypatch):
    def half(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    name = module.EmbeddingName("word")
    monkeypatch.setattr(module, "save_file", half)
    with pytest.raises(StorageError, match="Free some disk space"):
        name.save(WORD, {})
    assert files(folder) == []


def test_a_file_that_another_folder_hides_is_noticed(module, folder, tmp_path, monkeypatch):
    import folder_paths

    other = tmp_path / "other"
    other.mkdir()
    name = module.EmbeddingName("word")
    write = module.save_file

    def meanwhile(tensors, path, metadata):  # another program saves a word of that name
        write(tensors, path, metadata=metadata)
        save_file({"clip_l": torch.zeros(2, 3)}, other / "word_00001.safetensors")

    monkeypatch.setattr(module, "save_file", meanwhile)
    # of several folders ComfyUI searches in no fixed order; here it finds the other file for sure
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "embeddings", ([str(other)], {".safetensors"}))
    with pytest.raises(StorageError, match="ComfyUI reads other numbers for clip_l"):
        name.save(WORD, {})


@pytest.mark.parametrize("place", ["friends/anna_00001.safetensors", "deep/er/anna_00001.pt", "Anna_00001.bin"])
def test_a_number_that_a_file_of_that_name_has_in_any_folder_is_taken(module, folder, place):
    """ComfyUI looks into all folders below for a name without one, in no fixed order."""
    path = folder / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")
    (folder / "anna_00002_too.safetensors").write_bytes(b"")
    assert module.EmbeddingName("anna").save(WORD, {}) == "embedding:anna_00002"
    assert module.EmbeddingName("friends/anna").save(WORD, {}) == "embedding:friends/anna_00003"


def test_leftovers_of_a_killed_run_are_removed(module, folder):
    left = folder / "word_00001.safetensors.0a1b2c3d.part"
    other = folder / "mine.safetensors.0a1b2c3d.part"
    for path in (left, other):
        path.write_text("")
        os.utime(path, (0, 0))
    module.EmbeddingName("word")
    assert files(folder) == [other.name]
