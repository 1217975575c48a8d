"""Copies that share weights."""

import torch
from blockskip_pack.blockskip_core.blocks.weight_sharing import frozen_copy, weight_sharing_copy
from torch import nn


def test_a_copy_shares_memory_and_nothing_else():
    original = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    twin = weight_sharing_copy(original)
    assert list(twin.state_dict()) == list(original.state_dict())
    for name, tensor in original.state_dict().items():
        assert twin.state_dict()[name].data_ptr() == tensor.data_ptr()
    twin[0].register_forward_hook(lambda *_: None)
    twin[0].mark = 1
    twin[0].weight = nn.Parameter(torch.zeros(4, 3))
    assert not original[0]._forward_hooks
    assert not hasattr(original[0], "mark")
    assert original[0].weight.any()


def test_a_copy_keeps_the_strides_and_the_offset_of_a_view():
    original = nn.Linear(3, 4)
    original.weight = nn.Parameter(torch.arange(100.0)[10:90].view(8, 10)[::2, 1:7:2])
    twin = weight_sharing_copy(original)
    assert torch.equal(twin.weight, original.weight)
    assert twin.weight.data_ptr() == original.weight.data_ptr()


class Marked(nn.Parameter):
    """A parameter of another class whose shape is larger than its storage, as with packed weights."""

    @property
    def shape(self):
        return torch.Size((4, 6))


class Dressed(nn.Parameter):
    """Plain numbers in another class, as some files store small tensors."""


def test_plain_numbers_in_another_class_become_an_ordinary_tensor_over_the_same_memory():
    original = nn.Linear(3, 4)
    original.weight = Dressed(torch.randn(4, 3))
    twin = weight_sharing_copy(original).weight
    assert type(twin) is nn.Parameter
    assert twin.data_ptr() == original.weight.data_ptr()
    assert type(original.weight) is Dressed


def test_a_frozen_copy_runs_without_gradients_also_over_weights_that_are_kept_as_they_are():
    original = nn.Linear(3, 4)
    original.weight = Marked(torch.randn(4, 3))
    x = torch.randn(2, 3, requires_grad=True)
    frozen = frozen_copy(original)
    assert frozen.weight is original.weight
    assert torch.equal(frozen(x), original(x))
    assert not frozen(x).requires_grad
    assert original(x).requires_grad


def test_a_frozen_copy_can_be_marked_and_unmarked_where_a_host_finds_it():
    """Hosts set an attribute on the layer at a path, read it in that layer's forward, and delete it again."""

    class Layer(nn.Linear):
        factor = 1.0

        def forward(self, x):
            return super().forward(x) * self.factor

    original = Layer(3, 4)
    frozen, x = frozen_copy(original), torch.randn(2, 3)
    frozen.factor = 2.0
    assert torch.equal(frozen(x), 2.0 * original(x))
    del frozen.factor
    assert torch.equal(frozen(x), original(x))


class Doubling(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def put_back_on_itself(layer):
    """A host that replaces a method by another function and restores it leaves the method behind as an attribute."""
    layer.forward = layer.forward
    assert "forward" in layer.__dict__
    return layer


def test_a_method_that_was_put_back_on_the_original_is_the_copy_s_own():
    original = nn.Sequential(put_back_on_itself(Doubling(3, 4)))
    twin = weight_sharing_copy(original)
    twin[0].weight = nn.Parameter(torch.zeros(4, 3))
    twin[0].bias = nn.Parameter(torch.ones(4))
    x = torch.randn(2, 3)
    assert torch.equal(twin(x), torch.full((2, 4), 2.0))
    assert torch.equal(original(x), 2 * nn.functional.linear(x, original[0].weight, original[0].bias))
