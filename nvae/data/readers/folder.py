"""Folders and archives of pictures, with or without train/valid/test folders in them."""

import os
from collections.abc import Iterator
from pathlib import Path

from nvae.data.config import DataConfig
from nvae.data.readers.archives import is_archive, tar_items, tar_names, zip_items
from nvae.data.readers.source import Item, MissingSourceError, Part, group_by_split, read_file

PICTURE_SUFFIXES = (
    ".png",
    ".jpg",
    ".jpeg",
    ".webp",
    ".bmp",
    ".gif",
    ".tif",
    ".tiff",
    ".ppm",
    ".pgm",
)


def is_picture(name: str) -> bool:
    """Whether the name is that of a picture; hidden files (also of macOS archives) are not."""
    last = name.rpartition("/")[2].lower()
    return last.endswith(PICTURE_SUFFIXES) and not last.startswith(".") and "__MACOSX" not in name


def _walk(folder: Path) -> list[Path]:
    """All files below, sorted by relative path, without hidden folders and links to folders."""
    found: list[Path] = []
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(place, name) for name in files]
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def _missing(source: Path) -> MissingSourceError:
    return MissingSourceError(
        f"no pictures found in {source} (looked for {', '.join(PICTURE_SUFFIXES)}, "
        "also inside zip and tar archives)"
    )


def _tar_parts(path: Path, stem: str) -> tuple[list[str], Part]:
    names = tar_names(path, is_picture)
    return [f"{stem}{name}" for name in names], Part(
        len(names), lambda: tar_items(path, is_picture)
    )


def _loose(files: list[Path], source: Path) -> list[Item]:
    return [
        Item(path.relative_to(source).as_posix(), read_file(path))
        for path in files
        if is_picture(path.name)
    ]


def _chosen(part: Part, positions: list[int]) -> Part:
    """Some pictures of a part, in its order."""

    def items() -> Iterator[Item]:
        wanted = iter(positions)
        next_wanted = next(wanted, None)
        for position, item in enumerate(part.items()):
            if position == next_wanted:
                yield item
                next_wanted = next(wanted, None)

    return Part(len(positions), items)


def chain(parts: list[Part]) -> Part:
    """Parts one after another."""

    def items() -> Iterator[Item]:
        for part in parts:
            yield from part.items()

    return Part(sum(part.count for part in parts), items)


def read_folder(source: Path, config: DataConfig) -> dict[str, Part]:
    """Every picture below `source`, or in it where it is an archive.

    Folders or archives called train..., val... and test... are the splits, if all pictures are in
    such; otherwise there is one part.
    """
    del config
    if not source.exists():
        raise MissingSourceError(f"{source} does not exist")
    files = _walk(source) if source.is_dir() else [source]
    root = source if source.is_dir() else source.parent
    sources: list[tuple[list[str], Part]] = []
    loose = _loose(files, root)
    if loose:
        sources.append(([item.name for item in loose], list_part(loose)))
    for path in files:
        if not is_archive(path):
            continue
        # The archive's own name may tell the split: train_32x32.tar.
        stem = "" if path == source else f"{path.relative_to(root).as_posix()}/"
        if path.suffix.lower() == ".zip":
            packed = zip_items(path, is_picture)
            sources.append(([f"{stem}{item.name}" for item in packed], list_part(packed)))
        else:
            sources.append(_tar_parts(path, stem))
    groups = group_by_split([name for names, _ in sources for name in names])
    if not any(groups.values()):
        raise _missing(source)
    return {split: _gather(sources, positions) for split, positions in groups.items()}


def list_part(items: list[Item]) -> Part:
    """A part of items that are already listed."""
    return Part(len(items), lambda: iter(items))


def _gather(sources: list[tuple[list[str], Part]], positions: list[int]) -> Part:
    """The pictures at positions counted through all sources."""
    parts: list[Part] = []
    start = 0
    for _, part in sources:
        inside = [p - start for p in positions if start <= p < start + part.count]
        if inside:
            parts.append(_chosen(part, inside))
        start += part.count
    return chain(parts)
