"""Arrays in NPY, NPZ, HDF5 and Zarr: every number in every layout, and what are no images."""

import sys
from dataclasses import replace

import numpy as np
import pytest

from nvae.data.config import DataError
from nvae.data.readers import MissingSourceError, detect_format, read_source
from nvae.data.readers.array_files import Arrays

N, H, W, C = 7, 6, 9, 5


def numbers(n=N, *, channels=C, dtype=np.uint16, seed=0):
    shape = (n, H, W) if channels is None else (n, H, W, channels)
    return np.random.default_rng(seed).integers(0, 4096, shape).astype(dtype)


def npy(folder, arrays):
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    return folder


def npz(folder, arrays):
    np.savez(folder / "all.npz", **arrays)
    return folder / "all.npz"


def packed_npz(folder, arrays):
    np.savez_compressed(folder / "all.npz", **arrays)
    return folder


def hdf5(folder, arrays):
    h5py = pytest.importorskip("h5py")
    with h5py.File(folder / "all.h5", "w") as file:
        for name, array in arrays.items():
            kind = h5py.string_dtype() if array.dtype.kind == "U" else None
            data = array.tolist() if kind else array
            file.create_dataset(name.replace("_", "/"), data=data, dtype=kind)
    return folder / "all.h5"


def packed_hdf5(folder, arrays):
    h5py = pytest.importorskip("h5py")
    with h5py.File(folder / "all.hdf5", "w") as file:
        for name, array in arrays.items():
            file.create_dataset(name, data=array, compression="gzip", shuffle=True)
    return folder


def zarr(folder, arrays, **options):
    root = pytest.importorskip("zarr").open_group(str(folder / "all.zarr"), mode="w", **options)
    for name, array in arrays.items():
        root.create_array(name, shape=array.shape, dtype=array.dtype)[...] = array
    return folder / "all.zarr"


def old_zarr(folder, arrays):
    return zarr(folder, arrays, zarr_format=2)


FILES = {f.__name__: f for f in (npy, npz, packed_npz, hdf5, packed_hdf5, zarr, old_zarr)}


def parts_of(source, make_config, **overrides):
    values = {"image_size": [H, W], "channels": C, "bits": 12, "format": "arrays"} | overrides
    return read_source(source, "arrays", make_config(**values))


def read(part):
    loaded = [item.load() for item in part.items()]
    assert len(loaded) == part.count
    return np.stack([each.picture for each in loaded]), [each.label for each in loaded]


@pytest.mark.parametrize("kind", FILES)
def test_every_file_gives_its_numbers_and_labels(tmp_path, make_config, kind):
    train, test = numbers(), numbers(4, seed=1)
    arrays = {
        **{"train_images": train, "test_images": test},
        **{"train_labels": np.arange(N), "test_labels": np.arange(4) + 10},
    }
    source = FILES[kind](tmp_path, arrays)
    assert detect_format(source) == "arrays"
    parts = parts_of(source, make_config)
    assert set(parts) == {"train", "test"}
    for split, images, labels in (("train", train, range(N)), ("test", test, range(10, 14))):
        got, found = read(parts[split])
        assert np.array_equal(got, images)
        assert found == list(labels)


@pytest.mark.parametrize("kind", FILES)
def test_large_arrays_are_read_in_pieces(tmp_path, make_config, kind, monkeypatch):
    monkeypatch.setattr("nvae.data.readers.rows.PIECE", 3 * H * W * C * 2)
    train = numbers()
    got, _ = read(parts_of(FILES[kind](tmp_path, {"train": train}), make_config)["train"])
    assert np.array_equal(got, train)


@pytest.mark.parametrize(
    "names",
    [
        ("x_train", "y_train"),
        ("train/x", "train/y"),
        ("images", "labels"),
        ("data", "target"),
        ("arr_0", "label"),
        ("TRAIN-images", "TRAIN-labels"),
    ],
)
def test_names_say_what_is_what(tmp_path, make_config, names):
    train = numbers()
    source = npz(tmp_path, dict(zip(names, (train, np.arange(N)), strict=True)))
    got, labels = read(parts_of(source, make_config)["train"])
    assert np.array_equal(got, train)
    assert labels == list(range(N))


def test_channels_may_come_first_or_be_left_out(tmp_path, make_config):
    gray, planar = numbers(channels=None), numbers().transpose(0, 3, 1, 2)
    got, _ = read(parts_of(npy(tmp_path, {"train": gray}), make_config, channels=1)["train"])
    assert np.array_equal(got[..., 0], gray)
    got, _ = read(parts_of(npy(tmp_path, {"train": planar}), make_config)["train"])
    assert np.array_equal(got, numbers())


def test_channels_last_is_meant_where_both_would_fit(tmp_path, make_config):
    cube = np.random.default_rng(0).integers(0, 9, (3, 5, 5, 5)).astype(np.uint8)
    config = {"image_size": 5, "bits": 8}
    got, _ = read(parts_of(npy(tmp_path, {"train": cube}), make_config, **config)["train"])
    assert np.array_equal(got, cube)


@pytest.mark.parametrize(
    "dtype", ["u1", "i1", "b1", "<u2", ">u2", "<i2", ">i4", "<i8", "<f2", "<f4", ">f8"]
)
def test_every_type_of_number(tmp_path, make_config, dtype):
    train = numbers().astype(dtype)
    got, _ = read(parts_of(npy(tmp_path, {"train": train}), make_config)["train"])
    assert np.array_equal(got, train)


def test_labels_may_be_names(tmp_path, make_config):
    arrays = {"train_images": numbers(), "train_labels": np.array([*"abcabca"])}
    for write in (npy, npz, hdf5):
        (folder := tmp_path / write.__name__).mkdir()
        _, labels = read(parts_of(write(folder, arrays), make_config)["train"])
        assert labels == [*"abcabca"]


def test_labels_can_be_passed_over(tmp_path, make_config):
    source = npz(tmp_path, {"images": numbers(), "labels": np.arange(3)})
    with pytest.raises(DataError, match=r"labels is \(3,\), and there are 7 images"):
        parts_of(source, make_config)
    _, labels = read(parts_of(source, make_config, labels=False)["train"])
    assert set(labels) == {None}


def test_one_of_several_is_chosen_by_its_key(tmp_path, make_config):
    arrays = {"left": numbers(), "right": numbers(seed=1), "fine": np.arange(N), "mean": np.ones(3)}
    source = npz(tmp_path, arrays)
    with pytest.raises(DataError, match=r"left .* right .*data\.image_key"):
        parts_of(source, make_config)
    part = parts_of(source, make_config, image_key="right", label_key="fine")["train"]
    got, labels = read(part)
    assert np.array_equal(got, arrays["right"])
    assert labels == list(range(N))
    with pytest.raises(DataError, match=r"data\.image_key=rihgt is not there \(did you mean right"):
        parts_of(source, make_config, image_key="rihgt")


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros((3, 3)), "the train images must be one array"),
        (np.zeros((3, H, W), complex), "not numbers"),
        (np.asfortranarray(np.zeros((3, H, W))), "not in C order"),
        (np.array([{"a": 1}] * 3, object), "not numbers"),
    ],
)
def test_what_are_no_images_is_named(tmp_path, make_config, array, words):
    np.save(tmp_path / "train.npy", array, allow_pickle=True)
    with pytest.raises(DataError, match=words) as error:
        parts_of(tmp_path, make_config)
    assert "\n" not in str(error.value)


def test_nothing_to_train_on_is_said(tmp_path, make_config):
    with pytest.raises(MissingSourceError, match=r"no \.npy or"):
        parts_of(tmp_path, make_config)
    np.save(tmp_path / "test.npy", numbers())
    with pytest.raises(DataError, match="test is named as training images are: train"):
        parts_of(tmp_path, make_config)


@pytest.mark.parametrize(("kind", "package"), [("hdf5", "h5py"), ("zarr", "zarr")])
def test_a_package_that_is_not_there_is_named(tmp_path, make_config, monkeypatch, kind, package):
    source = FILES[kind](tmp_path, {"train": numbers()})
    monkeypatch.setitem(sys.modules, package, None)
    words = rf"needs {package}: pip install 'nvae\[formats\]'"
    with pytest.raises(DataError, match=words):
        parts_of(source, make_config)


def test_npz_batches_of_imagenet_stay_what_they_are(tmp_path):
    np.savez(tmp_path / "train_data_batch_1.npz", data=np.zeros((2, 12), np.uint8))
    assert detect_format(tmp_path) == "npz"


def test_arrays_among_pictures_are_no_data_set(tmp_path):
    np.save(tmp_path / "features.npy", numbers())
    (tmp_path / "a.png").touch()
    assert detect_format(tmp_path) == "folder"


def test_a_reader_takes_what_its_config_says(tmp_path, make_config):
    npy(tmp_path, {"train": numbers()})
    config = replace(make_config(format="arrays", channels=C, image_size=[H, W]), labels=False)
    assert set(Arrays(tmp_path, config).parts()) == {"train"}
