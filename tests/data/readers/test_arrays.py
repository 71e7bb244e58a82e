"""IDX, CIFAR-10, Omniglot and npz: exact pixels, every kind of damage named, no code ever run."""

import gzip
import os
import pickle
import struct
import tarfile

import numpy as np
import pytest
from scipy.io import savemat

from nvae.data.config import DataError
from nvae.data.readers import MissingSourceError, read_source
from nvae.data.readers.arrays import cifar_images, read_idx
from tests.data.files import (
    add_to_tar,
    cifar_batches,
    idx_bytes,
    pictures,
    write_chardata,
    write_cifar,
    write_idx,
    write_npz,
)


def loaded(part):
    return np.stack([item.load().picture for item in part.items()])


@pytest.mark.parametrize("compress", [True, False])
def test_idx_pixels_are_exact(tmp_path, make_config, compress):
    train, test = pictures(5, 28, 1), pictures(3, 28, 1, seed=1)
    # torchvision keeps its files deeper down.
    write_idx(tmp_path / "MNIST" / "raw", train, test, compress=compress)
    parts = read_source(tmp_path, "idx", make_config())
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
def test_damage_of_idx_is_named(tmp_path, damage, words, compress):
    data = damage(idx_bytes(pictures(4, 28, 1)))
    path = tmp_path / f"images{'.gz' if compress else ''}"
    path.write_bytes(gzip.compress(data) if compress else data)
    with pytest.raises(DataError, match=words):
        read_idx(path)


def test_a_cut_gzip_is_named(tmp_path):
    path = tmp_path / "images.gz"
    path.write_bytes(gzip.compress(idx_bytes(pictures(4, 28, 1)))[:-20])
    with pytest.raises(DataError, match="is damaged"):
        read_idx(path)


def test_a_false_gzip_is_named(tmp_path):
    path = tmp_path / "images.gz"
    path.write_bytes(idx_bytes(pictures(4, 28, 1)))
    with pytest.raises(DataError, match="is damaged"):
        read_idx(path)


def test_missing_files_are_named(tmp_path, make_config):
    with pytest.raises(MissingSourceError, match="train-images-idx3-ubyte"):
        read_source(tmp_path, "idx", make_config())


def test_stacks_are_three_gray_digits_of_the_right_split(tmp_path, make_config):
    """A test stack made of training digits would leak."""
    train, test = pictures(5, 28, 1), pictures(3, 28, 1, seed=1)
    write_idx(tmp_path, train, test)
    config = make_config(train_size=20, valid_size=4, test_size=10)
    parts = read_source(tmp_path, "stacked_idx", config)
    assert {split: part.count for split, part in parts.items()} == {"train": 24, "test": 10}
    for split, digits in (("train", train), ("test", test)):
        known = {image.tobytes() for image in digits}
        stacks = loaded(parts[split])
        assert all(s[..., c].tobytes() in known for s in stacks for c in range(3))
        assert np.array_equal(stacks, loaded(read_source(tmp_path, "stacked_idx", config)[split]))
    assert len({stack.tobytes() for stack in loaded(parts["train"])}) > 15


def test_stacks_need_their_numbers(tmp_path, make_config):
    with pytest.raises(DataError, match="stacked images need"):
        read_source(tmp_path, "stacked_idx", make_config(train_size=None))


@pytest.mark.parametrize("archive", [True, False])
def test_cifar_pixels_are_exact(tmp_path, make_config, archive):
    train, test = pictures(10, 32, 3), pictures(4, 32, 3, seed=1)
    write_cifar(tmp_path, train, test, archive=archive)
    parts = read_source(tmp_path, "cifar", make_config())
    assert np.array_equal(loaded(parts["train"]), train)
    assert np.array_equal(loaded(parts["test"]), test)


def python_2_batch(images):
    """As the distributed files are: texts of bytes, numbered places, which no Python writes now."""
    rows = images.transpose(0, 3, 1, 2).tobytes()
    count = len(images)
    names = b"".join(b"U\x08%04d.pngr%s" % (i, struct.pack("<I", 3072)) for i in range(count))
    return b"".join(
        [
            b"\x80\x02}q\x01(U\x06labelsq\x02]q\x03(" + b"K\x03" * count + b"eU\x04dataq\x05",
            b"cnumpy.core.multiarray\n_reconstruct\nq\x07cnumpy\nndarray\nq\x08K\x00\x85U\x01b\x87",
            b"Rq\x09(K\x01M" + struct.pack("<H", count) + b"M\x00\x0c\x86cnumpy\ndtype\nq\x0a",
            b"U\x02u1K\x00K\x01\x87Rq\x0b(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb",
            b"\x89T" + struct.pack("<I", len(rows)) + rows + b"tb",
            b"U\x09filenamesq\x0c](" + names + b"eu.",
        ]
    )


def test_cifar_batches_as_python_2_wrote_them():
    images = pictures(6, 32, 3)
    data = python_2_batch(images)
    unpickled = pickle.loads(data, encoding="bytes")[b"data"]
    assert np.array_equal(unpickled.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), images)
    assert np.array_equal(cifar_images(data, "batch"), images)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((2, 3072), np.int8),
        np.zeros((2, 768), np.float32),
        np.asfortranarray(pictures(2, 32, 3).reshape(2, 3072)),
        np.zeros((4, 1536), np.uint8),
    ],
    ids=["signed", "float", "fortran", "shape"],
)
def test_arrays_of_another_layout_are_no_batch(array):
    for protocol in range(3):
        with pytest.raises(DataError, match="not a CIFAR batch"):
            cifar_images(pickle.dumps({b"data": array}, protocol), "batch")


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
        cifar_images(data, "batch")
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
        cifar_images(source, "batch")


def test_a_hostile_batch_in_an_archive_stops_everything(tmp_path, make_config):
    batches = cifar_batches(pictures(10, 32, 3), pictures(4, 32, 3))
    batches["data_batch_3"] = pickle.dumps(Bomb(tmp_path / "harm"))
    with tarfile.open(tmp_path / "cifar-10-python.tar.gz", "w:gz") as tar:
        for name, data in batches.items():
            add_to_tar(tar, f"../../{name}", data)
    with pytest.raises(DataError, match="data_batch_3 is refused"):
        read_source(tmp_path, "cifar", make_config())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cifar-10-python.tar.gz"]


@pytest.mark.parametrize("content", [{}, [], {b"data": np.zeros((2, 5), np.uint8)}, {b"data": "x"}])
def test_pickles_of_something_else_are_refused(tmp_path, make_config, content):
    write_cifar(tmp_path, pictures(10, 32, 3), pictures(4, 32, 3), archive=False)
    (tmp_path / "data_batch_2").write_bytes(pickle.dumps(content))
    with pytest.raises(DataError, match="data_batch_2 is not a CIFAR batch"):
        read_source(tmp_path, "cifar", make_config())


def test_damage_of_a_batch_is_named(tmp_path, make_config):
    write_cifar(tmp_path, pictures(10, 32, 3), pictures(4, 32, 3))
    path = tmp_path / "cifar-10-python.tar.gz"
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(DataError, match="is damaged"):
        read_source(tmp_path, "cifar", make_config())


def test_a_missing_batch_is_named(tmp_path, make_config):
    with tarfile.open(tmp_path / "cifar-10-python.tar.gz", "w:gz") as tar:
        add_to_tar(tar, "data_batch_1", b"")
    with pytest.raises(DataError, match=r"lacks data_batch_2, .*test_batch"):
        read_source(tmp_path, "cifar", make_config())


def test_pixels_are_exact_and_upright(tmp_path, make_config):
    train, test = pictures(6, 28, 1), pictures(3, 28, 1, seed=1)
    write_chardata(tmp_path, train, test)
    parts = read_source(tmp_path, "omniglot", make_config())
    for split, wanted in (("train", train), ("test", test)):
        assert np.array_equal(np.stack([i.load().picture for i in parts[split].items()]), wanted)


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
    parts = read_source(tmp_path, "omniglot", make_config())
    for split, key in (("train", "data"), ("test", "testdata")):
        got = np.stack([item.load().picture for item in parts[split].items()])
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
        read_source(tmp_path, "omniglot", make_config())


@pytest.mark.parametrize("keep", [0, 100, 1000])
def test_a_cut_file_is_named(tmp_path, make_config, keep):
    write_chardata(tmp_path, pictures(6, 28, 1), pictures(3, 28, 1))
    path = tmp_path / "chardata.mat"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match=r"chardata\.mat"):
        read_source(tmp_path, "omniglot", make_config())


def test_npz_pixels_are_exact_and_batch_ten_comes_last(tmp_path, make_config):
    train = [pictures(2, 8, 3, seed=i) for i in range(10)]
    valid = pictures(3, 8, 3, seed=99)
    write_npz(tmp_path / "deep", train, valid)
    parts = read_source(tmp_path, "npz", make_config())
    assert parts["train"].count == 20
    got = np.stack([item.load().picture for item in parts["train"].items()])
    assert np.array_equal(got, np.concatenate(train))
    assert np.array_equal(np.stack([i.load().picture for i in parts["valid"].items()]), valid)


def test_objects_in_an_npz_are_refused(tmp_path, make_config):
    """Object arrays are pickles, and pickles run code."""
    data = np.array([[{}]], dtype=object)
    np.savez(tmp_path / "train_data_batch_1.npz", data=data)
    with pytest.raises(DataError, match=r"train_data_batch_1\.npz"):
        read_source(tmp_path, "npz", make_config())


@pytest.mark.parametrize("shape", [(4, 100), (4, 8, 8, 3)])
def test_other_shapes_are_refused(tmp_path, make_config, shape):
    np.savez(tmp_path / "train_data_batch_1.npz", data=np.zeros(shape, np.uint8))
    with pytest.raises(DataError, match=r"data must be \(N, 3 \* side \* side\) uint8"):
        read_source(tmp_path, "npz", make_config())


def test_a_cut_npz_is_named(tmp_path, make_config):
    write_npz(tmp_path, [pictures(2, 8, 3)], pictures(2, 8, 3))
    path = tmp_path / "val_data.npz"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError, match=r"val_data\.npz is damaged"):
        read_source(tmp_path, "npz", make_config())


def test_missing_npz_files_are_named(tmp_path, make_config):
    with pytest.raises(MissingSourceError, match="train_data_batch"):
        read_source(tmp_path, "npz", make_config())
