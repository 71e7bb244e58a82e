"""From a config to open tables, whatever the source."""

from nvae.data.config import IN_MEMORY_FORMATS, DataConfig
from nvae.data.memory import open_in_memory
from nvae.data.tables import SPLITS, TRAIN, ImageTable


def prepare_if_missing(config: DataConfig) -> None:
    """Make the prepared form of a data set unless it is there, or is made in memory.

    Raises:
        ValueError: The source is missing or bad; the message says what to do.
    """
    if config.format in IN_MEMORY_FORMATS:
        return
    raise NotImplementedError


def open_tables(config: DataConfig) -> dict[str, ImageTable]:
    """Open the splits that a data set has; an empty split is left out.

    Raises:
        ValueError: It is not prepared, damaged, or not what the config describes.
    """
    if config.format in IN_MEMORY_FORMATS:
        return open_in_memory(config)
    raise NotImplementedError


def check_tables(config: DataConfig, tables: dict[str, ImageTable]) -> None:
    """Hold the open splits against the config: shape and sizes.

    Raises:
        ValueError: They differ; the message names both.
    """
    size = config.stored_size
    wanted = (size, size, config.channels)
    for split, table in tables.items():
        if table.shape != wanted:
            raise ValueError(
                f"the prepared {split} images of {config.name} are "
                f"{'x'.join(map(str, table.shape))}, the config wants "
                f"{'x'.join(map(str, wanted))}: prepare them again or change data.image_size, "
                "data.pad or data.channels"
            )
    for split in SPLITS:
        asked = getattr(config, f"{split}_size")
        have = len(tables.get(split, ()))
        if asked is not None and asked != have:
            raise ValueError(
                f"{config.name} has {have} {split} images, the config says "
                f"data.{split}_size={asked}: prepare it again or change the config"
            )
    if TRAIN in tables and len(tables) == 1:
        raise ValueError(
            f"{config.name} has neither validation nor test images: set data.valid_size"
        )
