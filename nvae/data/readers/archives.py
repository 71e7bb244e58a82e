"""Pictures inside zip and tar archives, read where they are: nothing is ever extracted to disk."""

import bz2
import gzip
import lzma
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any, BinaryIO, cast

from nvae.data.images import BadImageError
from nvae.data.manifest import DataError
from nvae.data.readers.source import (
    LARGEST_PICTURE,
    PIECE,
    Item,
    constant,
    open_source,
    read_pieces,
    unpacked_limit,
)

ARCHIVE_SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
_PACKED: tuple[tuple[bytes, Callable[[BinaryIO], Any]], ...] = (
    (b"\x1f\x8b", gzip.open),
    (b"BZh", bz2.open),
    (b"\xfd7zXZ\x00", lzma.open),
)


def is_archive(path: Path) -> bool:
    """Whether the name is that of an archive we read."""
    return path.name.lower().endswith(ARCHIVE_SUFFIXES)


def _check_name(name: str, archive: Path) -> None:
    """Refuse a member whose path leads out of the archive; such a file was made to do harm."""
    parts = PurePosixPath(name.replace("\\", "/"))
    if parts.is_absolute() or ".." in parts.parts or ":" in name.split("/")[0]:
        raise DataError(f"{archive} is refused: its member {name!r} leads out of the archive")


def zip_items(path: Path, is_picture: Callable[[str], bool]) -> list[Item]:
    """The pictures of a zip archive, sorted by name; each is read when it is loaded."""
    file = open_source(path)
    try:
        archive = zipfile.ZipFile(file)
    # A damaged directory can raise nearly anything.
    except Exception as error:
        raise DataError(f"{path} is damaged: {error}") from error

    def loader(member: zipfile.ZipInfo) -> Callable[[], bytes]:
        def load() -> bytes:
            try:
                with open_member(archive, member) as file:
                    return read_pieces(file, LARGEST_PICTURE)
            except BadImageError:
                raise
            except Exception as error:
                raise BadImageError(f"its archive is damaged: {error}") from error

        return load

    members = sorted(archive.infolist(), key=lambda member: member.filename)
    items = []
    for member in members:
        _check_name(member.filename, path)
        if is_picture(member.filename):
            items.append(Item(member.filename, loader(member)))
        else:
            _check_passed_over(archive, member, path)
    return items


def _check_passed_over(archive: zipfile.ZipFile, member: zipfile.ZipInfo, path: Path) -> None:
    """The directory has no checksum; a damaged name must not drop a picture. What is read is
    compared with the name that stands before the data, and so must be what is not."""
    try:
        archive.open(member).close()
    except RuntimeError:
        return  # locked, or packed in a way that is not known; nobody wants it
    except Exception as error:
        raise DataError(f"{path} is damaged: {error}") from error


def open_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> IO[bytes]:
    """A member of a zip, for reading in pieces: it gives no more than its header says.

    Raises:
        BadImageError: It says more than it can hold, or is packed in a way that is not bounded.
    """
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        # Python unpacks these without a limit.
        raise BadImageError("it is packed by another method than deflate")
    stored = member.compress_type == zipfile.ZIP_STORED
    limit = member.compress_size if stored else unpacked_limit(member.compress_size)
    if member.file_size > limit:
        raise BadImageError(f"its {member.compress_size} bytes are to unpack to {member.file_size}")
    return archive.open(member)


class _Unpacked:
    """A tar archive's bytes, unpacked as they are read, with a limit on all and on one reading.

    What `tarfile` needs of a file: the sizes in headers, which it believes, are held against both.
    """

    def __init__(self, path: Path) -> None:
        self._raw = open_source(path)
        start = self._raw.read(6)
        size = self._raw.seek(0, 2)
        self._raw.seek(0)
        opened = next((opened for magic, opened in _PACKED if start.startswith(magic)), None)
        self._file: IO[bytes] = self._raw if opened is None else opened(self._raw)
        self._limit = size if opened is None else unpacked_limit(size)

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= PIECE:
            raise tarfile.ReadError("a header in it is longer than any is")
        data = self._file.read(size)
        self._check(self._file.tell())
        return data

    def seek(self, position: int) -> int:
        self._check(position)
        return self._file.seek(position)

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        self._file.close()
        self._raw.close()

    def _check(self, position: int) -> None:
        if position > self._limit:
            raise tarfile.ReadError(f"it claims or unpacks to more than {self._limit} bytes")


def tar_members(path: Path) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """Name of each file in the archive's order, and what reads it as long as it is the last given.

    The archive is read to its end, so that its checksum is compared and no file is passed over.

    Raises:
        DataError: It is damaged or unpacks to more than archives do.
    """
    file = _Unpacked(path)
    try:
        with tarfile.open(fileobj=cast(IO[bytes], file), mode="r:") as archive:
            while (member := archive.next()) is not None:
                archive.members.clear()  # type: ignore[attr-defined]  # it would keep them all
                if member.isfile():
                    yield member.name, _member_reader(archive, member, path)
            _check_end(file, archive.offset)
    except DataError:
        raise
    # tarfile and what unpacks for it raise nearly anything on damaged files.
    except Exception as error:
        raise DataError(f"{path} is damaged: {error or type(error).__name__}") from error
    finally:
        file.close()


def _member_reader(
    archive: tarfile.TarFile, member: tarfile.TarInfo, path: Path
) -> Callable[[], bytes]:
    def read() -> bytes:
        if member.issparse() or member.size > LARGEST_PICTURE:
            raise DataError(f"{path}: {member.name} is to unpack to {member.size} bytes")
        try:
            file = archive.extractfile(member)
            assert file is not None
            return read_pieces(file, member.size)
        except Exception as error:
            raise DataError(f"{path} is damaged in {member.name}: {error}") from error

    return read


def _check_end(file: _Unpacked, position: int) -> None:
    """tarfile takes a damaged header for the end; after the real one there is nothing but zeros."""
    file.seek(position)
    size = 0
    while piece := file.read(PIECE):
        size += len(piece)
        if piece.count(0) != len(piece):
            raise tarfile.ReadError(f"there is something other than a header at byte {position}")
    if size < tarfile.BLOCKSIZE:
        raise tarfile.ReadError("it is cut short")


def tar_names(path: Path, is_picture: Callable[[str], bool]) -> list[str]:
    """Names of the pictures in a tar archive, in its own order."""
    names = []
    for name, _ in tar_members(path):
        _check_name(name, path)
        if is_picture(name):
            names.append(name)
    return names


def tar_items(path: Path, is_picture: Callable[[str], bool]) -> Iterator[Item]:
    """The same pictures with their bytes, read once from front to back: tars allow nothing else."""
    for name, read in tar_members(path):
        if is_picture(name):
            yield Item(name, constant(read()))
