"""LMDBs: LSUN's, the reference's, and our reader of pages against the library that writes them."""

import random
import struct
import tracemalloc

import lmdb
import numpy as np
import pytest

from nvae.data.config import DataError
from nvae.data.pixels import BadImageError
from nvae.data.readers import MissingSourceError, read_source
from nvae.data.readers.lmdb import LmdbFile, decode_raw
from tests.data.files import encoded, pictures, write_lmdb, write_reference_lmdb


def test_reference_layout_in_numeric_order(tmp_path, make_config):
    """Keys sort as text in LMDB: 10 comes before 2."""
    train = pictures(12, 8, 3)
    write_reference_lmdb(tmp_path, [i.tobytes() for i in train], [encoded(train[0])])
    parts = read_source(tmp_path, "lmdb", make_config())
    got = np.stack([item.load().picture for item in parts["train"].items()])
    assert np.array_equal(got, train)
    (valid,) = parts["valid"].items()
    assert valid.load().picture == encoded(train[0])


@pytest.mark.parametrize("value", [b"", b"12345", bytes(3 * 8 * 9)])
def test_values_that_are_neither_picture_nor_square_are_refused(value):
    with pytest.raises(BadImageError, match="neither a picture nor a square"):
        decode_raw(value)


def test_a_missing_key_is_named(tmp_path, make_config):
    write_lmdb(tmp_path / "train.lmdb", {b"0": bytes(192), b"2": bytes(192)})
    part = read_source(tmp_path, "lmdb", make_config())["train"]
    with pytest.raises(DataError, match="no key '1'"):
        list(part.items())


def test_a_cut_database_is_found_before_it_kills_the_process(tmp_path, make_config):
    """LMDB maps the file: reading behind its end is a bus error, not an exception."""
    write_reference_lmdb(tmp_path, [i.tobytes() for i in pictures(40, 32, 3)], [])
    data = tmp_path / "train.lmdb" / "data.mdb"
    data.write_bytes(data.read_bytes()[: 1 << 14])
    with pytest.raises(DataError, match="cut short: it has 16384 bytes"):
        read_source(tmp_path, "lmdb", make_config())


@pytest.mark.parametrize("content", [b"", b"no database" * 1000])
def test_another_file_is_refused(tmp_path, make_config, content):
    (tmp_path / "train.lmdb").mkdir()
    (tmp_path / "train.lmdb" / "data.mdb").write_bytes(content)
    with pytest.raises(DataError, match="cannot be opened"):
        read_source(tmp_path, "lmdb", make_config())


def test_lsun_reads_every_value_of_both_splits(tmp_path, make_config):
    images = {f"{i:040x}".encode(): encoded(p) for i, p in enumerate(pictures(5, 9, 3))}
    write_lmdb(tmp_path / "church_outdoor_train_lmdb", images)
    write_lmdb(tmp_path / "church_outdoor_val_lmdb", dict(list(images.items())[:2]))
    parts = read_source(tmp_path, "lsun", make_config())
    assert [item.load().picture for item in parts["train"].items()] == list(images.values())
    assert parts["valid"].count == 2


def test_several_categories_in_one_folder_are_refused(tmp_path, make_config):
    for name in ("tower", "bedroom"):
        write_lmdb(tmp_path / f"{name}_train_lmdb", {b"k": b"v"})
    with pytest.raises(DataError, match="bedroom_train_lmdb, tower_train_lmdb"):
        read_source(tmp_path, "lsun", make_config())


@pytest.mark.parametrize("kind", ["lsun", "lmdb"])
def test_missing_databases_are_named(tmp_path, make_config, kind):
    with pytest.raises(MissingSourceError, match="train"):
        read_source(tmp_path, kind, make_config())


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


def test_kinds_of_values_that_picture_data_does_not_have_are_refused(tmp_path):
    with lmdb.open(str(tmp_path / "x"), max_dbs=2, map_size=1 << 24) as env:
        database = env.open_db(b"inner")
        with env.begin(write=True) as transaction:
            transaction.put(b"a", b"b", db=database)
    file = LmdbFile(tmp_path / "x" / "data.mdb")
    ((_, node),) = file.items()
    with pytest.raises(DataError, match="of a kind that picture data does not have"):
        file.value(node)


def test_keys_that_overlap_take_no_memory(tmp_path, make_config):
    """A page of 64 KiB whose 30,000 nodes have keys of 64 KiB each, one over the other."""
    entries, size = 30_000, 1 << 16
    page = struct.pack("<QHHHH", 2, 0, 2, 16 + 2 * entries, 0)
    page += struct.pack(f"<{entries}H", *(size - 8 - i % 4000 for i in range(entries)))
    page = page.ljust(size, b"\xff")
    tree = struct.pack("<IHHQQQQQ", size, 0, 1, 0, 1, 0, entries, 2)
    meta = struct.pack("<QHHHH", 0, 0, 8, 0, 0) + struct.pack("<IIQQ", 0xBEEFC0DE, 1, 0, 0)
    meta = (meta + tree + tree + struct.pack("<QQ", 2, 1)).ljust(size, b"\0")
    (tmp_path / "train.lmdb").write_bytes(meta + bytes(size) + page + bytes(4 * size))
    part = read_source(tmp_path, "lmdb", make_config())["train"]
    tracemalloc.start()
    with pytest.raises(DataError, match="no key '0'"):
        next(part.items())
    assert tracemalloc.get_traced_memory()[1] < 32 << 20
    tracemalloc.stop()
