"""The training step, as Lightning wants it: batch, model, likelihood, ELBO, regularisers."""

from functools import cached_property
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import WeightAveraging
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from nvae.checkpoint import describe
from nvae.data.dataset import ImageBatch
from nvae.models import HierarchicalVAE
from nvae.objective import Loss, ObjectiveConfig, build_objective
from nvae.training.distributed import synchronize_batchnorm
from nvae.training.noise import TrainingNoise
from nvae.training.optimizer import OptimizerConfig, build_optimizer, learning_rate_factor
from nvae.training.resuming import check_optimizer_shapes
from nvae.training.validation import ValidationSums


class NVAELightning(pl.LightningModule):
    """Trains one hierarchical VAE.

    Args:
        model: the network.
        objective: annealing, balancing, regularisation.
        optimizer: optimiser and learning rate.
        seed: of the posterior noise.
        run_config: plain dictionary that goes into every checkpoint.
        fingerprint: of the images and seeds, plain types; goes there too.
        learning_rate_scale: factor on the learning rate, lower where a diverged run went back to
            a checkpoint; None: what the checkpoint says.
    """

    def __init__(
        self,
        model: HierarchicalVAE,
        objective: ObjectiveConfig,
        optimizer: OptimizerConfig,
        *,
        seed: int = 0,
        run_config: dict[str, Any] | None = None,
        fingerprint: dict[str, Any] | None = None,
        learning_rate_scale: float | None = None,
    ) -> None:
        super().__init__()
        self.model = model.to(memory_format=torch.channels_last)
        self.loss = build_objective(model, objective)
        self.optimizer_config = optimizer
        self.seed = seed
        self.run_config = run_config
        self.fingerprint = fingerprint
        self.has_started = False
        self._has_checked_range = False
        self.learning_rate_scale = learning_rate_scale or 1.0
        self._scale_is_given = learning_rate_scale is not None
        self.last: Loss | None = None
        self._validation = ValidationSums(model)

    def training_step(self, batch: ImageBatch, batch_idx: int) -> Tensor:
        """Loss of one micro-batch, in nats; its parts stay in ``last`` for the logs."""
        if not self._has_checked_range:  # once, since it waits for the device
            self.model.check_range(batch.x)
            self._has_checked_range = True
        window, is_last = self._accumulation(batch_idx)
        nominal = self.trainer.accumulate_grad_batches
        noise = self._noise(self.model, len(batch.x), self.trainer.fit_loop.total_batch_idx)
        self.last = self.loss(
            self.model,
            batch.x,
            noise,
            step=self.global_step,
            total_steps=self.total_steps,
            input_noise=self._noise.further(batch.x) if self.loss.config.encoder_noise else None,
            regularize=is_last,
        )
        # Lightning divides by the nominal window; an epoch's last one may be shorter
        loss = self.last.data * (nominal / window)
        if self.last.penalty is not None:
            # once per optimizer step, whatever the number of micro-batches
            loss = loss + self.last.penalty * nominal
        return loss

    def validation_step(self, batch: ImageBatch, batch_idx: int) -> None:
        """Sum the ELBO's parts; every image's noise depends on its index alone."""
        output = self.model(batch.x, self._validation.noise(self.model, batch.index))
        log_likelihood = self.model.likelihood(output.logits).log_prob(batch.x)
        self._validation.add(output, log_likelihood)

    def on_validation_epoch_end(self) -> None:
        """Means over all images of all ranks."""
        metrics = self._validation.means(self.trainer.strategy)
        self._validation.reset()
        # for other callbacks; Lightning would count the loggers' step from 0
        self.log_dict(metrics, logger=False, rank_zero_only=True)
        for logger in self.trainer.loggers:
            logger.log_metrics(metrics, self.global_step)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Optimiser, and its learning rate as a function of the step."""
        optimizer = build_optimizer(
            self.optimizer_config,
            self.model.parameters(),
            fused=self.trainer.precision != "16-mixed",
        )
        factor = learning_rate_factor(self.optimizer_config, self.steps_per_epoch, self.total_steps)
        scheduler = LambdaLR(optimizer, lambda step: self.learning_rate_scale * factor(step))
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def on_fit_start(self) -> None:
        """Ranks draw different noise and share batch statistics."""
        self._noise = TrainingNoise(self.seed, self.global_rank)
        if self.trainer.world_size > 1:
            synchronize_batchnorm(self.model)

    def on_train_start(self) -> None:
        """A resumed run takes its hyper-parameters from the configuration, not the checkpoint."""
        optimizer, config = self.trainer.optimizers[0], self.optimizer_config
        scheduler = self.trainer.lr_scheduler_configs[0].scheduler
        assert isinstance(scheduler, LambdaLR)
        scheduler.base_lrs = [config.learning_rate]
        rate = config.learning_rate * scheduler.lr_lambdas[0](self.global_step)
        optimizer.param_groups[0].update(
            lr=rate,
            initial_lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            eps=config.epsilon,
            weight_decay=config.weight_decay,
        )
        self.has_started = True

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Make the checkpoint readable by :func:`nvae.checkpoint.load_model`."""
        checkpoint.update(describe(self.model, self.run_config))
        checkpoint["learning_rate_scale"] = self.learning_rate_scale
        if self.fingerprint is not None:
            checkpoint["fingerprint"] = self.fingerprint

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Undo what :meth:`on_save_checkpoint` added for training.

        Raises:
            CheckpointError: the optimiser's state is of other parameters.
        """
        check_optimizer_shapes(checkpoint, list(self.model.parameters()))
        keeps_average = any(isinstance(c, WeightAveraging) for c in self.trainer.callbacks)  # type: ignore[attr-defined]
        if "current_model_state" in checkpoint and not keeps_average:
            # the optimiser's state belongs to the raw weights; no one else would take them
            checkpoint["state_dict"] = checkpoint["current_model_state"]
        if not self._scale_is_given:
            self.learning_rate_scale = checkpoint["learning_rate_scale"]

    @cached_property
    def batches_per_epoch(self) -> int:
        """Micro-batches of an epoch on this rank.

        Not Lightning's ``estimated_stepping_batches``: asked for while the optimiser is being
        made, it sets the loaders up before their state has been read from the checkpoint, and a
        resumed epoch starts over.
        """
        data, limit = self.trainer.datamodule, self.trainer.limit_train_batches  # type: ignore[attr-defined]
        batches = len(data.train_dataloader())
        return min(batches, limit) if isinstance(limit, int) else batches

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps of an epoch."""
        return -(-self.batches_per_epoch // self.trainer.accumulate_grad_batches)

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the whole run, T."""
        assert self.trainer.max_epochs is not None
        return self.trainer.max_epochs * self.steps_per_epoch

    def _accumulation(self, batch_idx: int) -> tuple[int, bool]:
        """Micro-batches of the step that ``batch_idx`` belongs to, and whether it is the last."""
        nominal = self.trainer.accumulate_grad_batches
        start = batch_idx - batch_idx % nominal
        window = min(nominal, self.batches_per_epoch - start)
        return window, batch_idx == start + window - 1
