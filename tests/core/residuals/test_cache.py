"""Stored residuals: what is read equals what was written, or is refused."""

import dataclasses
import errno
import hashlib
import json
import os
import shutil
from random import Random

import pytest
import torch
from blockskip_pack.blockskip_core.errors import CacheError, InvalidInputError, StorageError
from blockskip_pack.blockskip_core.residuals import cache as residual_cache
from blockskip_pack.blockskip_core.residuals.cache import (
    DISK_RESERVE_BYTES,
    MANIFEST,
    CacheIdentity,
    CacheWriter,
    ResidualCache,
    is_finished,
    require_free_space,
)
from safetensors.torch import load_file

from ..test_files import too_many_open_files

IDENTITY = CacheIdentity(model="m", schedule="s", selection="e", pictures="p", captions="c", dtype="torch.float32")
IMAGE, TEXT, WIDTH = 6, 5, 4


def records(draws=(0, 1, 2), dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "front.img": (1, IMAGE, WIDTH),
        "front.txt": (1, TEXT, WIDTH),
        "back": (1, IMAGE, WIDTH),
        "latent": (3, 2, 3),
    }
    return {
        draw: {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
        for draw in draws
    }


def written(folder, *parts):
    writer = CacheWriter(folder, IDENTITY)
    for part in parts or (records(),):
        writer.write(part)
    writer.finish()
    return folder


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def read_all(folder):
    cache = ResidualCache(folder, IDENTITY)
    return {draw: cache.read(draw) for draw in range(len(cache))}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_bit_comes_back(tmp_path, dtype):
    given = records(dtype=dtype)
    given[1]["back"][0, 0, :3] = torch.tensor([float("nan"), float("-inf"), -0.0])
    assert_same_records(read_all(written(tmp_path / "c", given)), given)


def test_several_shards_read_as_one(tmp_path):
    given = records((0, 1, 2, 3, 4))
    parts = [{d: given[d] for d in part} for part in ((0, 3), (1,), (4, 2))]
    folder = written(tmp_path / "c", *parts)
    assert len(list(folder.glob("shard-*.safetensors"))) == 3
    read = read_all(folder)
    assert all(same_bits(read[d][name], x) for d in given for name, x in given[d].items())


def test_views_and_empty_and_scalar_tensors_are_stored(tmp_path):
    wide = torch.randn(4, 6, 8)
    given = {0: {"back": wide[1:2, :, ::2], "a": torch.zeros(0, 3), "b": torch.tensor(2.5), "c": wide.mT[0]}}
    read = read_all(written(tmp_path / "c", given))
    for name, tensor in given[0].items():
        assert torch.equal(read[0][name], tensor)


def with_texts_of(captions, draws):
    """Records in which draws of one caption have the same text tokens, as in models whose text sees nothing else."""
    found, texts = records(draws), records(range(len(captions)))
    return {draw: {**found[draw], "front.txt": texts[captions[draw]]["front.txt"].clone()} for draw in draws}


def assert_same_records(read, given):
    assert read.keys() == given.keys()
    for draw, tensors in given.items():
        assert read[draw].keys() == tensors.keys()
        assert all(same_bits(read[draw][name], tensor) for name, tensor in tensors.items())


def test_text_that_no_draw_changes_is_stored_once(tmp_path):
    captions = (0, 1, 0, 1, 0, 0)
    parts = (with_texts_of(captions, (0, 1, 2)), with_texts_of(captions, (3, 4, 5)))
    folder = written(tmp_path / "same", *parts)
    stored = [key for shard in sorted(folder.glob("shard-*")) for key in load_file(shard) if key.endswith("txt")]
    assert stored == ["0/front.txt", "1/front.txt"]
    assert_same_records(read_all(folder), {**parts[0], **parts[1]})


def test_text_that_differs_in_one_bit_is_stored(tmp_path):
    found = with_texts_of((0, 0), (0, 1))
    found[1]["front.txt"].view(torch.int32)[0, 0, 0] ^= 1
    folder = written(tmp_path / "other", found)
    assert_same_records(read_all(folder), found)
    assert not torch.equal(read_all(folder)[0]["front.txt"], read_all(folder)[1]["front.txt"])


def test_texts_stored_once_are_found_again_by_a_resumed_writer(tmp_path):
    captions = (0, 1, 0, 1, 0, 0)
    first, second = with_texts_of(captions, (0, 1, 2)), with_texts_of(captions, (3, 4, 5))
    CacheWriter(tmp_path / "resumed", IDENTITY).write(first)
    writer = CacheWriter(tmp_path / "resumed", IDENTITY, resume=True)
    assert writer.draws == {0, 1, 2}
    writer.write(second)
    writer.finish()
    assert [key for key in load_file(tmp_path / "resumed" / "shard-00001.safetensors") if key.endswith("txt")] == []
    assert_same_records(read_all(tmp_path / "resumed"), {**first, **second})


def test_a_residual_is_what_was_stored(tmp_path):
    given = records()
    del given[1]["front.txt"], given[2]["front.img"], given[2]["front.txt"], given[2]["back"]
    cache = ResidualCache(written(tmp_path / "c", given), IDENTITY)
    residual = cache.residual(0)
    assert torch.equal(residual.front.img, given[0]["front.img"])
    assert torch.equal(residual.front.txt, given[0]["front.txt"])
    assert torch.equal(residual.back, given[0]["back"])
    assert cache.residual(1).front.txt is None
    assert (cache.residual(2).front, cache.residual(2).back) == (None, None)
    assert cache.draws_with("back") == [0, 1]


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(CacheIdentity)])
def test_residuals_of_something_else_are_refused_by_name(tmp_path, field):
    folder = written(tmp_path / "c")
    value = 2 if field == "version" else "other"
    other = dataclasses.replace(IDENTITY, **{field: value})
    assert other.key != IDENTITY.key
    with pytest.raises(CacheError, match=f"belong to another {field}"):
        ResidualCache(folder, other)


def test_a_draw_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(CacheError, match="Training example 7 is not among"):
        ResidualCache(written(tmp_path / "c"), IDENTITY).read(7)


def test_a_cache_without_a_manifest_is_unfinished(tmp_path):
    writer = CacheWriter(tmp_path / "c", IDENTITY)
    writer.write(records())
    assert not is_finished(tmp_path / "c")
    with pytest.raises(CacheError, match="missing or unfinished"):
        ResidualCache(tmp_path / "c", IDENTITY)
    with pytest.raises(CacheError, match="missing or unfinished"):
        ResidualCache(tmp_path / "nowhere", IDENTITY)
    writer.finish()
    assert is_finished(tmp_path / "c")


def test_an_unfinished_cache_is_replaced(tmp_path):
    first = CacheWriter(tmp_path / "c", IDENTITY)
    first.write(records((8,)))
    first.write(records((9,)))
    read = read_all(written(tmp_path / "c"))
    assert set(read) == {0, 1, 2}
    assert len(list((tmp_path / "c").iterdir())) == 2


# --- damage ------------------------------------------------------------------------------------------------------


def read_or_refuse(folder, given):
    """Return whether reading was refused; what is read must equal what was written bit for bit."""
    try:
        read = read_all(folder)
    except CacheError:
        return True
    assert read.keys() == given.keys()
    for draw, tensors in given.items():
        assert read[draw].keys() == tensors.keys()
        assert all(same_bits(read[draw][name], tensor) for name, tensor in tensors.items())
    return False


def damaged_copies(tmp_path, given, name, damage):
    """Yield (folder, place) 50 times, each with one file damaged at a random place."""
    folder = written(tmp_path / "whole", given)
    whole = (folder / name).read_bytes()
    rng = Random(7)
    for number in range(50):
        copy = tmp_path / f"copy-{number}"
        shutil.copytree(folder, copy)
        place = rng.randrange(len(whole))
        (copy / name).write_bytes(damage(whole, place, rng))
        yield copy, place


@pytest.mark.parametrize("name", ["shard-00000.safetensors", MANIFEST])
def test_a_truncated_file_is_refused(tmp_path, name):
    given = records()
    for copy, _ in damaged_copies(tmp_path, given, name, lambda whole, place, rng: whole[:place]):
        assert read_or_refuse(copy, given)


def test_a_flipped_bit_in_a_shard_is_refused_or_harmless(tmp_path):
    given, refused = records(), 0
    header = None
    for copy, place in damaged_copies(
        tmp_path, given, "shard-00000.safetensors",
        lambda whole, place, rng: whole[:place] + bytes([whole[place] ^ 1 << rng.randrange(8)]) + whole[place + 1 :],
    ):  # fmt: skip
        if header is None:
            header = 8 + int.from_bytes((tmp_path / "whole/shard-00000.safetensors").read_bytes()[:8], "little")
        was_refused = read_or_refuse(copy, given)
        refused += was_refused
        assert was_refused or place < header  # every number is covered by a checksum
    assert refused > 25


def test_a_flipped_bit_in_the_manifest_is_refused_or_harmless(tmp_path):
    given = records()
    copies = damaged_copies(
        tmp_path, given, MANIFEST,
        lambda whole, place, rng: whole[:place] + bytes([whole[place] ^ 1 << rng.randrange(8)]) + whole[place + 1 :],
    )  # fmt: skip
    assert all(read_or_refuse(copy, given) for copy, _ in copies)


def test_a_missing_shard_is_refused(tmp_path):
    folder = written(tmp_path / "c")
    (folder / "shard-00000.safetensors").unlink()
    with pytest.raises(CacheError, match=r"in c are damaged \(shard-00000"):
        read_all(folder)


def test_swapped_shards_are_refused(tmp_path):
    given = records((0, 1))
    folder = written(tmp_path / "c", {0: given[0]}, {1: given[1]})
    a, b = sorted(folder.glob("shard-*"))
    content = a.read_bytes(), b.read_bytes()
    a.write_bytes(content[1])
    b.write_bytes(content[0])
    assert read_or_refuse(folder, given)


def test_the_right_name_with_another_draws_numbers_is_refused(tmp_path):
    given = records((0, 1))
    folder, other = written(tmp_path / "c", given), written(tmp_path / "other", {0: given[1], 1: given[0]})
    shutil.copy(other / "shard-00000.safetensors", folder)
    with pytest.raises(CacheError, match="damaged"):
        read_all(folder)


def rewrite_manifest(folder, change):
    """Change a manifest's content and correct its digest."""
    body = json.loads(json.loads((folder / MANIFEST).read_text())["body"])
    body = json.dumps(change(body))
    digest = hashlib.blake2b(body.encode(), digest_size=16).hexdigest()
    (folder / MANIFEST).write_text(json.dumps({"digest": digest, "body": body}))


@pytest.mark.parametrize(
    "shard", ["../outside.safetensors", "/etc/passwd", "..", ".", "", "a/../b", 5, None, ["x"]], ids=repr
)
def test_a_manifest_cannot_lead_out_of_its_folder(tmp_path, shard):
    folder = written(tmp_path / "c")
    shutil.copy(folder / "shard-00000.safetensors", tmp_path / "outside.safetensors")

    def change(body):
        for entry in body["tensors"].values():
            entry["shard"] = shard
        return body

    rewrite_manifest(folder, change)
    with pytest.raises(CacheError, match="damaged"):
        read_all(folder)


def test_a_manifest_that_was_changed_by_hand_is_refused(tmp_path):
    folder = written(tmp_path / "c")
    outer = json.loads((folder / MANIFEST).read_text())
    body = json.loads(outer["body"])
    del body["tensors"]["2/back"]
    (folder / MANIFEST).write_text(json.dumps({**outer, "body": json.dumps(body)}))
    with pytest.raises(CacheError, match=r"damaged \(manifest.json\)"):
        ResidualCache(folder, IDENTITY)


@pytest.mark.parametrize(
    "change",
    [
        lambda body: [],
        lambda body: None,
        lambda body: {},
        lambda body: {**body, "identity": 3},
        lambda body: {**body, "tensors": []},
        lambda body: {**body, "tensors": None},
        lambda body: {**body, "tensors": {"no draw": {}}},
        lambda body: {**body, "tensors": {"x/back": {}}},
        lambda body: {**body, "tensors": {"0/back": {}}},
        lambda body: {**body, "tensors": {"0/back": 3}},
        lambda body: {**body, "tensors": {"0/absent": {"shard": "shard-00000.safetensors", "checksum": 1}}},
    ],
    ids=range(11),
)
def test_a_manifest_of_another_form_is_refused(tmp_path, change):
    folder = written(tmp_path / "c")
    rewrite_manifest(folder, change)
    with pytest.raises(CacheError):
        ResidualCache(folder, IDENTITY).read(0)


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"null", b"3", b"\xff\xfe", b'{"body": 3, "digest": ""}', b"[" * 100_000]
)
def test_a_manifest_that_is_none_is_refused(tmp_path, content):
    folder = written(tmp_path / "c")
    (folder / MANIFEST).write_bytes(content)
    with pytest.raises(CacheError, match=r"damaged \(manifest.json\)"):
        ResidualCache(folder, IDENTITY)


# --- room on the disk --------------------------------------------------------------------------------------------


def test_too_little_room_is_said_before_anything_is_written(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    free = DISK_RESERVE_BYTES + 3 * 2**30
    monkeypatch.setattr(residual_cache.shutil, "disk_usage", lambda path: usage._replace(free=free))
    folder = tmp_path / "not" / "there" / "yet"
    require_free_space(folder, 3 * 2**30)
    with pytest.raises(InvalidInputError, match=r"would take 3\.00 GiB on disk, but 3\.25 GiB are free.*`chunked`"):
        require_free_space(folder, 3 * 2**30 + 1)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_is_reported_and_leaves_nothing_half_written(tmp_path, monkeypatch):
    writer = CacheWriter(tmp_path / "c", IDENTITY)
    writer.write(records((0,)))

    def full(tensors, path):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(residual_cache, "save_file", full)
    with pytest.raises(StorageError, match="shard-00001.safetensors could not be written"):
        writer.write(records((1,)))
    assert sorted(os.listdir(tmp_path / "c")) == ["shard-00000.safetensors", "unfinished.json"]
    writer.discard()
    assert not (tmp_path / "c").exists()
    writer.discard()


def test_too_many_open_files_are_no_damage(tmp_path):
    folder = written(tmp_path / "c")
    cache = ResidualCache(folder, IDENTITY)
    with (
        too_many_open_files(),
        pytest.raises(StorageError, match="cannot be read: .*Run again when the disk is available"),
    ):
        cache.read(0)
    assert same_bits(cache.read(0)["back"], records()[0]["back"])
    unfinished = CacheWriter(tmp_path / "d", IDENTITY)
    unfinished.write(records())
    with too_many_open_files(), pytest.raises(StorageError, match="cannot be read"):
        unfinished.read("0/back")


def test_a_folder_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / "residuals").write_text("in the way")
    with pytest.raises(StorageError, match="The folder for residuals cannot be created"):
        CacheWriter(tmp_path / "residuals" / "c", IDENTITY)


@pytest.mark.parametrize("finished", [True, False])
def test_a_cache_that_is_removed_by_half_is_not_taken_for_a_whole_one(tmp_path, monkeypatch, finished):
    """The process may be killed at any file."""
    writer = CacheWriter(tmp_path / "c", IDENTITY)
    writer.write(records())
    if finished:
        writer.finish()
    monkeypatch.setattr(residual_cache.shutil, "rmtree", lambda *args, **kwargs: None)
    residual_cache.remove_cache(tmp_path / "c")
    assert not is_finished(tmp_path / "c")
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["shard-00000.safetensors"]
