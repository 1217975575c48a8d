"""Published models on the meta device: as many bytes as their files, but none of them in memory."""

from types import SimpleNamespace

import pytest
import torch
from blockskip_pack.blockskip_core.errors import InvalidInputError, UnsupportedModelError

pytestmark = pytest.mark.usefixtures("comfyui")

# GiB of all parameters in bf16 (SD3.5's table of positions is a buffer and does not count); blocks in each list.
SIZES = {
    "FLUX.1-dev": (22.17, {"double_blocks": 19, "single_blocks": 38}),
    "FLUX.2-dev": (60.02, {"double_blocks": 8, "single_blocks": 48}),
    "FLUX.2-klein-4B": (7.22, {"double_blocks": 5, "single_blocks": 20}),
    "FLUX.2-klein-9B": (16.91, {"double_blocks": 8, "single_blocks": 24}),
    "Qwen-Image": (38.05, {"transformer_blocks": 60}),
    "Qwen-Image-2.1": (13.25, {"transformer_blocks": 32}),
    "Z-Image": (11.46, {"layers": 30}),
    "Wan2.1-T2V-1.3B": (2.64, {"blocks": 30}),
    "Wan2.1-T2V-14B": (26.61, {"blocks": 40}),
    "Krea-2": (23.88, {"blocks": 28}),
    "LTX-2": (36.48, {"transformer_blocks": 48}),
    "HunyuanVideo": (23.88, {"double_blocks": 20, "single_blocks": 40}),
    "MiniMax-H3": (61.73, {"blocks": 50}),
    "Chroma": (16.58, {"double_blocks": 19, "single_blocks": 38}),
    "SD3.5-Large": (15.01, {"joint_blocks": 38}),
    "SD3.5-Medium": (4.18, {"joint_blocks": 24}),
    "LTX-Video-2B": (3.58, {"transformer_blocks": 28}),
    "LTX-Video-13B": (24.29, {"transformer_blocks": 48}),
    "HunyuanVideo-1.5": (15.51, {"double_blocks": 54}),
    "HunyuanImage-2.1": (32.46, {"double_blocks": 20, "single_blocks": 40}),
    "AuraFlow": (12.75, {"double_layers": 4, "single_layers": 32}),
    "Mage-Flow": (7.67, {"transformer_blocks": 12}),
    "Lens": (7.64, {"transformer_blocks": 48}),
    "Boogu-Image": (19.17, {"double_stream_layers": 8, "single_stream_layers": 32}),
    "Kandinsky-5-Image-Lite": (11.22, {"visual_transformer_blocks": 50}),
    "Kandinsky-5-T2V-Lite": (3.74, {"visual_transformer_blocks": 32}),
    "OmniGen2": (7.39, {"layers": 32}),
    "JoyAI-Image-Edit": (30.29, {"double_blocks": 40}),
    "HiDream-I1": (31.86, {"double_stream_blocks": 16, "single_stream_blocks": 32}),
    "Anima": (3.89, {"blocks": 28}),
    "Ideogram-4": (17.28, {"layers": 34}),
    "Ernie-Image": (14.96, {"layers": 36}),
}


def known() -> list[str]:
    """The published models whose classes this ComfyUI has."""
    from blockskip_pack.blockskip_core.hosts.families.published_sizes import PUBLISHED_SIZES, is_known

    return [name for name in PUBLISHED_SIZES if is_known(name)]


@pytest.mark.parametrize("name", SIZES)
def test_sizes_are_those_of_the_published_files(name):
    from blockskip_pack.blockskip_core.hosts.families.published_sizes import published_model

    if name not in known():
        with pytest.raises(UnsupportedModelError, match=rf"This ComfyUI has no \w+, so it does not know {name}"):
            published_model(name)
        return
    model = published_model(name).diffusion_model
    assert all(
        tensor.is_meta or tensor.numel() < 64 for tensor in model.state_dict().values()
    )  # a buffer of MiniMax H3
    gib, lists = SIZES[name]
    assert sum(parameter.nbytes for parameter in model.parameters()) / 2**30 == pytest.approx(gib, abs=0.006)
    assert {key: len(getattr(model, key)) for key in lists} == lists


def test_the_host_reads_the_same_sizes_off_the_weights():
    from blockskip_pack.blockskip_core.hosts.families.published_sizes import PUBLISHED_SIZES, published_model
    from comfy.model_detection import detect_unet_config

    for name in known():
        size = PUBLISHED_SIZES[name]
        read = detect_unet_config(published_model(name).diffusion_model.state_dict(), "")
        assert {key: read.get(key) for key in size.config} == dict(size.config), name
        assert not any(value for key, value in read.items() if key not in size.config), name


def test_every_published_model_has_an_adapter_that_lists_its_blocks():
    from blockskip_pack.blockskip_core.hosts.families.published_sizes import published_model
    from blockskip_pack.blockskip_core.hosts.families.registry import adapter_for

    families = {}
    for name in known():
        adapter = adapter_for(SimpleNamespace(model=published_model(name)))
        families[name] = adapter.family
        if name in SIZES:
            assert len(adapter.blocks()) == sum(SIZES[name][1].values())
            assert sum(block.num_bytes for block in adapter.blocks()) / 2**30 < SIZES[name][0]
    followed = [
        "anima", "auraflow", "boogu", "ernieimage", "hidream", "hunyuanimage21", "hunyuanvideo", "hunyuanvideo15",
        "ideogram4", "joyimage", "kandinsky5", "kandinsky5image", "krea2", "lens", "ltxav", "ltxv", "mageflow", "omnigen2",
    ]  # fmt: skip
    assert sorted({*families.values()} - {"qwenimage21"}) == sorted(
        ["chroma", "flux", "flux2", "lumina2", "minimax", "qwen_image", "sd3", "wan", *followed]
    )


def test_the_small_wan_2_2_has_five_thousand_million_parameters():
    from blockskip_pack.blockskip_core.hosts.families.published_sizes import published_model

    parameters = published_model("Wan2.2-TI2V-5B").diffusion_model.parameters()
    assert sum(parameter.numel() for parameter in parameters) == pytest.approx(5.0e9, rel=0.01)


def test_bytes_follow_the_dtype():
    from blockskip_pack.blockskip_core.hosts.families.published_sizes import published_model

    counts = [
        sum(p.nbytes for p in published_model("FLUX.2-klein-4B", dtype).diffusion_model.parameters())
        for dtype in (torch.float32, torch.bfloat16)
    ]
    assert counts[0] == 2 * counts[1]


def test_an_unknown_name_is_refused_and_the_known_ones_named():
    from blockskip_pack.blockskip_core.hosts.families.published_sizes import published_model

    with pytest.raises(InvalidInputError, match="FLUX.1-dev, .*, got 'nothing'"):
        published_model("nothing")
