"""Sample and reconstruction grids while training goes on."""

from dataclasses import dataclass, field
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor
from torchvision.utils import make_grid, save_image

from nvae.data.module import ImageDataModule
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
        if self.every_epochs < 0:
            raise ValueError(
                f"callbacks.pictures.every_epochs is {self.every_epochs}; it must be at least 0"
            )
        if self.columns < 1:
            raise ValueError(f"callbacks.pictures.columns is {self.columns}; it must be at least 1")
        if not self.temperatures or min(self.temperatures) < 0:
            raise ValueError(
                f"callbacks.pictures.temperatures is {list(self.temperatures)}; "
                "it takes one or more numbers, none below 0"
            )


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
        step = trainer.global_step
        self._write(trainer, "samples", self._samples(pl_module), step)
        self._write(trainer, "reconstructions", self._reconstructions(trainer, pl_module), step)

    def _samples(self, module: NVAELightning) -> Tensor:
        model = module.model
        rows = []
        for temperature in self.config.temperatures:
            generator = torch.Generator(module.device).manual_seed(0)
            noise = model.draw_noise(self.config.columns, generator)
            rows.append(
                model.likelihood(model.sample_logits(len(noise[0]), temperature, noise)).mean
            )
        return torch.cat(rows)

    def _reconstructions(self, trainer: pl.Trainer, module: NVAELightning) -> Tensor:
        assert isinstance(trainer.datamodule, ImageDataModule)  # type: ignore[attr-defined]
        batch = next(trainer.datamodule.batches("valid", module.device))  # type: ignore[attr-defined]
        x = batch.x[: self.config.columns]
        generator = torch.Generator(module.device).manual_seed(0)
        output = module.model(x, module.model.draw_noise(len(x), generator))
        return torch.cat([x, module.model.likelihood(output.logits).mean])

    def _write(self, trainer: pl.Trainer, name: str, images: Tensor, step: int) -> None:
        grid = make_grid(images.float().cpu(), nrow=self.config.columns, padding=1)
        self.folder.mkdir(parents=True, exist_ok=True)
        save_image(grid, self.folder / f"{name}_{step:08d}.png")
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image(name, grid, step)
