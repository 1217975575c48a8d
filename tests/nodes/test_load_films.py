"""Load Training Folder with videos: clips for models of video."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from .test_load_training_folder import folder, photo, said  # noqa: F401  fixtures


def write_film(path, colours, size=(64, 48), codec="mpeg4"):
    """A video with one picture per colour (brightness in [0, 1])."""
    import av
    import numpy as np

    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=Fraction(8))
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = *size, "yuv420p", 4_000_000
        for colour in colours:
            values = np.full((size[1], size[0], 3), round(255 * colour), dtype=np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(values, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


@pytest.fixture
def load(nodes, run_node, folder):  # noqa: F811
    return lambda **settings: run_node(nodes.LoadTrainingFolder, folder="toy", **settings).args


def test_a_videos_first_pictures_are_one_image(load, folder, said):  # noqa: F811
    colours = [0.1, 0.3, 0.5, 0.7, 0.9, 0.2, 0.4]
    write_film(folder / "walk.mp4", colours)
    write_film(folder / "short.MOV", colours[:3])
    (folder / "walk.txt").write_text("a dog walks", encoding="utf-8")
    images, texts, files, _ = load(frames=5)
    assert [tuple(image.shape) for image in images] == [(3, 48, 64, 3), (5, 48, 64, 3)]
    torch.testing.assert_close(images[1].mean(dim=(1, 2, 3)), torch.tensor(colours[:5]), atol=0.03, rtol=0.0)
    assert texts == ["", "a dog walks"]
    assert [file.name for file in files] == ["short.MOV", "walk.mp4"]
    assert said[0].splitlines()[-1] == "Videos: 2; captions: 1"


def test_a_video_that_changes_its_size_is_refused(load, folder, tmp_path):  # noqa: F811
    """As a browser's recording of a window does that is resized, or of a phone that is turned."""
    import av

    parts = []
    for number, size in enumerate([(64, 48), (48, 64)]):
        parts.append(tmp_path / f"{number}.webm")
        write_film(parts[-1], [0.2, 0.4], size, codec="libvpx")
    with av.open(str(folder / "call.webm"), "w") as joined:
        stream, place = None, 0
        for part in parts:
            with av.open(str(part)) as opened:
                stream = stream or joined.add_stream_from_template(opened.streams.video[0])
                for packet in opened.demux(video=0):
                    if packet.dts is not None:
                        packet.pts = packet.dts = place
                        packet.stream, place = stream, place + 100
                        joined.mux(packet)
    with pytest.raises(ValueError, match="call.webm changes its size at picture 3. Save it again as MP4 of one size"):
        load(frames=5)
    assert [tuple(image.shape) for image in load(frames=2)[0]] == [(2, 48, 64, 3)]


def test_pictures_are_loaded_beside_videos_if_asked_for(load, folder, said):  # noqa: F811
    write_film(folder / "b.mp4", [0.1, 0.3, 0.5])
    photo(folder / "a.png")
    (folder / "a.txt").write_text("a dog", encoding="utf-8")
    assert [len(image) for image in load(frames=3)[0]] == [3]
    images, texts, files, _ = load(frames=3, with_pictures=True)
    assert [len(image) for image in images] == [1, 3]
    assert (texts, [file.name for file in files]) == (["a dog", ""], ["a.png", "b.mp4"])
    assert said[-1].splitlines()[-1] == "Videos and pictures: 2; captions: 1"


def test_several_clips_of_a_video_are_read_together(load, folder, said):  # noqa: F811
    write_film(folder / "walk.mp4", [0.1 * n for n in range(9)])
    assert len(load(frames=3, clips_per_video=2)[0][0]) == 6
    assert len(load(frames=3, clips_per_video=9)[0][0]) == 9


def test_large_videos_are_scaled_down(load, folder, said, monkeypatch):  # noqa: F811
    from blockskip_pack.blockskip_core.hosts.inputs import film_files

    monkeypatch.setattr(film_files, "LARGEST_SHORTER_SIDE", 24)
    write_film(folder / "walk.mp4", [0.5, 0.5])
    assert tuple(load(frames=2)[0][0].shape) == (2, 24, 32, 3)


@pytest.mark.parametrize(
    ("names", "settings", "message"),
    [
        (["a.png"], {"frames": 5}, r"There are no videos in the folder 'toy': .*It has pictures: set `frames` to 1"),
        (["a.mp4"], {}, r"There are no pictures in the folder 'toy': .*It has videos: set `frames` to more than 1"),
        ([], {"frames": 5}, r"There are no videos in the folder 'toy': none of its files ends with .mp4"),
        (["a.mp4"], {"frames": 0}, "`frames` must be at least 1, got 0"),
        (["a.mp4"], {"frames": 2, "clips_per_video": 0}, "`clips_per_video` must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_loaded_is_said(load, folder, said, names, settings, message):  # noqa: F811
    for name in names:
        photo(folder / name) if name.endswith("png") else write_film(folder / name, [0.5, 0.5])
    with pytest.raises(Exception, match=message):
        load(**settings)


def test_a_damaged_video_is_named(load, folder, said):  # noqa: F811
    (folder / "a.mp4").write_bytes(b"not a video")
    with pytest.raises(Exception, match=r"a.mp4 cannot be read as a video \(.*\). Save it again as MP4"):
        load(frames=5)


def test_a_changed_video_is_read_again(nodes, folder):  # noqa: F811
    write_film(folder / "a.mp4", [0.5, 0.5])
    before = nodes.LoadTrainingFolder.fingerprint_inputs(folder="toy")
    write_film(folder / "a.mp4", [0.5, 0.5, 0.5])
    assert nodes.LoadTrainingFolder.fingerprint_inputs(folder="toy") != before
