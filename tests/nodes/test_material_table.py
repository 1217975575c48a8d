"""How files and conditionings are used for training, as tables for ``docs/compatibility.md``."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from ..compatibility.recorded import assert_recorded

FILES = ("In the folder", "Load Training Folder", "ComfyUI's Load Image-Text (from Folder)")
CAPTIONS = ("Source of the caption", "Training")
SHOWN = np.random.default_rng(1).integers(0, 256, (30, 40, 3), dtype=np.uint8)
TEXT = "a grüner toy"


def photo(path, picture=None, **options):
    (picture or Image.fromarray(SHOWN)).save(path, **options)
    return torch.from_numpy(SHOWN / np.float32(255))


def deep_grey(path):
    values = np.linspace(2000, 60000, 1200).reshape(30, 40).astype(np.uint16)
    Image.fromarray(values).save(path)
    return torch.from_numpy(values[..., None] / np.float32(65535)).expand(-1, -1, 3)


def transparent(path):
    values = np.dstack([SHOWN, np.full((30, 40), 255, dtype=np.uint8)])
    values[20:, :, 3] = 0
    Image.fromarray(values).save(path)
    shown = torch.from_numpy(SHOWN / np.float32(255)).clone()
    shown[20:] = 1.0
    return shown


def turned(path):
    exif = Image.Exif()
    exif[0x0112] = 6
    photo(path, exif=exif, quality=100, subsampling=0)
    return torch.from_numpy(np.asarray(ImageOps.exif_transpose(Image.open(path))) / np.float32(255))


def truncated(path):
    photo(path)
    path.write_bytes(path.read_bytes()[:2000])


PICTURES = {
    "an 8-bit picture": ("a.png", photo),
    "a 16-bit grey picture": ("a.png", deep_grey),
    "a picture with transparent parts": ("a.png", transparent),
    "a photo that its camera marked as rotated": ("a.jpg", turned),
    "a TIFF": ("a.tif", photo),
    "a truncated picture": ("a.png", truncated),
}
TEXTS = {
    "a caption in UTF-8": ("a.txt", TEXT.encode()),
    "a caption in UTF-8 with a byte order mark": ("a.txt", TEXT.encode("utf-8-sig")),
    "a caption in UTF-16": ("a.txt", TEXT.encode("utf-16")),
    "a caption in Windows-1252 (Latin-1)": ("a.txt", TEXT.encode("cp1252")),
    "a caption with the extension .caption": ("a.caption", TEXT.encode()),
    "a caption that is a picture": ("a.txt", b"\x89PNG\r\n\x1a\n\0\0"),
    "an empty caption": ("a.txt", b" \r\n"),
    "no caption, while others have one": ("none", b""),
}


@pytest.fixture
def loaders(nodes, run_node, tmp_path, monkeypatch):
    """Both loaders on a folder "toy": each returns (images, texts, text shown under the node)."""
    import folder_paths
    from comfy_extras.nodes_dataset import LoadImageTextDataSetFromFolderNode

    (tmp_path / "toy").mkdir()
    said = []
    monkeypatch.setattr(folder_paths, "input_directory", str(tmp_path))
    monkeypatch.setattr(nodes.load_training_folder.NodeProgress, "say", lambda self, text: said.append(text))

    def ours():
        images, texts, *_ = run_node(nodes.LoadTrainingFolder, folder="toy").args
        return images, texts, said[-1]

    def theirs():
        images, texts = LoadImageTextDataSetFromFolderNode.execute("toy").args
        return images, texts, ""

    return tmp_path / "toy", (ours, theirs)


def outcome(load, name, judge):
    """Return how a loader handles the folder, in words."""
    try:
        images, texts, said = load()
    except Exception as error:  # noqa: BLE001 - including ComfyUI's own, which the table names
        return "refused by name" if name in str(error) else f"an error that does not name it ({type(error).__name__})"
    return judge(images[0][0], texts[0], said)


def of_picture(core, expected):
    def judge(image, text, said):
        colour = core("data.picture_checks").only_colour(image)
        if colour:
            return f"all {colour}"
        if expected is None:
            return "loaded, with a part missing"
        if image.shape != expected.shape:
            return "rotated" if image.shape[0] == expected.shape[1] else "another size"
        same = torch.allclose(image, expected, atol=2 / 255)
        return "unchanged" + (", with a remark" if "shown on white" in said else "") if same else "other colours"

    return judge


def of_text(image, text, said):
    if text == TEXT:
        return "read" + (", with a remark" if "Windows-1252" in said else "")
    if not text:
        return "empty" + (", with a remark" if "missing or empty" in said else "")
    return "read with other characters"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # ComfyUI leaves a damaged file open
@pytest.mark.parametrize("kind", PICTURES)
def test_pictures(loaders, core, kind):
    folder, both = loaders
    name, write = PICTURES[kind]
    judge = of_picture(core, write(folder / name))
    assert_recorded("training_files.json", FILES, [kind, *(outcome(load, name, judge) for load in both)])


@pytest.mark.parametrize("kind", TEXTS)
def test_texts(loaders, kind):
    folder, both = loaders
    name, content = TEXTS[kind]
    for picture in ("a.png", "b.png"):
        photo(folder / picture)
    (folder / name).write_bytes(content)
    (folder / "b.txt").write_text("a toy", encoding="utf-8")
    assert_recorded("training_files.json", FILES, [kind, *(outcome(load, name, of_text) for load in both)])


def conditionings(first, second):
    """The conditionings that core's nodes make from one or two texts."""
    from comfy_extras import nodes_edit_model, nodes_flux

    import nodes as host

    latent = {"samples": torch.zeros(1, 4, 8, 8)}
    return {
        "CLIP Text Encode": first,
        "FluxGuidance": nodes_flux.FluxGuidance.execute(first, 1.0).args[0],
        "Conditioning (Concat)": host.ConditioningConcat().concat(first, second)[0],
        "Conditioning (Average)": host.ConditioningAverage().addWeighted(first, second, 0.3)[0],
        "ConditioningZeroOut": host.ConditioningZeroOut().zero_out(first)[0],
        "Conditioning (Combine)": host.ConditioningCombine().combine(first, second)[0],
        "ConditioningSetTimestepRange, 0 to 1": host.ConditioningSetTimestepRange().set_range(first, 0.0, 1.0)[0],
        "ConditioningSetTimestepRange, a part": host.ConditioningSetTimestepRange().set_range(first, 0.0, 0.5)[0],
        "ConditioningSetAreaStrength, 1": host.ConditioningSetAreaStrength().append(first, 1.0)[0],
        "ConditioningSetAreaStrength, 0.2": host.ConditioningSetAreaStrength().append(first, 0.2)[0],
        "Conditioning (Set Area)": host.ConditioningSetArea().append(first, 64, 64, 0, 0, 1.0)[0],
        "Conditioning (Set Mask)": host.ConditioningSetMask().append(first, torch.ones(1, 8, 8), "default", 1.0)[0],
        "unCLIPConditioning": host.unCLIPConditioning().apply_adm(first, object(), 1.0, 0.0)[0],
        "ReferenceLatent": nodes_edit_model.ReferenceLatent.execute(first, latent).args[0],
    }


def test_conditionings(bench, tiny, core):
    for title, given in conditionings(*tiny.captions((5, 5))).items():
        try:
            remarks = bench.precompute(positive=given, storage="on the fly", draws=1)[0].remarks
            found = "used" + (", with the remark that it holds no words" if "no words" in "".join(remarks) else "")
        except core("errors").InvalidInputError as error:
            found = f"refused: {str(error).removeprefix('Conditioning 1 ').split(',')[0]}"
        assert_recorded("captions.json", CAPTIONS, [title, found])
