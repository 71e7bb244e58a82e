"""The data that a checkpoint is evaluated on: by default, the set that it was trained on.

A checkpoint may come from anybody, so its word goes no further than :class:`RecordedData`: the name
of a data set that is configured here, and which of its pixels are meant. Addresses, paths, formats
and everything else come from the configuration here and from what the user types.
"""

import dataclasses
import math
import os.path
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from omegaconf import MISSING, DictConfig, OmegaConf

from nvae.checkpoint import WEIGHTS_FILE, Weights, is_weights_folder, load_checkpoint, load_model
from nvae.cli.common import short_hash
from nvae.cli.schema import schema_of, schema_types
from nvae.command_line import brief, shell
from nvae.data import DataConfig
from nvae.data.config import IN_MEMORY_FORMATS, SPLITS, TRAIN, is_known, load_config
from nvae.data.dataset import ImageData
from nvae.data.places import prepared_folder
from nvae.data.store import MANIFEST_NAME
from nvae.models import HierarchicalVAE
from nvae.models.pixel_distribution import ImageConfig
from nvae.published_very_deep import ENTRIES
from nvae.settings import Size, check_choice, check_fields, height_width, show_size

_MOST_IN_MEMORY = 1 << 28
"""Bytes of images that are made in memory because a checkpoint says so."""


@dataclass(frozen=True)
class RecordedData:
    """All that is taken from a checkpoint about its data; see :class:`DataConfig`.

    Raises:
        ValueError: a value is of another type.
    """

    name: str
    image_size: Size
    channels: int
    bits: int
    likelihood: str
    counted_size: Size | None
    floats: bool
    value_range: list[float] | None
    labels: bool | str
    binarize: str
    pad: int
    flip: bool
    crop: str
    crop_box: list[int] | None
    resize: str
    train_size: int | None
    valid_size: int | None
    test_size: int | None
    split_seed: int
    seed: int
    eval_seed: int

    def __post_init__(self) -> None:
        check_fields(self, "the checkpoint's data.")


@dataclass(frozen=True)
class ChosenData:
    """A data set to open.

    Attributes:
        config: of the data set.
        prepare: the user named the set or its folder, so it may be downloaded and prepared.
    """

    config: DataConfig
    prepare: bool


def data_schema() -> type:
    """`DataConfig` with every field left open, so that single ones can be given."""
    hints = schema_types(DataConfig)
    return dataclasses.make_dataclass(
        "DataOverrides",
        [(f.name, hints[f.name], MISSING) for f in dataclasses.fields(DataConfig)],
    )


def with_data(cls: type) -> type:
    """The schema of ``cls`` with a `data` group beside its own fields."""
    base = schema_of(cls)
    group = data_schema()
    extra = [("data", group, dataclasses.field(default_factory=group))]
    return dataclasses.make_dataclass(cls.__name__, extra, bases=(base,))


def split_off_data(composed: DictConfig) -> tuple[DictConfig, dict[str, Any]]:
    """The command's own settings, and the data settings that were given."""
    own = OmegaConf.masked_copy(composed, [str(key) for key in composed if key != "data"])
    given = {}
    for key in map(str, composed.data):
        if not OmegaConf.is_missing(composed.data, key):
            value = composed.data[key]
            resolved = OmegaConf.is_config(value)
            given[key] = OmegaConf.to_container(value, resolve=True) if resolved else value
    return own, given


def choose_data(given: dict[str, Any], run_config: dict[str, Any]) -> ChosenData:
    """The data set: a whole one as given, or the checkpoint's with single fields changed.

    Args:
        given: what the user typed.
        run_config: of the checkpoint; see :class:`RecordedData` for what is taken from it.

    Raises:
        ValueError: neither command line nor checkpoint names a data set that is configured here,
            or the checkpoint names another folder than the configured one.
    """
    if _whole(given):
        return ChosenData(DataConfig(**given), prepare=True)
    recorded = run_config.get("data")
    name = given.get("name") or (recorded.get("name") if isinstance(recorded, dict) else None)
    if not isinstance(recorded, dict) or not isinstance(name, str):
        raise ValueError("the checkpoint does not say what it was trained on; give data=NAME")
    if not is_known(name):
        raise ValueError(
            f"the checkpoint's data set, {_quoted(name)}, is not configured here; give data=NAME, "
            "for pictures of your own data=folder data.root=FOLDER"
        )
    here = load_config(name)
    known = [f.name for f in dataclasses.fields(RecordedData)]
    values = {key: recorded.get(key, getattr(here, key)) for key in known}
    meant = RecordedData(**{**values, "name": name})
    if "root" not in given and here.format not in IN_MEMORY_FORMATS:
        _check_root(recorded.get("root", here.root), here)
    config = dataclasses.replace(here, **{**dataclasses.asdict(meant), **given})
    return ChosenData(config, prepare="root" in given)


def _whole(given: dict[str, Any]) -> bool:
    """Whether `data=NAME` was typed: then every field has a value that needs one."""
    required = {
        f.name
        for f in dataclasses.fields(DataConfig)
        if f.default is f.default_factory is dataclasses.MISSING
    }
    return required <= given.keys()


def _check_root(recorded: Any, here: DataConfig) -> None:
    if isinstance(recorded, str) and os.path.abspath(recorded) == os.path.abspath(here.root):
        return
    raise ValueError(
        f"the checkpoint was trained on {here.name} in {_quoted(recorded)}, a folder that is not "
        f"read on a checkpoint's word; give data.root=FOLDER (data={here.name} takes {here.root})"
    )


def _quoted(text: Any) -> str:
    """Text of a stranger: short, and repr lets no control character through."""
    return brief(repr(text), 100)


def open_data(chosen: ChosenData, model: ImageConfig) -> ImageData:
    """Open the data, prepared where the user named it, once it is known to fit the model.

    Raises:
        ValueError: sizes, channels or gray levels do not fit, or there is no data.
    """
    config = chosen.config
    _check_fits(config, model)
    data = ImageData(config)
    if chosen.prepare:
        data.prepare()
    elif config.format in IN_MEMORY_FORMATS:
        _check_memory(config)
    elif not (prepared_folder(config) / MANIFEST_NAME).is_file():
        raise ValueError(
            f"{config.name} is not prepared in {config.root}, and a checkpoint's word prepares "
            f"nothing: {shell('python', '-m', 'nvae.data.prepare', config.name)}, "
            f"or give data={config.name}"
        )
    data.setup()
    if model.num_classes and data.classes and config.labels == "auto":
        data.config = dataclasses.replace(config, labels=True)  # they were kept with the images
        data.check_classes(model.num_classes)
    return data


def _check_fits(config: DataConfig, model: ImageConfig) -> None:
    for name, have, want in (
        ("image_size", config.image_size, model.image_size),
        ("channels", config.channels, model.image_channels),
        ("counted_size", config.counted_size, model.counted_size),
    ):
        if have != want:
            raise ValueError(
                f"data.{name}={_shown(have)} does not fit the checkpoint's model, which has "
                f"{_shown(want)}"
            )
    model.pixel_distribution.check_data(model, config.bits)


def _shown(value: Size | None) -> str:
    return "null" if value is None else show_size(value)


def _check_memory(config: DataConfig) -> None:
    images = sum(size or 0 for size in (config.train_size, config.valid_size, config.test_size))
    pixels = math.prod(height_width(config.image_size)) * config.channels
    if images * pixels * (1 if config.bits <= 8 else 2) > _MOST_IN_MEMORY:
        raise ValueError(
            f"the checkpoint asks for {images} images of {config.name} in memory; give "
            f"data={config.name} if that is meant"
        )


def check_split(split: str) -> None:
    """Raise a ValueError unless ``split`` is one."""
    check_choice("split", split, SPLITS)


_CHANGES_NO_PIXEL = (
    *("batch_size", "eval_batch_size", "num_workers", "on_device", "on_device_limit"),
    *("root", "source", "cache", "download", "licence", "citation", "homepage", "urls", "files"),
    *("labels", "label_key", "image_key", "dataset"),
    *("seed", "flip", "global_batch"),  # of training alone
)


def pixel_protocol(data: ImageData, split: str) -> dict[str, Any]:
    """What the images of a split depend on: settings, and the stored pixels themselves."""
    settings = dataclasses.asdict(data.config)
    kept = {
        k: list(v) if isinstance(v, tuple) else v  # as JSON gives it back
        for k, v in settings.items()
        if k not in _CHANGES_NO_PIXEL
    }
    return {**kept, "sha256": data.split(split).sha256}


@dataclass(frozen=True)
class OpenedCheckpoint:
    """What the commands need to know.

    Attributes:
        file: holds the weights; what is made of them goes beside it.
        model: in evaluation mode, on the CPU.
        weights: ``averaged`` | ``raw`` | ``exported``.
        run_config: the configuration of the run that wrote it, if it says; nothing in it has been
            checked.
        train_sha256: of the images that the run was trained on, if it says.
        settings: hash of what the user gave for a published file, which does not hold them; what
            is made of the file depends on them too.
    """

    file: Path
    model: HierarchicalVAE
    weights: str
    run_config: dict[str, Any]
    train_sha256: str | None = None
    settings: str | None = None


def open_checkpoint(
    path: str, weights: str, plugins: Sequence[str] = (), settings: str | None = None
) -> OpenedCheckpoint:
    """Open what :func:`load_model` reads.

    Args:
        path: file or exported folder.
        weights: ``ema`` or ``raw``.
        plugins: ``package.module:NAME`` of models, likelihoods and cell families that the
            checkpoint may name; what is not among them is not imported.
        settings: of a published file that does not hold them; ``config`` of :func:`load_model`.

    Raises:
        CheckpointError: see there.
        ValueError: other weights, or a plugin that is none.
    """
    # which checks both
    model = load_model(path, cast(Weights, weights), plugins=plugins, config=settings)
    if is_weights_folder(path):
        return OpenedCheckpoint(Path(path) / WEIGHTS_FILE, model, "exported", {})
    checkpoint = load_checkpoint(path)
    averaged = weights == "ema" and not {"current_model_state", ENTRIES[1]}.isdisjoint(checkpoint)
    said = checkpoint.get("run_config")
    run_config = said if isinstance(said, dict) else {}
    images: Any = checkpoint
    for key in ("fingerprint", "data", "splits", TRAIN, "sha256"):
        images = images.get(key) if isinstance(images, dict) else None
    train_sha256 = images if isinstance(images, str) else None
    kind = "averaged" if averaged else "raw"
    given = None if settings is None else short_hash(model.config.to_dict())
    return OpenedCheckpoint(Path(path), model, kind, run_config, train_sha256, given)
