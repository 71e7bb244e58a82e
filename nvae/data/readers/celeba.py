"""CelebA as distributed: aligned JPEGs in a folder or zip, and the official partition file."""

from pathlib import Path

from nvae.data.config import DataConfig
from nvae.data.manifest import DataError
from nvae.data.readers.archives import zip_items
from nvae.data.readers.folder import is_picture, list_part
from nvae.data.readers.source import Item, Part, find_files, read_file
from nvae.data.tables import SPLITS
from nvae.files import LARGEST_TEXT, read_bytes

_PARTITION = "list_eval_partition.txt"


def _partition(path: Path) -> dict[str, list[str]]:
    """File names by split, in the order of the file: 0 train, 1 validation, 2 test."""
    names: dict[str, list[str]] = {split: [] for split in SPLITS}
    try:
        text = read_bytes(path, LARGEST_TEXT).decode("ascii", "replace")
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    for number, line in enumerate(text.splitlines()):
        words = line.split()
        if len(words) != 2 or words[1] not in ("0", "1", "2"):
            raise DataError(f"{path}, line {number + 1}: not a file name and 0, 1 or 2")
        if Path(words[0]).name != words[0] or words[0] == "..":
            raise DataError(f"{path}, line {number + 1}: {words[0]!r} leads out of the folder")
        names[SPLITS[int(words[1])]].append(words[0])
    return names


def read_celeba(source: Path, config: DataConfig) -> dict[str, Part]:
    """The official train, validation and test images."""
    del config
    partition = find_files(source, (_PARTITION,))
    images = find_files(source, ("img_align_celeba", "img_align_celeba.zip"))
    packed: dict[str, Item] = {}
    if images.is_file():
        packed = {Path(item.name).name: item for item in zip_items(images, is_picture)}

    def item(name: str) -> Item:
        if not images.is_file():
            return Item(name, read_file(images / name))
        if name not in packed:
            raise DataError(f"{images} lacks {name}, which {partition} lists")
        return packed[name]

    names = _partition(partition)
    if images.is_dir() and not all((images / row[0]).exists() for row in names.values() if row):
        # torchvision unpacks one level deeper than the archive's own layout.
        nested = images / images.name
        images = nested if nested.is_dir() else images
    parts = {split: list_part([item(name) for name in row]) for split, row in names.items()}
    return {split: part for split, part in parts.items() if part.count}
