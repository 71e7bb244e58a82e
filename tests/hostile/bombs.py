"""Small files that claim gigabytes, or unpack to them."""

import bz2
import gzip
import lzma
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np

from tests.data import files

GIGABYTES = 3 << 30
_BLOCK = 1 << 24


def _repeated(compress, size: int) -> bytes:
    """`size` zeros (about), in streams of one block that is compressed only once."""
    return compress(bytes(_BLOCK)) * (size // _BLOCK)


def _deflate(start: bytes, size: int, wbits: int = -15) -> bytes:
    """`start` and `size` zeros in one stream, a thousandth as long."""
    stream = zlib.compressobj(9, zlib.DEFLATED, wbits)
    head = stream.compress(start) + stream.flush(zlib.Z_FULL_FLUSH)
    block = stream.compress(bytes(_BLOCK)) + stream.flush(zlib.Z_FULL_FLUSH)
    rest = stream.compress(bytes(size % _BLOCK)) + stream.flush()
    return head + block * (size // _BLOCK) + rest


def write_archive(path: Path, members: dict[str, bytes]) -> None:
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in members.items():
                archive.writestr(name, data)
        return
    mode = path.name.rpartition(".tar")[2].removeprefix(".")
    with tarfile.open(path, f"w:{mode}") as tar:
        for name, data in members.items():
            files.add_to_tar(tar, name, data)


def _idx_pair(folder: Path, header: bytes, *, size: int = 0) -> None:
    for name in ("train", "t10k"):
        path = folder / f"{name}-images-idx3-ubyte"
        if size:
            data = gzip.compress(header) + _repeated(gzip.compress, size)
            path.with_name(f"{path.name}.gz").write_bytes(data)
        else:
            path.write_bytes(header + bytes(100))


def idx_claim(*shape: int):
    return lambda folder: _idx_pair(folder, struct.pack(">IIII", 0x803, *shape))


def idx_gzip(folder: Path) -> None:
    """Honest: so many black pictures, in three megabytes."""
    count = GIGABYTES // 784
    _idx_pair(folder, struct.pack(">IIII", 0x803, count, 28, 28), size=GIGABYTES)


def idx_gzip_longer(folder: Path) -> None:
    _idx_pair(folder, struct.pack(">IIII", 0x803, 1, 28, 28), size=GIGABYTES)


def _npy(shape: tuple[int, ...], descr: str = "|u1") -> bytes:
    text = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape!r}, }}"
    return b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little") + f"{text:<117}\n".encode()


def npz_claim(*shape: int):
    def write(folder: Path) -> None:
        with zipfile.ZipFile(folder / "train_data_batch_1.npz", "w") as archive:
            archive.writestr("data.npy", _npy(shape) + bytes(3072))

    return write


def npz_long_header(folder: Path) -> None:
    """A header of 2 GiB by its own word, packed a thousandfold."""
    start = b"\x93NUMPY\x02\x00" + (2 << 30).to_bytes(4, "little")
    _deflated(folder / "train_data_batch_1.npz", "data.npy", start, GIGABYTES // 2)


def npz_inflating(folder: Path) -> None:
    """Honest by its header."""
    rows = GIGABYTES // 3072
    _deflated(folder / "train_data_batch_1.npz", "data.npy", _npy((rows, 3072)), rows * 3072)


def npz_false_size(folder: Path) -> None:
    """It unpacks to more than the archive says."""
    path = folder / "train_data_batch_1.npz"
    _deflated(path, "data.npy", _npy((1, 3072)), GIGABYTES // 2)
    _shrink_claims(path, 128 + 3072)


def _deflated(path: Path, name: str, start: bytes, size: int) -> None:
    """A zip of one member, `start` and zeros; what it says of itself is true but for the CRC."""
    data = _deflate(start, size)
    _zip(path, name, data, len(start) + size, zipfile.ZIP_DEFLATED)


def _zip(path: Path, name: str, data: bytes, size: int, method: int) -> None:
    fields = struct.pack("<HHHHHIIIHH", 20, 0, method, 0, 0x21, 0, len(data), size, len(name), 0)
    local = b"PK\x03\x04" + fields + name.encode()
    central = b"PK\x01\x02" + struct.pack("<H", 20) + fields + bytes(14) + name.encode()
    central = central[: 46 - 4] + (0).to_bytes(4, "little") + central[46:]
    end = struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, 1, 1, len(central), len(local) + len(data), 0)
    path.write_bytes(local + data + central + end)


def _shrink_claims(path: Path, size: int) -> None:
    """Rewrite the directory's unpacked size of the only member."""
    data = bytearray(path.read_bytes())
    at = data.rindex(b"PK\x01\x02")
    data[at + 24 : at + 28] = size.to_bytes(4, "little")
    path.write_bytes(data)


def zip_inflating(folder: Path) -> None:
    _deflated(folder / "set.zip", "a.png", b"\x89PNG", GIGABYTES // 2)


def zip_false_size(folder: Path) -> None:
    _deflated(folder / "set.zip", "a.png", b"\x89PNG", GIGABYTES // 2)
    _shrink_claims(folder / "set.zip", 1000)


def zip_bzip2(folder: Path) -> None:
    data = _repeated(bz2.compress, 1 << 30)
    _zip(folder / "set.zip", "a.png", data, 1000, zipfile.ZIP_BZIP2)


def _tar_header(name: str, size: int, kind: bytes = b"0") -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


_COMPRESS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


def tar_of(suffix: str, kind: bytes = b"0", name: str = "a.png"):
    """A member of gigabytes of zeros: a picture, or a header's long name."""

    def write(folder: Path) -> None:
        compress = _COMPRESS[suffix]
        data = compress(_tar_header(name, GIGABYTES, kind)) + _repeated(compress, GIGABYTES)
        (folder / f"set.tar{suffix}").write_bytes(data + compress(bytes(10240)))

    return write


def tar_claim(kind: bytes):
    def write(folder: Path) -> None:
        data = _tar_header("a.png", 7 << 30, kind) + bytes(10240)
        (folder / "set.tar").write_bytes(data)

    return write


def tar_sparse(folder: Path) -> None:
    """A sparse member: 8 GB of nothing in one block."""
    buffer = bytearray(_tar_header("a.png", 512, tarfile.GNUTYPE_SPARSE))
    buffer[386:410] = b"00000000000\x0000000001000\x00"
    buffer[482] = 0
    buffer[483:495] = b"77777777777\x00"
    buffer[148:156] = b" " * 8
    buffer[148:156] = b"%06o\x00 " % sum(buffer)
    (folder / "set.tar").write_bytes(bytes(buffer) + bytes(512) + bytes(1024))


def tar_many(folder: Path) -> None:
    """Hundreds of members, each with all that the first one's header said of all."""
    info = tarfile.TarInfo("a.png")
    header = info.create_pax_global_header({f"k{i}": "v" for i in range(20_000)})
    with gzip.open(folder / "set.tar.gz", "wb", compresslevel=1) as file:
        file.write(header)
        member = _tar_header("a.png", 0)
        for _ in range(800):
            file.write(member)
        file.write(bytes(10240))


def cifar_of(data: bytes):
    def write(folder: Path) -> None:
        for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
            (folder / name).write_bytes(data)

    return write


def cifar_inflating(folder: Path) -> None:
    tar_of(".gz", name="cifar-10-batches-py/data_batch_1")(folder)
    (folder / "set.tar.gz").rename(folder / "cifar-10-python.tar.gz")


PICKLES = {
    "array": b"\x80\x02}U\x04datacnumpy\nndarray\n(J\x00\x00\x10\x00M\x00\x0ctU\x02u1\x86Rs.",
    "memo": b"\x80\x02}r\xff\xff\xff\x7f.",
    "bytearray": b"\x80\x05\x96" + struct.pack("<Q", 1 << 36) + b".",
    "bytes": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 36) + b".",
    "frame": b"\x80\x04\x95" + struct.pack("<Q", 1 << 36) + b".",
    "encoded often": b"\x80\x02]q\x00(X"
    + struct.pack("<I", 1 << 20)
    + b"x" * (1 << 20)
    + b"q\x01X\x06\x00\x00\x00latin1q\x02\x86q\x03c_codecs\nencode\nq\x04"
    + b"h\x04h\x03R" * 4000
    + b"e.",
    "hex": b"\x80\x02c_codecs\nencode\nU\x01xU\x03hex\x86R"
    + b"q\x010c_codecs\nencode\nh\x01U\x03hex\x86R" * 40
    + b".",
    "nested": b"]" * 200_000 + b"a" * 199_999 + b".",
}


def mat_inflating(folder: Path) -> None:
    _write_mat(folder, GIGABYTES // 2)


def _write_mat(folder: Path, size: int) -> None:
    """A compressed matrix of zeros as `data`."""
    head = b"MATLAB 5.0 MAT-file".ljust(124) + b"\x00\x01IM"
    columns = size // 784
    inner = struct.pack("<IIII", 6, 8, 9, 0) + struct.pack("<IIii", 5, 8, 784, columns)
    inner += struct.pack("<II", 1 | 4 << 16, int.from_bytes(b"data", "little"))
    inner += struct.pack("<II", 2, 784 * columns)
    size = 784 * columns
    packed = _deflate(struct.pack("<II", 14, len(inner) + size) + inner, size, 15)
    path = folder / "chardata.mat"
    path.write_bytes(head + struct.pack("<II", 15, len(packed)) + packed)


def mat_claim(folder: Path) -> None:
    """Version 4: twenty bytes of header that say anything."""
    head = struct.pack("<iiiii", 0, 784, 1 << 24, 0, 5)
    (folder / "chardata.mat").write_bytes(head + b"data\0" + bytes(800))


def mat_nested(folder: Path) -> None:
    """Cells in cells, deeper than any stack."""
    inner = b""
    for _ in range(20_000):
        body = struct.pack("<IIII", 6, 8, 1, 0) + struct.pack("<IIii", 5, 8, 1, 1)
        body += struct.pack("<II", 1 | 4 << 16, int.from_bytes(b"data", "little")) + inner
        inner = struct.pack("<II", 14, len(body)) + body
    head = b"MATLAB 5.0 MAT-file".ljust(124) + b"\x00\x01IM"
    (folder / "chardata.mat").write_bytes(head + inner)


def tfrecord_claim(length: int):
    def write(folder: Path) -> None:
        size = struct.pack("<Q", length)
        (folder / "a.tfrecord").write_bytes(size + files.masked(size) + bytes(5000))

    return write


def tfrecord_shape(shape: tuple[int, ...]):
    def write(folder: Path) -> None:
        data = files.record(files.example(shape, b""))
        (folder / "a.tfrecord").write_bytes(data * 12)

    return write


def tfrecord_lists(folder: Path) -> None:
    """A shape of sixteen million sides."""
    sides = files.field(1, bytes(1 << 20))
    message = files.field(1, files.feature("shape", 3, sides) * 16)
    crc = b"\0\0\0\0"
    size = struct.pack("<Q", len(message))
    (folder / "a.tfrecord").write_bytes((size + files.masked(size) + message + crc) * 2)


def lmdb_claim(folder: Path) -> None:
    """A database that says it has 2^60 entries."""
    files.write_reference_lmdb(folder, [bytes(192)] * 3, [])
    path = folder / "train.lmdb" / "data.mdb"
    data = bytearray(path.read_bytes())
    for meta in (0, 4096):
        at = meta + 16 + 24 + 48 + 32
        data[at : at + 8] = (1 << 60).to_bytes(8, "little")
    path.write_bytes(data)


def lmdb_circle(folder: Path) -> None:
    """A page that is its own child."""
    values = {f"{i:05d}".encode(): bytes(900) for i in range(200)}
    for split in ("train", "val"):
        files.write_lmdb(folder / f"x_{split}_lmdb", values)
        path = folder / f"x_{split}_lmdb" / "data.mdb"
        data = bytearray(path.read_bytes())
        for page in range(2, len(data) // 4096):
            start = page * 4096
            if data[start + 10] == 1:  # a branch
                (offset,) = struct.unpack_from("<H", data, start + 16)
                struct.pack_into("<HHH", data, start + offset, page, 0, 0)
        path.write_bytes(data)


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def huge_png(folder: Path) -> None:
    """A gigapixel of black in a megabyte."""
    rows = _deflate(b"", 1 << 27, 15)
    header = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 0, 0, 0, 0)
    (folder / "x.png").write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + _chunk(b"IHDR", header)
        + _chunk(b"IDAT", rows)
        + _chunk(b"IEND", b"")
    )


def png_text(folder: Path) -> None:
    """A comment that unpacks to gigabytes."""
    text = _deflate(b"", 1 << 30, 15)
    header = struct.pack(">IIBBBBB", 8, 8, 8, 0, 0, 0, 0)
    (folder / "x.png").write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + _chunk(b"IHDR", header)
        + _chunk(b"zTXt", b"a\0\0" + text)
        + _chunk(b"IEND", b"")
    )


def long_picture(folder: Path) -> None:
    """One pixel high: to its shorter side as wanted, it would be a million wide."""
    image = np.zeros((1, 60_000, 3), np.uint8)
    for i in range(10):
        (folder / f"{i}.ppm").write_bytes(b"P6 60000 1 255\n" + image.tobytes())


def endless(folder: Path) -> None:
    (folder / "x.png").symlink_to("/dev/zero")


def partition(folder: Path) -> None:
    files.write_celeba(folder, files.pictures(2, 8, 3), [0, 1])
    (folder / "list_eval_partition.txt").unlink()
    (folder / "list_eval_partition.txt").symlink_to("/dev/zero")


_LONG_NAME = tarfile.GNUTYPE_LONGNAME
BOMBS = {
    "idx claims": ("idx", idx_claim(0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF)),
    "idx wide": ("idx", idx_claim(1, 1, 0xFFFFFFFF)),
    "idx empty pictures": ("idx", idx_claim(0xFFFFFFFF, 0, 0)),
    "idx no pictures": ("idx", idx_claim(0, 28, 28)),
    "idx gzip": ("idx", idx_gzip),
    "idx gzip longer": ("idx", idx_gzip_longer),
    "npz claims": ("npz", npz_claim(1 << 40, 3072)),
    "npz empty pictures": ("npz", npz_claim(1 << 60, 0)),
    "npz wide": ("npz", npz_claim(1, 3 << 60)),
    "npz header": ("npz", npz_long_header),
    "npz inflating": ("npz", npz_inflating),
    "npz false size": ("npz", npz_false_size),
    "zip inflating": ("folder", zip_inflating),
    "zip false size": ("folder", zip_false_size),
    "zip bzip2": ("folder", zip_bzip2),
    "tar gz": ("folder", tar_of(".gz")),
    "tar bz2": ("folder", tar_of(".bz2")),
    "tar xz": ("folder", tar_of(".xz")),
    "tar long name": ("folder", tar_of(".gz", _LONG_NAME)),
    "tar pax": ("folder", tar_of(".gz", tarfile.XHDTYPE)),
    "tar claims": ("folder", tar_claim(b"0")),
    "tar claims a name": ("folder", tar_claim(_LONG_NAME)),
    "tar sparse": ("folder", tar_sparse),
    "tar many": ("folder", tar_many),
    "cifar inflating": ("cifar", cifar_inflating),
    **{f"cifar {name}": ("cifar", cifar_of(data)) for name, data in PICKLES.items()},
    "mat inflating": ("omniglot", mat_inflating),
    "mat claims": ("omniglot", mat_claim),
    "mat nested": ("omniglot", mat_nested),
    "tfrecord claims": ("tfrecord", tfrecord_claim((1 << 64) - 1)),
    "tfrecord claims a lot": ("tfrecord", tfrecord_claim(1 << 40)),
    "tfrecord no pixels": ("tfrecord", tfrecord_shape((0, 0, 3))),
    "tfrecord wide": ("tfrecord", tfrecord_shape((0, 1 << 62, 3))),
    "tfrecord lists": ("tfrecord", tfrecord_lists),
    "lmdb claims": ("lmdb", lmdb_claim),
    "lmdb circle": ("lsun", lmdb_circle),
    "png huge": ("folder", huge_png),
    "png text": ("folder", png_text),
    "endless picture": ("folder", endless),
    "endless partition": ("celeba", partition),
}
"""(format, writer) by name."""
