"""CIFAR pickles: exact pixels, and no code is ever run."""

import os
import pickle
import tarfile

import numpy as np
import pytest

from nvae.data.manifest import DataError
from nvae.data.readers.cifar import read_cifar, unpickle_arrays
from tests.data.files import add_to_tar, cifar_batches, pictures, write_cifar


def loaded(part):
    return np.stack([item.load() for item in part.items()])


@pytest.mark.parametrize("archive", [True, False])
def test_pixels_are_exact(tmp_path, make_config, archive):
    train, test = pictures(10, 32, 3), pictures(4, 32, 3, seed=1)
    write_cifar(tmp_path, train, test, archive=archive)
    parts = read_cifar(tmp_path, make_config())
    assert np.array_equal(loaded(parts["train"]), train)
    assert np.array_equal(loaded(parts["test"]), test)


class Bomb:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_that_runs_code_is_refused_before_it_runs(tmp_path, protocol):
    target = tmp_path / "harm"
    data = pickle.dumps({b"data": Bomb(target)}, protocol=protocol)
    with pytest.raises(DataError, match=r"is refused: it asks for .*mkdir"):
        unpickle_arrays(data, "batch")
    assert not target.exists()


@pytest.mark.parametrize(
    "source",
    [
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"c__builtin__\nexec\n(S'1'\ntR.",
        b"cnumpy\nload\n.",
        b"\x80\x04\x8c\x05numpy\x8c\x0ccore.fromstr\x93.",
        b"cnumpy.core.multiarray\n_reconstruct.__globals__\n.",
    ],
)
def test_other_names_are_refused(source):
    with pytest.raises(DataError, match="is refused"):
        unpickle_arrays(source, "batch")


def test_a_hostile_batch_in_an_archive_stops_everything(tmp_path, make_config):
    batches = cifar_batches(pictures(10, 32, 3), pictures(4, 32, 3))
    batches["data_batch_3"] = pickle.dumps(Bomb(tmp_path / "harm"))
    with tarfile.open(tmp_path / "cifar-10-python.tar.gz", "w:gz") as tar:
        for name, data in batches.items():
            add_to_tar(tar, f"../../{name}", data)
    with pytest.raises(DataError, match="data_batch_3 is refused"):
        read_cifar(tmp_path, make_config())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cifar-10-python.tar.gz"]


@pytest.mark.parametrize("content", [{}, [], {b"data": np.zeros((2, 5), np.uint8)}, {b"data": "x"}])
def test_pickles_of_something_else_are_refused(tmp_path, make_config, content):
    write_cifar(tmp_path, pictures(10, 32, 3), pictures(4, 32, 3), archive=False)
    (tmp_path / "data_batch_2").write_bytes(pickle.dumps(content))
    with pytest.raises(DataError, match="data_batch_2 is not a CIFAR batch"):
        read_cifar(tmp_path, make_config())


def test_damage_is_named(tmp_path, make_config):
    write_cifar(tmp_path, pictures(10, 32, 3), pictures(4, 32, 3))
    path = tmp_path / "cifar-10-python.tar.gz"
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(DataError, match="is damaged"):
        read_cifar(tmp_path, make_config())


def test_a_missing_batch_is_named(tmp_path, make_config):
    with tarfile.open(tmp_path / "cifar-10-python.tar.gz", "w:gz") as tar:
        add_to_tar(tar, "data_batch_1", b"")
    with pytest.raises(DataError, match=r"lacks data_batch_2, .*test_batch"):
        read_cifar(tmp_path, make_config())
