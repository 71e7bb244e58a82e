"""Data sets that are objects: any torch `Dataset` by `_target_`, Hugging Face's from a folder."""

import importlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from nvae.data.config import SPLITS, TRAIN, DataConfig, DataError
from nvae.data.readers import (
    IMAGE_KEYS,
    LABEL_KEYS,
    MissingSourceError,
    Part,
    Reader,
    damage_named,
    indexed_part,
    key_among,
)
from nvae.data.readers.splits import split_of_word

_TARGET = "_target_"
_ARGUMENTS, _PARTIAL = "_args_", "_partial_"
_DEEPEST = 20


class Datasets(Reader):
    """The torch `Dataset` that `data.dataset` describes, or one for each split."""

    def parts(self) -> Mapping[str, Any]:  # noqa: D102
        given = self.config.dataset
        by_split = {TRAIN: given} if _TARGET in given else given
        if unknown := sorted(set(by_split) - set(SPLITS)):
            raise DataError(
                f"data.dataset.{unknown[0]} is no split; it takes a _target_, or one in each of "
                f"{', '.join(SPLITS)}"
            )
        return {
            split: _checked(instantiate(each, f"data.dataset.{split}"), split)
            for split, each in by_split.items()
            if each is not None
        }


def _checked(made: Any, split: str) -> Any:
    if not (hasattr(made, "__len__") and hasattr(made, "__getitem__")):
        raise DataError(
            f"data.dataset for {split} is a {type(made).__name__}, which has no length or cannot "
            "be indexed by numbers"
        )
    return made


def instantiate(value: Any, where: str, depth: int = 0) -> Any:
    """What a description of an object stands for, by Hydra's convention.

    A mapping with `_target_`, a dotted path, is called with the others as arguments; `_args_` are
    positional, `_partial_: true` makes a `functools.partial`. It counts only in what the user
    composed: nothing that a file of data or a checkpoint says comes here.

    Raises:
        DataError: There is no such thing, or it does not take these arguments.
    """
    if depth > _DEEPEST:
        raise DataError(f"{where} is nested too deep")
    if isinstance(value, list):
        return [instantiate(each, where, depth + 1) for each in value]
    if not isinstance(value, dict):
        return value
    made = {
        key: instantiate(each, f"{where}.{key}", depth + 1)
        for key, each in value.items()
        if key != _TARGET
    }
    if _TARGET not in value:
        if depth == 0:
            raise DataError(f"{where} has no _target_")
        return made
    target = _located(value[_TARGET], where)
    positional, is_partial = made.pop(_ARGUMENTS, []), made.pop(_PARTIAL, False)
    if unknown := [key for key in made if str(key).startswith("_")]:
        raise DataError(f"{where}.{unknown[0]} is not known; there are _target_, _args_, _partial_")
    try:
        return partial(target, *positional, **made) if is_partial else target(*positional, **made)
    except Exception as error:  # whatever it raises, it is what the user named
        raise DataError(
            f"{where}: {value[_TARGET]} failed: {str(error) or type(error).__name__}"
        ) from error


def _located(path: Any, where: str) -> Any:
    """What a dotted path names; a class within a class too."""
    words = path.split(".") if isinstance(path, str) else []
    if len(words) < 2 or not all(word.isidentifier() for word in words):
        raise DataError(f"{where}._target_={path!r} is no dotted path, such as package.Class")
    for split in range(len(words) - 1, 0, -1):
        name = ".".join(words[:split])
        try:
            found: Any = importlib.import_module(name)
            for attribute in words[split:]:
                found = getattr(found, attribute)
            return found
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise DataError(f"{where}._target_={path} cannot be imported: {error}") from error
        except (ImportError, AttributeError) as error:
            raise DataError(f"{where}._target_={path} cannot be imported: {error}") from error
    raise DataError(f"{where}._target_={path} cannot be imported: there is no {words[0]}")


class HuggingFace(Reader):
    """A data set that `datasets.Dataset.save_to_disk` wrote, or several in one folder, by split."""

    def parts(self) -> Mapping[str, Any]:  # noqa: D102
        source = self.source
        names = ("dataset_dict.json", "dataset_info.json")
        if not any((source / name).exists() for name in names):
            raise MissingSourceError(f"{' or '.join(names)} not found in {source}")
        opened = _load(source)
        if not isinstance(opened, dict):
            return {TRAIN: _columns(opened, TRAIN, self.config)}
        named = {name: split_of_word(name) for name in opened}
        if TRAIN not in named.values():
            raise DataError(f"{source} has the splits {', '.join(named)}, and none is for training")
        return {
            split: _columns(opened[name], split, self.config)
            for name, split in named.items()
            if split is not None
        }


def _load(source: Path) -> Any:
    try:
        from datasets import load_from_disk
    except ImportError:
        raise DataError(
            f"{source} is a data set of Hugging Face's: pip install 'nvae[formats]'"
        ) from None
    with damage_named(source):
        return load_from_disk(str(source))


def _columns(data: Any, split: str, config: DataConfig) -> Part:
    """The images and labels of a data set, still encoded."""
    from datasets import ClassLabel
    from datasets import Image as ImageFeature

    features = data.features
    pictures = [name for name, kind in features.items() if isinstance(kind, ImageFeature)]
    arrays = [name for name, kind in features.items() if getattr(kind, "shape", None)]
    image: Any = key_among(features, config.image_key, IMAGE_KEYS, "image_key")
    if image not in (*pictures, *arrays):
        if config.image_key is not None or len(pictures) != 1:
            raise DataError(
                f"the {split} data have the columns {', '.join(features)}: name that of the "
                "images with data.image_key"
            )
        image = pictures[0]
    classed = [name for name, kind in features.items() if isinstance(kind, ClassLabel)]
    label = key_among(features, config.label_key, LABEL_KEYS, "label_key")
    if label is None and len(classed) == 1:
        label = classed[0]
    kind = features[image]
    if image in pictures:
        data = data.cast_column(image, ImageFeature(decode=False))
    entries = _Entries(data, image, label, getattr(kind, "dtype", None))
    if label in classed:
        entries.classes = features[label].names
    return indexed_part(entries, split, config)


class _Entries:
    """(picture, label) of every row of a data set.

    Attributes:
        classes: names of the classes, where labels are their numbers.
    """

    def __init__(self, data: Any, image: str, label: str | None, dtype: str | None) -> None:
        self._data = data.select_columns([image] if label is None else [image, label])
        self._image, self._label, self._dtype = image, label, dtype
        self.classes: list[str] | None = None

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        row = self._data[index]
        picture = row[self._image]
        if isinstance(picture, dict):
            # A path would be a file outside of the data set; what was saved holds the bytes.
            picture = picture.get("bytes")
        elif isinstance(picture, list):
            picture = np.array(picture, self._dtype)
        return picture, None if self._label is None else row[self._label]
