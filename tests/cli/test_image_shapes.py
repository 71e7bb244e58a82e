"""The commands on images of 16x8 pixels, five channels and 12 bits, as a user calls them."""

import json

import numpy as np
import pytest
from PIL import Image

from nvae.cli import evaluate, sample

from .checkpoints import write_checkpoint
from .commands import Commands


@pytest.fixture
def tall(tmp_path):
    """Five channels of 12 bits."""
    return write_checkpoint(tmp_path / "m.ckpt", image_size=(16, 8), channels=5, bits=12)


def test_samples_are_shown_in_color_and_kept_whole(tall, tmp_path, monkeypatch, capsys):
    """Pictures show three channels of 8 bits; arrays and the full depth lose nothing."""
    command = Commands(sample.main, monkeypatch, capsys, tmp_path)
    common = f"checkpoint={tall}", "seeds=0-3", "npz=true", "full_depth=true"
    command(*common, "output=a")
    images = np.load(tmp_path / "a" / "samples.npz")["images"][0]
    assert images.shape == (4, 5, 16, 8)
    shown = np.asarray(Image.open(tmp_path / "a" / "t1" / "seed000002.png"))
    assert shown.shape == (16, 8, 3)
    assert np.abs(shown / 255 - images[2, :3].transpose(1, 2, 0)).max() <= 0.5 / 255 + 1e-6
    levels = np.load(tmp_path / "a" / "t1" / "seed000002_full.npy")
    assert np.abs(levels / 4095 - images[2].transpose(1, 2, 0)).max() <= 0.5 / 4095 + 1e-6
    assert (
        "t1/seed000002_full.npy"
        in json.loads((tmp_path / "a" / "manifest.json").read_text())["files"]
    )

    command(*common, "show_channels=[4]", "show_range=[0.25,0.75]", "output=b")
    gray = np.asarray(Image.open(tmp_path / "b" / "t1" / "seed000002.png"))
    wanted = ((images[2, 4] - 0.25) * 2).clip(0, 1)
    assert gray.shape == (16, 8)
    assert np.abs(gray / 255 - wanted).max() <= 0.5 / 255 + 1e-6
    assert np.array_equal(np.load(tmp_path / "b" / "samples.npz")["images"][0], images)
    assert "have channels 0 to 4" in command.fails(*common, "show_channels=[0,1,5]", "output=c")
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("mode", ["reconstruct", "interpolate", "partial", "traverse", "nearest"])
def test_every_mode_draws_rectangles(tall, tmp_path, monkeypatch, capsys, mode):
    command = Commands(sample.main, monkeypatch, capsys, tmp_path)
    more = {"interpolate": ["frames=3", "steps=3"], "traverse": ["steps=3"]}.get(mode, [])
    which = "images=0-1" if mode == "reconstruct" else "seeds=0-1"
    command(f"checkpoint={tall}", f"mode={mode}", which, "output=a", *more)
    pictures = sorted((tmp_path / "a").glob("*.png"))
    assert pictures
    assert all(Image.open(path).mode == "RGB" for path in pictures)


def test_bits_per_dim_count_every_channel_of_a_rectangle(tall, tmp_path, monkeypatch, capsys):
    command = Commands(evaluate.main, monkeypatch, capsys, tmp_path)
    arguments = f"checkpoint={tall}", "importance_samples=[]", "output=a.json"
    command(*arguments)
    result = json.loads((tmp_path / "a.json").read_text())["result"]
    assert result["dimensions"] == 5 * 16 * 8
    bits = result["negative_elbo"]["mean"] / (5 * 16 * 8 * np.log(2))
    assert result["negative_elbo_bits_per_dim"]["mean"] == pytest.approx(bits)
    assert result["density_of"] == ""
    command(*arguments)  # the same evaluation again: a list in JSON is the tuple of before


def test_a_density_is_called_one(tmp_path, monkeypatch, capsys):
    path = write_checkpoint(tmp_path / "n.ckpt", bits=8, likelihood="normal")
    command = Commands(evaluate.main, monkeypatch, capsys, tmp_path)
    assert "of the density of 2x - 1" in command(
        f"checkpoint={path}", "importance_samples=[]", "output=n.json"
    )
    assert json.loads((tmp_path / "n.json").read_text())["result"]["density_of"] == "2x - 1"


def test_other_images_are_one_line(tall, tmp_path, monkeypatch, capsys):
    command = Commands(evaluate.main, monkeypatch, capsys, tmp_path)
    for given, told in (
        ("data.image_size=[8,16]", "data.image_size=[8, 16] does not fit the checkpoint's model, "
         "which has [16, 8]"),
        ("data.channels=3", "data.channels=3 does not fit the checkpoint's model, which has 5"),
        ("data.bits=8", "model.bits=12 does not fit data.bits=8"),
    ):  # fmt: skip
        assert told in command.fails(f"checkpoint={tall}", given)
