"""Pictures are read back and compared: what is written must be what was given."""

import numpy as np
import pytest
import torch
from PIL import Image

from nvae.pictures import (
    View,
    check_format,
    grid,
    save_animation,
    save_full_depth,
    save_grids_side_by_side,
    save_image,
    save_rows,
)


def _read(path):
    return np.asarray(Image.open(path))


@pytest.mark.parametrize("channels", [1, 3])
def test_a_single_image_survives_exactly(tmp_path, channels):
    levels = torch.randint(0, 256, (channels, 5, 7), generator=torch.Generator().manual_seed(0))
    save_image(tmp_path / "a.png", levels / 255)
    expected = levels.permute(1, 2, 0).numpy()
    assert np.array_equal(_read(tmp_path / "a.png").reshape(5, 7, channels), expected)


def test_grid_holds_every_image_in_order_enlarged_by_whole_pixels():
    images = torch.linspace(0, 1, 6).view(6, 1, 1, 1).expand(6, 1, 8, 8)
    picture = np.asarray(grid(images, columns=3))
    assert picture.shape == (2 * 50 + 2, 3 * 50 + 2)
    for i in range(6):
        y, x = 2 + (i // 3) * 50, 2 + (i % 3) * 50
        tile = picture[y : y + 48, x : x + 48]
        assert (tile == round(i / 5 * 255)).all()
    assert (picture[:2] == 128).all()  # a line that neither black nor white melts into


def test_rectangles_are_enlarged_as_a_square_of_their_area():
    assert grid(torch.zeros(1, 1, 4, 16)).size == (16 * 6 + 4, 4 * 6 + 4)
    assert grid(torch.zeros(1, 1, 96, 64)).size == (68, 100)


def test_labels_leave_the_images_untouched(tmp_path):
    rows = [torch.zeros(2, 3, 64, 64), torch.full((2, 3, 64, 64), 0.75)]
    save_rows(tmp_path / "r.png", rows, ["t = 0.5", "t = 1"], ["a", "b"])
    picture = _read(tmp_path / "r.png")
    assert (picture[-66:-2, -66:-2] == 191).all()
    left = picture[:, : picture.shape[1] - 2 * 66 - 2]
    assert (left < 128).any()  # ink
    bare = np.asarray(grid(torch.cat(rows), columns=2))
    assert np.array_equal(picture[-bare.shape[0] :, -bare.shape[1] :], bare)


def test_grids_side_by_side(tmp_path):
    grids = [torch.zeros(4, 1, 64, 64), torch.ones(4, 1, 64, 64)]
    save_grids_side_by_side(tmp_path / "s.png", grids, ["t = 0.7", "t = 1"], columns=2)
    picture = _read(tmp_path / "s.png")
    assert (picture[-30, 10:30] == 0).all()
    assert picture.shape[1] == 2 * 134 + 12
    with pytest.raises(ValueError, match="1 labels for 2"):
        save_grids_side_by_side(tmp_path / "s.png", grids, ["x"])


def test_titles_of_narrow_grids_do_not_run_over_each_other(tmp_path):
    """One small image a temperature: every title is whole, with white before the next."""
    titles = ["temperature 0.5", "temperature 0.75"]
    save_grids_side_by_side(tmp_path / "s.png", [torch.zeros(1, 1, 64, 64)] * 2, titles)
    picture = _read(tmp_path / "s.png")
    starts = np.flatnonzero((picture[-30] == 0) & (np.roll(picture[-30], 1) != 0))
    first, second = picture[:16, : starts[1]], picture[:16, starts[1] :]
    for one in (first, second):
        inked = np.flatnonzero((one < 128).any(axis=0))
        assert inked[-1] - inked[0] > 80
        assert inked[-1] < one.shape[1] - 2
    assert np.flatnonzero((first < 128).any(axis=0))[-1] < starts[1] - 10


def test_more_columns_than_images_leave_no_band():
    images = torch.zeros(4, 1, 64, 64)
    assert grid(images, columns=100).size == grid(images, columns=4).size


def test_a_failure_leaves_the_old_picture(tmp_path, monkeypatch):
    path = tmp_path / "g.png"
    save_rows(path, [torch.zeros(1, 1, 8, 8)], ["a"])
    before = path.read_bytes()

    def full_disk(*_args, **_kwargs):
        raise OSError("no space left")

    monkeypatch.setattr(Image.Image, "save", full_disk)
    with pytest.raises(OSError, match="no space"):
        save_rows(path, [torch.ones(1, 1, 8, 8)], ["a"])
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("channels", "shown"),
    [(1, [0]), (2, [0, 1, 0]), (3, [0, 1, 2]), (4, [0, 1, 2]), (5, [0, 1, 2])],
)
def test_what_is_seen_of_any_number_of_channels(channels, shown):
    images = torch.rand(2, channels, 4, 6)
    assert torch.equal(View()(images), images[:, shown])
    assert grid(View()(images)).mode == ("L" if channels == 1 else "RGB")
    last = channels - 1
    assert torch.equal(View([last])(images[0]), images[0, last:])


def test_a_range_of_values_is_stretched():
    image = torch.tensor([0.0, 0.2, 0.3, 0.4, 1.0]).view(1, 1, 5)
    seen = View(darkest=0.2, brightest=0.4)(image)
    torch.testing.assert_close(seen.flatten(), torch.tensor([0.0, 0.0, 0.5, 1.0, 1.0]))


@pytest.mark.parametrize(
    ("channels", "limits", "message"),
    [
        ([0, 1], None, r"show_channels=\[0, 1\]: one channel is shown as gray"),
        ([0, 1, 4], None, "the images have channels 0 to 3"),
        ([-1], None, "the images have channels 0 to 3"),
        (None, [0.5, 0.5], "first that of black, then that of white"),
        (None, [0, 2], r"show_range=\[0,2\]: it takes two numbers from 0 to 1"),
        (None, [0, 0.5, 1], "it takes two numbers, black and white"),
    ],
)
def test_what_cannot_be_seen_is_one_line(channels, limits, message):
    with pytest.raises(ValueError, match=message):
        View.of_settings(channels, limits).of(4)


def test_full_depth_keeps_every_level(tmp_path):
    """Gray as a PNG of 16 bits, other images as an array; both hold levels as data readers do."""
    levels = torch.arange(4096)
    gray = save_full_depth(tmp_path / "g", (levels / 4095).view(1, 64, 64), 12)
    assert gray.name == "g.png"
    assert np.array_equal(_read(gray).flatten(), levels.numpy())
    five = (torch.arange(65536) / 65535).view(1, 256, 256).expand(5, -1, -1)
    several = save_full_depth(tmp_path / "s.0", five, 16)
    assert several.name == "s.0.npy"
    found = np.load(several)
    assert (found.shape, found.dtype) == ((256, 256, 5), np.uint16)
    assert np.array_equal(found[..., 4].flatten(), np.arange(65536))
    assert np.load(save_full_depth(tmp_path / "two", torch.ones(2, 3, 3), 8)).dtype == np.uint8


def test_wrong_input_is_refused():
    with pytest.raises(ValueError, match="no images"):
        grid([])
    with pytest.raises(ValueError, match="1 or 3"):
        grid(torch.zeros(1, 2, 8, 8))
    with pytest.raises(ValueError, match="2 labels for 1 rows"):
        grid(torch.zeros(2, 1, 8, 8), columns=2, row_labels=["a", "b"])
    with pytest.raises(ValueError, match="all need as many"):
        save_rows("never.png", [torch.zeros(2, 1, 8, 8), torch.zeros(1, 1, 8, 8)], ["a", "b"])


def test_gif_plays_there_and_back(tmp_path):
    frames = torch.linspace(0, 1, 4).view(4, 1, 1, 1).expand(4, 1, 8, 8)
    save_animation(tmp_path / "a.gif", frames)
    with Image.open(tmp_path / "a.gif") as animation:
        assert animation.n_frames == 6
        assert animation.info["loop"] == 0
        values = []
        for i in range(6):
            animation.seek(i)
            values.append(np.asarray(animation.convert("L")).mean() / 255)
    assert np.allclose(values, [0, 1 / 3, 2 / 3, 1, 2 / 3, 1 / 3], atol=0.01)


@pytest.mark.parametrize(("channels", "side"), [(1, 8), (3, 49)])
def test_mp4_plays_there_and_back(tmp_path, channels, side):
    """Gray and color, even and odd sides."""
    av = pytest.importorskip("av")
    level = torch.linspace(0.1, 0.9, 4).view(4, 1, 1, 1)
    frames = level.expand(4, channels, side, side)
    save_animation(tmp_path / "a.mp4", frames, milliseconds=100)
    with av.open(tmp_path / "a.mp4") as video:
        assert video.streams.video[0].average_rate == 10
        shown = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
    shape = {8: (48, 48, 3), 49: (50, 50, 3)}[side]
    assert {picture.shape for picture in shown} == {shape}
    values = [picture.mean() / 255 for picture in shown]
    there = level.flatten().tolist()
    assert np.allclose(values, there + there[-2:0:-1], atol=0.02)


def test_formats_that_cannot_be_written_are_refused(tmp_path, monkeypatch):
    frames = torch.zeros(2, 1, 8, 8)
    with pytest.raises(ValueError, match="allowed: gif, mp4"):
        save_animation(tmp_path / "a.webm", frames)
    monkeypatch.setattr("nvae.pictures.find_spec", lambda _: None)
    with pytest.raises(ValueError, match="pip install 'nvae"):
        check_format("mp4")
    with pytest.raises(ValueError, match="no frames"):
        save_animation(tmp_path / "a.gif", frames[:0])
    assert not list(tmp_path.iterdir())
