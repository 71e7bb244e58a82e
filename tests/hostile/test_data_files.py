"""Data files that are damaged or made to do harm: the true pictures, or one line; never a hang, a
trace, or memory for what is not there."""

import contextlib
import json
import os
import random
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from nvae.data.config import DataConfig, DataError
from nvae.data.conversion import prepare
from nvae.data.pixels import BadImageError
from tests.data import files
from tests.data.files import open_splits
from tests.hostile import bombs

SIDE = 8
LONGEST = 500


@dataclass(frozen=True)
class Source:
    """A kind of source.

    Attributes:
        format: as in `DataConfig`.
        write: makes a small one in a folder.
        side: of its pictures.
        is_checked: whether its files carry checksums, so that no pixel may differ unseen.
    """

    format: str
    write: Callable[[Path], object]
    side: int = SIDE
    is_checked: bool = True


def _archive(folder: Path, suffix: str) -> None:
    folder.mkdir(parents=True)
    bombs.write_archive(
        folder / f"set{suffix}",
        {f"d/{i}.png": files.encoded(image) for i, image in enumerate(IMAGES)},
    )


IMAGES = files.pictures(6, SIDE, 3)
DIGITS = files.pictures(6, 28, 1)
COLORS = files.pictures(10, 32, 3)


def _split_folders(write):
    def both(folder: Path) -> None:
        write(folder / "train" / "a", IMAGES[:4])
        write(folder / "valid" / "a", IMAGES[4:])

    return both


def _celeba(folder: Path) -> None:
    files.write_celeba(folder, IMAGES, [0, 0, 0, 1, 1, 2], packed=True)


def _tfrecord(folder: Path, images: files.Pixels) -> None:
    files.write_tfrecords(folder.with_suffix(".tfrecord"), images)


def _lmdb(folder: Path) -> None:
    raw = [image.tobytes() for image in IMAGES]
    files.write_reference_lmdb(folder, raw, raw[:2])


def _lsun(folder: Path) -> None:
    values = {bytes([97 + i]): files.encoded(image) for i, image in enumerate(IMAGES)}
    for split in ("train", "val"):
        files.write_lmdb(folder / f"x_{split}_lmdb", values)


def _cifar(archive: bool):
    return lambda folder: files.write_cifar(folder, COLORS, COLORS[:2], archive=archive)


def _idx(compress: bool):
    return lambda folder: files.write_idx(folder, DIGITS[:4], DIGITS[4:], compress=compress)


def _pictures(kind: str):
    return lambda folder: files.write_pictures(folder, IMAGES, kind)


SOURCES = {
    "idx": Source("idx", _idx(False), 28, is_checked=False),
    "idx.gz": Source("idx", _idx(True), 28),
    "cifar": Source("cifar", _cifar(False), 32, is_checked=False),
    "cifar.tar.gz": Source("cifar", _cifar(True), 32),
    "mat": Source(
        "omniglot", lambda f: files.write_chardata(f, DIGITS[:4], DIGITS[4:]), 28, is_checked=False
    ),
    "npz": Source("npz", lambda f: files.write_npz(f, [IMAGES[:2], IMAGES[2:4]], IMAGES[4:])),
    **{
        kind: Source("folder", _pictures(kind), is_checked=kind == "png")
        for kind in ("png", "jpg", "webp", "gif", "tiff")
    },
    "zip": Source("folder", lambda f: _archive(f, ".zip")),
    "tar": Source("folder", lambda f: _archive(f, ".tar"), is_checked=False),
    "tar.gz": Source("folder", lambda f: _archive(f, ".tar.gz")),
    "tar.xz": Source("folder", lambda f: _archive(f, ".tar.xz")),
    "celeba": Source("celeba", _celeba, is_checked=False),
    "tfrecord": Source("tfrecord", _split_folders(_tfrecord)),
    "lmdb": Source("lmdb", _lmdb, is_checked=False),
    "lsun": Source("lsun", _lsun, is_checked=False),
}


def config_of(kind: Source, folder: Path, **overrides) -> DataConfig:
    values = {
        "name": "x",
        "format": kind.format,
        "root": str(folder),
        "source": str(folder / "source"),
        "image_size": kind.side,
        "channels": 1 if kind.side == 28 else 3,
        "bits": 8,
        "likelihood": "logistic_mixture",
        "download": False,
    }
    return DataConfig(**(values | overrides))


def pixels(config: DataConfig) -> dict[str, bytes]:
    return {name: split.images.numpy().tobytes() for name, split in open_splits(config).items()}


def check_line(error: ValueError) -> None:
    text = str(error)
    assert 0 < len(text) <= LONGEST, text[:200]
    assert "\n" not in text
    assert " at 0x" not in text
    assert "weights_only" not in text


def outcome(config: DataConfig) -> dict[str, bytes] | None:
    """What comes out of a source; None where it is refused, in one line."""
    try:
        prepare(config, workers=1)
        return pixels(config)
    except (DataError, BadImageError) as error:
        check_line(error)
        return None


def damaged(data: bytes, rng: random.Random, kind: str) -> bytes:
    if kind == "cut":
        return data[: rng.randrange(len(data))]
    if kind == "longer":
        return data + rng.randbytes(rng.randrange(1, 600))
    changed = bytearray(data)
    if kind == "flip":
        changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == "head":
        changed[rng.randrange(min(len(data), 64))] ^= 1 << rng.randrange(8)
    else:
        at = rng.randrange(len(data))
        changed[at : at + 8] = rng.choice([b"\xff" * 8, bytes(8), b"\xff\xff\xff\x7f" * 2])
    return bytes(changed)


KINDS = ("flip", "head", "word", "cut", "longer")


def attack(name: str, folder: Path, seed: int, times: int) -> None:
    source = SOURCES[name]
    source.write(folder / "source")
    config = config_of(source, folder)
    true = outcome(config)
    assert true is not None
    victims = sorted(
        p for p in (folder / "source").rglob("*") if p.is_file() and p.name != "lock.mdb"
    )
    rng = random.Random(f"{name} {seed}")
    for _ in range(times):
        victim, kind = rng.choice(victims), rng.choice(KINDS)
        whole = victim.read_bytes()
        victim.write_bytes(damaged(whole, rng, kind))
        found = outcome(config)
        if found is not None and source.is_checked and kind != "longer":
            assert found == true, (victim, kind)
        victim.write_bytes(whole)
    assert outcome(config) == true


@pytest.mark.parametrize("name", SOURCES)
def test_a_damaged_source_gives_its_pictures_or_one_line(tmp_path, name):
    attack(name, tmp_path, seed=0, times=16)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 3))
@pytest.mark.parametrize("name", SOURCES)
def test_a_damaged_source_many_more_times(tmp_path, name, seed):
    attack(name, tmp_path, seed, times=150)


# The prepared form.


def prepared(folder: Path, *, ragged: bool = False) -> DataConfig:
    source = SOURCES["png"]
    source.write(folder / "source")
    config = config_of(source, folder, crop="random" if ragged else "center")
    prepare(config, workers=1)
    shutil.rmtree(folder / "source")
    return config


def read(config: DataConfig) -> dict[str, bytes] | None:
    """Every picture, read as training does."""
    try:
        splits = open_splits(config)
    except DataError as error:
        check_line(error)
        return None
    return {
        name: split.gather(torch.arange(len(split)), epoch=None, seed=0).numpy().tobytes()
        for name, split in splits.items()
    }


def attack_prepared(folder: Path, ragged: bool, seed: int, times: int) -> None:
    config = prepared(folder, ragged=ragged)
    true = read(config)
    assert true is not None
    victims = sorted(p for p in folder.rglob("*.*") if p.is_file() and p.name != ".lock")
    rng = random.Random(f"prepared {ragged} {seed}")
    for _ in range(times):
        victim = rng.choice(victims)
        whole = victim.read_bytes()
        victim.write_bytes(damaged(whole, rng, rng.choice(KINDS)))
        found = read(config)
        assert found in (None, true), victim
        victim.write_bytes(whole)
    assert read(config) == true


@pytest.mark.parametrize("ragged", [False, True])
def test_a_damaged_prepared_form_gives_its_pictures_or_one_line(tmp_path, ragged):
    attack_prepared(tmp_path, ragged, seed=0, times=150)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 3))
@pytest.mark.parametrize("ragged", [False, True])
def test_a_damaged_prepared_form_many_more_times(tmp_path, ragged, seed):
    attack_prepared(tmp_path, ragged, seed, times=1000)


WRONG = [
    *(None, True, False, 0, -1, 1, 1.5, 10**6, 2**31, 2**63, -(2**63), 10**30, 1e308),
    *("", ".", "..", "/", "/etc/passwd", "../x.npy", "a/b.npy", "\0", "x" * 10_000, "\n", "é.npy"),
    *([], {}, [[]], [1, 2], [1, 2, 3, 4], [0, 0, 0], [-1, 8, 3], [10**9] * 3, ["a", "b", "c"]),
    *({"file": "x.npy"}, [None] * 3, "NaN", "1"),
]


def paths(value, path=()):
    """Where the values of a JSON document are, containers included."""
    yield path
    if isinstance(value, dict | list):
        for key, entry in value.items() if isinstance(value, dict) else enumerate(value):
            yield from paths(entry, (*path, key))


def replaced(value, path, by):
    if not path:
        return by
    copy = value.copy()
    copy[path[0]] = replaced(copy[path[0]], path[1:], by)
    return copy


def without(value, path):
    copy = value.copy()
    if len(path) == 1:
        del copy[path[0]]
    else:
        copy[path[0]] = without(copy[path[0]], path[1:])
    return copy


@pytest.mark.parametrize("name", ["manifest.json", "verified.json"])
@pytest.mark.parametrize("ragged", [False, True])
def test_every_value_of_the_json_files_of_every_wrong_type(tmp_path, ragged, name):
    config = prepared(tmp_path, ragged=ragged)
    true = read(config)
    (path,) = tmp_path.rglob(name)
    content = json.loads(path.read_text())
    for where in paths(content):
        for wrong in WRONG:
            path.write_text(json.dumps(replaced(content, where, wrong)))
            assert read(config) in (None, true), (where, wrong)
        if where:
            path.write_text(json.dumps(without(content, where)))
            assert read(config) in (None, true), where
    path.write_text(json.dumps(content))
    assert read(config) == true


@pytest.mark.parametrize("name", ["manifest.json", "verified.json"])
@pytest.mark.parametrize(
    "text",
    [
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"version": 1, "splits": ' + b"[" * 100 + b"]" * 100 + b"}",
        b'{"version": NaN}',
        b'{"version": ' + b"9" * 100_000 + b"}",
        b"\xff\xfe\x00",
        b"\x00" * 1000,
    ],
    ids=range(7),
)
def test_json_that_is_no_manifest(tmp_path, name, text):
    config = prepared(tmp_path)
    true = read(config)
    (path,) = tmp_path.rglob(name)
    path.write_bytes(text)
    assert read(config) == (None if name == "manifest.json" else true)


HEADERS = [
    "{'descr': '|u1', 'fortran_order': True, 'shape': (5, 8, 8, 3), }",
    "{'descr': '|i1', 'fortran_order': False, 'shape': (5, 8, 8, 3), }",
    "{'descr': '|O', 'fortran_order': False, 'shape': (5, 8, 8, 3), }",
    "{'descr': '<u8', 'fortran_order': False, 'shape': (5, 8, 3), }",
    "{'descr': '|u1', 'fortran_order': False, 'shape': (3, 8, 8, 5), }",
    "{'descr': '|u1', 'fortran_order': False, 'shape': (960,), }",
    "{'descr': '|u1', 'fortran_order': False, 'shape': (), }",
    "{'descr': '|u1', 'fortran_order': False, 'shape': (-5, -8, 8, 3), }",
    "{'descr': '|u1', 'fortran_order': False, 'shape': (0, 8, 8, 3), }",
    "{'descr': '|u1', 'fortran_order': False, 'shape': (2**62, 8, 8, 3), }",
    "{'descr': '|u1', 'fortran_order': False, 'shape': (4611686018427387904, 8, 8, 3), }",
    "{'descr': '|u1', 'fortran_order': False, 'shape': (True, 8, 8, 3), }",
    "{'descr': '|u1', 'fortran_order': False, 'shape': 5, }",
    "{'descr': [('a', '|u1')], 'fortran_order': False, 'shape': (5, 8, 8, 3), }",
    "__import__('os').system('true')",
    "-" * 100,
    "(" * 100,
    "",
]


@pytest.mark.parametrize("text", HEADERS)
def test_headers_of_arrays_are_not_believed(tmp_path, text):
    config = prepared(tmp_path)
    (path,) = tmp_path.rglob("train-*.npy")
    data = path.read_bytes()
    path.write_bytes(data[:10] + f"{text:<117}\n".encode() + data[128:])
    assert read(config) is None


# Things that are no files.


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server, contextlib.chdir(path.parent):
        server.bind(path.name)


THINGS = {
    "fifo": make_fifo,
    "socket": make_socket,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "dangling": lambda path: path.symlink_to("nowhere"),
    "circle": lambda path: path.symlink_to(path.name),
    "folder": lambda path: path.mkdir(),
    "self": lambda path: path.symlink_to("/proc/self/mem"),
}


@pytest.mark.parametrize("thing", THINGS)
@pytest.mark.parametrize("is_root", [True, False])
def test_things_among_pictures_are_named_or_skipped(tmp_path, thing, is_root):
    folder = tmp_path if is_root else tmp_path / "source"
    files.write_pictures(folder, files.pictures(10, SIDE, 3))
    THINGS[thing](folder / "x.png")
    config = config_of(SOURCES["png"], tmp_path, source=None)
    if thing == "folder":
        assert outcome(config) is not None
        return
    with pytest.raises(DataError, match=r"^x\.png cannot be used: ") as error:
        prepare(config)
    check_line(error.value)
    manifest = prepare(config, skip_bad=True)
    assert sum(split.skipped for split in manifest.splits.values()) == 1
    assert len(manifest.skipped_names) == 1
    assert sum(split.count for split in manifest.splits.values()) == 10


@pytest.mark.parametrize("thing", [name for name in THINGS if name != "folder"])
@pytest.mark.parametrize("name", SOURCES)
def test_things_in_place_of_source_files_are_one_line(tmp_path, thing, name):
    source = SOURCES[name]
    source.write(tmp_path / "source")
    for path in sorted(p for p in (tmp_path / "source").rglob("*") if p.is_file()):
        path.unlink()
        if thing != "socket" or len(path.name) < 100:
            THINGS[thing](path)
    assert outcome(config_of(source, tmp_path)) is None


@pytest.mark.parametrize("thing", [name for name in THINGS if name != "folder"])
@pytest.mark.parametrize("name", ["manifest.json", "verified.json", "train-*.npy"])
def test_things_in_place_of_prepared_files_are_one_line(tmp_path, thing, name):
    config = prepared(tmp_path)
    true = read(config)
    (path,) = tmp_path.rglob(name)
    path.unlink()
    THINGS[thing](path)
    assert read(config) == (true if name == "verified.json" else None)


def test_a_lock_that_is_a_link_harms_nothing(tmp_path):
    """A prepared form may come from a stranger."""
    config = prepared(tmp_path)
    precious = tmp_path / "precious"
    precious.write_text("mine")
    (lock,) = tmp_path.rglob(".lock")
    lock.unlink()
    lock.symlink_to(precious)
    SOURCES["png"].write(tmp_path / "source")
    outcome(config)
    assert precious.read_text() == "mine"


# Bombs: small files that claim or unpack to gigabytes. Each is opened in one process of its own,
# whose peak of memory is measured after every one.

MOST_MEMORY = 400 << 20
"""Bytes above what the process takes before the first bomb."""

OPEN_BOMBS = """
import json, resource, sys
from pathlib import Path
from nvae.data.config import DataConfig
from nvae.data.config import DataError
from nvae.data.conversion import prepare
import nvae.data.dataset
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
import nvae.data.module, scipy.io
least = peak()
for line in Path(sys.argv[1]).read_text().splitlines():
    name, values = json.loads(line)
    before = peak()
    try:
        prepare(DataConfig(**values), workers=2)
        result = "opened"
    except DataError as error:
        result = f"DataError {error}"
    except BaseException as error:
        result = f"{type(error).__name__} {str(error)[:300]}"
    print(json.dumps([name, result, peak() - least]), flush=True)
"""


def opened(folder: Path, jobs: dict[str, DataConfig]) -> dict[str, tuple[str, int]]:
    """(what became of it, peak of memory) of each data set."""
    lines = [json.dumps([name, vars(config)]) for name, config in jobs.items()]
    (folder / "jobs").write_text("\n".join(lines))
    done = subprocess.run(
        [sys.executable, "-c", OPEN_BOMBS, str(folder / "jobs")],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        check=False,
    )
    found = {
        name: (result, peak) for name, result, peak in map(json.loads, done.stdout.splitlines())
    }
    assert done.returncode == 0, (list(found), done.stderr[-500:])
    return found


def test_bombs_cost_one_line(tmp_path):
    jobs = {}
    for name, (kind, write) in bombs.BOMBS.items():
        folder = tmp_path / name.replace(" ", "_")
        (folder / "source").mkdir(parents=True)
        write(folder / "source")
        if kind == "folder":  # others beside it, so that it is not too few
            files.write_pictures(folder / "source" / "z", IMAGES)
        jobs[name] = config_of(Source(kind, None, 32), folder)
    for name, (result, peak) in opened(tmp_path, jobs).items():
        assert result.startswith("DataError "), (name, result)
        assert len(result) <= LONGEST + 10
        assert peak < MOST_MEMORY, (name, peak, result)


def test_a_picture_that_is_a_bomb_can_be_skipped(tmp_path):
    files.write_pictures(tmp_path / "source", files.pictures(10, SIDE, 3))
    bombs.huge_png(tmp_path / "source")
    config = config_of(SOURCES["png"], tmp_path)
    manifest = prepare(config, skip_bad=True)
    assert sum(split.skipped for split in manifest.splits.values()) == 1


def test_a_picture_that_only_an_interpreter_can_draw_is_refused(tmp_path):
    """PostScript under the name of a PNG would be given to ghostscript."""
    files.write_pictures(tmp_path / "source", files.pictures(10, SIDE, 3))
    text = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"
    (tmp_path / "source" / "x.png").write_bytes(text)
    with pytest.raises(DataError, match=r"x\.png cannot be used: cannot identify"):
        prepare(config_of(SOURCES["png"], tmp_path))


def test_a_set_that_is_honest_is_not_taken_for_a_bomb(tmp_path):
    """Black pictures pack well."""
    black = np.zeros((200, 28, 28, 1), np.uint8)
    files.write_idx(tmp_path / "source", black, black)
    config = replace(config_of(SOURCES["idx.gz"], tmp_path), channels=1)
    found = outcome(config)
    assert found is not None
    assert found["train"] == black.tobytes()
