"""LoRA tensors in files."""

import torch
from blockskip_pack.blockskip_core.adapters.lora_formats import LayerPart, to_file_tensors, to_host_lora

from .test_lora import LAYERS, SCALE, adapters


def delta_of_the_host(tensors, up, down, alpha):
    """ComfyUI's rule: up @ down * alpha / rank, with alpha = rank if the file has none."""
    rank = tensors[down].shape[0]
    return tensors[up] @ tensors[down] * (tensors[alpha].item() / rank if alpha in tensors else 1.0)


def test_every_written_form_is_the_same_change_of_the_weights():
    lora = adapters()
    state = lora.state_dict()
    host = to_host_lora(state, lora.scale)
    kohya = to_file_tensors(state, lora.scale, "kohya")
    native = to_file_tensors(state, lora.scale, "peft")
    for name in LAYERS:
        expected = SCALE * lora.up(name).detach() @ lora.down(name).detach()
        d, k = f"diffusion_model.{name}", "lora_unet_" + name.replace(".", "_")
        deltas = [
            delta_of_the_host(host, f"{d}.lora_up.weight", f"{d}.lora_down.weight", f"{d}.alpha"),
            delta_of_the_host(kohya, f"{k}.lora_up.weight", f"{k}.lora_down.weight", f"{k}.alpha"),
            delta_of_the_host(native, f"{d}.lora_B.weight", f"{d}.lora_A.weight", f"{d}.alpha"),
        ]
        for delta in deltas:
            torch.testing.assert_close(delta, expected, atol=1e-12, rtol=0.0)
        assert host[f"{d}.alpha"].item() == 1.0  # ComfyUI's "existing LoRA" input assumes 1
    assert len(host) == len(kohya) == 3 * len(LAYERS)
    assert len(native) == 2 * len(LAYERS)


def test_written_tensors_share_no_memory_with_the_training():
    lora = adapters()
    for tensors in (lora.state_dict(), to_host_lora(lora.state_dict(), 1.0)):
        pointers = {tensor.data_ptr() for tensor in tensors.values()}
        assert pointers.isdisjoint(p.data_ptr() for p in lora.parameters())


def test_parts_of_a_layer_that_diffusers_has_are_its_rows():
    lora = adapters()
    state = lora.state_dict()
    parts = {name: [LayerPart(f"{name}.a", 0, 3), LayerPart(f"{name}.b", 3, len(lora.up(name)) - 3)] for name in LAYERS}
    tensors = to_file_tensors(state, lora.scale, "diffusers", parts)
    assert len(tensors) == 4 * len(LAYERS)
    for name in LAYERS:
        a, b = f"transformer.{name}.a", f"transformer.{name}.b"
        deltas = [tensors[f"{stem}.lora_B.weight"] @ tensors[f"{stem}.lora_A.weight"] for stem in (a, b)]
        expected = SCALE * lora.up(name).detach() @ lora.down(name).detach()
        torch.testing.assert_close(torch.cat(deltas), expected, atol=1e-12, rtol=0.0)
    pointers = [tensor.untyped_storage().data_ptr() for tensor in tensors.values()]
    assert len(set(pointers)) == len(pointers), "safetensors refuses tensors that share memory"


def test_without_other_names_the_format_of_diffusers_has_the_hosts_names():
    state = adapters().state_dict()
    assert to_file_tensors(state, 1.0, "diffusers").keys() == to_file_tensors(state, 1.0, "peft").keys()
