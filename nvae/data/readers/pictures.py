"""Folders and archives of pictures, and CelebA, which is such a folder with a list of splits.

Archives are read where they are: nothing is ever extracted to disk. Own reader of CelebA:
torchvision's needs the attribute files and its own folders, and cannot read the zip.
"""

import bz2
import gzip
import lzma
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, suppress
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any, BinaryIO, cast

from nvae.data.config import SPLITS, DataError
from nvae.data.decoding import LARGEST_PICTURE
from nvae.data.labels import Labeled
from nvae.data.pixels import BadImageError
from nvae.data.readers import (
    PIECE,
    Item,
    MissingSourceError,
    Part,
    Reader,
    damage_named,
    file_item,
    find_files,
    labeled_item,
    linked_folder,
    list_part,
    loaded_item,
    open_source,
    read_pieces,
    read_whole,
    unpacked_limit,
    walk,
)
from nvae.data.readers.folder_labels import LABEL_FILES, FolderLabels, Table
from nvae.data.readers.splits import group_by_split
from nvae.files import LARGEST_TEXT

PICTURE_SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".webp", ".bmp"),
    *(".gif", ".tif", ".tiff", ".ppm", ".pgm"),
)
ARCHIVE_SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
_PACKED: tuple[tuple[bytes, Callable[[BinaryIO], Any]], ...] = (
    (b"\x1f\x8b", gzip.open),
    (b"BZh", bz2.open),
    (b"\xfd7zXZ\x00", lzma.open),
)


def is_picture(name: str) -> bool:
    """Whether the name is that of a picture; hidden files (also of macOS archives) are not."""
    last = name.rpartition("/")[2].lower()
    return last.endswith(PICTURE_SUFFIXES) and not last.startswith(".") and "__MACOSX" not in name


class Folder(Reader):
    """Every picture below `source`, or in it where it is an archive.

    Folders or archives called train..., val... and test... are the splits, if all pictures are in
    such; otherwise there is one part. The first folder below the split is the class, unless a file
    `labels.csv` or `metadata.csv` says it.
    """

    def parts(self) -> Mapping[str, Any]:  # noqa: D102
        source = self.source
        if not source.exists():
            raise MissingSourceError(f"{source} does not exist")
        files = _walk(source) if source.is_dir() else [source]
        root = source if source.is_dir() else source.parent
        loose = [
            file_item(path.relative_to(root).as_posix(), path)
            for path in files
            if is_picture(path.name)
        ]
        found = [([item.name for item in loose], list_part(loose))]
        has_labels = self.config.labels is not False
        tables = [
            Table(
                str(path), path.parent.relative_to(root).as_posix(), read_whole(path, LARGEST_TEXT)
            )
            for path in files
            if has_labels and path.name in LABEL_FILES
        ]
        for path in files:
            # The archive's own name may tell the split: train_32x32.tar.
            stem = "" if path == source else f"{path.relative_to(root).as_posix()}/"
            if path.name.lower().endswith(ARCHIVE_SUFFIXES):
                names, part, lists = _archive(path)
                found.append(([f"{stem}{name}" for name in names], part))
                tables += [
                    Table(f"{path}: {name}", str(PurePosixPath(f"{stem}{name}").parent), content)
                    for name, content in lists.items()
                    if has_labels
                ]
        all_names = [name for names, _ in found for name in names]
        groups = group_by_split(all_names)
        if not any(groups.values()):
            link = linked_folder(source) if source.is_dir() else None
            hint = f"; links to folders are not followed, and {link} is one" if link else ""
            raise MissingSourceError(
                f"no pictures found in {source} (looked for {', '.join(PICTURE_SUFFIXES)}, "
                f"also inside zip and tar archives){hint}"
            )
        labels = FolderLabels(all_names, tables) if has_labels else None
        parts = [part for _, part in found]
        return {split: _chosen(parts, positions, labels) for split, positions in groups.items()}


def _archive(path: Path) -> tuple[list[str], Part, dict[str, bytes]]:
    """The names of an archive's pictures, the pictures, and its CSV files of labels by name."""
    if path.name.lower().endswith(".zip"):
        items = zip_items(path)
        return [item.name for item in items], list_part(items), _zip_lists(path)
    names, lists = tar_listing(path)
    return names, _tar_part(path, len(names)), lists


def _is_list(name: str) -> bool:
    """Whether the name is that of a file of labels."""
    return name.rpartition("/")[2] in LABEL_FILES and "__MACOSX" not in name


def _walk(folder: Path) -> list[Path]:
    """All files below, sorted by relative path, without hidden folders and links to folders."""
    found = [Path(place, name) for place, _, files in walk(folder) for name in files]
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def _chosen(parts: list[Part], positions: list[int], labels: FolderLabels | None) -> Part:
    """The pictures at positions, in rising order, counted through all parts, with their labels."""

    def items() -> Iterator[Item]:
        wanted = iter(positions)
        following = next(wanted, None)
        start = 0
        for part in parts:
            # A part of which nothing is wanted is not read.
            if following is not None and following < start + part.count:
                for position, item in enumerate(part.items(), start):
                    if position == following:
                        yield labeled_item(item, labels.of(position)) if labels else item
                        following = next(wanted, None)
            start += part.count

    return Part(len(positions), items)


def _check_name(name: str, archive: Path) -> None:
    """Refuse a member whose path leads out of the archive; such a file was made to do harm."""
    parts = PurePosixPath(name.replace("\\", "/"))
    if parts.is_absolute() or ".." in parts.parts or ":" in name.split("/")[0]:
        raise DataError(f"{archive} is refused: its member {name!r} leads out of the archive")


def zip_items(path: Path) -> list[Item]:
    """The pictures of a zip archive, sorted by name; each is read when it is loaded."""
    file = open_source(path)
    with damage_named(path):
        archive = zipfile.ZipFile(file)

    items = []
    for member in sorted(archive.infolist(), key=lambda member: member.filename):
        _check_name(member.filename, path)
        if is_picture(member.filename):
            items.append(Item(member.filename, partial(_read_zipped, archive, member)))
        else:
            _check_passed_over(archive, member, path)
    return items


def _zip_lists(path: Path) -> dict[str, bytes]:
    """The files of labels in a zip archive."""
    lists = {}
    with damage_named(path), zipfile.ZipFile(open_source(path)) as archive:
        for member in archive.infolist():
            if not _is_list(member.filename):
                continue
            if member.file_size > LARGEST_TEXT:
                raise DataError(
                    f"{path}: {member.filename} is to unpack to {member.file_size} bytes"
                )
            with open_member(archive, member) as file:
                lists[member.filename] = read_pieces(file, LARGEST_TEXT)
    return lists


def _read_zipped(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Labeled:
    try:
        with open_member(archive, member) as file:
            return Labeled(read_pieces(file, LARGEST_PICTURE))
    except BadImageError:
        raise
    except Exception as error:
        raise BadImageError(f"its archive is damaged: {error}") from error


def _check_passed_over(archive: zipfile.ZipFile, member: zipfile.ZipInfo, path: Path) -> None:
    """Compare the name of a member that is no picture with the name that stands before its data.

    The zip's directory has no checksum, and a damaged name must not drop a picture. `open` compares
    both names.
    """
    # One that is locked, or packed in a way that is not known, is a RuntimeError; nobody wants it.
    with damage_named(path), suppress(RuntimeError):
        archive.open(member).close()


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
    """A tar archive, unpacked as it is read, with limits on its size and on what is read at once.

    `tarfile` believes the sizes that headers state, so they are checked here.
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
    """The name of each file, in the archive's order, and a function that reads it until the next
    one is asked for.

    The archive is read to its end, so that its checksum is compared and no file is passed over.

    Raises:
        DataError: It is damaged or unpacks to more than archives do.
    """
    with (
        damage_named(path),
        closing(_Unpacked(path)) as file,
        tarfile.open(fileobj=cast(IO[bytes], file), mode="r:") as archive,
    ):
        while (member := archive.next()) is not None:
            archive.members.clear()  # type: ignore[attr-defined]  # it would keep them all
            if member.isfile():
                yield member.name, partial(_read_member, archive, member, path)
        _check_end(file, archive.offset)


def _read_member(archive: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> bytes:
    if member.issparse() or member.size > LARGEST_PICTURE:
        raise DataError(f"{path}: {member.name} is to unpack to {member.size} bytes")
    with damage_named(f"{path}: {member.name}"):
        file = archive.extractfile(member)
        assert file is not None
        return read_pieces(file, member.size)


def _check_end(file: _Unpacked, position: int) -> None:
    """Raise an error unless only zeros follow: tarfile takes a damaged header for the end."""
    file.seek(position)
    size = 0
    while piece := file.read(PIECE):
        size += len(piece)
        if piece.count(0) != len(piece):
            raise tarfile.ReadError(f"there is something other than a header at byte {position}")
    if size < tarfile.BLOCKSIZE:
        raise tarfile.ReadError("it is cut short")


def tar_listing(path: Path) -> tuple[list[str], dict[str, bytes]]:
    """Names of the pictures in a tar archive, in its own order, and its files of labels."""
    names, lists = [], {}
    for name, read in tar_members(path):
        names.append(name)
        if _is_list(name):
            lists[name] = read()
    for name in names:
        _check_name(name, path)
    return [name for name in names if is_picture(name)], lists


def _tar_part(path: Path, count: int) -> Part:
    """The pictures of a tar archive, which can only be read from front to back."""

    def items() -> Iterator[Item]:
        for name, read in tar_members(path):
            if is_picture(name):
                yield loaded_item(name, read())

    return Part(count, items)


class CelebA(Reader):
    """The official train, validation and test images, aligned JPEGs in a folder or zip."""

    def parts(self) -> Mapping[str, Any]:  # noqa: D102
        partition = find_files(self.source, ("list_eval_partition.txt",))
        images = find_files(self.source, ("img_align_celeba", "img_align_celeba.zip"))
        names = _partition(partition)
        packed = {}
        if images.is_file():
            packed = {Path(item.name).name: item for item in zip_items(images)}
        elif not all((images / row[0]).exists() for row in names.values() if row):
            # torchvision unpacks one level deeper than the archive's own layout.
            nested = images / images.name
            images = nested if nested.is_dir() else images

        def item(name: str) -> Item:
            if not images.is_file():
                return file_item(name, images / name)
            if name not in packed:
                raise DataError(f"{images} lacks {name}, which {partition} lists")
            return packed[name]

        parts = {split: [item(name) for name in row] for split, row in names.items() if row}
        return {split: list_part(items) for split, items in parts.items()}


def _partition(path: Path) -> dict[str, list[str]]:
    """File names by split, in the order of the file: 0 train, 1 validation, 2 test."""
    names: dict[str, list[str]] = {split: [] for split in SPLITS}
    text = read_whole(path, LARGEST_TEXT).decode("ascii", "replace")
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split()
        if len(words) != 2 or words[1] not in ("0", "1", "2"):
            raise DataError(f"{path}, line {number}: not a file name and 0, 1 or 2")
        if Path(words[0]).name != words[0] or words[0] == "..":
            raise DataError(f"{path}, line {number}: {words[0]!r} leads out of the folder")
        names[SPLITS[int(words[1])]].append(words[0])
    return names
