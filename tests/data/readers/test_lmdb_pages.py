"""Our reader of LMDB pages against the library that writes them."""

import random

import lmdb
import pytest

from nvae.data.manifest import DataError
from nvae.data.readers.lmdb_pages import LmdbFile


def write(path, values, deleted=(), transactions=5):
    with lmdb.open(str(path), map_size=1 << 28) as env:
        items = list(values.items())
        for start in range(transactions):
            with env.begin(write=True) as transaction:
                for key, value in items[start::transactions]:
                    transaction.put(key, value)
        with env.begin(write=True) as transaction:
            for key in deleted:
                transaction.delete(key)
    return LmdbFile(path / "data.mdb")


@pytest.mark.parametrize("count", [0, 1, 2, 50, 3000])
@pytest.mark.parametrize("sizes", [[0, 1], [5, 300, 2000], [1900, 2030, 4000, 30_000]])
def test_what_the_library_wrote_is_read(tmp_path, count, sizes):
    """Branches of several levels, values on pages of their own, freed and used again."""
    rng = random.Random(count)
    sizes = sizes if count < 1000 else [size for size in sizes if size < 10_000]
    values = {str(i).encode(): rng.randbytes(rng.choice(sizes)) for i in range(count)}
    gone = [key for key in values if rng.random() < 0.3]
    file = write(tmp_path / "x", values, gone)
    left = {key: value for key, value in values.items() if key not in gone}
    assert len(file) == len(left)
    assert [(key, file.value(node)) for key, node in file.items()] == sorted(left.items())
    for key, value in left.items():
        assert file.value(file.find(key)) == value
    for key in [*gone, b"", b"~", b"1x"]:
        assert file.find(key) is None


def test_kinds_of_values_that_picture_data_does_not_have_are_refused(tmp_path):
    with lmdb.open(str(tmp_path / "x"), max_dbs=2, map_size=1 << 24) as env:
        database = env.open_db(b"inner")
        with env.begin(write=True) as transaction:
            transaction.put(b"a", b"b", db=database)
    file = LmdbFile(tmp_path / "x" / "data.mdb")
    ((_, node),) = file.items()
    with pytest.raises(DataError, match="of a kind that picture data does not have"):
        file.value(node)
