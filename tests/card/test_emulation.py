"""The emulated card itself: its memory, what it refuses, its thread, its streams, its pages."""

from __future__ import annotations

import threading

import pytest
import torch
from torch.nn import functional

from ..device import devtools

pytestmark = pytest.mark.emulated
MIB = 2**20
BLOCK = 1000  # bytes


def on_card(*shape, dtype=torch.float32):
    return torch.ones(*shape, dtype=dtype, device="cuda")


# --- memory


def test_bytes_are_counted_from_the_making_of_a_storage_to_its_end(card):
    before = card.memory.used
    one = on_card(10, 25)
    view = one.T[3:]
    assert card.memory.used - before == one.nbytes
    del one
    assert card.memory.used - before == 1000
    del view
    assert card.memory.used == before


def test_what_autograd_keeps_is_counted_until_backward(card):
    leaf = on_card(100).requires_grad_()
    before = card.memory.used
    loss = (leaf * 2).exp().sum()
    assert card.memory.used - before == 400 + loss.nbytes  # the exponential is its own gradient
    loss.backward()
    assert card.memory.used - before == leaf.grad.nbytes + loss.nbytes


def test_the_peak_is_the_most_that_lived_at_the_same_time(card):
    card.memory.reset_peak()
    before = card.memory.peak
    for _ in range(3):
        temporary = on_card(250) + on_card(250)
        del temporary
    assert card.memory.peak - before == 3 * 1000
    assert torch.cuda.max_memory_allocated() == card.memory.peak


def test_what_does_not_fit_is_refused_and_leaves_nothing(card):
    with card.memory.limited_to(card.memory.used + MIB):
        before = card.memory.used
        with pytest.raises(torch.OutOfMemoryError, match=r"Tried to allocate 2\.00 MiB.* of which 1\.00 MiB is free"):
            on_card(2 * MIB, dtype=torch.uint8)
        assert card.memory.used == before
        assert torch.cuda.mem_get_info() == (MIB, before + MIB)
        assert torch.cuda.get_device_properties(0).total_memory == before + MIB


def test_a_failure_is_injected_once_behind_so_many_allocations(card):
    with card.memory.failing_after(2):
        on_card(1), on_card(1)
        with pytest.raises(torch.OutOfMemoryError):
            on_card(1)
        on_card(1)


def test_a_result_that_is_resized_takes_its_new_bytes(card):
    out = torch.empty(0, device="cuda")
    before = card.memory.used
    torch.add(on_card(50), 1, out=out)
    assert out.tolist() == [2.0] * 50
    assert card.memory.used - before == 200


# --- kernels


@pytest.mark.parametrize(
    "mixed",
    [
        lambda: on_card(3) + torch.ones(3),
        lambda: torch.ones(3) * on_card(3),
        lambda: functional.linear(on_card(2, 3), torch.ones(4, 3)),
        lambda: torch.cat([on_card(3), torch.ones(3)]),
        lambda: torch.where(torch.ones(3, dtype=torch.bool), on_card(3), on_card(3)),
        lambda: torch.ones(3)[torch.zeros(1, dtype=torch.long, device="cuda")],
        lambda: functional.scaled_dot_product_attention(
            on_card(1, 1, 2, 2), on_card(1, 1, 2, 2), torch.ones(1, 1, 2, 2)
        ),
    ],
    ids=["add", "mul", "linear", "cat", "where", "index", "attention"],
)
def test_tensors_of_two_devices_are_refused_in_cudas_words(card, mixed):
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device, but found at least two"):
        mixed()


def test_scalars_and_indices_of_the_cpu_are_taken(card):
    assert (on_card(3) + torch.tensor(1.0)).tolist() == [2.0] * 3
    assert on_card(3)[torch.tensor([0, 2])].shape == (2,)


def operations():
    draw = torch.Generator().manual_seed(0)
    x, weight, heads = (torch.randn(shape, generator=draw) for shape in ((2, 9, 8), (8, 8), (1, 2, 9, 8)))
    mask = torch.zeros(9, 9)
    mask[:, 5:] = float("-inf")
    return {
        "linear": (functional.linear, x, weight, weight[0]),
        "layer_norm": (lambda x, w: functional.layer_norm(x, (8,), w), x, weight[0]),
        "rms_norm": (lambda x, w: functional.rms_norm(x, (8,), w, 1e-6), x, weight[0]),
        "attention": (functional.scaled_dot_product_attention, heads, heads.flip(2), heads.exp()),
        "masked": (lambda q, k: functional.scaled_dot_product_attention(q, k, k, mask.to(q)), heads, heads.flip(2)),
        "gelu": (lambda x: functional.gelu(x, approximate="tanh"), x),
        "rotation": (lambda x: torch.view_as_real(torch.view_as_complex(x.view(2, 9, 4, 2)) * 1j), x),
        "convolution": (functional.conv2d, x[None], weight.view(4, 2, 2, 4)[..., :3]),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", operations())
def test_results_and_gradients_are_the_cpus_bit_for_bit(card, name, dtype):
    function, *inputs = operations()[name]
    if name in ("rotation", "convolution") and dtype != torch.float32:
        pytest.skip("not in bfloat16")
    found = {}
    for device in ("cpu", "cuda"):
        leaves = [x.detach().clone().to(device, dtype).requires_grad_() for x in inputs]
        result = function(*leaves)
        result.mul(torch.linspace(-1, 1, result.numel()).view(result.shape).to(result)).sum().backward()
        found[device] = [result.detach().cpu(), *(leaf.grad.cpu() for leaf in leaves)]
    assert all(map(torch.equal, *found.values()))


def test_a_generator_of_the_cpu_is_refused_and_one_of_the_card_is_taken(card):
    with pytest.raises(RuntimeError, match="Expected a 'cuda' device type for generator but found 'cpu'"):
        torch.randn(3, device="cuda", generator=torch.Generator())
    generator = torch.Generator("cuda").manual_seed(4)
    first, second = (torch.randn(3, device="cuda", generator=generator) for _ in range(2))
    assert torch.equal(first.cpu(), torch.randn(3, generator=torch.Generator().manual_seed(4)))
    assert not torch.equal(first, second)


def test_tensors_that_are_made_under_inference_mode_are_of_its_kind(card):
    with torch.inference_mode():
        made = on_card(3) * 2
    assert made.is_inference()
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        made * on_card(3).requires_grad_()


def test_backward_runs_in_a_thread_of_the_cards_own(card):
    seen = []

    class Look(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            seen.append(threading.get_ident())
            return gradient

    for device in ("cpu", "cuda"):
        Look.apply(torch.ones(1, device=device, requires_grad=True)).sum().backward()
    assert seen[0] == threading.get_ident() != seen[1]


# --- streams


def written_there_and_read_here(wait: bool) -> None:
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        made = on_card(BLOCK)
    if wait:
        torch.cuda.current_stream().wait_stream(side)
    made.sum()


def freed_here_and_used_there(wait: bool) -> None:
    """A tensor of a side stream is read here and freed; the side stream's next tensor may get the same memory."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        made = on_card(BLOCK)
    torch.cuda.current_stream().wait_stream(side)
    made.sum()
    del made
    if wait:
        side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        on_card(BLOCK)


def overwritten_by_a_later_copy(wait: bool) -> None:
    side, buffer = torch.cuda.Stream(), on_card(BLOCK)
    buffer.sum()
    if wait:
        event = torch.cuda.current_stream().record_event()
        side.wait_event(event)
    with torch.cuda.stream(side):
        buffer.copy_(torch.zeros(BLOCK), non_blocking=True)
    torch.cuda.current_stream().wait_stream(side)  # before the buffer is freed


@pytest.mark.parametrize("scene", [written_there_and_read_here, freed_here_and_used_there, overwritten_by_a_later_copy])
def test_a_missing_wait_between_streams_is_found(card, scene):
    with card.streams.judged() as races:
        scene(wait=True)
        assert not races
        scene(wait=False)
        assert len(races) == 1
        assert "possible data race" in races[0]


def test_a_copy_that_the_host_waits_for_is_a_wait(card):
    side, buffer = torch.cuda.Stream(), on_card(BLOCK)
    with card.streams.judged() as races:
        buffer.add_(1)
        buffer.cpu()
        with torch.cuda.stream(side):
            buffer.add_(1)
    assert not races


# --- host memory and pages


def test_registered_memory_is_pinned_and_overlaps_are_refused(card):
    runtime, tensor = torch.cuda.cudart(), torch.zeros(100)
    address = tensor.data_ptr()
    assert runtime.cudaHostRegister(address, 400, 1) == 0
    assert tensor.is_pinned()
    assert tensor[50:].is_pinned()
    assert runtime.cudaHostRegister(address + 200, 400, 1) == 712
    assert card.pinned.num_bytes == 400
    assert runtime.cudaHostUnregister(address) == 0
    assert runtime.cudaHostUnregister(address) == 713
    assert not tensor.is_pinned()


@pytest.fixture
def pages(card):
    """The pages of a model with four layers, each as large as a page."""
    module = devtools("card.pages")
    with module.installed(card) as pager:
        model = module.ModelVBAR(4 * module.PAGE, 0)
        layers = [model.alloc(module.PAGE) for _ in range(4)]
        yield module, pager, model, layers
        del model, layers


def filled(model, layer):
    """Fault a layer in and fill it as ComfyUI does; return its signature and its tensor."""
    _, address, size = layer
    signature = model.fault(address, size)
    return signature, model.tensor(address, size).view(torch.float32).fill_(1.0)


def test_pages_are_counted_while_they_are_there(card, pages):
    module, _, model, layers = pages
    before = card.memory.used
    signature, _ = filled(model, layers[0])
    assert card.memory.used - before == module.PAGE
    assert model.fault(*layers[0][1:]) == signature
    model.unpin(*layers[0][1:])
    assert model.free_memory(1) == 0  # faulted in twice, so one of the two still uses it
    assert card.memory.used - before == module.PAGE
    model.unpin(*layers[0][1:])
    assert card.memory.used == before  # no longer allowed below the watermark


def test_who_still_reads_a_page_that_was_taken_away_reads_nan(pages):
    _, _, model, layers = pages
    signature, tensor = filled(model, layers[0])
    model.unpin(*layers[0][1:])
    model.free_memory(1)
    assert tensor.isnan().all()
    assert model.fault(*layers[0][1:]) is None
    model.prioritize()
    assert model.fault(*layers[0][1:]) != signature


def test_pages_beyond_the_limit_are_refused(pages):
    _, pager, model, layers = pages
    pager.limit = 1
    assert model.fault(*layers[0][1:])
    assert model.fault(*layers[1][1:]) is None
    assert pager.refused == 1


def test_a_full_card_takes_pages_from_models_that_were_prioritised_earlier(card, pages):
    module, pager, model, layers = pages
    filled(model, layers[0])
    model.unpin(*layers[0][1:])
    other = module.ModelVBAR(module.PAGE, 0)
    other.prioritize()
    with card.memory.limited_to(card.memory.used + module.SPARE_PAGES * module.PAGE):
        assert filled(other, other.alloc(module.PAGE))
    assert pager.evictions == 1
    assert model.get_residency() == [0, 0, 0, 0]


def test_a_model_without_others_to_take_pages_from_is_refused_its_last_ones(card, pages):
    module, _, model, layers = pages
    room = (module.SPARE_PAGES + 2) * module.PAGE
    with card.memory.limited_to(card.memory.used + room):
        for layer in layers:
            if model.fault(*layer[1:]):
                model.unpin(*layer[1:])
    assert model.get_residency() == [
        1,
        0,
        0,
        0,
    ]  # what does not fit costs one that did: room is made before it is refused
    assert model.get_watermark() == 1


def test_pages_give_way_to_torchs_own_tensors(card, pages):
    module, pager, model, layers = pages
    for layer in layers:
        filled(model, layer)
        model.unpin(*layer[1:])
    with card.memory.limited_to(card.memory.used + module.SPARE_PAGES * module.PAGE):
        kept = torch.empty(2 * module.PAGE, dtype=torch.uint8, device="cuda")
        assert model.get_residency() == [1, 1, 0, 0]
        assert model.fault(*layers[2][1:]) is None  # above the watermark
        assert model.fault(*layers[1][1:])
        more = torch.empty(module.SPARE_PAGES * module.PAGE, dtype=torch.uint8, device="cuda")
        assert model.get_residency() == [0, 3, 0, 0]  # a page in use stays
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(4 * module.PAGE, dtype=torch.uint8, device="cuda")
        del kept, more
    assert pager.evictions == 3


def test_the_pages_of_a_model_that_is_gone_are_free_again(card, pages):
    module, _, _, _ = pages
    before = card.memory.used
    other = module.ModelVBAR(module.PAGE, 0)
    filled(other, other.alloc(module.PAGE))
    del other
    assert card.memory.settled() == before


def test_the_buffer_for_layers_without_pages_is_the_same_for_all(card, pages):
    module, _, _, _ = pages
    before = card.memory.used
    buffer = module.VRAMBuffer(16 * 2**30, 0)
    first, second = (buffer.tensor(*buffer.get(40)[1:]) for _ in range(2))
    second.fill_(7)
    assert first.tolist() == [7] * 40
    assert card.memory.used - before == buffer.size() == module.PAGE // 2
    del buffer, first, second
    assert card.memory.settled() == before
