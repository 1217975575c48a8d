"""The likeness of samples to training pictures: the mean of all cosines, and an encoder that is loaded only for it."""

import pytest
import torch

from ..vision_encoders import QuadrantEncoder

PICTURES = [torch.rand(1, 8 + 4 * n, 12, 3, generator=torch.Generator().manual_seed(n)) for n in range(5)]


@pytest.fixture
def likeness(comfyui):
    from blockskip_pack.blockskip_core.hosts.sampling import likeness

    return likeness


def test_it_is_the_mean_of_all_cosines(likeness):
    encoder, told = QuadrantEncoder(), []
    found = likeness.Likeness(encoder, [*PICTURES[:3], PICTURES[0]], lambda *at: told.append(at))
    assert told == [(1, 3), (2, 3), (3, 3)]  # a picture given twice counts once
    samples = [picture[0] for picture in PICTURES[3:]]
    vectors = [encoder.encode_image(picture)["image_embeds"][0] for picture in PICTURES]
    for sample, got in zip(vectors[3:], found.of(samples), strict=True):
        cosines = [(sample @ of / sample.norm() / of.norm()).item() for of in vectors[:3]]
        assert got == pytest.approx(sum(cosines) / 3, abs=1e-15)


def test_a_picture_is_most_like_itself_and_the_encoder_is_unloaded(likeness):
    encoder = QuadrantEncoder()
    found = likeness.Likeness(encoder, PICTURES[:1], lambda *_: None)
    assert not encoder.is_loaded
    itself, other = found.of([PICTURES[0][0], PICTURES[1][0]])
    assert itself == pytest.approx(1.0, abs=1e-15)
    assert other < itself
    assert not encoder.is_loaded


def test_cancel_while_reading_unloads_the_encoder(likeness):
    encoder = QuadrantEncoder()

    def cancel(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        likeness.Likeness(encoder, PICTURES, cancel)
    assert encoder.encoded == 1
    assert not encoder.is_loaded


@pytest.mark.parametrize(
    ("encoder", "pictures", "match"),
    [(object(), None, "`reference_images` is not connected"), (None, PICTURES, "`clip_vision` is not connected")],
)
def test_half_of_it_is_refused(likeness, encoder, pictures, match):
    with pytest.raises(ValueError, match=match):
        likeness.likeness_for(encoder, pictures, lambda *_: None)
    assert likeness.likeness_for(None, None, lambda *_: None) is None
