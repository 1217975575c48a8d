"""What the diffusers host refuses, with one sentence each."""

from __future__ import annotations

import json

import pytest
import torch
from blockskip_pack.blockskip_core.errors import InvalidInputError, UnsupportedModelError
from blockskip_pack.blockskip_core.hosts import diffusers as host
from torch import nn

from .tiny_models import FLUX, QWEN_IMAGE, SANA, WAN
from .tiny_pipelines import build


def refused(model, message, tiny=FLUX, error=UnsupportedModelError):
    with pytest.raises(error, match=message):
        host.DiffusersDit(model, tiny.captions())


# --- models ------------------------------------------------------------------------------------------------------


def test_an_unknown_class():
    message = "Expected a transformer of one of diffusers' classes FluxTransformer2DModel, .* got Linear"
    refused(nn.Linear(2, 2), message)


@pytest.mark.parametrize(
    ("tiny", "settings"),
    [
        (FLUX, {"out_channels": 8}), (QWEN_IMAGE, {"use_additional_t_cond": True}), (SANA, {"guidance_embeds": True}),
        (WAN, {"in_channels": 8}),
    ],
    ids=["filling in", "layers", "distilled", "pictures"],
)  # fmt: skip
def test_a_variant_that_takes_more_than_a_text(tiny, settings):
    refused(tiny.build(**settings), "This .* takes more than a text, or is distilled", tiny)


class Packed(nn.Linear):
    """A layer whose weight is packed."""

    def __init__(self, layer):
        super().__init__(layer.in_features, layer.out_features)
        self.weight = nn.Parameter(torch.zeros(10, dtype=torch.uint8), requires_grad=False)


@pytest.mark.parametrize("kind", ["packed", "fp8"])
def test_quantised_weights(kind):
    model = FLUX.build()
    attention = model.transformer_blocks[1].attn
    if kind == "packed":
        attention.to_q = Packed(attention.to_q)
    else:
        attention.to_q.weight = nn.Parameter(attention.to_q.weight.to(torch.float8_e4m3fn), requires_grad=False)
    refused(model, r"The weight of transformer_blocks.1.attn.to_q \(.*\) is quantised, so no gradient can pass")


def test_a_loaded_lora():
    import peft

    model = FLUX.build()
    earlier = host.DiffusersDit(model, FLUX.captions())
    model.add_adapter(peft.LoraConfig(target_modules=["to_q"]))
    refused(model, "A LoRA is loaded into this transformer")
    with pytest.raises(UnsupportedModelError, match="A LoRA is loaded into this transformer"), earlier.running({}):
        pass


def test_fused_projections():
    model = FLUX.build()
    model.fuse_qkv_projections()
    refused(model, "The projections of transformer_blocks.0.attn are fused")
    model.unfuse_qkv_projections()
    host.DiffusersDit(model, FLUX.captions())


def test_offloading_and_caches():
    from accelerate.hooks import ModelHook, add_hook_to_module
    from diffusers import FirstBlockCacheConfig

    offloaded = FLUX.build()
    add_hook_to_module(offloaded, ModelHook())
    refused(offloaded, "The transformer has a hook of accelerate or diffusers")
    cached = FLUX.build()
    cached.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    refused(cached, "transformer_blocks.0 has a hook of accelerate or diffusers")
    cached.disable_cache()
    host.DiffusersDit(cached, FLUX.captions())


def test_blocks_that_exchange_more_than_tokens(monkeypatch):
    model, kept = FLUX.build(), []
    for index, block in enumerate(model.single_transformer_blocks):
        block.place = index  # copies have it too
    kind = type(model.single_transformer_blocks[0])
    plain = kind.forward

    def connected(self, *args, **kwargs):
        text, image = plain(self, *args, **kwargs)
        if self.place == 0:
            kept[:] = [image]
        return text, image + kept.pop() if self.place == 2 and kept else image

    whole = type(model).forward

    def forward(self, *args, **kwargs):
        kept.clear()
        return whole(self, *args, **kwargs)

    monkeypatch.setattr(kind, "forward", connected)
    monkeypatch.setattr(type(model), "forward", forward)
    refused(model, "FLUX.1: with its blocks replayed the model computes something else than whole")


# --- captions ----------------------------------------------------------------------------------------------------


def test_no_captions():
    with pytest.raises(InvalidInputError, match="No caption came in"):
        host.DiffusersDit(FLUX.build(), [])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda text: text.pop("encoder_hidden_states"),
            "Caption 1 must have `encoder_hidden_states` and batch axis 1",
        ),
        (lambda text: text.update(pooled_projections=torch.ones(2, 12)), "Caption 1 must have .* got .*\\(2, 12\\)"),
        (lambda text: text["pooled_projections"].fill_(torch.nan), "Caption 1 contains NaN or Inf"),
        (
            lambda text: text.update(encoder_hidden_states=torch.ones(1, 5, 7)),
            "FLUX.1 could not be run with these captions",
        ),
        (lambda text: text.pop("pooled_projections"), "could not be run with these captions .KeyError"),
    ],
    ids=["no tokens", "two rows", "not finite", "another width", "no pooled"],
)
def test_captions_that_do_not_fit(change, message):
    (text,) = FLUX.captions([5])
    change(text)
    with pytest.raises(InvalidInputError, match=message):
        host.DiffusersDit(FLUX.build(), [text])


def test_a_later_caption_of_another_kind():
    model, (first, second) = FLUX.build(), FLUX.captions([5, 3])
    host.DiffusersDit(model, [first, {**second, "guidance": torch.ones(1)}])
    for captions in (
        [first, {**second, "pooled_projections": torch.ones(1, 13)}],
        [{"encoder_hidden_states": torch.ones(1, 2, 20)}],
    ):
        with pytest.raises(InvalidInputError, match="Caption . has the widths .* FLUX.1 was run with .* Encode all"):
            host.DiffusersDit(model, captions)


def test_captions_of_one_batch_with_different_arguments():
    first, second = FLUX.captions([5, 5])
    dit = host.DiffusersDit(FLUX.build(), [first, {**second, "guidance": torch.ones(1)}])
    with dit.running({}) as denoise, pytest.raises(InvalidInputError, match="Two captions of one batch"):
        denoise(torch.zeros(2, *FLUX.latent_shape), torch.ones(2), [0, 1])


# --- folders -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    build("flux").save_pretrained(folder)
    return folder


def changed_index(saved, folder, **changes):
    """The folder with another index; its components are links."""
    for part in saved.iterdir():
        if part.is_dir():
            (folder / part.name).symlink_to(part, target_is_directory=True)
    index = json.loads((saved / "model_index.json").read_text(encoding="utf-8"))
    (folder / "model_index.json").write_text(json.dumps({**index, **changes}), encoding="utf-8")
    return folder


def test_a_saved_pipeline_is_loaded_in_the_wanted_dtype(saved):
    stored, reduced = host.load_pipeline(saved), host.load_pipeline(str(saved), dtype=torch.bfloat16)
    expected = build("flux").transformer.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in stored.transformer.state_dict().items())
    assert (stored.transformer.dtype, reduced.transformer.dtype, reduced.vae.dtype) == (
        torch.float32, torch.bfloat16, torch.bfloat16
    )  # fmt: skip


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_a_folder_without_a_pipeline(tmp_path, content):
    if content is not None:
        (tmp_path / "model_index.json").write_text(content, encoding="utf-8")
    with pytest.raises((InvalidInputError, UnsupportedModelError), match="model_index.json cannot be read|got None"):
        host.load_pipeline(tmp_path)


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", ["code", "FluxPipeline"]], ids=["known", "code"])
def test_a_pipeline_of_another_kind(saved, tmp_path, name):
    with pytest.raises(UnsupportedModelError, match="Expected one of diffusers' pipelines FluxPipeline, "):
        host.load_pipeline(changed_index(saved, tmp_path, _class_name=name))


def test_code_from_the_folder(saved, tmp_path):
    (tmp_path / "vae.py").write_text("raise SystemExit('this code has run')", encoding="utf-8")
    folder = changed_index(saved, tmp_path, vae=["vae", "Autoencoder"])
    with pytest.raises(UnsupportedModelError, match="vae of .* needs code from vae, and only classes of diffusers and"):
        host.load_pipeline(folder)


def test_weights_that_are_not_safetensors(saved, tmp_path):
    folder = changed_index(saved, tmp_path)
    (folder / "transformer").unlink()
    (folder / "transformer").mkdir()
    (folder / "transformer" / "diffusion_pytorch_model.bin").write_bytes(b"code")
    with pytest.raises(
        InvalidInputError, match="transformer has no safetensors file, and other formats can carry code"
    ):
        host.load_pipeline(folder)


@pytest.fixture
def in_parts(tmp_path):
    """A pipeline whose transformer and text encoder are in several files."""
    pipeline = build("flux")
    pipeline.save_pretrained(tmp_path / "tiny", max_shard_size="5KB")
    return tmp_path / "tiny"


TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors.index.json"
TEXT_ENCODER = "text_encoder/model.safetensors.index.json"


def test_a_pipeline_in_parts_is_loaded(in_parts):
    assert (in_parts / TRANSFORMER).exists()
    assert (in_parts / TEXT_ENCODER).exists()
    loaded, expected = host.load_pipeline(in_parts), build("flux").transformer.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.transformer.state_dict().items())


@pytest.mark.parametrize("index", [TRANSFORMER, TEXT_ENCODER])
@pytest.mark.parametrize(
    "part",
    ["x.bin", "../x.safetensors", "/x.safetensors", "..\\x.safetensors", "c:x.safetensors", 3, "x.safetensors.bin"],
)
def test_an_index_that_names_something_else(in_parts, monkeypatch, index, part):
    monkeypatch.setattr(torch, "load", lambda *_args, **_settings: pytest.fail("torch.load was called"))
    content = json.loads((in_parts / index).read_text(encoding="utf-8"))
    content["weight_map"][next(iter(content["weight_map"]))] = part
    (in_parts / index).write_text(json.dumps(content), encoding="utf-8")
    loads = [host.load_pipeline, *([host.load_transformer] if index == TRANSFORMER else [])]
    for load in loads:
        with pytest.raises(InvalidInputError, match="index.json must name safetensors files beside it, got"):
            load(in_parts)


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": []}'])
def test_a_damaged_index(in_parts, content):
    (in_parts / TRANSFORMER).write_text(content, encoding="utf-8")
    with pytest.raises(
        InvalidInputError, match="index.json (cannot be read|must name safetensors files beside it, got None)"
    ):
        host.load_transformer(in_parts)


def test_an_adapter_that_names_its_base(in_parts):
    (in_parts / "text_encoder" / "adapter_config.json").write_text(
        '{"base_model_name_or_path": "/x"}', encoding="utf-8"
    )
    with pytest.raises(UnsupportedModelError, match="text_encoder has an adapter .* may name files elsewhere"):
        host.load_pipeline(in_parts)
