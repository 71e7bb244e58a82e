"""TFRecords without TensorFlow: layouts, checksums, malformed messages."""

import contextlib

import numpy as np
import pytest

from nvae.data.config import DataError
from nvae.data.pixels import BadImageError
from nvae.data.readers import MissingSourceError, read_source
from nvae.data.readers.tfrecord import crc32c, decode_example, masked_crc32c
from tests.data.files import crc32c_reference, example, field, masked, pictures, write_tfrecords


def loaded(part):
    return np.stack([item.load().picture for item in part.items()])


@pytest.mark.parametrize("planes", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_pixels_are_exact_in_either_layout(tmp_path, make_config, planes, packed):
    train, valid = pictures(5, 8, 3), pictures(2, 8, 3, seed=1)
    write_tfrecords(tmp_path / "train" / "a.tfrecords", train[:3], planes=planes, packed=packed)
    write_tfrecords(tmp_path / "train" / "b.tfrecords", train[3:], planes=planes, packed=packed)
    write_tfrecords(tmp_path / "validation" / "a.tfrecords", valid, planes=planes, packed=packed)
    parts = read_source(tmp_path, "tfrecord", make_config())
    assert parts["train"].count == 5
    assert np.array_equal(loaded(parts["train"]), train)
    assert np.array_equal(loaded(parts["valid"]), valid)


def test_of_a_pyramid_only_the_wanted_resolution_is_read(tmp_path, make_config):
    for level in (2, 3, 4):
        path = tmp_path / "train" / f"train-r{level:02d}-s-0000-of-0001.tfrecords"
        write_tfrecords(path, pictures(2, 2**level, 3))
    for size, side in ((8, 8), (16, 16), (64, 16)):
        part = read_source(tmp_path, "tfrecord", make_config(image_size=size))["train"]
        assert loaded(part).shape == (2, side, side, 3)


def test_one_file_is_one_part(tmp_path, make_config):
    write_tfrecords(tmp_path / "ffhq.tfrecords", pictures(4, 8, 3))
    assert read_source(tmp_path / "ffhq.tfrecords", "tfrecord", make_config())["train"].count == 4


def test_a_wrong_checksum_of_the_pixels_is_found(tmp_path, make_config):
    path = tmp_path / "a.tfrecord"
    write_tfrecords(path, pictures(2, 8, 3))
    data = bytearray(path.read_bytes())
    data[60] ^= 1
    path.write_bytes(data)
    first, second = read_source(tmp_path, "tfrecord", make_config())["train"].items()
    with pytest.raises(BadImageError, match="checksum is wrong"):
        first.load()
    second.load()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda d: d[:-3], "cut short in record 1"),
        (lambda d: d + b"\x01", "cut short in record 2"),
        (lambda d: b"\x01" + d[1:], "length's checksum is wrong"),
    ],
)
def test_damaged_framing_is_found_before_any_work(tmp_path, make_config, damage, words):
    path = tmp_path / "a.tfrecord"
    write_tfrecords(path, pictures(2, 8, 3))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=words):
        read_source(tmp_path, "tfrecord", make_config())


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (b"", "lacks 'shape' or 'data'"),
        (field(1, b""), "lacks"),
        (example((8, 8, 3), bytes(10)), r"10 bytes, its shape is \[8, 8, 3\]"),
        (example((8, 8), bytes(64)), "its shape is"),
        (example((4, 4, 4), bytes(64)), "neither 1 nor 3 channels"),
        (example((8, 8, 3), bytes(192))[:-4], "cut short"),
        (b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff", "malformed"),
        (b"\x0b", "malformed"),
    ],
)
def test_malformed_messages_are_refused(message, words):
    with pytest.raises(BadImageError, match=words):
        decode_example(message)


def test_random_bytes_never_do_worse_than_being_refused():
    rng = np.random.default_rng(0)
    good = example((4, 4, 3), bytes(48))
    for _ in range(300):
        noisy = bytearray(good)
        for at in rng.integers(0, len(noisy), 3):
            noisy[at] = rng.integers(256)
        with contextlib.suppress(BadImageError):
            assert decode_example(bytes(noisy)).ndim == 3


def test_missing_files_are_named(tmp_path, make_config):
    with pytest.raises(MissingSourceError, match="tfrecord"):
        read_source(tmp_path, "tfrecord", make_config())


@pytest.mark.parametrize(
    ("data", "crc"),
    [
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (b"123456789", 0xE3069283),
        (b"", 0),
    ],
)
def test_published_vectors(data, crc):
    assert crc32c(data) == crc


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 31, 33, 63, 64, 65, 1000, 4097])
def test_every_length_agrees_with_the_bitwise_form(length):
    data = np.random.default_rng(length).bytes(length)
    assert crc32c(data) == crc32c_reference(data)
    assert masked_crc32c(data).to_bytes(4, "little") == masked(data)
