"""The configuration of a training run, as `configs/train.yaml` composes it."""

from dataclasses import asdict, dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from nvae.cli.report import ReportConfig
from nvae.cli.schema import build, schema_of
from nvae.cli.targets import build_callbacks, check_loggers
from nvae.data import DataConfig
from nvae.models import ModelConfig
from nvae.models.likelihoods import LIKELIHOODS
from nvae.objective import ObjectiveConfig
from nvae.settings import check_choice, check_fields
from nvae.training.optimizers import OptimizerConfig
from nvae.training.trainer import TrainerConfig

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
        checkpoint_cells: recompute every cell in the backward pass: about a quarter more time for
            a fraction of the memory. ``true`` | ``false`` | ``auto``: where the estimate of a
            step's memory exceeds what the device has.
        optimized_metric: what a job of a sweep returns, to be minimized: ``valid/negative_elbo`` is
            that of the best validation, in nats; of any other metric the last value.
        callbacks: groups with `_target_`, by names of the user's choice; null switches one off.
        logger: the same.
    """

    data: DataConfig
    name: str
    runs_dir: str = "runs"
    seed: int = 0
    resume: str = "auto"
    compile: bool = False
    checkpoint_cells: bool | str = "auto"
    optimized_metric: str = BEST_METRIC
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    callbacks: dict[str, Any] = field(default_factory=dict)
    logger: dict[str, Any] = field(default_factory=dict)
    report: ReportConfig = field(default_factory=ReportConfig)

    def __post_init__(self) -> None:
        check_fields(self, seed=(0, None))
        check_choice("resume", self.resume, RESUME)
        if self.checkpoint_cells not in (True, False, "auto"):
            raise ValueError(
                f"checkpoint_cells={self.checkpoint_cells} is unknown; allowed: true, false, auto"
            )
        self._check_names()
        self._check_model_reads_data()
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

    def _check_model_reads_data(self) -> None:
        for of_model, of_data in (("image_size", "image_size"), ("image_channels", "channels")):
            wanted, given = getattr(self.model, of_model), getattr(self.data, of_data)
            if wanted != given:
                raise ValueError(
                    f"model.{of_model}={wanted} does not fit data.{of_data}={given}; "
                    f"set data.{of_data}, the model follows it"
                )
        LIKELIHOODS[self.model.likelihood].check_data(self.model, self.data.bits)

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for checkpoints and YAML."""
        return asdict(self)


def register() -> None:
    """Tell Hydra the schema that `configs/train.yaml` starts from."""
    ConfigStore.instance().store(name="train_schema", node=schema_of(TrainConfig))


def train_config(composed: DictConfig) -> TrainConfig:
    """Check a composed configuration.

    Raises:
        ValueError: one line that says what is wrong and what is allowed.
    """
    return build(TrainConfig, composed)
