"""IDX files: exact pixels, and every kind of damage named."""

import gzip

import numpy as np
import pytest

from nvae.data.manifest import DataError
from nvae.data.readers.idx import read_idx, read_idx_images, read_stacked_idx
from nvae.data.readers.source import MissingSourceError
from tests.data.files import idx_bytes, pictures, write_idx


def loaded(part):
    return np.stack([item.load() for item in part.items()])


@pytest.mark.parametrize("compress", [True, False])
def test_pixels_are_exact(tmp_path, make_config, compress):
    train, test = pictures(5, 28, 1), pictures(3, 28, 1, seed=1)
    # torchvision keeps its files deeper down.
    write_idx(tmp_path / "MNIST" / "raw", train, test, compress=compress)
    parts = read_idx(tmp_path, make_config())
    assert np.array_equal(loaded(parts["train"]), train)
    assert np.array_equal(loaded(parts["test"]), test)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda d: d[:-1], "header says 4 images of 28x28 = 3136 bytes, it has 3135"),
        (lambda d: d + b"x", "it has more"),
        (lambda d: d[:10], "not an IDX file"),
        (lambda d: b"", "starts with nothing"),
        (lambda d: b"\x00\x00\x08\x01" + d[4:], "starts with 00 00 08 01"),
        (lambda d: d[:4] + b"\xff\xff\xff\xff" + d[8:], "header says 4294967295 images"),
    ],
)
@pytest.mark.parametrize("compress", [True, False])
def test_damage_is_named(tmp_path, damage, words, compress):
    data = damage(idx_bytes(pictures(4, 28, 1)))
    path = tmp_path / f"images{'.gz' if compress else ''}"
    path.write_bytes(gzip.compress(data) if compress else data)
    with pytest.raises(DataError, match=words):
        read_idx_images(path)


def test_a_cut_gzip_is_named(tmp_path):
    path = tmp_path / "images.gz"
    path.write_bytes(gzip.compress(idx_bytes(pictures(4, 28, 1)))[:-20])
    with pytest.raises(DataError, match="is damaged"):
        read_idx_images(path)


def test_a_false_gzip_is_named(tmp_path):
    path = tmp_path / "images.gz"
    path.write_bytes(idx_bytes(pictures(4, 28, 1)))
    with pytest.raises(DataError, match="is damaged"):
        read_idx_images(path)


def test_missing_files_are_named(tmp_path, make_config):
    with pytest.raises(MissingSourceError, match="train-images-idx3-ubyte"):
        read_idx(tmp_path, make_config())


def test_stacks_are_three_grey_digits_of_the_right_split(tmp_path, make_config):
    """A test stack made of training digits would leak."""
    train, test = pictures(5, 28, 1), pictures(3, 28, 1, seed=1)
    write_idx(tmp_path, train, test)
    config = make_config(train_size=20, valid_size=4, test_size=10)
    parts = read_stacked_idx(tmp_path, config)
    assert {split: part.count for split, part in parts.items()} == {"train": 24, "test": 10}
    for split, digits in (("train", train), ("test", test)):
        known = {image.tobytes() for image in digits}
        stacks = loaded(parts[split])
        assert all(s[..., c].tobytes() in known for s in stacks for c in range(3))
        assert np.array_equal(stacks, loaded(read_stacked_idx(tmp_path, config)[split]))
    assert len({stack.tobytes() for stack in loaded(parts["train"])}) > 15


def test_stacks_need_their_numbers(tmp_path, make_config):
    with pytest.raises(DataError, match="stacked images need"):
        read_stacked_idx(tmp_path, make_config(train_size=None))
