"""Vectors of pictures from the host's own encoders, read from files by the host's loader: small, but of its classes."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
KINDS = {"clip_vision_model": "clip_vision_config_vitl.json", "dinov2": "image_encoders/dino2_large.json"}
PICTURES = [torch.rand(1, 40 + 8 * n, 56, 3, generator=torch.Generator().manual_seed(n)) for n in range(2)]


@pytest.fixture(params=KINDS)
def loaded(request, comfyui, tmp_path, monkeypatch, caplog):
    """The host's encoder as its CLIP Vision loader reads it: a file with all layers, in which only the width is small."""
    from comfy import clip_vision

    def narrow(file):
        config = json.load(file)
        return {**config, **SMALL, **({"projection_dim": 16} if "projection_dim" in config else {})}

    monkeypatch.setattr(clip_vision, "json", SimpleNamespace(load=narrow))
    model = clip_vision.ClipVisionModel(str(Path(clip_vision.__file__).parent / KINDS[request.param])).model
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    save_file(model.state_dict(), tmp_path / "encoder.safetensors")
    found = clip_vision.load(str(tmp_path / "encoder.safetensors"))
    assert "missing" not in caplog.text
    assert found.model_type == request.param
    return found


def test_the_vector_is_the_encoders_own_of_the_picture_as_the_host_prepares_it(loaded, monkeypatch):
    import comfy.clip_model
    from blockskip_pack.blockskip_core.hosts.sampling.likeness import Likeness
    from blockskip_pack.blockskip_core.hosts.sampling.picture_embeddings import embedded

    seen, model = [], loaded.model
    forward = model.forward
    monkeypatch.setattr(
        model,
        "forward",
        lambda pixel_values, **more: seen.append(pixel_values) or forward(pixel_values=pixel_values, **more),
    )
    with torch.inference_mode():
        (vector,) = embedded(loaded, PICTURES[0])
        prepared = comfy.clip_model.clip_preprocess(
            PICTURES[0], size=loaded.image_size, mean=loaded.image_mean, std=loaded.image_std, crop=True
        )
        tokens, _, pooled, _ = forward(pixel_values=prepared.float(), intermediate_output=-2)
    assert torch.equal(seen[0], prepared.float())
    assert torch.equal(vector, (pooled if loaded.model_type == "clip_vision_model" else tokens[:, 0])[0])
    itself, other = Likeness(loaded, PICTURES[:1], lambda *_: None).of([picture[0] for picture in PICTURES])
    assert itself == pytest.approx(1.0, abs=1e-12)
    assert -1.0 < other < 1.0 - 1e-6


def test_every_other_kind_of_the_host_is_refused_in_a_sentence(comfyui):
    from blockskip_pack.blockskip_core.hosts.sampling.likeness import Likeness
    from comfy import clip_vision

    others = set(clip_vision.IMAGE_ENCODERS) - set(KINDS)
    assert {"siglip_vision_model", "siglip2_vision_model"} <= others
    for kind in others:
        with pytest.raises(ValueError, match=f"`clip_vision` is a {kind}, for which ComfyUI gives no single vector"):
            Likeness(SimpleNamespace(model_type=kind, patcher=None), PICTURES, lambda *_: None)
