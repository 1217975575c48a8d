"""Which programs read our LoRA files: ComfyUI's loader nodes, diffusers, peft, and programs that follow kohya."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from blockskip_pack.blockskip_core.adapters.lora import LinearShape, LoraAdapters, LoraSettings
from blockskip_pack.blockskip_core.adapters.lora_formats import to_file_tensors
from torch import nn

from ...compatibility.recorded import assert_recorded
from ...core.plain_dit import selection
from ..hosted_runs import chosen, clean_latents, flux_lora, full_forward, hosted
from ..tiny_flux import tiny_flux

pytestmark = pytest.mark.usefixtures("comfyui")

FORMS = ("diffusers", "peft", "kohya")
SETTINGS = LoraSettings(rank=2, alpha=6.0)  # a scale of 3, which must not get lost


@dataclass(frozen=True)
class InDiffusers:
    """A family's classes in diffusers.

    Attributes:
        published: Model at its published size.
        loader: Class that loads LoRAs, without its suffix.
        transformer: Class of the model, without its suffix, and its settings.
        converted: Function of diffusers that renames and splits the published weights; "" if the names are the same.
    """

    published: str
    loader: str
    transformer: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    converted: str = ""


FAMILIES = {
    "FLUX.1": InDiffusers("FLUX.1-dev", "Flux", "Flux", {"guidance_embeds": True}, "flux_transformer_checkpoint"),
    "FLUX.2": InDiffusers("FLUX.2-dev", "Flux2", "Flux2", {}, "flux2_transformer_checkpoint"),
    "Qwen-Image": InDiffusers("Qwen-Image", "QwenImage", "QwenImage"),
    "Z-Image": InDiffusers("Z-Image", "ZImage", "ZImage", {}, "z_image_transformer_checkpoint"),
    "Wan": InDiffusers("Wan2.1-T2V-14B", "Wan", "Wan", {}, "wan_transformer"),
    "Chroma": InDiffusers("Chroma", "Flux", "Chroma", {}, "chroma_transformer_checkpoint"),
    "SD3.5": InDiffusers(
        "SD3.5-Medium", "SD3", "SD3",
        {
            "num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 384,
            "dual_attention_layers": tuple(range(13)), "qk_norm": "rms_norm",
        },
        "sd3_transformer_checkpoint",
    ),
}  # fmt: skip
COLUMNS = ["Family", *FORMS]


# --- ComfyUI -----------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """A LoRA of the tiny FLUX.1 in ComfyUI's loras folder, in every form."""
    import folder_paths
    from blockskip_pack.blockskip_core.hosts.families.lora_names import file_names
    from blockskip_pack.blockskip_core.hosts.files.lora_files import save_lora

    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path)], {".safetensors"}))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    adapters = flux_lora(hosted(tiny_flux(mlp_ratio=4.0)), chosen(1, 1), zero=False)
    patcher = tiny_flux(mlp_ratio=4.0)
    rows = {name: adapters.up(name).shape[0] for name in adapters.names}
    for form in FORMS:
        names = file_names(patcher.model, hosted(patcher).adapter, rows, form)
        tensors = to_file_tensors(adapters.state_dict(), adapters.scale, form, names.in_diffusers)
        save_lora(tensors, {}, tmp_path / f"{form}.safetensors")
    return len(adapters.names)


@pytest.mark.parametrize("form", FORMS)
def test_comfyuis_loader_nodes_read_them(saved, form):
    """Load LoRA, LoraLoaderModelOnly and our own node: the same layers, the same picture."""
    from blockskip_pack.blockskip_core.hosts.files.applied_lora import apply_lora
    from blockskip_pack.blockskip_core.hosts.files.lora_files import load_lora_file

    from nodes import LoraLoader, LoraLoaderModelOnly

    file, clean = f"{form}.safetensors", clean_latents()
    ours, count, _ = apply_lora(tiny_flux(mlp_ratio=4.0), load_lora_file(file), 0.8)
    picture = full_forward(hosted(ours), clean, [0])
    assert count == saved
    assert not torch.allclose(picture, full_forward(hosted(tiny_flux(mlp_ratio=4.0)), clean, [0]), atol=1e-3)

    with_clip, _ = LoraLoader().load_lora(tiny_flux(mlp_ratio=4.0), None, file, 0.8, 0.0)
    (model_only,) = LoraLoaderModelOnly().load_lora_model_only(tiny_flux(mlp_ratio=4.0), file, 0.8)
    for patcher in (with_clip, model_only):
        assert len(patcher.patches) == saved
        assert torch.equal(full_forward(hosted(patcher), clean, [0]), picture)


# --- every family at its published size ------------------------------------------------------------------------------


class FullSize:
    """A LoRA with random numbers on three middle blocks of a published model without memory.

    A weight's change is as large as the weight. So its effect on two inputs is compared: B (A x).
    """

    def __init__(self, model):
        from blockskip_pack.blockskip_core.hosts.families.registry import adapter_for

        self.model = model
        self.adapter = adapter_for(SimpleNamespace(model=model))
        blocks = [block.name for block in self.adapter.blocks()]
        third = len(blocks) // 3  # in both kinds of blocks, if there are two
        kept = tuple(f"{blocks[place]}." for place in (third - 1, third, len(blocks) // 2))
        self.lora = LoraAdapters(
            {
                name: LinearShape(layer.in_features, layer.out_features)
                for name, layer in model.diffusion_model.named_modules()
                if name.startswith(kept)
                and isinstance(layer, nn.Linear)
                and self.adapter.is_lora_target(name, "attention and mlp")
            },
            SETTINGS,
            seed=0,
        )
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for tensor in self.lora.parameters():
                tensor.normal_(generator=generator)

    def names(self, form):
        from blockskip_pack.blockskip_core.hosts.families.lora_names import file_names

        rows = {name: self.lora.up(name).shape[0] for name in self.lora.names}
        return file_names(self.model, self.adapter, rows, form)

    def tensors(self, form):
        return to_file_tensors(self.lora.state_dict(), self.lora.scale, form, self.names(form).in_diffusers)

    @property
    def expected(self):
        """Layer -> the effect of its change."""
        lora = self.lora
        return {name: acting(lora.up(name).detach(), lora.down(name).detach(), lora.scale) for name in lora.names}


def acting(up, down, scale=1.0):
    """Return B (A x) for two fixed inputs x, shape (rows, 2)."""
    x = torch.randn(down.shape[1], 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return scale * (up.double() @ (down.double() @ x))


def same(found, expected):
    """Return whether these are the same layers with the same changes."""
    return found.keys() == expected.keys() and all(
        found[name].shape == change.shape
        and torch.allclose(found[name], change, rtol=1e-4, atol=1e-4 * change.abs().max())
        for name, change in expected.items()
    )


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, comfyui):
    return request.param


@pytest.fixture(scope="module")
def full(family):
    from blockskip_pack.blockskip_core.hosts.families.published_sizes import published_model

    return FullSize(published_model(FAMILIES[family].published))


def read_by_comfyui(full, tensors):
    """The changes as loaded by ComfyUI, by native layer."""
    import comfy.lora
    import comfy.lora_convert

    keys = comfy.lora.model_lora_keys_unet(full.model, {})
    found = {}
    for key, patch in comfy.lora.load_lora(comfy.lora_convert.convert_lora(dict(tensors)), keys).items():
        weight, part = (key, None) if isinstance(key, str) else key
        up, down, alpha = patch.weights[:3]
        name = weight.removeprefix("diffusion_model.").removesuffix(".weight")
        rows = full.model.diffusion_model.get_submodule(name).out_features
        first, count = (0, rows) if part is None else part[1:]
        whole = found.setdefault(name, torch.zeros(rows, 2, dtype=torch.float64))
        whole[first : first + count] += acting(up, down, 1.0 if alpha is None else alpha / len(down))
    return found


def in_diffusers(full, place):
    """The changes by diffusers' layer, according to its converter of published weights."""
    import diffusers.loaders.single_file_utils as single_file

    changes = {f"{name}.weight": change for name, change in full.expected.items()}
    if not place.converted:
        return {name.removesuffix(".weight"): change for name, change in changes.items()}
    weights = {
        name: torch.zeros((tensor.shape[0], 2) if tensor.ndim > 1 else tensor.shape, dtype=torch.float64)
        for name, tensor in full.model.diffusion_model.state_dict().items()
    }
    weights |= {  # the names of norms in the published files of FLUX.1 and Chroma
        name.removesuffix(".weight") + ".scale": tensor for name, tensor in weights.items() if tensor.ndim == 1
    }
    converted = getattr(single_file, f"convert_{place.converted}_to_diffusers")(weights | changes)
    return {
        name.removesuffix(".weight"): tensor for name, tensor in converted.items() if tensor.ndim == 2 and tensor.any()
    }


def read_by_diffusers(tensors, loader, linear=None):
    """The changes as loaded by diffusers, by its layer; empty if it fails or its model has no such layers.

    Args:
        tensors: Of a file.
        loader: Class that loads LoRAs, without its suffix.
        linear: Layer -> shape of its weight in diffusers' model; None to accept any layers.
    """
    import diffusers.loaders.lora_pipeline

    mixin = getattr(diffusers.loaders.lora_pipeline, f"{loader}LoraLoaderMixin")
    try:
        state = mixin.lora_state_dict(dict(tensors))
    except (KeyError, ValueError, RuntimeError):  # raised by its conversions
        return {}
    found = {}
    for key, down in state.items():
        name = key.removesuffix(".lora_A.weight")
        if key.endswith(".lora_A.weight") and name.startswith("transformer."):  # it skips others with a warning
            up, name = state[f"{name}.lora_B.weight"], name.removeprefix("transformer.")
            if linear is not None and linear.get(name) != (up.shape[0], down.shape[1]):
                return {}
            found[name] = acting(up, down)
    return found


def linear_shapes(model):
    return {name: tuple(m.weight.shape) for name, m in model.named_modules() if isinstance(m, nn.Linear)}


def read_by_peft(tensors, prefix, shapes):
    """The changes as loaded by peft without the prefix, in a model with layers of these shapes; empty if not."""
    import peft

    layers = {
        name.removeprefix(prefix).removesuffix(".lora_A.weight") for name in tensors if name.endswith("lora_A.weight")
    }
    if not all(name.startswith(prefix) for name in tensors) or not layers or not layers <= shapes.keys():
        return {}
    model = LoraAdapters(
        {name: LinearShape(shapes[name][1], shapes[name][0]) for name in layers},
        LoraSettings(rank=2, alpha=2.0),
        seed=5,
    )
    result = peft.set_peft_model_state_dict(
        model._skeleton, {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    )
    assert not result.unexpected_keys
    return {name: acting(model.up(name).detach(), model.down(name).detach()) for name in model.names}


def read_like_kohya(tensors, shapes):
    """The changes by sd-scripts' rule: "lora_unet_" and the layer's path with underscores; alpha over rank."""
    found = {}
    for name, shape in shapes.items():
        stem = "lora_unet_" + name.replace(".", "_")
        if f"{stem}.lora_down.weight" in tensors:
            up, down = tensors[f"{stem}.lora_up.weight"], tensors[f"{stem}.lora_down.weight"]
            assert (up.shape[0], down.shape[1]) == shape
            found[name] = acting(up, down, tensors[f"{stem}.alpha"].item() / len(down))
    return found


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_each_form_is_read_by_the_programs_that_the_table_names(family, full):
    """As recorded for docs/compatibility.md; the file's own metadata says the same."""
    import diffusers

    place = FAMILIES[family]
    with torch.device("meta"):
        kind = "3DModel" if place.transformer == "Wan" else "2DModel"
        theirs = linear_shapes(getattr(diffusers, f"{place.transformer}Transformer{kind}")(**place.settings))
    ours = linear_shapes(full.model.diffusion_model)
    expected, expected_there = full.expected, in_diffusers(full, place)
    row = [family]
    for form in FORMS:
        tensors, names = full.tensors(form), full.names(form)
        split = names.in_diffusers is not None
        by_peft = read_by_peft(tensors, "transformer." if split else "diffusion_model.", theirs if split else ours)
        readers = {
            "ComfyUI": same(read_by_comfyui(full, tensors), expected),
            "diffusers": same(read_by_diffusers(tensors, place.loader, theirs), expected_there),
            "peft": same(by_peft, expected_there if split else expected),
            "kohya": same(read_like_kohya(tensors, ours), expected),
        }
        assert readers["ComfyUI"]
        if diffusers.__version__ == "0.42.1":
            assert names.loads_in == ", ".join(name for name in ("ComfyUI", "diffusers") if readers[name])
        row.append(", ".join(name for name, reads in readers.items() if reads))
    if diffusers.__version__ == "0.42.1":  # other versions may read more
        assert_recorded("lora_files.json", COLUMNS, row)


def test_diffusers_reads_no_lora_of_lumina_2_without_its_first_blocks():
    """Lumina 2 has no published size here. Its converter requires all layers of all blocks, from the first."""
    from ..tiny_families import FAMILIES as TINY

    tiny = next(tiny for tiny in TINY if tiny.name == "lumina2")
    patcher = tiny.build()
    dit = tiny.hosted(patcher)
    lora = tiny.lora(dit, tiny.chosen(1, 1), zero=False)
    full = FullSize.__new__(FullSize)
    full.model, full.adapter, full.lora = patcher.model, dit.adapter, lora
    row = ["Lumina 2"]
    for form in FORMS:
        tensors = full.tensors(form)
        assert read_by_diffusers(tensors, "Lumina2") == {}
        assert full.names(form).loads_in == "ComfyUI"
        shapes = linear_shapes(patcher.model.diffusion_model)
        readers = {
            "ComfyUI": same(read_by_comfyui(full, tensors), full.expected),
            "peft": same(read_by_peft(tensors, "diffusion_model.", shapes), full.expected),
            "kohya": same(read_like_kohya(tensors, shapes), full.expected),
        }
        row.append(", ".join(name for name, reads in readers.items() if reads))
    assert_recorded("lora_files.json", COLUMNS, row)


# --- models that are followed ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FollowedInDiffusers:
    """A followed family's classes in diffusers, as small as the tests' model.

    Attributes:
        title: Name in the table.
        loader: Class that loads LoRAs, without its suffix.
        transformer: Class of the model.
        settings: ComfyUI's model -> settings that make diffusers' as large.
    """

    title: str
    loader: str
    transformer: str
    settings: Callable[[nn.Module], dict[str, Any]]


_LTX = {"num_attention_heads": 2, "num_layers": 4, "caption_channels": 20}
FOLLOWED_THERE = {
    "ltxv": FollowedInDiffusers("LTX-Video", "LTXVideo", "LTXVideoTransformer3DModel", lambda _: {
        **_LTX, "attention_head_dim": 16, "cross_attention_dim": 32,
    }),
    "ltx2": FollowedInDiffusers("LTX-2", "LTX2", "LTX2VideoTransformer3DModel", lambda _: {
        **_LTX, "attention_head_dim": 32, "cross_attention_dim": 64, "gated_attn": True, "cross_attn_mod": True,
        "audio_num_attention_heads": 2, "audio_attention_head_dim": 16, "audio_cross_attention_dim": 32,
        "audio_gated_attn": True, "audio_cross_attn_mod": True,
    }),
    "krea2": FollowedInDiffusers("Krea 2", "Krea2", "Krea2Transformer2DModel", lambda model: {
        "num_layers": 5, "attention_head_dim": 16, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": model.blocks[0].mlp.gate.out_features, "axes_dims_rope": (4, 6, 6), "text_hidden_dim": 20,
        "num_text_layers": 3, "text_num_attention_heads": 2, "text_num_key_value_heads": 2, "text_intermediate_size": 32,
    }),
    "ernie": FollowedInDiffusers("Ernie-Image", "ErnieImage", "ErnieImageTransformer2DModel", lambda _: {
        "hidden_size": 32, "num_attention_heads": 2, "num_layers": 4, "ffn_hidden_size": 48, "text_in_dim": 20,
        "rope_axes_dim": (4, 6, 6),
    }),
    "hidream": FollowedInDiffusers("HiDream-I1", "HiDreamImage", "HiDreamImageTransformer2DModel", lambda _: {
        "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 2, "num_single_layers": 2,
        "attention_head_dim": 16, "num_attention_heads": 2, "caption_channels": [20, 20], "text_emb_dim": 16,
        "num_routed_experts": 2, "num_activated_experts": 1, "axes_dims_rope": (8, 4, 4), "llama_layers": [0, 1, 2, 3],
    }),
    "anima": FollowedInDiffusers("Anima", "Anima", "CosmosTransformer3DModel", lambda _: {
        "num_attention_heads": 2, "attention_head_dim": 128, "num_layers": 6, "text_embed_dim": 64, "adaln_lora_dim": 8,
        "extra_pos_embed_type": None,
    }),
    "auraflow": FollowedInDiffusers("AuraFlow", "AuraFlow", "AuraFlowTransformer2DModel", lambda _: {
        "num_mmdit_layers": 2, "num_single_dit_layers": 3, "attention_head_dim": 32, "num_attention_heads": 2,
        "joint_attention_dim": 20, "caption_projection_dim": 64, "pos_embed_max_size": 256,
    }),
    "hunyuan_video": FollowedInDiffusers("HunyuanVideo", "HunyuanVideo", "HunyuanVideoTransformer3DModel", lambda _: {
        "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 4, "num_single_layers": 6, "mlp_ratio": 4.0,
        "text_embed_dim": 20, "pooled_projection_dim": 16, "rope_axes_dim": (4, 6, 6),
    }),
    "kandinsky5": FollowedInDiffusers(
        "Kandinsky 5 (picture)", "Kandinsky", "Kandinsky5Transformer3DModel", lambda _: {
            "in_visual_dim": 16, "out_visual_dim": 16, "in_text_dim": 20, "in_text_dim2": 16, "time_dim": 24,
            "model_dim": 32, "ff_dim": 64, "num_visual_blocks": 8, "axes_dims": (4, 6, 6),
        },
    ),
}  # fmt: skip


def same_numbers(found, expected):
    """Return whether these are the same changes, one for one, whatever the names of their layers."""
    left = list(expected.values())
    for change in found.values():
        close = (
            place
            for place, other in enumerate(left)
            if other.shape == change.shape and torch.allclose(change, other, rtol=1e-4, atol=1e-4 * other.abs().max())
        )
        place = next(close, None)
        if place is None:
            return False
        del left[place]
    return not left


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", FOLLOWED_THERE)
def test_each_form_of_a_followed_family_is_read_by_the_programs_that_the_table_names(name):
    """With small models of both programs' classes, of the same size."""
    import diffusers

    from ..followed_families import family as followed_family

    there, tiny = FOLLOWED_THERE[name], followed_family(name)
    patcher = tiny.build()
    dit = tiny.hosted(patcher)
    full = FullSize.__new__(FullSize)
    full.model, full.adapter = patcher.model, dit.adapter
    full.lora = tiny.lora(dit, selection(0, 0, len(dit.blocks)), zero=False)
    with torch.device("meta"):
        theirs = linear_shapes(getattr(diffusers, there.transformer)(**there.settings(patcher.model.diffusion_model)))
    ours = linear_shapes(patcher.model.diffusion_model)
    row = [there.title]
    for form in FORMS:
        tensors, names = full.tensors(form), full.names(form)
        assert names.in_diffusers is None
        readers = {
            "ComfyUI": same(read_by_comfyui(full, tensors), full.expected),
            "diffusers": same_numbers(read_by_diffusers(tensors, there.loader, theirs), full.expected),
            "peft": same(read_by_peft(tensors, "diffusion_model.", ours), full.expected),
            "kohya": same(read_like_kohya(tensors, ours), full.expected),
        }
        assert readers["ComfyUI"]
        if diffusers.__version__ == "0.42.1":
            assert names.loads_in == ", ".join(program for program in ("ComfyUI", "diffusers") if readers[program])
        row.append(", ".join(program for program, reads in readers.items() if reads))
    if diffusers.__version__ == "0.42.1":
        assert_recorded("lora_files.json", COLUMNS, row)
