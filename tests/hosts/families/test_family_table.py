"""What works with which model, as a table for docs/models.md.

Every model in the lists is trained in the parametrised tests beside this one: exact replay, gradients, a falling loss, a LoRA
that ComfyUI's loader patches onto every layer. The other columns are found here, or are the lists of the tests that show them.
"""

from __future__ import annotations

import pytest
import torch
from blockskip_pack.blockskip_core.errors import UnsupportedModelError

from ...compatibility.recorded import FOLDER, assert_recorded
from ..followed_families import FOLLOWED
from ..models import test_gguf, test_stored_families, test_stored_followed
from ..tiny_families import FAMILIES, TinyFamily
from ..tiny_minimax import MINIMAX
from . import test_clips, test_followed, test_followed_references, test_references

pytestmark = pytest.mark.usefixtures("comfyui")

TITLES = {
    "flux": "FLUX.1 dev, schnell, Kontext", "flux2": "FLUX.2 dev", "klein": "FLUX.2 Klein", "qwen_image": "Qwen-Image",
    "z_image": "Z-Image", "lumina2": "Lumina 2", "wan21": "Wan 2.1", "wan22": "Wan 2.2", "chroma": "Chroma",
    "sd35": "SD3.5", "minimax": "MiniMax H3", "auraflow": "AuraFlow", "mage_flow": "Mage-Flow", "lens": "Lens",
    "boogu": "Boogu", "hunyuan_video": "HunyuanVideo", "hunyuan_image": "HunyuanImage 2.1",
    "kandinsky5": "Kandinsky 5 (picture)", "kandinsky5_video": "Kandinsky 5 (video)", "hunyuan_video15": "HunyuanVideo 1.5", "anima": "Anima", "krea2": "Krea 2", "omnigen2": "OmniGen2",
    "ernie": "Ernie-Image", "hidream": "HiDream-I1", "ltxv": "LTX-Video", "ltx2": "LTX-2", "joyimage": "JoyImage", "qwen_image21": "Qwen-Image 2.1",
    "ltx25": "LTX-2.5", "ideogram4": "Ideogram 4",
}  # fmt: skip
NEWER = ("qwen_image21", "ltx25")  # than 0.30.0
MODELS = [tiny for tiny in (*FAMILIES, MINIMAX, *FOLLOWED) if tiny.name not in NEWER]
COLUMNS = [
    "Model", "Clips", "References", "Text hidden", "RALU", "Dynamic patches", "Memory Plan", "fp8 scaled", "int8 ConvRot",
    "nvfp4", "GGUF",
]  # fmt: skip
CLIPS = {tiny.name for tiny in test_clips.VIDEO} | {"minimax"}  # a case of its tests
QUANTISED = {tiny.name for tiny in test_stored_families.TRAINED} | test_stored_followed.CASES.keys()  # in three formats
GGUF = {tiny.name for tiny in test_gguf.TRAINED}
REFERENCES = {name for name, _ in (*test_references.CASES, *test_followed_references.CASES)} | {"minimax"}  # likewise


def has(works: bool) -> str:
    return "yes" if works else ""


def is_counted(tiny: TinyFamily, dit) -> bool:
    """Whether a call of the model runs without values."""
    from blockskip_pack.blockskip_core.hosts.models.weightless_dit import WeightlessDit

    if tiny.name in test_followed.NOT_COUNTED:
        return False
    with torch.no_grad(), WeightlessDit.of(dit).running({}) as denoise:
        output = denoise(torch.empty(1, *tiny.latent_shape, device="meta"), torch.empty(1, device="meta"), [0])
    return output.shape == (1, *tiny.latent_shape)


def formats(name: str) -> list[str]:
    """The cells of the formats, from the lists of the tests that train a model of the class from them."""
    quantised = has(name in QUANTISED)
    return [quantised, test_stored_families.WITHOUT_INT8.get(name, quantised), quantised, has(name in GGUF)]


def is_hidden(adapter) -> bool:
    """Whether the text can be hidden from the blocks."""
    from blockskip_pack.blockskip_core.hosts.families.capabilities import MasksText, require

    try:
        require(adapter, MasksText, "").text_masking_wrapper(frozenset())
    except UnsupportedModelError:
        return False
    return True


def is_placed(patcher) -> bool:
    """Whether tokens of two sizes can be given positions."""
    from blockskip_pack.blockskip_core.hosts.families.sampled_families import positions_of

    try:
        positions_of(patcher)
    except UnsupportedModelError:
        return False
    return True


@pytest.mark.parametrize("tiny", MODELS, ids=lambda tiny: tiny.name)
def test_what_works_is_what_the_table_says(tiny):
    from blockskip_pack.blockskip_core.hosts.families.capabilities import EmbedsPatches

    patcher = tiny.build()
    dit = tiny.hosted(patcher, lengths=tiny.lengths[:1])
    found = (
        tiny.name in CLIPS, tiny.name in REFERENCES, is_hidden(dit.adapter), is_placed(patcher) and not tiny.empty,
        isinstance(dit.adapter, EmbedsPatches), is_counted(tiny, dit),
    )  # fmt: skip
    assert_recorded("families.json", COLUMNS, [TITLES[tiny.name], *map(has, found), *formats(tiny.name)])


def test_the_table_has_no_other_model():
    import json

    rows = json.loads((FOLDER / "families.json").read_text(encoding="utf-8"))["rows"]
    assert [row[0] for row in rows] == [TITLES[tiny.name] for tiny in MODELS]
