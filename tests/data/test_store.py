"""The prepared form on disk: what was written comes back, and any damage is detected on opening."""

import io
import json
import os

import numpy as np
import pytest
import torch

from nvae.data.config import DataError
from nvae.data.loader import DenseSplit, RaggedSplit
from nvae.data.store import Manifest, map_array, open_store, read_header, read_manifest
from nvae.data.writing import StoreWriter, exclusive
from tests.data.files import pictures


def write(folder, images, *, ragged=False, name="set"):
    with exclusive(folder), StoreWriter(folder) as writer:
        size = min(min(image.shape[:2]) for image in images)
        split = writer.split("train", (size, size, 3), ragged=ragged)
        for image in images:
            split.add(image)
        writer.commit(
            Manifest(
                name=name,
                format="folder",
                source="here",
                source_digest="",
                geometry={},
                split_rule="as in the source",
                splits=writer.finish(),
            )
        )


def files(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


def data_file(folder):
    return folder / read_manifest(folder).splits["train"].pixels.file


def test_images_come_back_from_a_memory_map(tmp_path):
    images = pictures(5, 8, 3)
    write(tmp_path, images)
    split = open_store(tmp_path)["train"]
    assert isinstance(split, DenseSplit)
    assert np.array_equal(split.images.numpy(), images)
    # Plain numpy can open the file too.
    assert np.array_equal(np.load(data_file(tmp_path)), images)


def test_images_of_different_sizes_come_back(tmp_path):
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (8, w, 3), np.uint8) for w in (8, 13, 9)]
    write(tmp_path, images, ragged=True)
    split = open_store(tmp_path)["train"]
    assert isinstance(split, RaggedSplit)
    got = split.gather(torch.tensor([1]), epoch=None, seed=0)[0]
    assert np.array_equal(got.numpy(), images[1][:, 2:10])


@pytest.mark.parametrize("ragged", [True, False])
@pytest.mark.parametrize("at", [130, -1])
def test_an_altered_byte_is_found(tmp_path, at, ragged):
    write(tmp_path, pictures(5, 8, 3), ragged=ragged)
    path = data_file(tmp_path)
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match="was altered"):
        open_store(tmp_path)


@pytest.mark.parametrize("change", [lambda d: d[:-1], lambda d: d + b"x", lambda d: b""])
def test_a_file_of_another_length_is_found(tmp_path, change):
    write(tmp_path, pictures(5, 8, 3))
    path = data_file(tmp_path)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(DataError, match="bytes instead of"):
        open_store(tmp_path)


def test_an_altered_header_is_found(tmp_path):
    write(tmp_path, pictures(5, 8, 3))
    path = data_file(tmp_path)
    path.write_bytes(path.read_bytes().replace(b"(5, 8, 8, 3)", b"(5, 8, 4, 6)"))
    with pytest.raises(DataError, match=r"images of \(8, 4, 6\)"):
        open_store(tmp_path)


def test_a_missing_file_is_found(tmp_path):
    write(tmp_path, pictures(5, 8, 3))
    data_file(tmp_path).unlink()
    with pytest.raises(DataError, match="cannot be read"):
        open_store(tmp_path)


def test_a_whole_copy_is_accepted_and_checked_once(tmp_path, monkeypatch):
    """Reading 14 GB for a checksum at every start would be a nuisance."""
    write(tmp_path, pictures(5, 8, 3))
    path = data_file(tmp_path)
    os.utime(path, (1, 1))
    open_store(tmp_path)
    monkeypatch.setattr("nvae.data.store.checksum", lambda path: pytest.fail("read again"))
    open_store(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": 99}, "version 99, this program reads 1"),
        ({"splits": {"train": {}}}, "is not valid: splits.train lacks count, pixels, shape"),
        ({"splits": 3}, "is not valid"),
        ({"extra": 1}, "is not valid"),
    ],
)
def test_a_manifest_of_another_make_is_refused(tmp_path, change, words):
    write(tmp_path, pictures(5, 8, 3))
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DataError, match=words):
        open_store(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "null"])
def test_a_broken_manifest_is_refused(tmp_path, text):
    write(tmp_path, pictures(5, 8, 3))
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(DataError, match=r"manifest\.json"):
        open_store(tmp_path)


def test_a_manifest_cannot_point_outside_its_folder(tmp_path):
    write(tmp_path, pictures(5, 8, 3))
    path = tmp_path / "manifest.json"
    content = json.loads(path.read_text())
    content["splits"]["train"]["pixels"]["file"] = "../secret.npy"
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match="leads out of the folder"):
        open_store(tmp_path)


def test_positions_outside_the_pixels_are_refused(tmp_path):
    write(tmp_path, pictures(2, 8, 3), ragged=True)
    layout = tmp_path / read_manifest(tmp_path).splits["train"].layout.file
    content = json.loads((tmp_path / "manifest.json").read_text())
    array = np.load(layout)
    array[1, 0] += 1
    np.save(layout, array)
    from nvae.data.store import checksum

    content["splits"]["train"]["layout"]["sha256"] = checksum(layout)
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="outside its pixels"):
        open_store(tmp_path)


def test_a_failed_second_preparation_leaves_the_first_untouched(tmp_path):
    images = pictures(5, 8, 3)
    write(tmp_path, images)
    before = files(tmp_path)

    def failing():
        yield from pictures(3, 8, 3, seed=1)
        raise KeyboardInterrupt

    def interrupted():
        with StoreWriter(tmp_path) as writer:
            split = writer.split("train", (8, 8, 3), ragged=False)
            for image in failing():
                split.add(image)

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert files(tmp_path) == before
    assert np.array_equal(open_store(tmp_path)["train"].images.numpy(), images)


def test_a_second_preparation_replaces_the_first_and_its_files(tmp_path):
    write(tmp_path, pictures(5, 8, 3))
    images = pictures(6, 8, 3, seed=1)
    write(tmp_path, images)
    assert np.array_equal(open_store(tmp_path)["train"].images.numpy(), images)
    assert len(list(tmp_path.glob("*.npy"))) == 1


def test_what_a_killed_preparation_left_is_cleared_by_the_next(tmp_path):
    (tmp_path / "train.partial").write_bytes(b"half")
    (tmp_path / "train-0123456789ab.npy").write_bytes(b"unnamed by any manifest")
    write(tmp_path, pictures(5, 8, 3))
    assert files(tmp_path) == sorted(["manifest.json", "verified.json", data_file(tmp_path).name])


@pytest.mark.parametrize("version", [(1, 0), (2, 0)])
@pytest.mark.parametrize(("shape", "dtype"), [((5, 8, 8, 3), "|u1"), ((4, 3), "<i8"), ((), "|u1")])
def test_headers_that_numpy_writes(tmp_path, shape, dtype, version):
    array = np.arange(int(np.prod(shape)), dtype=dtype).reshape(shape)
    path = tmp_path / "a.npy"
    with path.open("wb") as file:
        np.lib.format.write_array(file, array, version)
    header = read_header(io.BytesIO(path.read_bytes()), (dtype,))
    assert (header.shape, header.dtype) == (shape, dtype)
    assert header.bytes == path.stat().st_size
    assert np.array_equal(map_array(path, dtype).numpy(), array)


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros((2, 3), np.int8), "it holds |i1, not |u1"),
        (np.zeros((2, 3), np.uint8, order="F"), "not in C order"),
        (np.array([{}]), "it holds |O"),
        (np.zeros(2, [("a", "u1")]), "it holds |V1"),
    ],
)
def test_other_arrays_are_refused(array, words):
    file = io.BytesIO()
    np.save(file, array)
    with pytest.raises(ValueError) as error:  # noqa: PT011
        read_header(io.BytesIO(file.getvalue()), ("|u1",))
    assert words in str(error.value)


@pytest.mark.parametrize("change", [lambda d: d[:-1], lambda d: d + b"x", lambda d: d[:50]])
def test_a_file_of_another_length_than_its_header_says_is_refused(tmp_path, change):
    np.save(tmp_path / "a.npy", np.zeros((4, 3), np.uint8))
    data = change((tmp_path / "a.npy").read_bytes())
    (tmp_path / "a.npy").write_bytes(data)
    with pytest.raises(ValueError, match="header"):
        map_array(tmp_path / "a.npy", "|u1")


@pytest.mark.parametrize(
    "shape", ["(2L, 3L)", "(True, 3)", "(-2, 3)", "(2**70, 3)", "2", "(2.0, 3)"]
)
def test_shapes_that_numpy_frowns_at_or_lets_pass(recwarn, shape):
    text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}"
    data = b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little") + f"{text:<117}\n".encode()
    if shape == "(2L, 3L)":  # as Python 2 wrote them
        assert read_header(io.BytesIO(data), ("|u1",)).shape == (2, 3)
    else:
        with pytest.raises(ValueError, match="header"):
            read_header(io.BytesIO(data), ("|u1",))
    assert not recwarn.list
