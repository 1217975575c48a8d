"""IMAGE batches as clips, and clips as latents of this package."""

from types import SimpleNamespace

import pytest
import torch
from blockskip_pack.blockskip_core.errors import InvalidInputError, UnsupportedModelError

pytestmark = pytest.mark.usefixtures("comfyui")


def film(length, height=6, width=8, seed=0):
    return torch.rand(length, height, width, 3, generator=torch.Generator().manual_seed(seed))


def video_model(channels=4, per_frame=4, dimensions=3):
    form = SimpleNamespace(
        latent_channels=channels,
        latent_dimensions=dimensions,
        spacial_downscale_ratio=8,
        temporal_downscale_ratio=per_frame,
    )
    return SimpleNamespace(latent_format=form)


def test_a_film_is_cut_from_its_beginning_and_clips_are_views():
    from blockskip_pack.blockskip_core.hosts.inputs.clips import Clips

    films = [film(11), film(5, 10, 4, seed=1)]
    clips = Clips(films, 5)
    assert (len(clips), clips.films, clips.unused) == (3, [0, 0, 1], 1)
    assert clips.sizes == [(6, 8), (6, 8), (10, 4)]
    for index, (number, start) in enumerate([(0, 0), (0, 5), (1, 0)]):
        assert torch.equal(clips[index], films[number][start : start + 5])
        assert torch.equal(clips.still(index), films[number][start])
        assert clips[index].untyped_storage().data_ptr() == films[number].untyped_storage().data_ptr()
    assert clips.labels.full(2) == "Clip 3 of 3"


def test_clips_of_another_dtype_or_range_are_converted():
    from blockskip_pack.blockskip_core.hosts.inputs.clips import Clips

    half = film(5).half()
    assert torch.equal(Clips([half], 5)[0], half.float())
    overshooting = film(5)
    overshooting[3, 0, 0] = 1.05
    assert Clips([overshooting], 5)[0].max() == 1.0


def test_one_caption_per_film_is_used_for_all_its_clips():
    from blockskip_pack.blockskip_core.hosts.inputs.clips import Clips

    clips = Clips([film(10), film(5)], 5, ["a.mp4", "b.mp4"])
    captions = [["first"], ["second"]]
    assert clips.captions_for_each(captions) == [["first"], ["first"], ["second"]]
    assert clips.captions_for_each([["all"]]) == [["all"]]
    assert clips.labels.short(1) == "a.mp4"


def test_a_single_picture_beside_films_is_a_clip_of_one():
    from blockskip_pack.blockskip_core.hosts.inputs.clips import Clips
    from blockskip_pack.blockskip_core.hosts.inputs.material import checked_material

    images = [film(11), film(1, 4, 4, seed=1), film(5, seed=2)]
    clips = Clips(images, 5)
    assert [len(clip) for clip in clips] == [5, 5, 1, 5]
    assert torch.equal(clips[2], images[1])
    assert (clips.films, clips.unused, clips.stills) == ([0, 0, 1, 2], 1, 1)
    material = checked_material(images, [[[torch.rand(1, 3, 4), {}]]] * 3, None, 5)
    assert material.remarks == [
        "3 clips of 5 pictures; 1 pictures at the ends of the films are not used; 1 single pictures are trained beside "
        "the clips"
    ]
    with pytest.raises(InvalidInputError, match="Film 1 of 2 has 1 pictures, and `frames` asks for clips of 5"):
        Clips([film(1), film(1)], 5)


def test_material_says_what_is_left_out():
    from blockskip_pack.blockskip_core.hosts.inputs.material import checked_material

    positive = [[[torch.rand(1, 3, 4), {}]]] * 2
    material = checked_material([film(11), film(5, seed=1)], positive, None, 5)
    assert material.remarks == ["3 clips of 5 pictures; 1 pictures at the ends of the films are not used"]
    assert len(material.captions) == len(material.pictures) == 3


@pytest.mark.parametrize(
    ("films", "message"),
    [
        ([film(4)], "Film 1 of 1 has 4 pictures, and `frames` asks for clips of 5"),
        ([film(5), torch.zeros(5, 6, 8)], r"Picture 6 must come in the shape"),
        ([film(5) * 255], "Picture 1 of 5 has values from"),
        ([], "No pictures came in"),
    ],
)
def test_films_that_cannot_be_used_are_named(films, message):
    from blockskip_pack.blockskip_core.hosts.inputs.clips import Clips

    with pytest.raises(InvalidInputError, match=message):
        Clips(films, 5)


@pytest.mark.parametrize(("pictures", "expected"), [(1, 1), (5, 2), (9, 3), (49, 13)])
def test_the_number_of_latent_frames(pictures, expected):
    from blockskip_pack.blockskip_core.hosts.inputs.frames import latent_frames, latent_shape

    assert latent_frames(video_model(), pictures) == expected
    assert latent_shape(video_model(), 64, expected) == (4 * expected, 8, 8)


@pytest.mark.parametrize(
    ("model", "pictures", "error", "message"),
    [
        (video_model(), 8, InvalidInputError, r"a multiple of 4 plus 1 for this model, got 8. Try 5 or 9"),
        (video_model(per_frame=8), 3, InvalidInputError, r"Try 1 or 9"),
        (video_model(dimensions=2), 5, InvalidInputError, "`frames` is 5, but this model makes pictures"),
        (video_model(), 0, InvalidInputError, "`frames` must be at least 1, got 0"),
        (video_model(per_frame=None), 5, UnsupportedModelError, "This version of ComfyUI cannot train on clips"),
    ],
)
def test_lengths_that_a_model_cannot_have_are_refused(model, pictures, error, message):
    from blockskip_pack.blockskip_core.hosts.inputs.frames import latent_frames

    with pytest.raises(error, match=message):
        latent_frames(model, pictures)


def test_frames_become_channels_and_back():
    from blockskip_pack.blockskip_core.hosts.inputs.frames import frames_in, with_frames, without_frames

    video = torch.rand(2, 4, 3, 5, 7)
    folded = without_frames(video_model(), video)
    assert folded.shape == (2, 12, 5, 7)
    assert torch.equal(with_frames(video_model(), folded), video)
    assert frames_in(video_model(), 12) == 3
    picture = torch.rand(2, 4, 5, 7)
    flat = video_model(dimensions=2)
    assert with_frames(flat, picture) is without_frames(flat, picture) is picture
    assert frames_in(flat, 4) == 1


def test_a_clip_is_cropped_and_resized_like_each_of_its_pictures():
    from blockskip_pack.blockskip_core.data.patch_sampling import crop_and_resize, resize

    clip, place = film(3, 20, 30), {"top": 2, "left": 5, "crop": (16, 12), "size": (8, 6)}
    together = crop_and_resize(clip, **place)
    assert together.shape == (3, 8, 6, 3)
    for one, picture in zip(together, clip, strict=True):
        torch.testing.assert_close(one, crop_and_resize(picture, **place), atol=1e-7, rtol=0.0)
    assert resize(clip, 20, 30) is clip
