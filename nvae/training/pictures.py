"""Sample and reconstruction grids while training goes on."""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
from PIL import Image
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor

from nvae.command_line import brief
from nvae.data.module import ImageDataModule
from nvae.pictures import save_rows
from nvae.sampling import decode, encode, sample_images
from nvae.settings import check_fields
from nvae.training.module import NVAELightning


@dataclass
class PicturesConfig:
    """Pictures at intervals.

    Attributes:
        every_epochs: epochs between two sets; 0: none.
        temperatures: of the latents, one row of samples each.
        columns: pictures in a row.
    """

    every_epochs: int = 1
    temperatures: list[float] = field(default_factory=lambda: [0.7, 1.0])
    columns: int = 8

    def __post_init__(self) -> None:
        check_fields(
            self, "callbacks.pictures.", every_epochs=(0, None), temperatures=(0, 100),
            columns=(1, 1024),
        )  # fmt: skip
        if not self.temperatures:
            raise ValueError("callbacks.pictures.temperatures is []; it takes one or more numbers")


class Pictures(pl.Callback):
    """Writes grids to the run's folder and to TensorBoard; the first rank alone.

    The noise is the same every time, so that one can watch a picture form.

    Args:
        folder: for the PNG files.
        config: when and what.
    """

    def __init__(self, folder: Path, config: PicturesConfig) -> None:
        self.folder, self.config = folder, config

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """With the weights that were validated."""
        every = self.config.every_epochs
        if not every or (trainer.current_epoch + 1) % every or not trainer.is_global_zero:
            return
        assert isinstance(pl_module, NVAELightning)
        columns, temperatures = self.config.columns, self.config.temperatures
        samples = [
            sample_images(pl_module.model, range(columns), temperature=t, pixel_temperature="mean")
            for t in temperatures
        ]
        self._write(trainer, "samples", samples, [f"temperature {t:g}" for t in temperatures])
        assert isinstance(trainer.datamodule, ImageDataModule)  # type: ignore[attr-defined]
        batch = next(trainer.datamodule.batches("valid", pl_module.device))  # type: ignore[attr-defined]
        x, index = batch.x[:columns], batch.index[:columns]
        means = decode(pl_module.model, encode(pl_module.model, x, index), "mean")
        labels = ["validation image", "reconstruction"]
        self._write(trainer, "reconstructions", [x.cpu(), means], labels)

    def _write(self, trainer: pl.Trainer, name: str, rows: list[Tensor], labels: list[str]) -> None:
        step = trainer.global_step
        file = self.folder / f"{name}_{step:08d}.png"
        try:
            save_rows(file, rows, labels)
        except OSError as error:  # a picture less is no reason to stop
            reason = brief(error.strerror or error)
            print(f"{file} could not be written: {reason}; training goes on", file=sys.stderr)
            return
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                with Image.open(file) as picture:
                    pixels = np.asarray(picture.convert("RGB"))
                logger.experiment.add_image(name, pixels, step, dataformats="HWC")
