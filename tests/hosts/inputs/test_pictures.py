"""ComfyUI's IMAGEs as inputs: what is refused, and that nothing is held twice."""

from __future__ import annotations

import pytest
import torch
from blockskip_pack.blockskip_core.accounting.measuring import Counting
from blockskip_pack.blockskip_core.data.crops import TrainingCrops
from blockskip_pack.blockskip_core.data.patch_sampling import PatchConfig
from blockskip_pack.blockskip_core.data.schedule import draw_schedule
from blockskip_pack.blockskip_core.errors import InvalidInputError

pytestmark = pytest.mark.usefixtures("comfyui")


@pytest.fixture
def flattened(comfyui):
    from blockskip_pack.blockskip_core.hosts.inputs.pictures import Pictures

    return Pictures


def test_batches_are_flattened_in_order(flattened):
    first, second = torch.rand(2, 8, 9, 3), torch.rand(1, 5, 6, 4)
    pictures = flattened([first, second])
    assert len(pictures) == 3
    assert pictures.sizes == [(8, 9), (8, 9), (5, 6)]
    assert [picture.tolist() for picture in pictures] == [
        first[0].tolist(),
        first[1].tolist(),
        second[0, ..., :3].tolist(),
    ]
    assert [tuple(picture.shape) for picture in pictures[1:]] == [(8, 9, 3), (5, 6, 3)]


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (torch.rand(1, 8, 9, 1), r"must come in the shape \(pictures, rows, columns, 3 colours\), got \(1, 8, 9, 1\)"),
        (torch.rand(1, 8, 9, 2), r"3 colours\), got \(1, 8, 9, 2\)"),
        (torch.rand(1, 8, 9, 5), r"3 colours\), got \(1, 8, 9, 5\)"),
        (torch.rand(1, 3, 8, 9), r"3 colours\), got \(1, 3, 8, 9\)"),
        (torch.rand(8, 9, 3), r"3 colours\), got \(8, 9, 3\)"),
        (torch.rand(1, 2, 8, 9, 3), r"3 colours\), got \(1, 2, 8, 9, 3\)"),
        (torch.rand(1, 0, 9, 3), r"3 colours\), got \(1, 0, 9, 3\)"),
        ("x.png", "is not a picture but a str"),
        (torch.zeros(1, 8, 9, 3, dtype=torch.uint8), "of 3 holds values of the type uint8; pictures are floating-point"),
        (torch.zeros(1, 8, 9, 3, dtype=torch.int64), "of 3 holds values of the type int64"),
        (torch.zeros(1, 8, 9, 3, dtype=torch.bool), "of 3 holds values of the type bool"),
        (torch.zeros(1, 8, 9, 3, dtype=torch.complex64), "of 3 holds values of the type complex64"),
        (torch.full((1, 4, 4, 3), float("nan")), "of 3 contains NaN or Inf"),
        (torch.full((1, 4, 4, 3), float("-inf")), "of 3 contains NaN or Inf"),
        (torch.linspace(-1, 1, 48).reshape(1, 4, 4, 3), "of 3 has values from -1 to 1; pictures are 0 to 1"),
        (torch.linspace(0, 255, 48).reshape(1, 4, 4, 3), "of 3 has values from 0 to 255; pictures are 0 to 1"),
        (torch.linspace(-0.5, 0.5, 48).reshape(1, 4, 4, 3), "of 3 has values from -0.5 to 0.5"),
        (torch.linspace(0, 255, 48, dtype=torch.float16).reshape(1, 4, 4, 3), "of 3 has values from 0 to 255"),
    ],
)  # fmt: skip
def test_what_is_no_picture_is_refused_by_its_number(flattened, picture, message):
    with pytest.raises(InvalidInputError, match=f"^Picture 3 .*{message}"):
        flattened([torch.rand(2, 8, 9, 3), picture])


def test_a_picture_with_a_file_is_refused_by_its_name(flattened):
    with pytest.raises(InvalidInputError, match=r"^Picture 2 of 2 \(b\.png\) has values from 0 to 3"):
        flattened([torch.rand(1, 8, 9, 3), torch.rand(1, 8, 9, 3).round() * 3], ["a.png", "b.png"])
    with pytest.raises(InvalidInputError, match="`files` describes 1 pictures, and 2 came in"):
        flattened([torch.rand(2, 8, 9, 3)], ["a.png"])


@pytest.mark.parametrize("nothing", [[], [torch.zeros(0, 8, 8, 3)]])
def test_nothing_is_refused(flattened, nothing):
    with pytest.raises(InvalidInputError, match="No pictures came in"):
        flattened(nothing)


def test_what_resampling_overshoots_is_clamped(flattened):
    """The worst case: a chequered picture, enlarged without clamping."""
    chequered = (torch.arange(64).view(8, 8) + torch.arange(8).view(8, 1)).remainder(2).float().repeat_interleave(4, 1)
    planes = chequered.repeat_interleave(4, 0).expand(1, 3, 32, 32)
    enlarged = torch.nn.functional.interpolate(planes, scale_factor=2.7, mode="bicubic").movedim(1, -1)
    assert enlarged.max() > 1.05
    [picture] = flattened([enlarged])
    assert (float(picture.min()), float(picture.max())) == (0.0, 1.0)
    assert torch.equal(picture, enlarged[0].clamp(0, 1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floating_point_numbers_are_converted(flattened, dtype):
    given = torch.rand(1, 8, 9, 3).to(dtype)
    [picture] = flattened([given])
    assert picture.dtype == torch.float32
    assert torch.equal(picture, given[0].float())


def test_transparent_pictures_are_known(flattened):
    opaque, hidden = torch.ones(1, 20, 20, 4), torch.ones(1, 20, 20, 4)
    hidden[:, 5:, :, 3] = 0.0
    assert flattened([opaque, hidden, torch.rand(1, 8, 8, 3)]).transparent == [1]


def test_pictures_are_held_once(flattened):
    """Counted: in addition to the input, the memory of a few pictures, however many there are."""
    side, count = 96, 12
    images = [torch.rand(1, side, side, 3) for _ in range(count - 4)] + [torch.rand(4, side, side, 4)]
    one = images[0].nbytes
    patches = PatchConfig(patch_min=32, patch_max=80)
    with Counting() as counting:
        pictures = flattened(images)
        assert counting.live(torch.device("cpu")) < one / 2
        schedule = draw_schedule(
            pictures.sizes, num_captions=1, num_draws=3 * count, patches=patches,
            sample_sigmas=lambda number, generator: torch.rand(number, generator=generator), seed=1,
        )  # fmt: skip
        crops = TrainingCrops(pictures, schedule)
        for index in crops.by_picture(range(len(crops))):
            crops[index]
    assert counting.peak(torch.device("cpu")) < 4 * one
    assert all(picture.data_ptr() == batch.data_ptr() for picture, batch in zip(pictures, images[:-1], strict=False))


@pytest.mark.parametrize(("order", "most"), [("fixed", 3), ("low-to-high", 60)])
def test_draws_with_the_same_crop_are_known(order, most):
    pictures = [torch.rand(96, 96, 3) for _ in range(3)]
    schedule = draw_schedule(
        [(96, 96)] * 3, num_captions=1, num_draws=60, patches=PatchConfig(patch_min=32, patch_max=96, order=order),
        sample_sigmas=lambda number, generator: torch.rand(number, generator=generator), seed=1,
    )  # fmt: skip
    crops = TrainingCrops(pictures, schedule)
    alike = crops.alike()
    assert all(torch.equal(crops[index], crops[first]) for index, first in enumerate(alike))
    for index, first in enumerate(alike):
        assert first <= index
        assert not any(torch.equal(crops[index], crops[other]) for other in range(first))
    assert len(set(alike)) <= most
