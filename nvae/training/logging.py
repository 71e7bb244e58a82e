"""What a run leaves behind to look at: metrics in logs, grids of pictures.

Lightning's loggers work as they are; these put their files into the run's folder and go on there
when the run is resumed. All but JSON lines are Lightning's own with other defaults. A logger that
fails is a warning, not the run's end.
"""

import errno
import functools
import importlib.util
import json
import os
import re
import secrets
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytorch_lightning as pl
from PIL import Image
from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from pytorch_lightning.utilities.rank_zero import rank_zero_only
from torch import Tensor

from nvae.command_line import brief
from nvae.files import replacing
from nvae.models import HierarchicalVAE
from nvae.pictures import View, save_rows
from nvae.sampling import decode, encode, sample_images
from nvae.settings import check_fields
from nvae.training.module import NVAELightning

_GUARDED = (
    "log_metrics", "log_hyperparams", "log_graph", "log_image", "after_save_checkpoint", "save",
    "finalize",
)  # fmt: skip
"""What the Trainer and this package ask of a logger while a run goes on."""

_LONGEST = 200


class Warnings:
    """Turns errors into lines on stderr, each cause once for each that failed."""

    def __init__(self) -> None:
        self._said = set[tuple[str, str]]()

    @contextmanager
    def instead(self, name: str, what: str) -> Iterator[None]:
        """Whatever goes wrong inside is said and forgotten.

        Args:
            name: of the logger, or of whatever else works here.
            what: it was about to do.
        """
        try:
            yield
        except Exception as error:
            # Lightning's TensorBoard calls every error one of the value's type
            cause = error if isinstance(error, OSError) else error.__cause__ or error
            reason = brief(f"{type(cause).__name__}: {cause}", _LONGEST)
            kind = name, re.sub(r"\d+", "", reason)  # steps and values differ
            if kind not in self._said:
                self._said.add(kind)
                print(
                    f"{name} failed in {what} ({reason}); training goes on, and what it could not "
                    "take is missing from it",
                    file=sys.stderr,
                )


def guard(logger: Logger, name: str) -> Logger:
    """The same logger, whose calls no longer raise.

    Args:
        logger: Lightning's, ours or anybody's.
        name: of it, for the warnings.
    """
    warnings = Warnings()
    for method in _GUARDED:
        if hasattr(type(logger), method):
            setattr(logger, method, _guarded(getattr(logger, method), warnings, name))
    return logger


def _guarded(call: Callable[..., Any], warnings: Warnings, name: str) -> Callable[..., Any]:
    @functools.wraps(call)
    def guarded(*arguments: Any, **more: Any) -> Any:
        with warnings.instead(name, call.__name__):
            return call(*arguments, **more)

    return guarded


class LogWriteError(OSError):
    """A reading could not be written; the log is as it was."""


class JsonLinesLogger(Logger):
    """One JSON object a line: step, time (seconds since the epoch), and the metrics.

    Args:
        save_dir: folder of `metrics.jsonl`; lines of steps after ``start_step`` are dropped, for
            a resumed run writes them again. So is one of that step which it begins with: of a
            validation that is done once more.
        start_step: optimizer step that the run starts from.
    """

    def __init__(self, save_dir: str | Path, start_step: int = 0) -> None:
        super().__init__()
        self.path, self.start_step = Path(save_dir) / "metrics.jsonl", start_step
        self._trimmed = False

    @property
    def name(self) -> str:
        """What Lightning calls it."""
        return "jsonl"

    @property
    def version(self) -> str:
        """None: a resumed run goes on in the same file."""
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
                self._trim(line)
            with self.path.open("ab", buffering=0) as file:
                self._append(file, (json.dumps(line) + "\n").encode())
        except OSError as error:
            raise LogWriteError(f"cannot write {self.path}: {error.strerror or error}") from error

    @staticmethod
    def _append(file: IO[bytes], line: bytes) -> None:
        before = file.tell()
        try:
            if file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            file.truncate(before)  # the next line must not go on where this one was cut
            raise

    def _trim(self, first: dict[str, Any]) -> None:
        if self.path.exists():
            lines = self.path.read_text().splitlines()
            kept = [line for line in lines if self._stays(line, first)]
            with replacing(self.path) as temporary:
                temporary.write_text("".join(line + "\n" for line in kept))
        self._trimmed = True

    def _stays(self, line: str, first: dict[str, Any]) -> bool:
        try:
            found = json.loads(line)
            step = int(found["step"])
        except (ValueError, KeyError, TypeError):  # the line a killed process was writing
            return False
        is_again = step == first["step"] and found.keys() == first.keys()
        return step <= self.start_step and not is_again


class RunTensorBoard(TensorBoardLogger):
    """Event files with curves and pictures in ``save_dir/tensorboard``.

    Args:
        save_dir: the run's folder.
        start_step: optimizer step that the run starts from; what was logged after it is dropped.
        more: of Lightning's logger.
    """

    def __init__(self, save_dir: str | Path, start_step: int = 0, **more: Any) -> None:
        purge = {"purge_step": start_step + 1} if start_step else {}
        own: dict[str, Any] = {"name": "tensorboard", "version": "", "default_hp_metric": False}
        super().__init__(save_dir, **(own | purge | more))


class RunCSV(CSVLogger):
    """`metrics.csv`, a new one at each start: Lightning's writer deletes the file it finds.

    Every line is written when it is made.

    Args:
        save_dir: the run's folder.
        start_step: optimizer step that the run starts from.
        more: of Lightning's logger.
    """

    def __init__(self, save_dir: str | Path, start_step: int = 0, **more: Any) -> None:
        own: dict[str, Any] = {
            "name": "csv",
            "version": f"from_step_{start_step:08d}",
            "flush_logs_every_n_steps": 1,  # a killed run leaves its lines
        }
        super().__init__(save_dir, **own | more)


class RunWandb(WandbLogger):
    """Weights & Biases, with configuration and pictures.

    The id is drawn once and kept in the run's folder: a resumed run goes on in its own page, and
    runs of one name in other folders have others.

    Args:
        save_dir: the run's folder.
        more: of Lightning's logger: ``project``, ``offline``, ``name``, ...

    Raises:
        ValueError: the `wandb` package is not installed.
    """

    def __init__(self, save_dir: str | Path, **more: Any) -> None:
        if importlib.util.find_spec("wandb") is None:
            raise ValueError(
                "logger.wandb needs the wandb package: pip install wandb, or use logger=default"
            )
        folder = Path(save_dir)
        own = {"name": folder.name, "id": kept_id(folder / "wandb_id"), "resume": "allow"}
        super().__init__(save_dir=save_dir, **own | more)


def kept_id(file: Path) -> str:
    """The text in ``file``, made at random where there is none yet."""
    is_first: bool = getattr(rank_zero_only, "rank", 0) == 0  # no other rank logs
    if not file.exists() and is_first:
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as temporary:
            temporary.write_text(secrets.token_hex(8))
    return file.read_text().strip() if file.exists() else ""


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


@dataclass(eq=False)
class Pictures(pl.Callback):
    """Writes grids of samples and reconstructions to `pictures/` in the Trainer's
    `default_root_dir`, to TensorBoard and to Weights & Biases; the first rank alone. One that
    fails is a line on stderr.

    The noise is the same every time, so that one can watch a picture form.

    Attributes:
        every_epochs: epochs between two sets; 0: none.
        temperatures: of the latents, one row of samples each.
        columns: pictures in a row.
        show_channels: see :class:`~nvae.pictures.View`.
        show_range: values that are shown as black and as white; None: 0 and 1.
    """

    every_epochs: int = 1
    temperatures: list[float] = field(default_factory=lambda: [0.7, 1.0])
    columns: int = 8
    show_channels: list[int] | None = None
    show_range: list[float] | None = None

    def __post_init__(self) -> None:
        check_fields(
            self, "callbacks.pictures.", every_epochs=(0, None), temperatures=(0, 100),
            columns=(1, 1024),
        )  # fmt: skip
        if not self.temperatures:
            raise ValueError("callbacks.pictures.temperatures is []; it takes one or more numbers")
        self._view = View.of_settings(self.show_channels, self.show_range)
        self._x: Tensor | None = None
        self._warnings = Warnings()

    def _are_due(self, trainer: pl.Trainer) -> bool:
        every = self.every_epochs
        is_due = every > 0 and (trainer.current_epoch + 1) % every == 0
        return is_due and trainer.is_global_zero and not trainer.sanity_checking

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        """Keep the first images."""
        if batch_idx == 0 and self._are_due(trainer):
            assert isinstance(pl_module, NVAELightning)
            images = pl_module.to_input(batch)
            self._x, self._index = images.x[: self.columns], images.index[: self.columns]

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """With the weights that were validated."""
        if not self._are_due(trainer):
            return
        assert isinstance(pl_module, NVAELightning)
        with self._warnings.instead("callbacks.pictures", "samples"):
            self._draw_samples(trainer, pl_module.model)
        with self._warnings.instead("callbacks.pictures", "reconstructions"):
            self._draw_reconstructions(trainer, pl_module.model)
        self._x = None

    def _draw_samples(self, trainer: pl.Trainer, model: HierarchicalVAE) -> None:
        samples = [
            sample_images(model, range(self.columns), temperature=t, pixel_temperature="mean")
            for t in self.temperatures
        ]
        labels = [f"temperature {t:g}" for t in self.temperatures]
        self._write(trainer, "samples", samples, labels)

    def _draw_reconstructions(self, trainer: pl.Trainer, model: HierarchicalVAE) -> None:
        if self._x is None:
            return
        means = decode(model, encode(model, self._x, self._index), "mean")
        labels = ["validation image", "reconstruction"]
        self._write(trainer, "reconstructions", [self._x.cpu(), means], labels)

    def _write(self, trainer: pl.Trainer, name: str, rows: list[Tensor], labels: list[str]) -> None:
        step = trainer.global_step
        file = Path(trainer.default_root_dir) / "pictures" / f"{name}_{step:08d}.png"
        save_rows(file, [self._view(row) for row in rows], labels)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                with Image.open(file) as picture:
                    pixels = np.asarray(picture.convert("RGB"))
                logger.experiment.add_image(name, pixels, step, dataformats="HWC")
            elif isinstance(logger, WandbLogger):
                logger.log_image(name, [str(file)], step=step)
