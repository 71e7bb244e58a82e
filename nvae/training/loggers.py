"""Where metrics go: TensorBoard, CSV, JSON lines, Weights & Biases."""

import importlib.util
import json
import threading
import time
from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from nvae.files import replacing
from nvae.settings import check_fields


@dataclass
class LoggerConfig:
    """Which logs a run keeps, all below its folder.

    Attributes:
        tensorboard: event files with curves and pictures.
        csv: `metrics.csv`, a new one at each start.
        jsonl: `metrics.jsonl`, one line a reading.
        wandb_project: Weights & Biases project; null: none. Needs the `wandb` package.
        wandb_offline: keep the Weights & Biases log on this machine.
        every_steps: optimiser steps between two readings of the training metrics.
    """

    tensorboard: bool = True
    csv: bool = True
    jsonl: bool = True
    wandb_project: str | None = None
    wandb_offline: bool = False
    every_steps: int = 50

    def __post_init__(self) -> None:
        check_fields(self, "logger.", every_steps=(1, None))
        if self.wandb_project is not None and importlib.util.find_spec("wandb") is None:
            raise ValueError(
                f"logger.wandb_project={self.wandb_project} needs the wandb package: "
                "pip install wandb, or set logger.wandb_project=null"
            )


class LogWriteError(OSError):
    """A reading could not be written; the log is as it was, but for a last line cut short."""


class JsonLinesLogger(Logger):
    """One JSON object a line: step, time (seconds since the epoch), and the metrics.

    Args:
        path: of the file; lines of steps after ``start_step`` are dropped, for a resumed run
            writes them again.
        start_step: optimiser step that the run starts from.
    """

    def __init__(self, path: Path, start_step: int = 0) -> None:
        super().__init__()
        self.path, self.start_step = path, start_step
        self._trimmed = False

    @property
    def name(self) -> str:
        """Of the log."""
        return "jsonl"

    @property
    def version(self) -> str:
        """There is one."""
        return ""

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kw: Any) -> None:
        """The run's configuration has a file of its own."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append a line.

        Raises:
            LogWriteError: it cannot be written.
        """
        line = {"step": step, "time": round(time.time(), 3)}
        line |= {name: float(value) for name, value in metrics.items() if name != "epoch"}
        try:
            if not self._trimmed:
                self._trim()
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise LogWriteError(f"cannot write {self.path}: {error.strerror or error}") from error

    def _trim(self) -> None:
        self._trimmed = True
        if not self.path.exists():
            return
        kept = [line for line in self.path.read_text().splitlines() if self._is_earlier(line)]
        with replacing(self.path) as temporary:
            temporary.write_text("".join(line + "\n" for line in kept))

    def _is_earlier(self, line: str) -> bool:
        try:
            return int(json.loads(line)["step"]) <= self.start_step
        except (ValueError, KeyError, TypeError):  # the line a killed process was writing
            return False


@contextmanager
def log_errors_once() -> Iterator[None]:
    """TensorBoard writes in a thread; what fails there is raised at the next reading.

    The thread's own traceback is left out.
    """
    before = threading.excepthook

    def hook(arguments: threading.ExceptHookArgs) -> None:
        if not isinstance(arguments.exc_value, OSError):
            before(arguments)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = before


def build_loggers(config: LoggerConfig, folder: Path, start_step: int) -> list[Logger]:
    """The run's loggers.

    Args:
        config: which.
        folder: the run's.
        start_step: optimiser step the run starts from; what was logged after it is superseded.
    """
    loggers: list[Logger] = []
    if config.tensorboard:
        purge: dict[str, Any] = {"purge_step": start_step + 1} if start_step else {}
        loggers.append(TensorBoardLogger(folder, name="tensorboard", version="", **purge))
    if config.csv:
        # Lightning's writer deletes the file it finds, so every start has its own
        loggers.append(CSVLogger(folder, name="csv", version=f"from_step_{start_step:08d}"))
    if config.jsonl:
        loggers.append(JsonLinesLogger(folder / "metrics.jsonl", start_step))
    if config.wandb_project is not None:
        loggers.append(
            WandbLogger(
                folder.name, save_dir=folder, project=config.wandb_project, id=folder.name,
                resume="allow", offline=config.wandb_offline,
            )
        )  # fmt: skip
    return loggers
