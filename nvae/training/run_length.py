"""Where a run is, counted in images, so that it may go on with another number of devices.

Schedules go by the share of the run's images that have been seen. In steps of G images that is the
position, images seen / G, of the total, T = images in all / G. A run that never changes G is always
at position global_step. Where G changes (without `data.global_batch` it follows the devices), the
steps counted so far were of another size: global_step goes on counting them, and the position is
global_step plus a constant, :func:`steps_ahead`.

Lightning counts an epoch's micro-batches. Other devices make another number of them of the same
images, so the counters of the epoch at hand are rewritten; totals over the run only ever grow, so
that no batch's noise is drawn twice.
"""

import math
from functools import cached_property
from typing import Any

import pytorch_lightning as pl

from nvae.data.module import ImageDataModule
from nvae.data.samplers import TrainSampler
from nvae.training.pending import end_epoch, validates_after

Plain = dict[str, Any]

ENTRY = "images"
"""Key in checkpoints: images ``seen``, and images ``a_step``."""


def images_a_step(run_config: Plain) -> int:
    """G of a run's configuration, plain types."""
    data = run_config["data"]
    if data.get("global_batch"):
        return int(data["global_batch"])
    accumulated = run_config["trainer"].get("accumulate_grad_batches", 1)
    return int(data["batch_size"] * processes(run_config) * accumulated)


def processes(run_config: Plain) -> int:
    """Of a run's configuration, on all machines."""
    trainer = run_config["trainer"]
    return int(trainer.get("devices", 1) * trainer.get("num_nodes", 1))


def steps_ahead(checkpoint: Plain, a_step: int, run_config: Plain | None) -> float:
    """What to add to global_step for the position in steps of ``a_step`` images.

    Args:
        checkpoint: to go on from.
        a_step: images in a step of this start.
        run_config: of this start; None: unknown.
    """
    step, before = checkpoint["global_step"], checkpoint.get("run_config")
    if ENTRY in checkpoint:
        seen = checkpoint[ENTRY]["seen"]
        # an integer: positions stay what they were, bit for bit
        return 0 if seen == step * a_step else seen / a_step - step
    if not before or not run_config:
        return 0
    # of an earlier version, which did not let G change; a small data set's may be smaller than said
    was, now = images_a_step(before), images_a_step(run_config)
    return 0 if was == now else step * was / now - step


def recount_batches(loops: Plain, sampler: TrainSampler, batches_per_epoch: int) -> int:
    """Count the micro-batches of the epoch at hand as this start cuts them.

    Args:
        loops: Lightning's state, changed in place.
        sampler: of this start.
        batches_per_epoch: of this start.

    Returns:
        Micro-batches of the epoch that were done before.
    """
    fit = loops["fit_loop"]
    progress, states = fit["epoch_loop.batch_progress"], fit["state_dict"].get("combined_loader")
    if not states:  # it read other loaders than ours
        return 0
    if progress["is_last_batch"]:  # what is left over of the images now is not this epoch's
        done = batches_per_epoch
    else:
        done = len(sampler) - sampler.remaining(states[0]["position"])
    current = progress["current"]
    more = done - current["ready"]
    for name in current:
        current[name] += more
    return done


class RunLength:
    """How long a run is, in micro-batches, steps and images, and where it is.

    Args:
        trainer: of the run.

    Attributes:
        steps_ahead: what :meth:`position` adds to a count of steps.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self._trainer = trainer
        self.steps_ahead: float = 0
        self._resumed_at = 0  # micro-batch of the epoch at hand

    def check(self) -> None:
        """Raise a ValueError where the Trainer counts other micro-batches than the data makes."""
        sampler, accumulate = self.sampler, self._trainer.accumulate_grad_batches
        if sampler is None or sampler.global_batch is None:
            return
        wanted = len(sampler.micro_batches)
        if accumulate != wanted:
            raise ValueError(
                f"data.global_batch={sampler.global_batch} takes {wanted} micro-batches a step "
                f"here: give the Trainer accumulate_grad_batches={wanted}"
            )

    def resume(self, checkpoint: Plain, run_config: Plain | None) -> None:
        """Go on from a checkpoint, whose counters of Lightning's are changed in place.

        Args:
            checkpoint: of the run.
            run_config: of this start; None: unknown.
        """
        if self.sampler is None or self.images_per_step is None:
            return
        self.steps_ahead = steps_ahead(checkpoint, self.images_per_step, run_config)
        if "loops" in checkpoint:  # Lightning takes weights alone, too
            batches, loops = int(self.batches_per_epoch), checkpoint["loops"]
            self._resumed_at = recount_batches(loops, self.sampler, batches)
            if self._resumed_at >= batches and validates_after(self._trainer, loops):
                end_epoch(checkpoint)  # what is left of its images fills no batch of this start

    def begin_epoch(self) -> None:
        """An epoch begins at its first micro-batch."""
        self._resumed_at = 0

    @cached_property
    def sampler(self) -> TrainSampler | None:
        """Of our data module in training; None elsewhere, where images cannot be counted."""
        data = getattr(self._trainer, "datamodule", None)
        if self._trainer.state.fn != "fit" or not isinstance(data, ImageDataModule):
            return None
        order = data.train_dataloader().order
        return order if isinstance(order, TrainSampler) else None

    @property
    def images_per_step(self) -> int | None:
        """Images of a whole optimizer step, over all ranks; None where they cannot be counted."""
        if self.sampler is None:
            return None
        if self.sampler.global_batch is not None:
            return self.sampler.global_batch
        return self.sampler.global_batch_size * self._trainer.accumulate_grad_batches

    def position(self, step: int) -> float:
        """Where in the schedules a count of optimizer steps is, of :attr:`total_steps`."""
        return max(step + self.steps_ahead, 0)  # torch asks for step 0 first, whatever is loaded

    @cached_property
    def batches_per_epoch(self) -> float:
        """Micro-batches of an epoch on this rank; infinite where the loader has no length.

        For our data module not Lightning's: asked for while the optimizer is being made, Lightning
        sets the loaders up before their state has been read from the checkpoint, and a resumed
        epoch starts over.
        """
        data = getattr(self._trainer, "datamodule", None)
        if not isinstance(data, ImageDataModule):
            self._trainer.fit_loop.setup_data()
            return self._trainer.num_training_batches
        limit = self._trainer.limit_train_batches
        batches = len(data.train_dataloader())
        return min(batches, limit) if isinstance(limit, int) else int(batches * (limit or 1.0))

    @property
    def steps_per_epoch(self) -> float:
        """Optimizer steps of an epoch; infinite where the loader has no length."""
        batches = self.batches_per_epoch
        if math.isinf(batches):
            return batches
        return -(-int(batches) // self._trainer.accumulate_grad_batches)

    @property
    def total_steps(self) -> int:
        """Length of the schedules, T: the whole run in steps of this start's batch.

        Raises:
            ValueError: the run has no known end.
        """
        steps, epochs = self._trainer.max_steps, self._trainer.max_epochs
        bounds = [self.position(steps)] if steps is not None and steps >= 0 else []
        if epochs is not None and epochs >= 0:
            bounds.append(epochs * self.steps_per_epoch)
        total = min(bounds, default=math.inf)
        if math.isinf(total):
            raise ValueError(
                "the KL coefficient and the learning rate go by the length of the run, which is "
                "not known: give the Trainer max_steps=..., or max_epochs=... and a loader that "
                "has a length"
            )
        return int(total)

    def weight_of(self, batch_idx: int, images: int) -> tuple[float, bool]:
        """Weight of a micro-batch's mean in the step, and whether the step ends with it.

        Lightning divides the sum by the nominal number of micro-batches, and the mean over ranks
        by theirs; with both undone the step is the mean over its images. Loaders that are not our
        data module's do not say how many images are to come: all their micro-batches weigh alike.

        Args:
            batch_idx: of the micro-batch, in its epoch.
            images: it has on this rank.
        """
        nominal = self._trainer.accumulate_grad_batches
        start = batch_idx - batch_idx % nominal
        # an epoch's last step may be shorter, and the first one after resuming
        end = int(min(start + nominal, self.batches_per_epoch))
        if self._resumed_at <= batch_idx:
            start = max(start, self._resumed_at)
        sampler = self.sampler
        if sampler is None or sampler.global_batch is None:  # all micro-batches are alike
            weight = nominal / (end - start)
        else:
            whole = sum(sampler.micro_batches[: end - start])
            weight = images * self._trainer.world_size * nominal / whole
        return weight, batch_idx == end - 1
