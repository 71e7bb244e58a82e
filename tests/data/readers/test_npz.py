"""npz batches of ImageNet: order of batches, planes, damage."""

import numpy as np
import pytest

from nvae.data.config import DataError
from nvae.data.readers import MissingSourceError
from nvae.data.readers.npz import read_npz
from tests.data.files import pictures, write_npz


def test_pixels_are_exact_and_batch_ten_comes_last(tmp_path, make_config):
    train = [pictures(2, 8, 3, seed=i) for i in range(10)]
    valid = pictures(3, 8, 3, seed=99)
    write_npz(tmp_path / "deep", train, valid)
    parts = read_npz(tmp_path, make_config())
    assert parts["train"].count == 20
    got = np.stack([item.load() for item in parts["train"].items()])
    assert np.array_equal(got, np.concatenate(train))
    assert np.array_equal(np.stack([i.load() for i in parts["valid"].items()]), valid)


def test_objects_in_an_npz_are_refused(tmp_path, make_config):
    """Object arrays are pickles, and pickles run code."""
    data = np.array([[{}]], dtype=object)
    np.savez(tmp_path / "train_data_batch_1.npz", data=data)
    with pytest.raises(DataError, match=r"train_data_batch_1\.npz"):
        read_npz(tmp_path, make_config())


@pytest.mark.parametrize("shape", [(4, 100), (4, 8, 8, 3)])
def test_other_shapes_are_refused(tmp_path, make_config, shape):
    np.savez(tmp_path / "train_data_batch_1.npz", data=np.zeros(shape, np.uint8))
    with pytest.raises(DataError, match=r"data must be \(N, 3 \* side \* side\) uint8"):
        read_npz(tmp_path, make_config())


def test_a_cut_file_is_named(tmp_path, make_config):
    write_npz(tmp_path, [pictures(2, 8, 3)], pictures(2, 8, 3))
    path = tmp_path / "val_data.npz"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError, match=r"val_data\.npz is damaged"):
        read_npz(tmp_path, make_config())


def test_missing_files_are_named(tmp_path, make_config):
    with pytest.raises(MissingSourceError, match="train_data_batch"):
        read_npz(tmp_path, make_config())
