"""Load Training Folder: files of editors and cameras load as they look there, and unreadable files are named."""

from __future__ import annotations

import asyncio
import os
import struct

import numpy as np
import pytest
import torch
from PIL import Image


@pytest.fixture
def folder(comfyui, tmp_path, monkeypatch):
    """A folder "toy" in a temporary input folder."""
    import folder_paths

    monkeypatch.setattr(folder_paths, "input_directory", str(tmp_path / "input"))
    found = tmp_path / "input" / "toy"
    found.mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    return found


@pytest.fixture
def load(nodes, run_node, folder):
    return lambda name="toy": run_node(nodes.LoadTrainingFolder, folder=name).args


@pytest.fixture
def said(nodes, monkeypatch):
    found = []
    monkeypatch.setattr(nodes.load_training_folder.NodeProgress, "say", lambda self, text: found.append(text))
    return found


def photo(path, size=(40, 30), seed=1, **options):
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(values).save(path, **options)
    return torch.from_numpy(values / np.float32(255.0))


def test_pictures_captions_and_names_come_in_the_order_of_the_names(load, folder, said):
    for number in (10, 2, 1):
        photo(folder / f"{number}.png", seed=number)
        (folder / f"{number}.txt").write_text(f"toy {number}", encoding="utf-8")
    images, texts, files, _ = load()
    assert texts == ["toy 1", "toy 2", "toy 10"]
    assert [(file.name, file.caption) for file in files] == [
        ("1.png", "toy 1"),
        ("2.png", "toy 2"),
        ("10.png", "toy 10"),
    ]
    assert [tuple(image.shape) for image in images] == [(1, 30, 40, 3)] * 3
    assert torch.equal(images[1][0], photo(folder / "again.png", seed=2))
    assert said == ["Pictures: 3; captions: 3"]


@pytest.mark.parametrize("ending", ["png", "webp", "bmp", "tif", "PNG"])
def test_every_ending_is_read(load, folder, ending):
    values = photo(folder / f"a.{ending}", **({"lossless": True} if ending == "webp" else {}))
    assert torch.equal(load()[0][0][0], values)


def test_pictures_in_formats_that_are_not_read_are_named(load, folder, said):
    photo(folder / "a.png")
    for name in ("IMG_2.HEIC", "IMG_10.HEIC", "b.avif"):
        (folder / name).write_bytes(b"")
    assert len(load()[0]) == 1
    assert said[0].startswith(
        "Not read, because of their format: b.avif, IMG_2.HEIC, IMG_10.HEIC. Save them as JPEG or PNG."
    )
    (folder / "a.png").unlink()
    with pytest.raises(
        ValueError, match="There are no pictures in .* Not read, because of their format: .*JPEG or PNG"
    ):
        load()


def test_a_folder_that_is_not_there_is_refused_when_the_graph_is_queued(nodes, folder):
    check = nodes.LoadTrainingFolder.validate_inputs
    assert check(folder="toy") is True
    assert check(folder=None) is True  # linked
    for name in ("my_subject", "../outside", "", "."):
        assert "Put your pictures into one there, press R, and choose it." in check(folder=name)


def test_a_jpeg_is_turned_as_the_camera_was_held(load, folder):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    photo(folder / "a.jpg", exif=exif)
    assert load()[0][0].shape == (1, 40, 30, 3)


@pytest.mark.parametrize("kind", ["png", "tif"])
def test_grey_of_sixteen_bits_keeps_its_range(load, folder, said, kind):
    values = np.linspace(2000, 60000, 64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(values).save(folder / f"grey.{kind}")
    [image] = load()[0]
    expected = torch.from_numpy(values.astype(np.float32) / 65535).expand(3, -1, -1).movedim(0, -1)
    torch.testing.assert_close(image[0], expected)
    assert "one colour" not in said[0]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P"])
def test_transparent_parts_are_white_whatever_colour_is_hidden_in_them(load, folder, said, mode):
    values = np.zeros((32, 32, 4), dtype=np.uint8)
    values[:16] = (90, 90, 90, 255)
    values[16:] = (0, 255, 0, 0) if mode == "RGBA" else (10, 10, 10, 0)
    picture = Image.fromarray(values).convert("RGBA")
    if mode == "P":
        picture = Image.new("P", (32, 32), 0)
        picture.putpalette([90, 90, 90, 0, 255, 0])
        picture.paste(1, (0, 16, 32, 32))
        picture.save(folder / "a.png", transparency=1)
    else:
        picture.convert("LA" if mode == "PA" else mode).save(folder / "a.png")
    [image] = load()[0]
    assert torch.equal(image[0, 20], torch.ones(32, 3))
    torch.testing.assert_close(image[0, 4], torch.full((32, 3), 90 / 255))
    assert said[0].startswith("1 of 1 pictures is partly transparent and shown on white: a.png.")


@pytest.mark.parametrize("mode", ["L", "1", "CMYK", "YCbCr"])
def test_other_modes_become_colours(load, folder, mode):
    photo(folder / "x.png")
    Image.open(folder / "x.png").convert(mode).save(folder / "x.tif")
    (folder / "x.png").unlink()
    assert load()[0][0].shape == (1, 30, 40, 3)


def truncated(path):
    photo(path)
    path.write_bytes(path.read_bytes()[:900])


def huge(path):
    """A few bytes that claim to be 60000 x 60000 px."""
    header = (
        b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    )
    path.write_bytes(header + b"\0" * 64)


BROKEN = {
    "truncated": truncated,
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("no picture", encoding="utf-8"),
    "huge": huge,
    "floating point": lambda path: Image.fromarray(np.full((8, 8), 0.5, dtype=np.float32)).save(path, format="TIFF"),
    "32 bits": lambda path: Image.fromarray(np.full((8, 8), 70000, dtype=np.int32)).save(path, format="TIFF"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_picture_that_cannot_be_read_is_named(load, folder, kind):
    photo(folder / "a.png")
    BROKEN[kind](folder / "b.png")
    with pytest.raises(
        ValueError, match=r"^b\.png (cannot be read as a picture|contains floating-point|is grey with values)"
    ) as refused:
        load()
    assert "take it out of the folder" in str(refused.value) or "Save it as PNG or JPEG" in str(refused.value)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("\ufeffa grüner toy \n".encode(), "a grüner toy"),
        ("a grüner toy".encode("utf-16"), "a grüner toy"),
        ("a grüner toy".encode("latin-1"), "a grüner toy"),
        (b" \r\n\xef\xbb\xbf ", ""),
    ],
)
def test_captions_of_windows_editors_are_read(load, folder, content, text):
    photo(folder / "a.png")
    (folder / "a.txt").write_bytes(content)
    assert load()[1] == [text]


def test_other_endings_of_captions_are_read_and_txt_counts_first(load, folder):
    for name in ("a", "b", "c"):
        photo(folder / f"{name}.png")
    (folder / "a.caption").write_text("one", encoding="utf-8")
    (folder / "b.TXT").write_text("two", encoding="utf-8")
    (folder / "c.txt").write_text("three", encoding="utf-8")
    (folder / "c.caption").write_text("not this", encoding="utf-8")
    assert load()[1] == ["one", "two", "three"]


@pytest.mark.parametrize("content", [b"\x89PNG\r\n\x1a\n\0\0", b"a" * 70000])
def test_a_caption_that_cannot_be_read_is_named(load, folder, content):
    photo(folder / "a.png")
    (folder / "a.txt").write_bytes(content)
    with pytest.raises(ValueError, match=r"^a\.txt is (not text in UTF-8|larger than 64 KiB)"):
        load()


def test_missing_captions_guesses_and_blank_pictures_are_said(load, folder, said):
    for name in "abcd":
        photo(folder / f"{name}.png")
    Image.new("RGB", (30, 30), "black").save(folder / "e.png")
    (folder / "a.txt").write_bytes("grüner toy".encode("cp1252"))
    (folder / "b.txt").write_text("toy", encoding="utf-8")
    (folder / "c.txt").write_text("\ufeff \n", encoding="utf-8")
    load()
    lines = said[0].splitlines()
    assert lines[0].startswith("1 of 5 pictures is all of one colour, or almost: e.png (black).")
    assert lines[1].startswith(
        "3 of 5 captions are missing or empty: c.png, d.png, e.png. A picture's caption is a .txt file"
    )
    assert lines[2].startswith("The captions of a.png are not in UTF-8 and were read as Windows-1252")
    assert lines[3] == "Pictures: 5; captions: 2"


def test_no_captions_at_all_are_no_fault_here(load, folder, said):
    photo(folder / "a.png")
    assert load()[1] == [""]
    assert said == ["Pictures: 1; captions: none"]


def test_pictures_of_numbered_folders_count_several_times_and_are_held_once(load, folder):
    for name in ("2_toy", "plain", "0_not"):
        (folder / name).mkdir()
        photo(folder / name / "a.png")
    photo(folder / "top.png")
    images, texts, files, _ = load()
    assert [file.name for file in files] == ["top.png", "2_toy/a.png", "2_toy/a.png", "plain/a.png"]
    assert images[1].data_ptr() == images[2].data_ptr()
    assert len(images) == len(texts) == 4
    (folder / "99999_x").mkdir()
    with pytest.raises(ValueError, match="asks for its pictures 99999 times, but at most 1000"):
        load()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such names")
def test_a_name_that_no_page_can_show_harms_nothing(load, folder, bench):
    for name in (b"a\xff.png", b"b\nc.png"):
        Image.new("RGB", (64, 64)).save(os.fsdecode(os.path.join(os.fsencode(folder), name)), format="PNG")
    images, _, files, _ = load()
    assert [file.name for file in files] == ["a?.png", "b?c.png"]
    listed = type(bench.pictures)
    residuals = bench.precompute(images=listed(images), files=listed(files))[0]
    assert "a?.png (black), b?c.png (black)" in residuals.remarks[0]
    assert "html" in bench.train(residuals=residuals).ui["blockskip"][0]["summary_file"]


def test_a_folder_without_pictures_is_refused(load, folder):
    (folder / "a.txt").write_text("toy", encoding="utf-8")
    (folder / "._a.png").write_bytes(b"what some systems leave beside a picture")
    with pytest.raises(
        ValueError, match="There are no pictures in the folder 'toy': none of its files ends with .png, .jpg"
    ):
        load()


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../outside", "toy/../../outside", "/etc", "toy\0", "no", "x" * 5000, "toy/a.png"]
)
def test_only_folders_below_the_input_folder_are_read(load, folder, name):
    photo(folder / "a.png")
    photo(folder.parents[1] / "outside" / "b.png")
    with pytest.raises(ValueError, match="There is no folder .* in ComfyUI's input folder"):
        load(name)


@pytest.mark.skipif(os.name == "nt", reason="needs symbolic links")
def test_links_out_of_the_input_folder_are_refused(load, folder):
    outside = folder.parents[1] / "outside"
    photo(outside / "b.png")
    (outside / "c.txt").write_text("secret", encoding="utf-8")
    (folder.parent / "linked").symlink_to(outside)
    with pytest.raises(ValueError, match="There is no folder 'linked'"):
        load("linked")
    photo(folder / "c.png")
    (folder / "c.txt").symlink_to(outside / "c.txt")
    with pytest.raises(ValueError, match=r"^c\.txt is a link out of ComfyUI's input folder"):
        load()
    (folder / "c.png").unlink()
    (folder / "b.png").symlink_to(outside / "b.png")
    with pytest.raises(ValueError, match=r"^b\.png is a link out of ComfyUI's input folder"):
        load()


def test_it_runs_again_when_a_file_has_changed_and_only_then(nodes, folder):
    key = nodes.LoadTrainingFolder.fingerprint_inputs
    photo(folder / "a.png")
    keys = [key(folder="toy"), key(folder="toy")]
    (folder / "a.txt").write_text("toy", encoding="utf-8")
    keys.append(key(folder="toy"))
    photo(folder / "b.png")
    keys.append(key(folder="toy"))
    photo(folder / "b.png", size=(50, 50))
    keys.append(key(folder="toy"))
    assert keys[0] == keys[1]
    assert len(set(keys)) == 4
    assert "There is no folder" in key(folder="../outside")
    assert key() == key(folder=None) == ""


def test_comfyui_asks_for_that_as_it_asks_a_node(nodes, folder, monkeypatch, caplog):
    import execution
    from comfy_execution.graph import DynamicPrompt

    import nodes as host_nodes

    kind = "BlockSkip_LoadTrainingFolder"
    monkeypatch.setitem(host_nodes.NODE_CLASS_MAPPINGS, kind, nodes.LoadTrainingFolder)
    photo(folder / "a.png")

    def key(chosen):
        prompt = DynamicPrompt({"1": {"class_type": kind, "inputs": {"folder": chosen}}})
        return asyncio.run(execution.IsChangedCache("p", prompt, None).get("1"))

    before = key("toy")
    assert key("toy") == before == [nodes.LoadTrainingFolder.fingerprint_inputs(folder="toy")]
    photo(folder / "b.png")
    assert key("toy") != before
    assert key(["2", 0]) is not None  # linked
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == []


def test_its_outputs_go_into_precompute_residuals(load, folder, bench):
    for name in "abc":
        photo(folder / f"{name}.png", size=(64, 64), seed=ord(name))
    images, _, files, _ = load()
    listed = type(bench.pictures)
    assert len(bench.precompute(images=listed(images), files=listed(files))[0].schedule) == 6
    photo(folder / "b.png", size=(64, 20))
    images, _, files, _ = load()
    with pytest.raises(ValueError, match=r"smaller than the patch of 32 px: b\.png \(64 x 20 px\)"):
        bench.precompute(images=listed(images), files=listed(files))


def test_cores_loader_makes_grey_of_sixteen_bits_white_and_that_is_said(folder, bench, core):
    from comfy_extras.nodes_dataset import LoadImageDataSetFromFolderNode

    values = np.linspace(2000, 60000, 64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(values).save(folder / "grey.png")
    images = LoadImageDataSetFromFolderNode.execute("toy").args[0]
    residuals = bench.precompute(images=type(bench.pictures)(images))[0]
    assert residuals.remarks[0].startswith("1 of 1 pictures is all of one colour, or almost: number 1 (white).")


def test_the_trigger_word_and_mirrored_copies_through_the_node(nodes, run_node, folder, said):
    values = photo(folder / "a.png")
    images, texts, files, _ = run_node(nodes.LoadTrainingFolder, folder="toy", trigger_word="sks toy", flip=True).args
    assert texts == ["sks toy", "sks toy"]
    assert [file.name for file in files] == ["a.png", "a.png (mirrored)"]
    assert torch.equal(images[1][0], values.flip(1))
    assert said[-1].endswith("Pictures: 2; captions: 2")


def profile(primaries, kind="RGB "):
    """A colour profile of gamma 2.2 with these primaries, each as XYZ; "GRAY" has none."""

    def fixed(*values):
        return b"".join(struct.pack(">i", round(value * 65536)) for value in values)

    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(2.2 * 256)) + bytes(2)
    name = b"desc" + bytes(4) + struct.pack(">I", 5) + b"test" + bytes(79)
    tags = {
        b"desc": name + bytes(-len(name) % 4),
        b"cprt": b"text" + bytes(8),
        b"wtpt": b"XYZ " + bytes(4) + fixed(0.9642, 1, 0.8249),
    }
    if kind == "GRAY":
        tags[b"kTRC"] = curve
    for letter, primary in zip(b"rgb", primaries, strict=False):
        tags[bytes([letter]) + b"XYZ"] = b"XYZ " + bytes(4) + fixed(*primary)
        tags[bytes([letter]) + b"TRC"] = curve
    table, body, start = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for tag, content in tags.items():
        table += tag + struct.pack(">II", start + len(body), len(content))
        body += content
    head = struct.pack(">I4sI4s4s4s", start + len(body), bytes(4), 0x02100000, b"mntr", kind.encode(), b"XYZ ")
    return head + bytes(12) + b"acsp" + bytes(28) + fixed(0.9642, 1, 0.8249) + bytes(48) + table + body


DISPLAY_P3 = profile([(0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407)])
ADOBE_RGB = profile([(0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457)])


@pytest.mark.parametrize(
    ("of", "expected"), [(DISPLAY_P3, (219, 37, 49)), (ADOBE_RGB, (231, 57, 57))], ids=["P3", "Adobe"]
)
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_the_colours_of_a_profile_become_those_of_srgb(load, folder, of, expected, mode):
    """Phones save Display P3 and cameras Adobe RGB; the values are of Pillow's own conversion."""
    picture = Image.new("RGB", (16, 16), (200, 60, 60))
    picture = picture.quantize() if mode == "P" else picture.convert(mode)
    picture.save(folder / "a.png", icc_profile=of)
    image = load()[0][0]
    assert (image[0, 0, 0] * 255).tolist() == pytest.approx(expected, abs=1)


def test_transparency_is_kept_beside_a_profile(load, folder, said):
    picture = Image.new("RGBA", (16, 16), (200, 60, 60, 255))
    picture.putpixel((0, 0), (0, 0, 0, 0))
    picture.save(folder / "a.png", icc_profile=DISPLAY_P3)
    image = load()[0][0]
    assert image[0, 0, 0].tolist() == [1.0, 1.0, 1.0]
    assert (image[0, 1, 1] * 255).tolist() == pytest.approx((219, 37, 49), abs=1)


def test_a_profile_of_srgb_changes_nothing(load, folder):
    from PIL import ImageCms

    of = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    expected = photo(folder / "a.png", icc_profile=of)
    assert torch.equal(load()[0][0][0], expected)


def test_a_grey_profile_is_followed(load, folder):
    Image.new("L", (16, 16), 60).save(folder / "a.png", icc_profile=profile([], "GRAY"))
    image = load()[0][0]
    assert (image[0, 0, 0] * 255).tolist() == pytest.approx((58, 58, 58), abs=2)
    assert image.shape[-1] == 3


@pytest.mark.parametrize("of", [b"no profile", profile([], "GRAY")], ids=["damaged", "of another kind"])
def test_a_profile_that_cannot_be_used_is_left_out_and_told(load, folder, of, caplog):
    expected = photo(folder / "a.png", icc_profile=of)
    assert torch.equal(load()[0][0][0], expected)
    assert "a.png: its colour profile cannot be used" in caplog.text


@pytest.mark.parametrize("ending", [".txt", ".TXT", ".Txt", ".Caption"])
def test_a_caption_is_found_in_any_case(load, folder, ending):
    photo(folder / "a.png")
    (folder / f"a{ending}").write_text("a toy", encoding="utf-8")
    assert load()[1] == ["a toy"]
