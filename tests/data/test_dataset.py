"""Data sets, open: those that need no files, and all of them without Lightning."""

import subprocess
import sys

import pytest
import torch
from sklearn.datasets import load_digits

from nvae.data.dataset import make_in_memory


def digits(make_config, **overrides):
    defaults = {
        "format": "digits",
        "channels": 1,
        "bits": 4,
        "train_size": 1397,
        "valid_size": 100,
        "test_size": 300,
    }
    return make_in_memory(make_config(**(defaults | overrides)))


def test_digits_are_the_1797_real_images_each_once(make_config):
    splits = digits(make_config)
    images = torch.cat([split.images for split in splits.values()])
    wanted = (torch.from_numpy(load_digits().images) * 16).clamp(max=255).to(torch.uint8)
    assert images.shape == (1797, 8, 8, 1)
    assert sorted(images.flatten(1).tolist()) == sorted(wanted.flatten(1).tolist())


def test_four_bits_merge_only_the_two_brightest_of_17_levels(make_config):
    values = digits(make_config)["train"].images.unique()
    assert len(values) == 17
    assert (values >> 4).tolist() == [*range(16), 15]


def test_digits_can_be_enlarged(make_config):
    assert digits(make_config, image_size=16)["train"].shape == (16, 16, 1)


def test_digits_are_gray_also_in_color(make_config):
    """A model of color is held against them; no other number of channels has a meaning."""
    some = torch.arange(4)
    color = digits(make_config, channels=3)["train"].gather(some, epoch=None, seed=0)
    gray = digits(make_config)["train"].gather(some, epoch=None, seed=0)
    assert torch.equal(color, gray.expand(-1, -1, -1, 3))
    with pytest.raises(ValueError, match="channels=1 or 3"):
        digits(make_config, channels=2)


def test_random_images_are_seeded_and_fill_the_range(make_config):
    splits = make_in_memory(make_config())
    assert {name: len(split) for name, split in splits.items()} == {
        "train": 50,
        "valid": 7,
        "test": 5,
    }
    assert torch.equal(splits["train"].images, make_in_memory(make_config())["train"].images)
    assert splits["train"].images.unique().numel() == 256


def test_random_images_need_their_number(make_config):
    with pytest.raises(ValueError, match="train_size"):
        make_in_memory(make_config(train_size=None))


WITHOUT_LIGHTNING = """
import sys
from nvae.data.config import DataConfig
from nvae.data.dataset import ImageData
config = DataConfig("x", "random", 8, 3, 8, "normal", train_size=9, valid_size=1, flip=True)
data = ImageData(config)
data.prepare()
data.setup()
assert [len(batch.x) for batch in data.batches("valid")] == [1]
assert data.split("test") is data.split("valid")
assert data.fingerprint()["splits"]["train"]["images"] == 9
heavy = {"pytorch_lightning", "hydra", "torchvision", "scipy", "sklearn", "lmdb"}
print(*sorted(heavy & set(sys.modules)))
"""


def test_a_data_set_opens_without_lightning():
    """Sampling and evaluation need data, and none of the seconds that these imports take."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_LIGHTNING], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == []
