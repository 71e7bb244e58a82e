"""The configuration of a training run, as `configs/train.yaml` composes it, and what it names.

A ``_target_`` counts only in what the user composes, never in a configuration read from a file.
"""

import dataclasses
import importlib
import importlib.util
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.loggers import Logger

from nvae.cli.report import ReportConfig
from nvae.cli.schema import build, schema_of
from nvae.data import DataConfig
from nvae.data.samplers import micro_batches_a_step
from nvae.models import MODELS, HierarchicalVAE, ImageConfig, ModelConfig
from nvae.objective import ObjectiveConfig
from nvae.ops.library import IMPLS
from nvae.published_settings import FAMILIES, preset_settings, presets
from nvae.settings import (
    CONFIGS,
    check_arguments,
    check_choice,
    check_fields,
    plain_size,
    show_size,
)
from nvae.training.ema import MovingAverage
from nvae.training.logging import guard
from nvae.training.optimizers import OptimizerConfig
from nvae.training.trainer import TrainerConfig

Entries = dict[str, Any]
"""Groups with ``_target_`` by name; null is one that is switched off."""

RESUME = ("auto", "never", "must")
BEST_METRIC = "valid/negative_elbo"
LONGEST_NAME = 200
"""Bytes of a run's name; file systems take 255, and `NAME-2` must fit too."""


@dataclass
class TrainConfig:
    """Everything that a training run depends on.

    Attributes:
        name: of the run; its folder is `runs_dir/name`.
        runs_dir: where runs go.
        seed: of initial weights and posterior noise; the order of the data has `data.seed`.
        resume: ``auto`` goes on where the run's folder left off, ``never`` starts anew in a folder
            beside it, ``must`` refuses to start anew.
        compile: compile every residual cell; checkpoints keep their keys.
        kernels: ``auto``: layers run as CUDA kernels where the device can; ``cuda``: an error where
            it cannot; ``reference``: PyTorch's own operations alone. A matter of this machine and
            not of the model, hence no part of `model`, which checkpoints keep and a resumed run
            must repeat.
        checkpoint_cells: recompute every latent group, and every cell around them, in the backward
            pass: about a quarter more time for a fraction of the memory. ``true`` | ``false`` |
            ``auto``: where the estimate of a step's memory exceeds what the device has.
        optimized_metric: what a job of a sweep returns, to be minimized: ``valid/negative_elbo`` is
            that of the best validation, in nats; of any other metric the last value.
        architecture: the model's class: a name in ``MODELS``, or ``package.module:Class``.
        model: settings of that class.
        callbacks: groups with `_target_`, by names of the user's choice; null switches one off.
        logger: the same.
    """

    data: DataConfig
    name: str
    runs_dir: str = "runs"
    seed: int = 0
    resume: str = "auto"
    compile: bool = False
    kernels: str = "auto"
    checkpoint_cells: bool | str = "auto"
    optimized_metric: str = BEST_METRIC
    architecture: str = "nvae"
    model: ImageConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    callbacks: dict[str, Any] = field(default_factory=dict)
    logger: dict[str, Any] = field(default_factory=dict)
    report: ReportConfig = field(default_factory=ReportConfig)

    def __post_init__(self) -> None:
        check_fields(self, seed=(0, None))
        check_choice("resume", self.resume, RESUME)
        check_choice("kernels", self.kernels, IMPLS)
        if self.checkpoint_cells not in (True, False, "auto"):
            raise ValueError(
                f"checkpoint_cells={self.checkpoint_cells} is unknown; allowed: true, false, auto"
            )
        self._check_names()
        wanted = MODELS[self.architecture].config_class
        if not isinstance(self.model, wanted):
            raise ValueError(f"architecture={self.architecture} takes a {wanted.__name__} as model")
        check_sizes(lambda name: attrgetter(name)(self))
        self.model.pixel_distribution.check_data(self.model, self.data.bits)
        self._ask_for_labels()
        self.report.view.of(self.data.channels)
        self._accumulate()
        build_callbacks(self.callbacks)
        check_loggers(self.logger)

    def _check_names(self) -> None:
        name = self.name
        if not name or name in (".", "..") or "/" in name or name != name.strip():
            raise ValueError(f"name={name!r} is no folder name; use letters, digits, - and _")
        if not name.isprintable():
            raise ValueError(f"name={name!r} has characters that cannot be printed")
        if len(name.encode()) > LONGEST_NAME:
            raise ValueError(f"name={name!r} is too long; at most {LONGEST_NAME} bytes")
        if not self.runs_dir or not self.runs_dir.isprintable():
            raise ValueError(f"runs_dir={self.runs_dir!r} is no folder; runs_dir=. is this one")

    def _ask_for_labels(self) -> None:
        """Batches hold labels where the model knows classes."""
        classes = self.model.num_classes
        if classes and self.data.labels is False:
            raise ValueError(
                f"model.num_classes={classes} needs labels, and data.labels=false passes over "
                "them; leave one of the two out"
            )
        if classes:
            self.data = dataclasses.replace(self.data, labels=True)

    def _accumulate(self) -> None:
        """With `data.global_batch` the micro-batches a step follow from devices and memory."""
        if self.data.global_batch is None:
            return
        follows = micro_batches_a_step(
            self.data.global_batch, self.trainer.world_size, self.data.batch_size
        )
        given = self.trainer.accumulate_grad_batches
        if given not in (1, follows):
            raise ValueError(
                f"trainer.accumulate_grad_batches={given}, but with data.global_batch="
                f"{self.data.global_batch} it follows from devices and data.batch_size: it is "
                f"{follows} here; leave it out, or set data.global_batch=null"
            )
        self.trainer = dataclasses.replace(self.trainer, accumulate_grad_batches=follows)

    def build_model(self) -> HierarchicalVAE:
        """The network, with random weights."""
        return MODELS[self.architecture](self.model)

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for checkpoints and YAML."""
        return asdict(self)


def check_sizes(value_of: Callable[[str], Any]) -> None:
    """Raise a ValueError where the network is of another size than the images.

    Args:
        value_of: a setting by its name; None where there is none.
    """
    for of_model, of_data in (
        ("model.image_size", "data.image_size"),
        ("model.image_channels", "data.channels"),
    ):
        wanted, given = (_plain(value_of(name)) for name in (of_model, of_data))
        if wanted != given and all(isinstance(size, int | tuple) for size in (wanted, given)):
            raise ValueError(
                f"{of_model}={show_size(wanted)} does not fit {of_data}={show_size(given)}; take "
                f"{_networks(value_of)}, or {of_data}={show_size(wanted)}"
            )


def _plain(value: Any) -> Any:
    return plain_size(list(value) if OmegaConf.is_list(value) else value)


def _networks(value_of: Callable[[str], Any]) -> str:
    """Which networks of the architecture are for images like the data's."""
    family = value_of("architecture")
    if family not in FAMILIES:
        return "a network for such images (model=...)"
    wanted = {
        "image_size": _plain(value_of("data.image_size")),
        "image_channels": value_of("data.channels"),
        "likelihood": value_of("data.likelihood"),
    }
    found = []
    for name in presets(family):
        settings = preset_settings(name)  # without those that follow the data
        if all(settings.get(key, value) == value for key, value in wanted.items()):
            found.append(name)
    if found:
        return f"a network for such images: model={' or model='.join(found)}"
    return (
        f"model={family} with settings of your own (configs/model has no network for such images)"
    )


def register() -> None:
    """Tell Hydra the schemas that `configs/train.yaml`, the model's and the optimizer's start from.

    The settings of another architecture, or of an optimizer that ``_target_`` names, are composed
    as they are, and checked by their own class.
    """
    store = ConfigStore.instance()
    store.store(name="train_schema", node=schema_of(TrainConfig, untyped=["model", "optimizer"]))
    for name in MODELS:
        store.store(name=f"{name}_schema", node=schema_of(MODELS[name].config_class))
    store.store(name="optimizer_schema", node=schema_of(OptimizerConfig))


def train_config(composed: DictConfig) -> TrainConfig:
    """Check a composed configuration.

    Raises:
        ValueError: one line that says what is wrong and what is allowed.
    """
    model = MODELS[composed.architecture].config_class
    # before the model's own checks, which know nothing of the data
    check_sizes(partial(OmegaConf.select, composed))
    if OmegaConf.is_dict(composed.optimizer) and "_target_" in composed.optimizer:
        given: Any = OmegaConf.to_container(composed.optimizer, resolve=True)
        composed = composed.copy()
        composed.optimizer = asdict(OptimizerConfig.from_target(given))
    return build(TrainConfig, composed, model=model)


def compose_train(overrides: Sequence[str] = ()) -> TrainConfig:
    """What ``python train.py`` would run with these overrides, such as ``experiment=mnist``.

    Raises:
        ValueError: an impossible combination; hydra's and omegaconf's errors for unknown keys,
            wrong types and unknown choices.
    """
    register()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return train_config(compose("train", overrides=list(overrides)))


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
    """The loggers that are not null; what fails in them is a warning.

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
        loggers.append(guard(_made("logger", name, entry | more, Logger), f"logger.{name}"))
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
    said = f"{group}.{name}._target_={entry['_target_']}"
    module, _, attribute = entry["_target_"].rpartition(".")
    if "/" in entry["_target_"] or module.startswith("."):
        raise ValueError(f"{said}: write package.module.Class, not a path")
    try:
        found: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{said}: {error}") from None
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
