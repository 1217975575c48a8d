"""Who reads our LoRA files: ComfyUI's own loader nodes, and diffusers for some families, as docs/models.md says."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch
from blockskip_pack.blockskip_core.adapters.lora import LinearShape, LoraAdapters, LoraSettings
from blockskip_pack.blockskip_core.adapters.lora_formats import to_file_tensors
from torch import nn

from ...docs.texts import read, rows, section
from ..hosted_runs import chosen, clean_latents, flux_lora, full_forward, hosted
from ..tiny_flux import tiny_flux

pytestmark = pytest.mark.usefixtures("comfyui")

FORMS = ("peft", "kohya")
SETTINGS = LoraSettings(rank=2, alpha=6.0)  # a scale of 3, which must not get lost

# Row of the table in docs/models.md -> published model, loader and transformer of diffusers, settings of the latter.
# Lumina 2 has no published size here.
IN_DIFFUSERS = {
    "FLUX.1": ("FLUX.1-dev", "Flux", "Flux", {"guidance_embeds": True}),
    "FLUX.2": ("FLUX.2-dev", "Flux2", "Flux2", {}),
    "Qwen-Image": ("Qwen-Image", "QwenImage", "QwenImage", {}),
    "Z-Image": ("Z-Image", "ZImage", "ZImage", {}),
    "Wan": ("Wan2.1-T2V-14B", "Wan", "Wan", {}),
    "Chroma": ("Chroma", "Flux", "Chroma", {}),
    "SD3.5": ("SD3.5-Large", "SD3", "SD3", {"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432}),
}  # fmt: skip
LISTS = {"double_blocks": "transformer_blocks", "single_blocks": "single_transformer_blocks"}  # ours -> diffusers'


# --- ComfyUI -----------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """A LoRA of the tiny FLUX.1 in ComfyUI's loras folder, in both forms; and the model's picture with it."""
    import folder_paths
    from blockskip_pack.blockskip_core.hosts.files.lora_files import save_lora

    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path)], {".safetensors"}))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    adapters = flux_lora(hosted(tiny_flux()), chosen(1, 1), zero=False)
    for form in FORMS:
        tensors = to_file_tensors(adapters.state_dict(), adapters.scale, form)
        save_lora(tensors, {}, tmp_path / f"{form}.safetensors")
    return len(adapters.names)


@pytest.mark.parametrize("form", FORMS)
def test_comfyuis_loader_nodes_read_them(saved, form):
    """Load LoRA, LoraLoaderModelOnly, and what our own node does: the same layers, the same picture."""
    from blockskip_pack.blockskip_core.hosts.files.applied_lora import apply_lora
    from blockskip_pack.blockskip_core.hosts.files.lora_files import load_lora_file

    from nodes import LoraLoader, LoraLoaderModelOnly

    file, clean = f"{form}.safetensors", clean_latents()
    ours, count, _ = apply_lora(tiny_flux(), load_lora_file(file), 0.8)
    picture = full_forward(hosted(ours), clean, [0])
    assert count == saved
    assert not torch.allclose(picture, full_forward(hosted(tiny_flux()), clean, [0]), atol=1e-3)

    with_clip, _ = LoraLoader().load_lora(tiny_flux(), None, file, 0.8, 0.0)
    (model_only,) = LoraLoaderModelOnly().load_lora_model_only(tiny_flux(), file, 0.8)
    for patcher in (with_clip, model_only):
        assert len(patcher.patches) == saved
        assert torch.equal(full_forward(hosted(patcher), clean, [0]), picture)


# --- diffusers ---------------------------------------------------------------------------------------------------


def lora_of(published):
    """Return a LoRA with random numbers on three blocks in the middle of a model at full size."""
    from blockskip_pack.blockskip_core.hosts.families.published_sizes import published_model
    from blockskip_pack.blockskip_core.hosts.families.registry import adapter_for

    model = published_model(published)
    adapter = adapter_for(SimpleNamespace(model=model))
    blocks = [block.name for block in adapter.blocks()]
    third = len(blocks) // 3
    kept = tuple(
        f"{blocks[place]}." for place in (third - 1, third, len(blocks) // 2)
    )  # two kinds, where there are two
    layers = {
        name: LinearShape(layer.in_features, layer.out_features)
        for name, layer in model.diffusion_model.named_modules()
        if name.startswith(kept) and isinstance(layer, nn.Linear) and adapter.is_lora_target(name, "attention and mlp")
    }
    lora = LoraAdapters(layers, SETTINGS, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in lora.parameters():
            tensor.normal_(generator=generator)
    return lora


def block_of(name):
    """Return the block that a layer is in, in diffusers' words."""
    kind, number = re.match(r"(\w+)\.(\d+)\.", name).groups()
    return f"{LISTS.get(kind, kind)}.{number}"


def squares(changes):
    """Return block -> sum of the squares of all changed weights, from (layer, A, B); B A itself would be large."""
    found = {}
    for name, down, up in changes:
        down, up = down.double(), up.double()
        found[block_of(name)] = found.get(block_of(name), 0.0) + ((up.T @ up) * (down @ down.T)).sum().item()
    return found


def read_by_diffusers(tensors, loader, linear):
    """Return block -> squares of what diffusers reads of a file's tensors, or nothing if it reads nothing or fails.

    Layers that its model does not have, or has in another shape, count as failure; without ``linear`` any layers will do.
    """
    import diffusers.loaders.lora_pipeline

    mixin = getattr(diffusers.loaders.lora_pipeline, f"{loader}LoraLoaderMixin")
    try:
        state = mixin.lora_state_dict(dict(tensors))
    except (KeyError, ValueError, RuntimeError):  # what its conversions raise
        return {}
    names = [key.removesuffix(".lora_A.weight") for key in state if key.endswith(".lora_A.weight")]
    names = [name for name in names if name.startswith("transformer.")]  # others it passes over with a warning
    changes = [
        (name.removeprefix("transformer."), state[f"{name}.lora_A.weight"], state[f"{name}.lora_B.weight"])
        for name in names
    ]
    shapes = [(name, (up.shape[0], down.shape[1])) for name, down, up in changes]
    fits = linear is None or all(linear.get(name) == shape for name, shape in shapes)
    return squares(changes) if fits else {}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("family", IN_DIFFUSERS)
def test_diffusers_reads_what_the_document_says(family):
    """Read means: all of it, at the right blocks, in layers that diffusers' model has, with the scale."""
    import diffusers

    published, loader, transformer, settings = IN_DIFFUSERS[family]
    lora = lora_of(published)
    expected = squares((name, lora.down(name).detach(), 3.0 * lora.up(name).detach()) for name in lora.names)
    assert len(expected) == 3
    with torch.device("meta"):
        kind = "3DModel" if transformer == "Wan" else "2DModel"
        model = getattr(diffusers, f"{transformer}Transformer{kind}")(**settings)
    linear = {name: tuple(m.weight.shape) for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    found = {}
    for form in FORMS:
        tensors = to_file_tensors(lora.state_dict(), lora.scale, form)
        found[form] = read_by_diffusers(tensors, loader, linear) == pytest.approx(expected, rel=1e-4)
    said = said_of(family)
    assert [form for form in FORMS if said[form] and not found[form]] == []
    if diffusers.__version__ in read("docs/models.md"):  # a later one may read more
        assert found == said


def said_of(family):
    """Return form -> whether docs/models.md says that diffusers reads it."""
    table = rows(section(read("docs/models.md"), "Where the LoRA files load"))
    (row,) = [row for row in table if row[0] == family]
    assert set(row[1:]) <= {"yes", "no"}
    return {form: word == "yes" for form, word in zip(FORMS, row[1:], strict=True)}


@pytest.mark.parametrize("form", FORMS)
def test_diffusers_reads_no_lora_of_lumina_2_without_its_first_blocks(form):
    from ..tiny_families import FAMILIES

    tiny = next(tiny for tiny in FAMILIES if tiny.name == "lumina2")
    lora = tiny.lora(tiny.hosted(tiny.build()), tiny.chosen(1, 1), zero=False)
    tensors = to_file_tensors(lora.state_dict(), lora.scale, form)
    assert read_by_diffusers(tensors, "Lumina2", None) == {}
    assert said_of("Lumina 2")[form] is False
