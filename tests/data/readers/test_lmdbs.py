"""LSUN's LMDB and the reference's: values, order, damage."""

import numpy as np
import pytest

from nvae.data.images import BadImageError
from nvae.data.manifest import DataError
from nvae.data.readers.lmdbs import decode_raw, read_lsun, read_reference_lmdb
from nvae.data.readers.source import MissingSourceError
from tests.data.files import encoded, pictures, write_lmdb, write_reference_lmdb


def test_reference_layout_in_numeric_order(tmp_path, make_config):
    """Keys sort as text in LMDB: 10 comes before 2."""
    train = pictures(12, 8, 3)
    write_reference_lmdb(tmp_path, [i.tobytes() for i in train], [encoded(train[0])])
    parts = read_reference_lmdb(tmp_path, make_config())
    got = np.stack([item.load() for item in parts["train"].items()])
    assert np.array_equal(got, train)
    (valid,) = parts["valid"].items()
    assert valid.load() == encoded(train[0])


@pytest.mark.parametrize("value", [b"", b"12345", bytes(3 * 8 * 9)])
def test_values_that_are_neither_picture_nor_square_are_refused(value):
    with pytest.raises(BadImageError, match="neither a picture nor a square"):
        decode_raw(value)


def test_a_missing_key_is_named(tmp_path, make_config):
    write_lmdb(tmp_path / "train.lmdb", {b"0": bytes(192), b"2": bytes(192)})
    part = read_reference_lmdb(tmp_path, make_config())["train"]
    with pytest.raises(DataError, match="no key '1'"):
        list(part.items())


def test_a_cut_database_is_found_before_it_kills_the_process(tmp_path, make_config):
    """LMDB maps the file: reading behind its end is a bus error, not an exception."""
    write_reference_lmdb(tmp_path, [i.tobytes() for i in pictures(40, 32, 3)], [])
    data = tmp_path / "train.lmdb" / "data.mdb"
    data.write_bytes(data.read_bytes()[: 1 << 14])
    with pytest.raises(DataError, match="cut short: it has 16384 bytes"):
        read_reference_lmdb(tmp_path, make_config())


@pytest.mark.parametrize("content", [b"", b"no database" * 1000])
def test_another_file_is_refused(tmp_path, make_config, content):
    (tmp_path / "train.lmdb").mkdir()
    (tmp_path / "train.lmdb" / "data.mdb").write_bytes(content)
    with pytest.raises(DataError, match="cannot be opened"):
        read_reference_lmdb(tmp_path, make_config())


def test_lsun_reads_every_value_of_both_splits(tmp_path, make_config):
    images = {f"{i:040x}".encode(): encoded(p) for i, p in enumerate(pictures(5, 9, 3))}
    write_lmdb(tmp_path / "church_outdoor_train_lmdb", images)
    write_lmdb(tmp_path / "church_outdoor_val_lmdb", dict(list(images.items())[:2]))
    parts = read_lsun(tmp_path, make_config())
    assert [item.load() for item in parts["train"].items()] == list(images.values())
    assert parts["valid"].count == 2


def test_several_categories_in_one_folder_are_refused(tmp_path, make_config):
    for name in ("tower", "bedroom"):
        write_lmdb(tmp_path / f"{name}_train_lmdb", {b"k": b"v"})
    with pytest.raises(DataError, match="bedroom_train_lmdb, tower_train_lmdb"):
        read_lsun(tmp_path, make_config())


@pytest.mark.parametrize("reader", [read_lsun, read_reference_lmdb])
def test_missing_databases_are_named(tmp_path, make_config, reader):
    with pytest.raises(MissingSourceError, match="train"):
        reader(tmp_path, make_config())
