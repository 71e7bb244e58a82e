"""The data that a checkpoint is evaluated on: by default, what it was trained on."""

import dataclasses
import typing
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf

from nvae.cli.schema import schema_of
from nvae.data import DataConfig
from nvae.data.module import ImageDataModule
from nvae.data.tables import SPLITS
from nvae.models import ModelConfig


def data_schema() -> type:
    """`DataConfig` with every field left open, so that single ones can be given."""
    hints = typing.get_type_hints(DataConfig)
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


def data_config(given: dict[str, Any], run_config: dict[str, Any]) -> DataConfig:
    """The data set: a whole one as given, or the checkpoint's with single fields changed.

    Raises:
        ValueError: neither command line nor checkpoint names a data set.
    """
    if "format" in given:
        return DataConfig(**given)
    recorded = run_config.get("data")
    if not isinstance(recorded, dict):
        raise ValueError("the checkpoint does not say what it was trained on; give data=NAME")
    unknown = sorted(recorded.keys() - {f.name for f in dataclasses.fields(DataConfig)})
    if unknown:
        raise ValueError(f"the checkpoint's data settings hold unknown keys: {', '.join(unknown)}")
    return DataConfig(**{**recorded, **given})


def open_data(config: DataConfig, model: ModelConfig) -> ImageDataModule:
    """Prepare and open the data, once it is known to fit the model.

    Raises:
        ValueError: sizes, channels or grey levels do not fit, or there is no data.
    """
    for name, have, want in (
        ("image_size", config.image_size, model.image_size),
        ("channels", config.channels, model.image_channels),
        ("counted_size", config.counted_size, model.counted_size),
    ):
        if have != want:
            raise ValueError(
                f"data.{name}={have} does not fit the checkpoint's model, which has {want}"
            )
    if model.likelihood == "bernoulli" and config.bits != 1:
        raise ValueError(
            f"the checkpoint's model is for black and white pixels, data.bits={config.bits} is not"
        )
    if model.likelihood == "logistic_mixture" and config.bits != model.bits:
        raise ValueError(
            f"data.bits={config.bits} does not fit the checkpoint's model, which has {model.bits}"
        )
    data = ImageDataModule(config)
    data.prepare_data()
    data.setup()
    return data


def check_split(split: str) -> None:
    """Raise a ValueError unless ``split`` is one."""
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is unknown; allowed: {', '.join(SPLITS)}")


_CHANGES_NO_PIXEL = (
    *("batch_size", "eval_batch_size", "num_workers", "on_device", "on_device_limit"),
    *("root", "source", "cache", "download", "licence", "citation", "homepage", "urls", "files"),
)


def pixel_protocol(data: ImageDataModule, split: str) -> dict[str, Any]:
    """What the images of a split depend on: settings, and the stored pixels themselves."""
    settings = dataclasses.asdict(data.config)
    kept = {k: v for k, v in settings.items() if k not in _CHANGES_NO_PIXEL}
    return {**kept, "sha256": data.table(split).sha256}
