"""Pictures inside zip and tar archives, read where they are: nothing is ever extracted to disk."""

import lzma
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from nvae.data.images import BadImageError
from nvae.data.manifest import DataError
from nvae.data.readers.source import Item, constant

ARCHIVE_SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
_MEMBER_LIMIT = 1 << 29
"""A picture larger than this, unpacked, is a bomb and not a picture."""

_TAR_ERRORS = (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError)


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
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError) as error:
        raise DataError(f"{path} is damaged: {error}") from error

    def loader(member: zipfile.ZipInfo) -> Callable[[], bytes]:
        def load() -> bytes:
            if member.file_size > _MEMBER_LIMIT:
                raise BadImageError(f"it unpacks to {member.file_size} bytes")
            try:
                return archive.read(member)
            except (zipfile.BadZipFile, RuntimeError, EOFError, zlib.error) as error:
                raise BadImageError(str(error)) from error

        return load

    members = sorted(archive.infolist(), key=lambda member: member.filename)
    for member in members:
        _check_name(member.filename, path)
    return [
        Item(member.filename, loader(member))
        for member in members
        if not member.is_dir() and is_picture(member.filename)
    ]


def tar_names(path: Path, is_picture: Callable[[str], bool]) -> list[str]:
    """Names of the pictures in a tar archive, in its own order."""
    try:
        with tarfile.open(path) as archive:
            members = list(archive)
    except _TAR_ERRORS as error:
        raise DataError(f"{path} is damaged: {error}") from error
    for member in members:
        _check_name(member.name, path)
    return [member.name for member in members if member.isfile() and is_picture(member.name)]


def tar_items(path: Path, is_picture: Callable[[str], bool]) -> Iterator[Item]:
    """The same pictures with their bytes, read once from front to back: tars allow nothing else."""
    try:
        with tarfile.open(path, "r|*") as archive:
            for member in archive:
                if not member.isfile() or not is_picture(member.name):
                    continue
                if member.size > _MEMBER_LIMIT:
                    raise DataError(f"{path}: {member.name} unpacks to {member.size} bytes")
                file = archive.extractfile(member)
                assert file is not None
                yield Item(member.name, constant(file.read()))
    except _TAR_ERRORS as error:
        raise DataError(f"{path} is damaged: {error}") from error
