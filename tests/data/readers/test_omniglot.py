"""chardata.mat: orientation, scale, damage."""

import numpy as np
import pytest
from scipy.io import savemat

from nvae.data.manifest import DataError
from nvae.data.readers.omniglot import read_omniglot
from tests.data.files import pictures, write_chardata


def test_pixels_are_exact_and_upright(tmp_path, make_config):
    train, test = pictures(6, 28, 1), pictures(3, 28, 1, seed=1)
    write_chardata(tmp_path, train, test)
    parts = read_omniglot(tmp_path, make_config())
    for split, wanted in (("train", train), ("test", test)):
        assert np.array_equal(np.stack([i.load() for i in parts[split].items()]), wanted)


@pytest.mark.parametrize(
    "options", [{"do_compression": True}, {"format": "4"}, {"do_compression": False}]
)
@pytest.mark.parametrize("dtype", [float, np.float32])
def test_every_version_of_the_file_is_read(tmp_path, make_config, options, dtype):
    rng = np.random.default_rng(0)
    values = {
        k: rng.integers(0, 2, (784, n)).astype(dtype) for k, n in (("data", 5), ("testdata", 3))
    }
    savemat(tmp_path / "chardata.mat", {**values, "target": np.zeros((3, 7))}, **options)
    parts = read_omniglot(tmp_path, make_config())
    for split, key in (("train", "data"), ("test", "testdata")):
        got = np.stack([item.load() for item in parts[split].items()])
        wanted = (255 * values[key].T).reshape(-1, 28, 28).transpose(0, 2, 1)
        assert np.array_equal(got[..., 0], wanted)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"data": np.zeros((784, 2))}, "no 'testdata'"),
        ({"data": np.zeros((10, 2)), "testdata": np.zeros((784, 2))}, "no 'data' of 784 rows"),
        ({"data": np.full((784, 2), 255.0), "testdata": np.zeros((784, 2))}, "between 0 and 1"),
        ({"data": np.full((784, 2), np.nan), "testdata": np.zeros((784, 2))}, "between 0 and 1"),
    ],
)
def test_other_content_is_refused(tmp_path, make_config, content, words):
    savemat(tmp_path / "chardata.mat", content)
    with pytest.raises(DataError, match=words):
        read_omniglot(tmp_path, make_config())


@pytest.mark.parametrize("keep", [0, 100, 1000])
def test_a_cut_file_is_named(tmp_path, make_config, keep):
    write_chardata(tmp_path, pictures(6, 28, 1), pictures(3, 28, 1))
    path = tmp_path / "chardata.mat"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match=r"chardata\.mat"):
        read_omniglot(tmp_path, make_config())
