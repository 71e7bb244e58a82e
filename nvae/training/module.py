"""The training step, as Lightning wants it: batch, model, likelihood, ELBO, regularizers.

:class:`NVAELightning` needs nothing else of this package. In a notebook::

    model = NVAE(ModelConfig(image_size=8, bits=4, likelihood="logistic_mixture"))
    pl.Trainer(max_epochs=20).fit(NVAELightning(model), train_loader, valid_loader)
    images = model.eval().sample(16)
"""

import logging
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import (
    GradientAccumulationScheduler,
    RichProgressBar,
    TQDMProgressBar,
    WeightAveraging,
)
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from nvae.checkpoint import describe
from nvae.data.dataset import ImageBatch
from nvae.models import HierarchicalVAE, Output
from nvae.models.conditioning import check_labels
from nvae.models.normalization import MOMENTUM
from nvae.objective import Loss, ObjectiveConfig, build_objective
from nvae.regularizers import batchnorms
from nvae.settings import check_choice
from nvae.training.batch import TrainingNoise, images_of
from nvae.training.optimizers import OptimizerConfig, build_optimizer
from nvae.training.recompute import compile_blocks, recompute_segments
from nvae.training.resuming import check_optimizer_shapes
from nvae.training.run_length import ENTRY, RunLength
from nvae.training.schedule import build_schedule, take_over
from nvae.training.shared_statistics import SHARING, SharedStatistics
from nvae.training.throughput import Throughput
from nvae.training.validation import ValidationSums, group_metrics
from nvae.training.whole_step import StepInput, StepPosition, weighted

_LOG = logging.getLogger(__name__)


class NVAELightning(pl.LightningModule):
    """Trains one hierarchical VAE.

    A batch is a tensor of images ``(B, C, H, W)``, a tuple whose first entry is one, or our data
    module's :class:`ImageBatch`. Where the model knows classes, the tuple's second entry are labels
    ``(B,)`` int64. Images are uint8 or floating-point numbers in [0, 1]; those that
    do not come from our data module keep the upper ``model.config.bits`` bits of their 8 (with one
    bit: black below 128/255, white from there). Where the model has more than 8 bits, they are
    uint16 levels from 0 to 2^bits - 1, or floating-point numbers that are rounded to such levels.
    A likelihood that is a density (``normal``) takes floating-point numbers as they are.
    Where the likelihood counts a window of the model's image (``counted_size``), images of the
    window's size get zeros around them.

    The KL coefficient and the learning rate go by the share of the run's images that were seen:
    the Trainer needs ``max_epochs`` or ``max_steps``, ``max_time`` alone does not do.

    Logged, in nats per image: ``train/loss`` and its parts every ``log_every_n_steps`` optimizer
    steps, which is when the device is read, ``valid/negative_elbo`` and its parts at each
    validation, ``test/...`` likewise. Callbacks can monitor them.

    Args:
        model: the network.
        objective: annealing, balancing, regularization; a dictionary of its fields will do.
        optimizer: optimizer and learning rate; a dictionary of its fields will do.
        seed: of the posterior noise.
        run_config: plain dictionary that goes into every checkpoint and to the loggers.
        fingerprint: of the images and seeds, plain types; goes there too.
        learning_rate_scale: factor on the learning rate, lower where a diverged run went back to
            a checkpoint; None: what the checkpoint says.
        sync_batchnorm: processes that share batch statistics in training: ``world``, ``node``
            (those of a machine) or ``none``.
    """

    def __init__(
        self,
        model: HierarchicalVAE,
        objective: ObjectiveConfig | dict[str, Any] | None = None,
        optimizer: OptimizerConfig | dict[str, Any] | None = None,
        *,
        seed: int = 0,
        run_config: dict[str, Any] | None = None,
        fingerprint: dict[str, Any] | None = None,
        learning_rate_scale: float | None = None,
        sync_batchnorm: str = "world",
    ) -> None:
        super().__init__()
        check_choice("sync_batchnorm", sync_batchnorm, SHARING)
        if not isinstance(objective, ObjectiveConfig):
            objective = ObjectiveConfig(**objective or {})
        if not isinstance(optimizer, OptimizerConfig):
            optimizer = OptimizerConfig(**optimizer or {})
        self.model = model.to(memory_format=torch.channels_last)
        self.loss = build_objective(model, objective)
        self.optimizer_config = optimizer
        self.seed = seed
        self.run_config = run_config
        self.fingerprint = fingerprint
        self.sync_batchnorm = sync_batchnorm
        self._shared: SharedStatistics | None = None
        self.save_hyperparameters(
            {
                "model_config": model.config.to_dict(),
                "objective": asdict(objective),
                "optimizer": asdict(optimizer),
                "seed": seed,
            },
            logger=run_config is None,
        )
        self.has_started = False
        self._has_checked_values = False
        self.learning_rate_scale = learning_rate_scale or 1.0
        self._scale_is_given = learning_rate_scale is not None
        self.last: Loss | None = None
        self.latest: dict[str, float] = {}  # metrics at the last reading
        self._sums = ValidationSums(model)
        self._seen = 0  # images of this evaluation, on this rank
        # does backward pass and optimizer step too, where it is set: nvae.training.captured
        self.whole_step: Callable[[StepInput, StepPosition], Loss] | None = None
        self._ends_step = False
        self._speed = Throughput()

    def to_input(self, batch: Any, first: int = 0) -> ImageBatch:
        """What the model takes, of any batch that the class describes; see :func:`images_of`.

        Args:
            batch: on the model's device.
            first: position of its first image among those of this rank.
        """
        at = first * self.trainer.world_size + self.trainer.global_rank  # as samplers share
        return images_of(batch, self.model, at, self.trainer.world_size)

    def labels_of(self, batch: ImageBatch) -> Tensor | None:
        """Labels of a batch where the model knows classes.

        Raises:
            ValueError: the batch has none.
        """
        labels, classes = self.model.labels_of(batch), self.model.config.num_classes
        if classes and labels is None:
            raise ValueError(
                f"model.num_classes={classes}, but the images have no labels; give data that has, "
                "or model.num_classes=0"
            )
        return labels

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Loss of one micro-batch, in nats; its parts stay in ``last`` for the logs."""
        images = self.to_input(batch)
        x = images.x
        labels = self.labels_of(images)
        if not self._has_checked_values:  # once, since it waits for the device
            self.model.check_range(x)
            check_labels(
                None if labels is None else labels.cpu(), self.model.config.num_classes, len(x)
            )
            self._has_checked_values = True
        self._speed.images += len(x) * self.trainer.world_size
        weight, is_last = self.length.weight_of(batch_idx, len(x))
        nominal = self.trainer.accumulate_grad_batches
        number = self.trainer.fit_loop.total_batch_idx
        noise = self._noise(self.model, len(x), number)
        input_noise = self._noise.further(x) if self.loss.config.encoder_noise else None
        if labels is not None:
            labels = self._noise.drop(labels, self.loss.config.label_dropout)
        position = self.length.position(self.global_step)
        if self.whole_step is None:
            self.last = self.loss(
                self.model,
                x,
                noise,
                step=position,
                total_steps=self.length.total_steps,
                input_noise=input_noise,
                labels=labels,
                regularize=is_last,
            )
        else:
            # indices of other batches than our data module's are made up
            index = images.index if isinstance(batch, ImageBatch) else images.index[:0]
            at = StepPosition(
                position, self.length.total_steps, self.global_step + 1, number, weight,
                is_first=batch_idx % nominal == 0, is_last=self._ends_step, regularize=is_last,
            )  # fmt: skip
            self.last = self.whole_step(StepInput(x, noise, index, input_noise, labels), at)
        return weighted(self.last, weight, nominal)

    def optimizer_zero_grad(self, *arguments: Any, **more: Any) -> None:
        """Lightning's hook; a whole step has done it."""
        if self.whole_step is None:
            super().optimizer_zero_grad(*arguments, **more)

    def backward(self, loss: Tensor, *arguments: Any, **more: Any) -> None:
        """Lightning's hook; a whole step has done it."""
        if self.whole_step is None:
            super().backward(loss, *arguments, **more)

    def optimizer_step(self, *arguments: Any, **more: Any) -> None:
        """Step, and every ``log_every_n_steps`` steps log, before a callback may stop the run."""
        if self.whole_step is None:
            super().optimizer_step(*arguments, **more)
        else:
            _, _, optimizer, closure = arguments
            for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
                callback.on_before_optimizer_step(self.trainer, self, optimizer.optimizer)
            self._ends_step = True
            try:
                closure()
            finally:
                self._ends_step = False
        step, every = self.global_step + 1, self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and step % every == 0 and self.last is not None:
            self._log_step(self.last, step)

    def _log_step(self, loss: Loss, step: int) -> None:
        """One copy of all metrics from the device.

        The loggers get them directly: Lightning would count their step from 0, and forget the
        steps of an interrupted epoch.
        """
        metrics = read_loss(loss)
        metrics["train/learning_rate"] = self.trainer.optimizers[0].param_groups[0]["lr"]
        # reading waited for the device, so the clock covers the work
        precision, world_size = str(self.trainer.precision), self.trainer.world_size
        metrics |= self._speed.read(self.model, precision, world_size)
        self.latest = metrics
        # Lightning reads what its bars show at every step: from the host
        has_bar = isinstance(self.trainer.progress_bar_callback, RichProgressBar | TQDMProgressBar)
        for name in (name for name in metrics if name.startswith("train/")):
            in_bar = has_bar and name == "train/negative_elbo"
            self.log(name, torch.tensor(metrics[name]), prog_bar=in_bar, logger=False)
        for logger in self.trainer.loggers:
            logger.log_metrics(metrics, step)

    def on_train_epoch_start(self) -> None:
        """Validation and checkpoints between epochs are no part of the speed."""
        self._speed.start()
        self._speed.wait()  # for the first batch
        self.length.begin_epoch()  # not called where an epoch is resumed

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """The loader has given a batch."""
        self._speed.resume()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """What comes next is the loader's turn."""
        self._speed.wait()

    def on_validation_start(self) -> None:
        """In the middle of an epoch too, validation is no part of the speed."""
        self._speed.pause()

    def on_validation_end(self) -> None:
        """After the callbacks' own, which may save."""
        self._speed.go_on()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Sum the ELBO's parts; every image's noise depends on its index alone."""
        images = self._next_input(batch)
        output = self._output(images)
        log_likelihood = self.model.likelihood(output.logits).log_prob(images.x)
        self._sums.add(output, log_likelihood)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """As in validation; logged as ``test/...``."""
        self.validation_step(batch, batch_idx)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Reconstructions: the likelihood's mean given a draw from the posterior, ``(B, C, H, W)``.

        Latents are ``nvae.sampling.encode``'s to give.
        """
        images = self._next_input(batch)
        return self.model.likelihood(self._output(images).logits).mean

    def _output(self, images: ImageBatch) -> Output:
        noise = self._sums.noise(self.model, images.index)
        labels = self.labels_of(images)
        if labels is None:
            return self.model(images.x, noise)
        return self.model(images.x, noise, labels)

    def _next_input(self, batch: Any) -> ImageBatch:
        images = self.to_input(batch, self._seen)
        self._seen += len(images.x)
        return images

    def _start_evaluation(self) -> None:
        self._seen = 0
        self._sums.reset()

    on_validation_epoch_start = on_test_epoch_start = on_predict_epoch_start = _start_evaluation

    def on_validation_epoch_end(self) -> None:
        """Means over all images of all ranks."""
        self._log_means("valid")

    def on_test_epoch_end(self) -> None:
        """The same."""
        self._log_means("test")

    def _log_means(self, stage: str) -> None:
        metrics = self._sums.means(self.trainer.strategy, stage)
        # equal on all ranks already; in training the loggers get theirs directly, see _log_step
        own = {name: value for name, value in metrics.items() if name.startswith(f"{stage}/")}
        in_fit = self.trainer.state.fn == "fit"
        self.log_dict(own, logger=not in_fit, sync_dist=self.trainer.world_size > 1)
        if in_fit and not self.trainer.sanity_checking:
            for logger in self.trainer.loggers:
                logger.log_metrics(metrics, self.global_step)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Optimizer, and its learning rate as a function of the step."""
        optimizer = build_optimizer(
            self.optimizer_config, self.model.parameters(),
            fused=self.trainer.precision != "16-mixed", kernels=self.model.kernels,
        )  # fmt: skip
        scheduler: Any = build_schedule(
            self.optimizer_config, optimizer, self.length, lambda: self.learning_rate_scale,
            is_first_rank=self.trainer.is_global_zero,
        )  # fmt: skip
        # a resumed run takes them from the configuration, not from the checkpoint
        self._hyperparameters = {
            name: value for name, value in optimizer.param_groups[0].items() if name != "params"
        }
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def setup(self, stage: str) -> None:
        """Another Trainer may bring other data."""
        self.length = RunLength(self.trainer)

    def __getstate__(self) -> dict[str, Any]:
        """What a copy holds: nothing that belongs to a run, and no graph of a loss."""
        state = super().__getstate__() | {"last": None, "whole_step": None}
        return {name: value for name, value in state.items() if name not in ("length", "_noise")}

    def on_fit_start(self) -> None:
        """Ranks draw different noise and share batch statistics.

        Raises:
            ValueError: the Trainer counts other micro-batches than the data module makes, or is to
                count others in later epochs.
        """
        self.length.check()
        callbacks: Any = getattr(self.trainer, "callbacks", [])
        if any(isinstance(each, GradientAccumulationScheduler) for each in callbacks):
            raise ValueError(
                "GradientAccumulationScheduler changes the number of micro-batches while a run "
                "goes on, which is not done here; give accumulate_grad_batches instead"
            )
        self._has_checked_values = False
        span_whole_steps(self.model, self.trainer.accumulate_grad_batches)
        self._noise = TrainingNoise(self.seed, self.global_rank)
        if self.trainer.world_size > 1:
            strategy: Any = self.trainer.strategy
            self._shared = SharedStatistics(
                self.model,
                self.sync_batchnorm,
                self.trainer.node_rank,
                getattr(strategy, "_timeout", None),
            )
        if self.run_config is not None:
            for logger in self.trainer.loggers:
                logger.log_hyperparams(self.run_config)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """After the callbacks' own: running statistics are the same on all ranks."""
        if self._shared is not None:
            self._shared.settle()

    def teardown(self, stage: str) -> None:
        """Process groups go, and with them what cannot be copied or pickled."""
        if self._shared is not None and stage == "fit":
            self._shared.close()
            self._shared = None

    def on_train_start(self) -> None:
        """A resumed run takes its hyper-parameters from the configuration, not the checkpoint."""
        self._speed.start()
        group = self.trainer.optimizers[0].param_groups[0]
        for each in self.trainer.lr_scheduler_configs:
            take_over(
                self.optimizer_config, each.scheduler, group, self._hyperparameters,
                self.learning_rate_scale, self.global_step,
            )  # fmt: skip
        self.has_started = True

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Make the checkpoint readable by :func:`nvae.checkpoint.load_model`."""
        checkpoint.update(describe(self.model, self.run_config))
        checkpoint["learning_rate_scale"] = self.learning_rate_scale
        images = self.length.images_per_step
        if images is not None:
            seen = round(self.length.position(checkpoint["global_step"]) * images)
            checkpoint[ENTRY] = {"seen": seen, "a_step": images}
        if self.fingerprint is not None:
            checkpoint["fingerprint"] = self.fingerprint

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Undo what :meth:`on_save_checkpoint` added for training.

        Raises:
            CheckpointError: the optimizer's state is of other parameters.
        """
        if not self._scale_is_given:
            self.learning_rate_scale = checkpoint.get("learning_rate_scale", 1.0)
        trainer = self._trainer
        if trainer is None or trainer.state.fn != "fit":
            return
        is_ours = type(self).configure_optimizers is NVAELightning.configure_optimizers
        if is_ours and "optimizer_states" in checkpoint:
            check_optimizer_shapes(checkpoint, list(self.model.parameters()))
        keeps_average = any(isinstance(c, WeightAveraging) for c in trainer.callbacks)  # type: ignore[attr-defined]
        if "current_model_state" in checkpoint and not keeps_average:
            # the optimizer's state belongs to the raw weights; no one else would take them
            checkpoint["state_dict"] = checkpoint["current_model_state"]
        self.length.resume(checkpoint, self.run_config)


def span_whole_steps(model: nn.Module, micro_batches: int) -> None:
    """Let running statistics span as many images as if each step were a single batch.

    After K updates of momentum 1 - (1 - m)^(1/K) as much is left of the past as after one of m.
    """
    momentum = MOMENTUM
    if micro_batches > 1:  # with one the power would round
        momentum = 1 - (1 - MOMENTUM) ** (1 / micro_batches)
    for norm in batchnorms(model):
        norm.momentum = momentum


def read_loss(loss: Loss) -> dict[str, float]:
    """A step's metrics as Python numbers, by one copy from the device; nats per image."""
    terms = torch.stack([term.double() for term in loss.terms.values()])
    values = torch.cat([terms, loss.kl_per_group.double()]).tolist()
    metrics = {f"train/{name}": value for name, value in zip(loss.terms, values, strict=False)}
    metrics |= {f"train/{name}": value for name, value in loss.coefficients.items()}
    return metrics | group_metrics("train_kl_group", values[len(loss.terms) :])


def build_module(
    build: Callable[[], HierarchicalVAE],
    objective: ObjectiveConfig,
    optimizer: OptimizerConfig,
    *,
    seed: int = 0,
    compile: bool = False,
    recompute: bool = False,
    kernels: str = "auto",
    **more: Any,
) -> NVAELightning:
    """Model with its initial weights, objective and optimizer.

    Args:
        build: makes the model.
        objective: see :class:`NVAELightning`, as all that is not named here.
        optimizer: see there.
        seed: of initial weights and noise.
        compile: compile the model's blocks.
        recompute: recompute the segments' activations in the backward pass.
        kernels: see :meth:`HierarchicalVAE.choose_kernels`.
        more: see there.
    """
    torch.manual_seed(seed)  # the same initial weights on every rank
    model = build()
    model.choose_kernels(kernels)
    if compile:
        compile_blocks(model)
    if recompute:
        recompute_segments(model)
    return NVAELightning(model, objective, optimizer, seed=seed, **more)
