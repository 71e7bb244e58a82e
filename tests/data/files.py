"""Writers of tiny source files in every format, and the pictures that should come out of them.

Protocol buffers and TFRecords are written here by hand, apart from the code under test.
"""

import gzip
import io
import os
import pickle
import struct
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from scipy.io import savemat

from nvae.data.config import DataConfig
from nvae.data.dataset import ImageData
from nvae.data.loader import Split

Pixels = NDArray[np.uint8]


def open_splits(config: DataConfig) -> dict[str, Split]:
    """What the prepared form of a data set holds."""
    data = ImageData(config)
    data.setup()
    return {name: data.split(name) for name in data.names}


def refuse_folder(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Make a folder unreadable, also for root."""
    real = os.scandir

    def scandir(path: Any = ".") -> Any:
        if Path(path) == folder or Path(path).absolute() == folder:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)


def pictures(n: int, size: int, channels: int, seed: int = 0) -> Pixels:
    """(N, size, size, C) random uint8."""
    return np.random.default_rng(seed).integers(0, 256, (n, size, size, channels), np.uint8)


def encoded(pixels: Pixels, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(pixels[:, :, 0] if pixels.shape[-1] == 1 else pixels)
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def idx_bytes(images: Pixels, magic: int = 0x803) -> bytes:
    n, height, width, _ = images.shape
    return struct.pack(">IIII", magic, n, height, width) + images.tobytes()


def write_idx(folder: Path, train: Pixels, test: Pixels, *, compress: bool = True) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, images in (("train", train), ("t10k", test)):
        data = idx_bytes(images)
        path = folder / f"{name}-images-idx3-ubyte{'.gz' if compress else ''}"
        path.write_bytes(gzip.compress(data) if compress else data)


def cifar_batches(train: Pixels, test: Pixels) -> dict[str, bytes]:
    """The six files, planes as rows, keys as Python 2 wrote them."""
    chunks = {f"data_batch_{i}": c for i, c in enumerate(np.array_split(train, 5), 1)}
    chunks["test_batch"] = test
    return {
        name: pickle.dumps(
            {b"data": images.transpose(0, 3, 1, 2).reshape(len(images), -1), b"labels": [0]},
            protocol=2,
        )
        for name, images in chunks.items()
    }


def write_cifar(folder: Path, train: Pixels, test: Pixels, *, archive: bool = True) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    batches = cifar_batches(train, test)
    if not archive:
        for name, data in batches.items():
            (folder / name).write_bytes(data)
        return
    with tarfile.open(folder / "cifar-10-python.tar.gz", "w:gz") as tar:
        for name, data in batches.items():
            add_to_tar(tar, f"cifar-10-batches-py/{name}", data)


def add_to_tar(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def write_chardata(folder: Path, train: Pixels, test: Pixels) -> None:
    """Columns of intensities, each picture column by column."""
    folder.mkdir(parents=True, exist_ok=True)

    def columns(images: Pixels) -> NDArray[np.float64]:
        flat = images[..., 0].transpose(0, 2, 1).reshape(len(images), -1)
        return flat.T / 255.0

    savemat(folder / "chardata.mat", {"data": columns(train), "testdata": columns(test)})


def write_npz(folder: Path, train: list[Pixels], valid: Pixels) -> None:
    folder.mkdir(parents=True, exist_ok=True)

    def rows(images: Pixels) -> Pixels:
        return images.transpose(0, 3, 1, 2).reshape(len(images), -1)

    for i, images in enumerate(train, 1):
        np.savez(folder / f"train_data_batch_{i}.npz", data=rows(images), labels=np.zeros(3))
    np.savez(folder / "val_data.npz", data=rows(valid), labels=np.zeros(3))


def write_pictures(folder: Path, images: Pixels, kind: str = "png") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        (folder / f"{i:04d}.{kind}").write_bytes(encoded(image, {"jpg": "JPEG"}.get(kind, kind)))


def write_celeba(folder: Path, images: Pixels, splits: list[int], *, packed: bool = False) -> None:
    """PNG data under JPEG names: lossless, and PIL goes by content."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{i + 1:06d}.jpg" for i in range(len(images))]
    lines = [f"{name} {split}\n" for name, split in zip(names, splits, strict=True)]
    (folder / "list_eval_partition.txt").write_text("".join(lines))
    if packed:
        with zipfile.ZipFile(folder / "img_align_celeba.zip", "w") as archive:
            for name, image in zip(names, images, strict=True):
                archive.writestr(f"img_align_celeba/{name}", encoded(image))
        return
    (folder / "img_align_celeba").mkdir()
    for name, image in zip(names, images, strict=True):
        (folder / "img_align_celeba" / name).write_bytes(encoded(image))


def crc32c_reference(data: bytes) -> int:
    """Bit by bit, from RFC 3720."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def masked(data: bytes) -> bytes:
    crc = crc32c_reference(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def record(data: bytes) -> bytes:
    length = struct.pack("<Q", len(data))
    return length + masked(length) + data + masked(data)


def varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])


def field(number: int, payload: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(payload)) + payload


def feature(name: str, kind: int, values: bytes) -> bytes:
    return field(1, field(1, name.encode()) + field(2, field(kind, values)))


def example(shape: tuple[int, ...], data: bytes, *, packed: bool = True) -> bytes:
    """tf.Example with `shape` and `label` (int64, packed or not) and `data` (bytes)."""
    if packed:
        sides = field(1, b"".join(map(varint, shape)))
    else:
        sides = b"".join(varint(1 << 3) + varint(side) for side in shape)
    return field(
        1,
        feature("data", 1, field(1, data))
        + feature("label", 3, field(1, varint(7)))
        + feature("shape", 3, sides),
    )


def write_tfrecords(
    path: Path, images: Pixels, *, planes: bool = False, packed: bool = True
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if planes:
        images = images.transpose(0, 3, 1, 2)
    records = (example(i.shape, np.ascontiguousarray(i).tobytes(), packed=packed) for i in images)
    path.write_bytes(b"".join(record(r) for r in records))


def write_lmdb(path: Path, values: dict[bytes, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with lmdb.open(str(path), map_size=1 << 24) as env, env.begin(write=True) as transaction:
        for key, value in values.items():
            transaction.put(key, value)


def write_reference_lmdb(folder: Path, train: list[bytes], valid: list[bytes]) -> None:
    for name, values in (("train", train), ("validation", valid)):
        numbered = {str(i).encode(): value for i, value in enumerate(values)}
        write_lmdb(folder / f"{name}.lmdb", numbered)
