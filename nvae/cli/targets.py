"""Objects that a training configuration names by `_target_`: callbacks, loggers, plugins.

They count only in what the user composes, never in a configuration read from a file.
"""

import dataclasses
import importlib
import importlib.util
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from pytorch_lightning.loggers import Logger

from nvae.settings import check_arguments
from nvae.training.ema import MovingAverage
from nvae.training.trainer import TrainerConfig

Entries = dict[str, Any]


def build_callbacks(entries: Entries) -> list[pl.Callback]:
    """The callbacks that are not null, in the order of the configuration.

    Raises:
        ValueError: one line that names the entry.
    """
    made = (_made("callbacks", name, entry, pl.Callback) for name, entry in _given(entries))
    return [callback for callback in made if callback is not None]


def averages_on_device(entries: Entries) -> bool:
    """Whether a moving average of the weights will live beside the model."""
    return any(isinstance(c, MovingAverage) and c.device is None for c in build_callbacks(entries))


def check_loggers(entries: Entries) -> None:
    """Raise a ValueError for what :func:`build_loggers` could not build; nothing is written."""
    for name, entry in _given(entries):
        check_arguments(_target("logger", name, entry), _arguments(entry), f"logger.{name}.")


def check_installed(entries: Entries) -> None:
    """Raise a ValueError for a logger whose package is not there."""
    for name, entry in _given(entries):
        if "wandb" in entry["_target_"].lower() and importlib.util.find_spec("wandb") is None:
            raise ValueError(
                f"logger.{name} needs the wandb package: pip install wandb, or set "
                f"logger.{name}=null"
            )


def build_loggers(entries: Entries, folder: Path, start_step: int) -> list[Logger]:
    """The loggers that are not null.

    Args:
        entries: of the configuration.
        folder: the run's; the argument `save_dir` of loggers that take one and are not given it.
        start_step: optimizer step that the run starts from; `start_step` likewise.

    Raises:
        ValueError: one line that names the entry.
    """
    loggers = []
    for name, entry in _given(entries):
        known = inspect.signature(_target("logger", name, entry)).parameters
        more = {"save_dir": str(folder), "start_step": start_step}
        more = {key: value for key, value in more.items() if key in known and key not in entry}
        loggers.append(_made("logger", name, entry | more, Logger))
    return loggers


def with_objects(config: TrainerConfig) -> TrainerConfig:
    """The trainer's settings with plugins, profiler, strategy, ... as the objects they describe."""
    changed = {
        field.name: _instantiated(f"trainer.{field.name}", getattr(config, field.name))
        for field in dataclasses.fields(config)
        if isinstance(getattr(config, field.name), dict | list)
    }
    return dataclasses.replace(config, **changed) if changed else config


def _given(entries: Entries) -> Iterator[tuple[str, Any]]:
    return ((name, entry) for name, entry in entries.items() if entry is not None)


def _arguments(entry: Entries) -> list[str]:
    return [key for key in entry if not (key.startswith("_") and key.endswith("_"))]


def _target(group: str, name: str, entry: Any) -> Callable[..., Any]:
    if not isinstance(entry, dict) or not isinstance(entry.get("_target_"), str):
        raise ValueError(f"{group}.{name}={entry!r}: it takes a group with _target_, or null")
    module, _, attribute = entry["_target_"].rpartition(".")
    try:
        found: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{group}.{name}._target_={entry['_target_']}: {error}") from None
    return found


def _made(group: str, name: str, entry: Any, kind: type) -> Any:
    check_arguments(_target(group, name, entry), _arguments(entry), f"{group}.{name}.")
    made = _instantiated(f"{group}.{name}", entry)
    if made is not None and not isinstance(made, kind):
        raise ValueError(
            f"{group}.{name}._target_={entry['_target_']} makes a {type(made).__name__}, no "
            f"{kind.__name__}"
        )
    return made


def _instantiated(setting: str, value: Any) -> Any:
    try:
        return instantiate(value, _convert_="all")
    except InstantiationException as error:
        cause = error.__cause__ or error
        text = " ".join(str(cause).split())
        ours = isinstance(cause, ValueError) and text.startswith(setting)
        raise ValueError(text if ours else f"{setting}: {text}") from None
