"""The data sets that `configs/data` describes, by name."""

import re
from dataclasses import fields

from nvae.command_line import shell
from nvae.data.config import SOURCE_FORMATS, DataConfig
from nvae.data.manifest import DataError
from nvae.files import read_yaml
from nvae.settings import CONFIGS

CONFIG_FOLDER = CONFIGS / "data"
FOLDER = "folder"
"""The data set of the user's own pictures."""

_NAME = re.compile(r"[A-Za-z0-9_-]{1,100}")
_LARGEST = 1 << 20
OPTIONS = {
    "root": "--root",
    "source": "--source",
    "cache": "--cache",
    "format": "--format",
    "image_size": "--size",
    "channels": "--channels",
    "crop": "--crop",
    "crop_box": "--crop-box",
    "resize": "--resize",
    "train_size": "--train-size",
    "valid_size": "--valid-size",
    "test_size": "--test-size",
}
"""Settings that the preparing command takes, and how it calls them."""


def is_known(name: str) -> bool:
    """Whether a name is that of a file in `configs/data`."""
    return bool(_NAME.fullmatch(name)) and (CONFIG_FOLDER / f"{name}.yaml").is_file()


def config_names() -> list[str]:
    """Data sets that have a file in `configs/data` and need preparation.

    Raises:
        DataError: One of the files is bad.
    """
    names = sorted(path.stem for path in CONFIG_FOLDER.glob("*.yaml") if is_known(path.stem))
    return [name for name in names if load_config(name).format in SOURCE_FORMATS]


def load_config(name: str) -> DataConfig:
    """`configs/data/NAME.yaml` as a typed config.

    Raises:
        DataError: No such name, or a file that does not fit `DataConfig`.
    """
    path = CONFIG_FOLDER / f"{name}.yaml"
    if not is_known(name):
        raise DataError(f"there is no data set {name!r} in {CONFIG_FOLDER}")
    try:
        values = read_yaml(path, _LARGEST)
        if not isinstance(values, dict):
            raise ValueError("it holds no settings")
        if unknown := {str(key) for key in values} - {f.name for f in fields(DataConfig)}:
            raise ValueError(f"unknown settings: {', '.join(sorted(unknown))}")
        return DataConfig(**values)
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{path} is not valid: {error}") from error


def prepare_command(config: DataConfig) -> str:
    """The command that prepares a data set, to be typed as it is."""
    name = config.name if is_known(config.name) else FOLDER
    usual = load_config(name) if is_known(name) else None
    words: list[object] = ["python", "-m", "nvae.data.prepare", name]
    for setting, option in OPTIONS.items():
        value = getattr(config, setting)
        if value is not None and value != getattr(usual, setting, None):
            words += [option, *(value if isinstance(value, list | tuple) else [value])]
    return shell(*words)
