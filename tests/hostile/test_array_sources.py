"""Arrays from strangers: NPY, NPZ, HDF5 and Zarr that claim, unpack to or lead to what they should
not. Each is opened in a process of its own, whose peak of memory is measured."""

import json
import pickle
import random
import zipfile
from pathlib import Path

import numpy as np
import pytest

from nvae.data.config import DataConfig, DataError
from nvae.data.readers import read_source
from tests.data import files
from tests.hostile import bombs
from tests.hostile.test_data_files import KINDS, MOST_MEMORY, check_line, damaged, opened, outcome

SIDE = 8
SHAPE = (10, SIDE, SIDE, 3)


def config_of(folder: Path, **overrides) -> DataConfig:
    values = {"image_size": SIDE, "channels": 3, "bits": 8, "likelihood": "logistic_mixture"}
    places = {"root": str(folder), "source": str(folder / "source")}
    return DataConfig(**(values | {"name": "x", "format": "arrays"} | places | overrides))


def npy_claim(*shape: int, descr: str = "|u1"):
    return lambda folder: (folder / "train.npy").write_bytes(bombs._npy(shape, descr) + bytes(3072))


def npz_member(data: bytes, method: int = zipfile.ZIP_DEFLATED):
    def write(folder: Path) -> None:
        with zipfile.ZipFile(folder / "train.npz", "w", method) as archive:
            archive.writestr("train.npy", data)

    return write


def npz_bomb(folder: Path) -> None:
    """Honest: so many black pictures, in three megabytes."""
    count = bombs.GIGABYTES // (SIDE * SIDE * 3)
    start, size = bombs._npy((count, SIDE, SIDE, 3)), count * SIDE * SIDE * 3
    bombs._deflated(folder / "train.npz", "train.npy", start, size)


def hdf5(fill):
    def write(folder: Path) -> None:
        h5py = pytest.importorskip("h5py")
        with h5py.File(folder / "train.h5", "w") as file:
            fill(h5py, file, folder)

    return write


def sparse(h5py, file, folder: Path) -> None:
    """A shape of terabytes, of which nothing was written."""
    file.create_dataset("train", (1 << 32, SIDE, SIDE, 3), "u1", chunks=(1, SIDE, SIDE, 3))


def large_image(h5py, file, folder: Path) -> None:
    file.create_dataset("train", (2, 1 << 20, 1 << 14, 1), "u1", chunks=(1, 64, 64, 1))


def large_chunks(h5py, file, folder: Path) -> None:
    shape = (1 << 24, SIDE, SIDE, 1)
    array = file.create_dataset("train", shape, "u1", chunks=shape, compression="gzip")
    array.id.write_direct_chunk((0, 0, 0, 0), bytes(100))


def external(h5py, file, folder: Path) -> None:
    (folder / "secret").write_bytes(bytes(range(192)) * 10)
    file.create_dataset("train", SHAPE, "u1", external=[(str(folder / "secret"), 0, 1920)])


def virtual(h5py, file, folder: Path) -> None:
    layout = h5py.VirtualLayout(SHAPE, "u1")
    with h5py.File(folder / ".other", "w") as other:
        other["secret"] = np.ones(SHAPE, "u1")
    layout[:] = h5py.VirtualSource(str(folder / ".other"), "secret", SHAPE)
    file.create_virtual_dataset("train", layout)


def linked(h5py, file, folder: Path) -> None:
    with h5py.File(folder / ".other", "w") as other:
        other["secret"] = np.ones(SHAPE, "u1")
    file["train"] = h5py.ExternalLink(str(folder / ".other"), "secret")


def many(h5py, file, folder: Path) -> None:
    for i in range(1200):
        file.create_group(f"g{i}")


def zarr(change=None, **options):
    def write(folder: Path) -> None:
        module = pytest.importorskip("zarr")
        settings = {"shape": SHAPE, "dtype": "u1", "chunks": (1, SIDE, SIDE, 3)} | options
        module.create_array(str(folder / "train.zarr"), **settings)[:2] = 7
        if change is not None:
            path = next(
                (folder / "train.zarr" / name)
                for name in (".zarray", "zarr.json")
                if (folder / "train.zarr" / name).exists()
            )
            path.write_text(json.dumps(change(json.loads(path.read_text()))))

    return write


def zarr_shape(content):
    return content | {"shape": [1 << 40, SIDE, SIDE, 3]}


def zarr_chunks(content):
    return content | {"shape": [1 << 22, SIDE, SIDE, 3], "chunks": [1 << 22, SIDE, SIDE, 3]}


def zarr_pickle(content):
    return content | {"filters": [{"id": "pickle", "protocol": 4}]}


BOMBS = {
    "npy of terabytes": npy_claim(1 << 36, SIDE, SIDE, 3),
    "npy of nothing": npy_claim(0, SIDE, SIDE, 3),
    "npy of negative sides": npy_claim(-1, SIDE, -SIDE, 3),
    "npy of one image": npy_claim(1 << 40),
    "npy of objects": npy_claim(10, descr="|O"),
    "npy of wide text": npy_claim(10, SIDE, SIDE, 3, descr="<U99999999"),
    "npz of terabytes": npz_member(bombs._npy((1 << 36, SIDE, SIDE, 3)) + bytes(3072)),
    "npz bomb": npz_bomb,
    "npz of objects": npz_member(bombs._npy((10,), "|O") + bytes(80)),
    "npz packed without bounds": npz_member(bombs._npy(SHAPE) + bytes(1920), zipfile.ZIP_LZMA),
    "npz of nothing": lambda folder: zipfile.ZipFile(folder / "train.npz", "w").close(),
    "hdf5 of terabytes": hdf5(sparse),
    "hdf5 of one image": hdf5(large_image),
    "hdf5 of one chunk": hdf5(large_chunks),
    "hdf5 of external numbers": hdf5(external),
    "hdf5 of virtual numbers": hdf5(virtual),
    "hdf5 of a link elsewhere": hdf5(linked),
    "hdf5 of many groups": hdf5(many),
    "hdf5 that is none": lambda folder: (folder / "train.h5").write_bytes(b"\x89HDF\r\n\x1a\nxx"),
    "zarr of terabytes": zarr(zarr_shape),
    "old zarr of one chunk": zarr(zarr_chunks, zarr_format=2),
    "old zarr that runs code": zarr(zarr_pickle, zarr_format=2),
    "zarr that is a file": lambda folder: (folder / "train.zarr").write_bytes(b"x"),
    "zarr of nothing": lambda folder: (folder / "train.zarr").mkdir(),
    "zarr of no json": zarr(lambda content: ["a"]),
}


@pytest.mark.parametrize("part", [0, pytest.param(1, marks=pytest.mark.exhaustive)])
def test_bombs_cost_one_line(tmp_path, part):
    jobs = {}
    for name, write in list(BOMBS.items())[part::2]:
        folder = tmp_path / name.replace(" ", "_")
        (folder / "source").mkdir(parents=True)
        write(folder / "source")
        jobs[name] = config_of(folder)
    for name, (result, peak) in opened(tmp_path, jobs).items():
        assert result.startswith("DataError "), (name, result)
        assert len(result) <= 510
        assert peak < MOST_MEMORY, (name, peak, result)


class Harm:
    def __reduce__(self):
        return (pytest.fail, ("code was run",))


def test_a_pickle_in_zarr_is_never_run(tmp_path):
    (tmp_path / "source").mkdir()
    zarr(zarr_pickle, zarr_format=2)(tmp_path / "source")
    for path in (tmp_path / "source" / "train.zarr").rglob("0.*"):
        path.write_bytes(pickle.dumps(Harm()))
    with pytest.raises(DataError, match=r"is refused|is damaged"):
        read_source(tmp_path / "source", "arrays", config_of(tmp_path))


def test_objects_in_npy_are_never_unpickled(tmp_path):
    (tmp_path / "source").mkdir()
    np.save(tmp_path / "source" / "train.npy", np.array([Harm()] * 3, object), allow_pickle=True)
    with pytest.raises(DataError, match="not numbers"):
        read_source(tmp_path / "source", "arrays", config_of(tmp_path))


def save_npz(folder: Path, images) -> None:
    np.savez_compressed(folder / "all.npz", train=images[:7], test=images[7:])


def save_npy(folder: Path, images) -> None:
    np.save(folder / "train.npy", images[:7])
    np.save(folder / "test.npy", images[7:])


@pytest.mark.parametrize("save", [save_npz, save_npy])
def test_a_damaged_array_gives_its_pictures_or_one_line(tmp_path, save):
    """What has a checksum gives the true pixels or nothing."""
    (tmp_path / "source").mkdir()
    save(tmp_path / "source", files.pictures(10, SIDE, 3))
    config = config_of(tmp_path)
    true = outcome(config)
    assert true is not None
    rng = random.Random(0)
    paths = sorted((tmp_path / "source").iterdir())
    for _ in range(60):
        victim, kind = rng.choice(paths), rng.choice(KINDS)
        whole = victim.read_bytes()
        victim.write_bytes(damaged(whole, rng, kind))
        found = outcome(config)
        if found is not None and save is save_npz and kind != "longer":
            assert found == true, kind
        victim.write_bytes(whole)


@pytest.mark.parametrize("suffix", ["npy", "npz", "h5", "zarr"])
def test_a_pipe_is_not_waited_for(tmp_path, suffix):
    import os

    (tmp_path / "source").mkdir()
    os.mkfifo(tmp_path / "source" / f"train.{suffix}")
    with pytest.raises(DataError) as error:
        read_source(tmp_path / "source", "arrays", config_of(tmp_path))
    check_line(error.value)
