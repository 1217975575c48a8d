"""Counts against closed forms, torch's own counter, and a known sequence of allocations; real and on `meta`."""

from __future__ import annotations

import pytest
import torch
from blockskip_pack.blockskip_core.accounting.fused_kernels import FusedAttention
from blockskip_pack.blockskip_core.accounting.measuring import Counting
from blockskip_pack.blockskip_core.accounting.weightless import replaced, weightless_copy
from blockskip_pack.blockskip_core.adapters.lora import LinearShape, LoraAdapters, LoraSettings, plain_weight
from blockskip_pack.blockskip_core.blocks.saved_bytes import SavedBytes
from blockskip_pack.blockskip_core.blocks.stand_ins import TrainedBlock
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.flop_counter import FlopCounterMode

DEVICES = [torch.device("cpu"), torch.device("meta")]
MIB = 2**20


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_peak_of_a_known_sequence(device):
    with Counting() as counting:
        a = torch.zeros(MIB // 4, device=device)
        b = a + 1  # two
        c = b * 2  # three: the peak
        del b
        assert (counting.live(device), counting.peak(device)) == (2 * MIB, 3 * MIB)
        a.add_(c)  # in-place operations and views add nothing
        view = a.view(2, -1)[1:]
        del a, c
        assert counting.live(device) == MIB  # the view keeps all of it alive
        counting.reset_peak()
        assert counting.peak(device) == MIB
        del view
    assert (counting.live(device), counting.peak(device)) == (0, MIB)


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_what_was_there_counts_only_if_it_is_held(device):
    before = torch.zeros(MIB // 4, device=device)
    with Counting() as counting:
        before.view(-1).add_(1)
        assert counting.live(device) == 0
        counting.hold([before, {"again": before[:3]}])
        assert counting.live(device) == MIB
        del before
        assert counting.live(device) == 0


def test_of_a_tensor_around_others_those_count():
    part = torch.zeros(MIB // 4)
    pair = TwoTensor(part, part.clone())  # looks like one float32 tensor of 1 MiB
    with Counting() as counting:
        counting.hold(pair)
        assert counting.live(part.device) == 2 * MIB
        twice = pair + pair
        assert counting.live(part.device) == 4 * MIB
        del pair, part, twice
        assert counting.live(torch.device("cpu")) == 0


def test_the_cpu_beside_meta_is_counted_apart():
    meta, cpu = torch.device("meta"), torch.device("cpu")
    with Counting() as counting:
        there = torch.zeros(MIB, device=meta)
        here = there.to(torch.float64).to("cpu")
        assert not here.any()
        assert (counting.live(cpu), counting.live(meta)) == (8 * MIB, 4 * MIB)
        assert counting.peak(meta) == 12 * MIB


def test_numbers_asked_of_meta_are_one():
    x = torch.zeros(3, device="meta")
    with Counting():
        assert x.sum().item() == 1.0
        assert x.any()
        assert torch.isfinite(x).all()
    with pytest.raises(RuntimeError, match="meta"):
        x.sum().item()


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_a_multiply_add_is_two_operations_forward_and_twice_that_backward(device):
    x = torch.zeros(5, 7, device=device, requires_grad=True)
    weight = torch.zeros(7, 11, device=device, requires_grad=True)
    with Counting() as counting:
        y = x @ weight
        assert counting.operations == 2 * 5 * 7 * 11
        y.sum().backward()
    assert counting.operations == 3 * 2 * 5 * 7 * 11


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_attention_is_two_products_forward_and_five_backward(device):
    q, k, v = (torch.zeros(2, 3, n, 8, device=device, requires_grad=True) for n in (10, 12, 12))
    product = 2 * 2 * 3 * 10 * 12 * 8
    with Counting() as counting:
        with FusedAttention():
            y = scaled_dot_product_attention(q, k, v)
        assert counting.operations == 2 * product
        y.sum().backward()
    assert counting.operations == 7 * product


def test_attention_on_meta_has_no_matrix_of_scores():
    q = torch.zeros(1, 1, 1000, 8, device="meta", requires_grad=True)
    with Counting() as counting, FusedAttention():
        scaled_dot_product_attention(q, q, q)
    assert counting.peak(q.device) == 1000 * 8 * 4 + 1000 * 4  # the output, and one number per row
    with Counting() as counting:
        scaled_dot_product_attention(q, q, q)
    assert counting.peak(q.device) > 1000 * 1000 * 4


def test_grouped_heads_attend_as_repeated_ones():
    q, k = torch.zeros(1, 4, 6, 8, device="meta"), torch.zeros(1, 2, 6, 8, device="meta")
    with FusedAttention():
        grouped = scaled_dot_product_attention(q, k, k, enable_gqa=True)
    assert grouped.shape == (1, 4, 6, 8)


def test_operations_are_those_of_torchs_own_counter():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 5))
    picture = torch.zeros(2, 3, 4, 4, requires_grad=True)
    with FlopCounterMode(display=False) as torchs:
        net(picture).sum().backward()
    with Counting() as counting:
        net(picture).sum().backward()
    assert counting.operations == torchs.get_total_flops() > 0
    with torch.inference_mode(), Counting() as counting:  # composite operations are not decomposed there
        net[2](torch.zeros(2, 16))
    assert counting.operations == 2 * 2 * 16 * 5


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_lora_layer_saves_its_input_and_fetches_its_weight(device, checkpointed):
    """Saved: x, A x and the scaled B. Operations: the layer's product forward and for dx, the LoRA's three times.

    A recomputation ends once everything that was saved exists again: before the product with B.
    """
    tokens, inputs, outputs, rank = 6, 32, 48, 2
    block = TrainedBlock(nn.Sequential(nn.Linear(inputs, outputs, device=device)), checkpointed=checkpointed)
    with device:
        adapters = LoraAdapters({"0": LinearShape(inputs, outputs)}, LoraSettings(rank=rank), seed=0)
    x = torch.zeros(1, tokens, inputs, device=device, requires_grad=True)
    saved = SavedBytes()
    block.saved = saved

    def pack(tensor):
        saved.add(tensor)
        return tensor

    with Counting() as counting, adapters.attached({"0": block.get_submodule("0")}, plain_weight):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = block(x)
        forward = 2 * tokens * inputs * outputs + 2 * tokens * rank * (inputs + outputs)
        assert counting.operations == forward
        y.sum().backward()
    backward = 2 * tokens * inputs * outputs + 4 * tokens * rank * (inputs + outputs)
    again = (forward - 2 * tokens * rank * outputs) * checkpointed
    assert counting.operations == forward + again + backward
    inside = 4 * tokens * rank + 4 * outputs * rank
    assert saved.total == 4 * tokens * inputs + inside * (not checkpointed)


def test_saved_bytes_on_meta_are_not_mistaken_for_one_another():
    saved = SavedBytes()
    a, b = torch.zeros(3, device="meta"), torch.zeros(4, device="meta")
    for tensor in (a, b, a[1:], nn.Parameter(torch.zeros(9, device="meta"))):
        saved.add(tensor)
    assert saved.total == 7 * 4


class Tied(nn.Module):
    """A shared parameter, a buffer, a table that is neither, and a quantised weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(3, 4)
        self.b.weight = self.a.weight
        self.register_buffer("counts", torch.zeros(5, dtype=torch.int64))
        self.table = torch.zeros(2, 2)
        self.mark, self.functions = object(), [print]

    def forward(self, x):
        return self.a(x) + self.b(x) + self.table.sum()


def test_a_weightless_copy_has_shapes_and_shares_what_was_shared():
    original = Tied()
    twin = weightless_copy(original, without={"mark": None, "functions": []})
    assert twin.state_dict().keys() == original.state_dict().keys()
    for name, tensor in twin.state_dict().items():
        assert tensor.is_meta
        assert (tensor.shape, tensor.dtype) == (original.state_dict()[name].shape, original.state_dict()[name].dtype)
    assert twin.a.weight is twin.b.weight
    assert twin(torch.zeros(2, 3, device="meta")).shape == (2, 4)
    assert not hasattr(twin, "mark")
    assert (twin.functions, original.functions) == ([], [print])
    assert not any(tensor.is_meta for tensor in (*original.parameters(), *original.buffers(), original.table))


def test_quantised_weights_become_packed_ones():
    class Packed(torch.Tensor):
        """Bytes that present themselves as a matrix."""

        @property
        def shape(self):
            return torch.Size((4, 3))

    layer = nn.Linear(3, 4, bias=False)
    packed = torch.zeros(2, 7, dtype=torch.uint8).as_subclass(Packed)
    layer.weight = nn.Parameter(packed, requires_grad=False)
    weight = weightless_copy(layer).weight
    assert (weight.shape, weight.dtype, weight.is_meta) == ((4, 3), torch.float8_e4m3fn, True)


def test_numbers_in_another_class_stay_numbers():
    """Some file formats store small tensors like this; computations with them are not eight-bit."""

    class Dressed(torch.Tensor):
        pass

    layer = nn.Linear(3, 4, bias=False)
    layer.weight = nn.Parameter(torch.zeros(4, 3).as_subclass(Dressed), requires_grad=False)
    weight = weightless_copy(layer).weight
    assert (weight.shape, weight.dtype, weight.is_meta) == ((4, 3), torch.float32, True)
    assert type(weight) is nn.Parameter


def test_replaced_modules_are_seen_in_the_copy_only():
    tree = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]), "head": nn.Linear(2, 2)})
    first, head = tree["blocks"][0], tree["head"]
    stand_in = nn.Identity()
    twin = replaced(tree, {"blocks.0": stand_in, "head": nn.Identity()})
    assert twin["blocks"][0] is stand_in
    assert isinstance(twin["head"], nn.Identity)
    assert twin["blocks"][1] is tree["blocks"][1]
    assert (tree["blocks"][0], tree["head"]) == (first, head)
