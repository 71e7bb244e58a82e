"""Animations play what they were given, in both formats."""

import numpy as np
import pytest
import torch
from PIL import Image

from nvae.animation import check_format, save_animation


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
    """Grey and colour, even and odd sides."""
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
    monkeypatch.setattr("nvae.animation.find_spec", lambda _: None)
    with pytest.raises(ValueError, match="pip install 'nvae"):
        check_format("mp4")
    with pytest.raises(ValueError, match="no frames"):
        save_animation(tmp_path / "a.gif", frames[:0])
    assert not list(tmp_path.iterdir())
