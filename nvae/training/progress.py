"""The progress bar of a run: one bar over all its steps, with loss parts, images/s and ETA.

Lightning's bars start anew at every epoch, know no end of the run, and leave nothing readable in a
job's log. `callbacks.progress` takes one of them all the same.
"""

import sys
import time
from collections.abc import Iterator
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ProgressBar
from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from nvae.training.module import NVAELightning

NOTABLE_WAIT = 0.05
"""Share of the time without data from which on the line says so."""

PLAIN_SECONDS = 20.0
"""Seconds between two lines where the output is no terminal."""


def describe_metrics(metrics: dict[str, float]) -> str:
    """Loss parts and speed in one short line; empty before the first reading."""
    if not metrics:
        return ""
    parts = [
        f"-ELBO {metrics['train/negative_elbo']:.2f}",
        f"rec {metrics['train/reconstruction']:.2f}",
        f"KL {metrics['train/kl']:.2f}",
        f"beta {metrics['train/beta']:.2f}",
    ]
    if "train/spectral" in metrics:
        parts.append(f"SR {metrics['train/spectral']:.0f}")
    parts.append(f"{metrics['train/images_per_second']:.0f} images/s")
    if metrics["train/data_wait"] >= NOTABLE_WAIT:
        parts.append(f"{metrics['train/data_wait']:.0%} waiting for data")
    return "  ".join(parts)


class _TwoLines(Progress):
    """The bar, and below it the metrics: together they are wider than a terminal."""

    def get_renderables(self) -> Iterator[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks:
            if task.fields["metrics"]:
                yield Text(task.fields["metrics"], style="dim")


class RunProgress(ProgressBar):
    """Shows where the run is. On a terminal a live bar, elsewhere a line now and then.

    What is shown are the module's latest metrics; nothing is read from the device for it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._console = Console(stderr=True, markup=False)
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._printed = 0.0
        self._enabled = True
        self._valid = ""

    def disable(self) -> None:
        """Lightning calls this on all ranks but the first."""
        self._enabled = False

    def enable(self) -> None:
        """Undo :meth:`disable`."""
        self._enabled = True

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open the bar where the run starts or resumes."""
        self._printed = time.monotonic()
        self._started, self._start_step = time.monotonic(), trainer.global_step
        assert isinstance(pl_module, NVAELightning)
        self._total = round(pl_module.length.total_steps - pl_module.length.steps_ahead)
        if not (self._enabled and self._console.is_terminal):
            return
        self._progress = _TwoLines(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed}/{task.total}"),
            TextColumn("steps"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=self._console,
        )
        self._task = self._progress.add_task(
            "train", total=self._total, completed=trainer.global_step,
            epoch=self._epoch(trainer), metrics="",
        )  # fmt: skip
        self._progress.start()

    @staticmethod
    def _epoch(trainer: pl.Trainer) -> str:
        most = trainer.max_epochs
        of = f"/{most}" if most is not None and most > 0 else ""
        return f"{trainer.current_epoch + 1}{of}"

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any,
        batch_idx: int,
    ) -> None:  # fmt: skip
        """Advance."""
        if not self._enabled:
            return
        assert isinstance(pl_module, NVAELightning)
        text = describe_metrics(pl_module.latest) + self._valid
        if self._progress is not None:
            self._progress.update(
                self._task, completed=trainer.global_step, metrics=text,
                epoch=self._epoch(trainer),
            )  # fmt: skip
        elif time.monotonic() - self._printed > PLAIN_SECONDS:
            self._printed = time.monotonic()
            self.print(f"epoch {self._epoch(trainer)}  {self._position(trainer)}  {text}")

    def _position(self, trainer: pl.Trainer) -> str:
        step, total = trainer.global_step, self._total
        elapsed = time.monotonic() - self._started
        left = elapsed / max(step - self._start_step, 1) * (total - step)
        return f"step {step}/{total}  {int(left) // 60}:{int(left) % 60:02d} left"

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show the validation ELBO beside the training's."""
        value = trainer.callback_metrics.get("valid/negative_elbo")
        if value is not None:
            self._valid = f"  valid -ELBO {float(value):.2f}"

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Above the bar."""
        if self._enabled:
            self._console.print(*args, highlight=False, soft_wrap=True)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Close the bar."""
        self._close()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """The same after an error, where Lightning calls no teardown; it gives the cursor back."""
        self._close()

    def _close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
        sys.stderr.flush()
