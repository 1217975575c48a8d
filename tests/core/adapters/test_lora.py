"""Adapters: their arithmetic, their gradients, their names and their files."""

import peft
import pytest
import torch
from blockskip_pack.blockskip_core.adapters.lora import LinearShape, LoraAdapters, LoraSettings, plain_weight
from blockskip_pack.blockskip_core.errors import InvalidInputError
from torch import nn

LAYERS = {"blocks.0.attn.qkv": LinearShape(6, 15), "blocks.0.mlp": LinearShape(6, 4), "blocks.1.mlp": LinearShape(6, 4)}
RANK, ALPHA = 3, 4.5
SCALE = ALPHA / RANK


def adapters(*, seed=0, dtype=torch.float64, zero=False):
    made = LoraAdapters(LAYERS, LoraSettings(rank=RANK, alpha=ALPHA), seed=seed, dtype=dtype)
    if not zero:
        for name in made.names:
            made.up(name).data.normal_(generator=torch.Generator().manual_seed(len(name)))
    return made


def layers(dtype=torch.float64):
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return {
            name: nn.Linear(s.in_features, s.out_features).to(dtype).requires_grad_(False) for name, s in LAYERS.items()
        }


def tokens(dtype=torch.float64):
    return torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(3), dtype=dtype)


def test_an_attached_layer_adds_the_low_rank_product():
    modules, lora, x = layers(), adapters(), tokens()
    with lora.attached(modules, plain_weight):
        for name, module in modules.items():
            expected = x @ (module.weight + SCALE * lora.up(name) @ lora.down(name)).mT + module.bias
            torch.testing.assert_close(module(x), expected, atol=1e-12, rtol=0.0)


def test_a_fresh_lora_changes_nothing_to_the_last_bit():
    modules, lora, x = layers(), adapters(zero=True), tokens()
    plain = {name: module(x) for name, module in modules.items()}
    with lora.attached(modules, plain_weight):
        for name, module in modules.items():
            assert torch.equal(module(x), plain[name])


def test_every_gradient_is_that_of_the_merged_layer():
    modules, lora = layers(), adapters()
    for name, module in modules.items():
        x = tokens().requires_grad_()
        down, up = (p.detach().clone().requires_grad_() for p in (lora.down(name), lora.up(name)))
        merged = torch.sin(x) @ (module.weight + SCALE * up @ down).mT + module.bias
        expected = torch.autograd.grad(merged.pow(3).sum(), (x, down, up))
        with lora.attached(modules, plain_weight):
            output = module(torch.sin(x))
        got = torch.autograd.grad(output.pow(3).sum(), (x, lora.down(name), lora.up(name)))
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-12)


def test_a_layer_called_twice_and_inside_itself_keeps_its_calls_apart():
    modules, lora = layers(), adapters()
    name = "blocks.0.mlp"
    square = nn.Linear(6, 6, bias=False, dtype=torch.float64).requires_grad_(False)
    lora_square = LoraAdapters({"x": LinearShape(6, 6)}, LoraSettings(rank=2, alpha=2.0), seed=1, dtype=torch.float64)
    lora_square.up("x").data.normal_(generator=torch.Generator().manual_seed(9))
    x = tokens().requires_grad_()
    with lora.attached(modules, plain_weight), lora_square.attached({"x": square}, plain_weight):
        got = torch.autograd.grad(modules[name](square(square(x))).square().sum(), x)[0]
    inner = square.weight + lora_square.up("x") @ lora_square.down("x")
    outer = modules[name].weight + SCALE * lora.up(name) @ lora.down(name)
    expected = torch.autograd.grad((x @ inner.mT @ inner.mT @ outer.mT + modules[name].bias).square().sum(), x)[0]
    torch.testing.assert_close(got, expected, atol=1e-10, rtol=1e-12)


def test_the_weight_is_lent_once_per_backward_and_not_saved_by_the_forward():
    modules, lora = layers(), adapters()
    lent, saved = [], []

    def lend(module, like):
        lent.append((module, like.shape))
        return plain_weight(module, like)

    name = "blocks.0.attn.qkv"
    x = tokens().requires_grad_()
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t.data_ptr()), t)[1], lambda t: t)
    with lora.attached(modules, lend), hooks:
        output = modules[name](x)
    assert lent == []
    assert modules[name].weight.data_ptr() not in saved
    output.sum().backward()
    assert lent == [(modules[name], (2, 5, 15))]


def test_without_gradients_nothing_is_lent_and_values_are_the_same():
    modules, lora, x = layers(), adapters(), tokens().requires_grad_()
    with lora.attached(modules, plain_weight):
        expected = modules["blocks.0.mlp"](x)
    with lora.attached(modules, lambda *_: pytest.fail("lent")), torch.no_grad():
        assert torch.equal(modules["blocks.0.mlp"](x), expected)


def test_the_product_is_computed_in_the_dtype_of_the_tokens():
    modules, lora = layers(torch.bfloat16), adapters(dtype=torch.float32)
    with lora.attached(modules, plain_weight):
        output = modules["blocks.0.mlp"](tokens(torch.bfloat16))
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    assert lora.up("blocks.0.mlp").grad.dtype == torch.float32


def hooks_of(modules):
    return [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in modules.values()]


@pytest.mark.parametrize("problem", [None, ValueError, KeyboardInterrupt])
def test_hooks_are_gone_however_the_context_ends(problem):
    modules, lora = layers(), adapters()
    try:
        with lora.attached(modules, plain_weight):
            assert hooks_of(modules) == [(2, 1, 0)] * 3
            if problem:
                raise problem
    except (ValueError, KeyboardInterrupt):
        pass
    assert hooks_of(modules) == [(0, 0, 0)] * 3


def test_hooks_are_gone_if_a_layer_is_missing():
    modules, lora = layers(), adapters()
    partial = dict(list(modules.items())[:2])
    with pytest.raises(KeyError), lora.attached(partial, plain_weight):
        pass
    assert hooks_of(modules) == [(0, 0, 0)] * 3


def test_the_seed_decides_the_tensors_and_the_global_random_state_is_untouched():
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    first = adapters(zero=True).state_dict()
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(6)
    second, other = adapters(zero=True).state_dict(), adapters(zero=True, seed=1).state_dict()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name])
        assert name.endswith("lora_B.weight") == torch.equal(tensor, other[name])


def test_initialisation_is_pefts():
    """A: Kaiming uniform with a = sqrt 5, so within 1 / sqrt(in); B: zero."""
    lora = LoraAdapters({"x": LinearShape(64, 70)}, LoraSettings(rank=50, alpha=1.0), seed=0)
    down = lora.down("x")
    assert down.shape == (50, 64)
    assert lora.up("x").shape == (70, 50)
    assert 0.95 / 8 < down.abs().max() <= 1 / 8
    assert down.std().item() == pytest.approx(1 / 8 / 3**0.5, rel=0.05)
    assert not lora.up("x").any()
    assert down.dtype == torch.float32


def test_names_and_config_are_those_that_peft_writes_for_the_real_layers():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            for name, module in layers().items():
                parent = self
                *path, leaf = name.split(".")
                for part in path:
                    if part not in parent._modules:
                        parent.add_module(part, nn.Module())
                    parent = parent._modules[part]
                parent.add_module(leaf, module)

    lora = adapters()
    model = Model()
    peft.inject_adapter_in_model(lora.config, model)
    expected = peft.get_peft_model_state_dict(model)
    assert {k: v.shape for k, v in lora.state_dict().items()} == {k: v.shape for k, v in expected.items()}
    assert peft.set_peft_model_state_dict(model, lora.state_dict()).unexpected_keys == []
    x = tokens()
    with lora.attached(plain := layers(), plain_weight):
        wanted = plain["blocks.0.attn.qkv"](x)
    torch.testing.assert_close(model.get_submodule("blocks.0.attn.qkv")(x), wanted, atol=1e-12, rtol=0.0)


def test_the_state_dict_is_a_copy():
    lora = adapters()
    state = lora.state_dict()
    kept = {name: tensor.clone() for name, tensor in state.items()}
    for parameter in lora.parameters():
        parameter.data.add_(1.0)
    assert all(torch.equal(state[name], kept[name]) for name in kept)


def test_parameters_are_a_before_b_layer_by_layer_and_stay_the_same_objects():
    lora = adapters()
    before = lora.parameters()
    lora.to(torch.device("cpu"))
    assert [id(p) for p in lora.parameters()] == [id(p) for p in before]
    assert [tuple(p.shape) for p in before] == [(3, 6), (15, 3), (3, 6), (4, 3), (3, 6), (4, 3)]
    assert all(p.requires_grad for p in before)


def test_the_skeleton_takes_no_memory_for_the_weights():
    lora = LoraAdapters({"x": LinearShape(10**6, 10**6)}, LoraSettings(rank=1, alpha=1.0), seed=0)
    assert sum(p.numel() for p in lora.parameters()) == 2 * 10**6


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"alpha": 0.0}, "alpha must be positive"),
        ({"alpha": float("nan")}, "alpha must be positive"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(InvalidInputError, match=message):
        LoraSettings(**settings)


def test_a_lora_without_layers_is_refused():
    with pytest.raises(InvalidInputError, match="No linear layer is left for the LoRA"):
        LoraAdapters({}, LoraSettings(), seed=0)


def test_no_weight_is_saved_for_backward_with_or_without_an_adapter():
    """A host may provide a weight only temporarily, so autograd must not keep it."""
    modules, lora = layers(), adapters()
    bare = torch.nn.Linear(6, 6, bias=False).double()
    weights = {module.weight.data_ptr() for module in modules.values()} | {bare.weight.data_ptr()}
    saved: list[int] = []

    def pack(tensor):
        saved.append(tensor.data_ptr())
        return tensor

    x = torch.randn(2, next(iter(modules.values())).in_features, dtype=torch.float64, requires_grad=True)
    y = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    with (
        lora.attached({**modules, "bare": bare}, plain_weight),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        out = bare(y)
        next(iter(modules.values()))(x)
    assert not weights & set(saved)
    out.sum().backward()
    torch.testing.assert_close(y.grad, bare.weight.sum(0).expand_as(y), rtol=0, atol=1e-12)


def test_a_layer_gets_no_higher_rank_than_its_smaller_side_and_the_same_scale():
    shapes = {"a.wide": LinearShape(20, 30), "a.narrow": LinearShape(20, 5), "b.narrow": LinearShape(3, 30)}
    lora = LoraAdapters(shapes, LoraSettings(rank=8, alpha=4.0), seed=0)
    assert {name: lora.rank_of(name) for name in shapes} == {"a.wide": 8, "a.narrow": 5, "b.narrow": 3}
    assert {name: tuple(lora.down(name).shape) for name in shapes} == {
        "a.wide": (8, 20), "a.narrow": (5, 20), "b.narrow": (3, 3),
    }  # fmt: skip
    assert {name: tuple(lora.up(name).shape) for name in shapes} == {
        "a.wide": (30, 8), "a.narrow": (5, 5), "b.narrow": (30, 3),
    }  # fmt: skip
    assert {module.scaling["default"] for module in lora._layers.values()} == {lora.scale} == {0.5}
    assert lora.narrow_layers == {"a.narrow": 5, "b.narrow": 3}
    assert LoraAdapters(shapes, LoraSettings(rank=3), seed=0).narrow_layers == {}
