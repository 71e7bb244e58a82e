"""Exponential moving average of the weights, by Lightning's weight averaging.

Where Adamax's kernel trains a model on a GPU, it moves the average too, in the same pass. An
average in the host's memory, of a model on a GPU, is updated by a thread from a copy of the weights
that nobody waits for. Otherwise it is a few operations after the step.
"""

import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import WeightAveraging
from torch import Tensor, nn
from torch.optim import Optimizer

from nvae.models.folding import forget
from nvae.ops.adamax import move
from nvae.training.guard import BadSteps, guard_of
from nvae.training.optimizers import Adamax, WeightAverages

_LOG = logging.getLogger(__name__)

MOST_LEFT = 0.1
"""Share of the average that the first step's weights may be at the end of a run, unsaid."""

CHUNK = 16 * 2**20
"""Elements that are gathered on the device for one copy: 64 MiB of float32."""


class HostCopy:
    """Copies of tensors in one block of pinned memory, made anew at every :meth:`start`.

    The block is filled by a few large copies: small tensors are first gathered on the device,
    :data:`CHUNK` elements at a time. All of it is queued on the current stream; the host goes on.

    Args:
        tensors: of one type and one device; of the same shapes at every copy.

    Attributes:
        copies: on the host, of the tensors' shapes and memory formats; valid after :meth:`wait`.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        first = tensors[0]
        on_gpu = first.is_cuda
        block = torch.empty(
            sum(t.numel() for t in tensors), dtype=first.dtype, device="cpu", pin_memory=on_gpu
        )
        pieces = block.split([t.numel() for t in tensors])
        # empty_like keeps a memory format where it leaves no holes
        self._strides = [torch.empty_like(t, device="meta").stride() for t in tensors]
        self.copies = [
            piece.as_strided(t.shape, stride, piece.storage_offset())
            for t, stride, piece in zip(tensors, self._strides, pieces, strict=True)
        ]
        self._chunks = list(_chunks([t.numel() for t in tensors]))
        self._targets = block.split([size for _, _, size in self._chunks])
        largest = max((size for start, end, size in self._chunks if end - start > 1), default=0)
        self._staging = first.new_empty(largest)
        self._done = torch.cuda.Event(blocking=True) if on_gpu else None

    def start(self, tensors: Sequence[Tensor]) -> None:
        """Queue the copies. What :meth:`wait` was not called for is overwritten."""
        rows = [_in_order(t, stride) for t, stride in zip(tensors, self._strides, strict=True)]
        for (start, end, size), target in zip(self._chunks, self._targets, strict=True):
            if end - start == 1:
                target.copy_(rows[start], non_blocking=True)
            else:
                staged = torch.cat(rows[start:end], out=self._staging[:size])
                target.copy_(staged, non_blocking=True)
        if self._done is not None:
            self._done.record()

    def wait(self) -> None:
        """Until the copies are whole; from any thread."""
        if self._done is not None:
            with torch.cuda.device(self._staging.device):  # another thread's own is the first GPU
                self._done.synchronize()


def _in_order(t: Tensor, stride: tuple[int, ...]) -> Tensor:
    """A tensor as one row, in the order of memory that ``stride`` gives it."""
    t = t.detach()
    if t.stride() != stride:
        t = torch.empty_strided(t.shape, stride, dtype=t.dtype, device=t.device).copy_(t)
    return t.as_strided((t.numel(),), (1,))


def _chunks(sizes: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """First, last + 1 and elements of neighbors that fit a chunk; larger ones go alone."""
    start = total = 0
    for i, size in enumerate(sizes):
        if i > start and total + size > CHUNK:
            yield start, i, total
            start, total = i, 0
        total += size
    yield start, len(sizes), total


Place = tuple[dict[str, Tensor | None], str]
"""Where a module keeps a tensor; the tensor there may be another one at every step."""


class _Averaged:
    """The tensors of one type: their averages, the model's own, and how to update the former.

    Args:
        averages: in place.
        places: of the model's own.
        decay: of the average.
        guarded: :meth:`start` is told whether the step was left out.
    """

    def __init__(
        self, averages: list[Tensor], places: list[Place], decay: float, guarded: bool
    ) -> None:
        self._averages, self._places = averages, places
        self._weight = 1 - decay
        current = self._current()
        self._lerps = averages[0].is_floating_point()
        # of a model on another device the average is updated from a copy beside it
        self.is_apart = _apart(averages[0], current[0])
        self._guarded = guarded and self._lerps
        self._taken = current[0].new_ones(()) if self._guarded else None
        self._copy = HostCopy(self._with_flag(current)) if self.is_apart else None

    def _current(self) -> list[Tensor]:
        return [kept[name] for kept, name in self._places]  # type: ignore[misc]

    def _with_flag(self, current: list[Tensor]) -> list[Tensor]:
        return current if self._taken is None else [*current, self._taken]

    def start(self, left_out: Tensor | None) -> None:
        """Queue the copy, where one is needed.

        Args:
            left_out: the step was, 0-d bool on the model's device: then averages stay as they are.
        """
        if self._guarded and left_out is not None:
            self._taken = (~left_out).to(self._averages[0].dtype)
        if self._copy is not None:
            self._copy.start(self._with_flag(self._current()))

    @torch.no_grad()
    def update(self, first: bool) -> None:
        """The average moves; counters and flags are copied. Nothing asks the device."""
        taken = self._taken
        if self._copy is None:
            current = self._current()
        else:
            self._copy.wait()
            current = self._copy.copies[: len(self._averages)]
            if taken is not None:
                taken = self._copy.copies[-1]
        if first or not self._lerps:
            torch._foreach_copy_(self._averages, current)
        elif taken is None:
            torch._foreach_lerp_(self._averages, current, self._weight)
        elif not taken.is_cuda:
            torch._foreach_lerp_(self._averages, current, [taken * self._weight] * len(current))
        else:
            move_by(self._averages, current, taken * self._weight)


def move_by(averages: Sequence[Tensor], current: Sequence[Tensor], weight: Tensor) -> None:
    """Move averages by a share of the way that only the device knows, with little more memory."""
    for begin, end, _ in _chunks([average.numel() for average in averages]):
        move(averages[begin:end], current[begin:end], weight)


class MovingAverage(WeightAveraging):
    """Averages parameters and running statistics after every optimizer step.

    The arithmetic is that of :func:`torch.optim.swa_utils.get_ema_multi_avg_fn`. A step is a few
    multi-tensor operations a type of tensor, on the device that the average is on, and nothing
    waits: an average in the host's memory is updated by a thread, from copies that arrive while
    training goes on. What Adamax's kernel trains is averaged by the kernel as well, in the pass of
    its step, from the second step on; running statistics and counters are left to this callback. A
    step that the run's guard left out leaves the average as it is.

    Validation and pictures use the average. It is the `state_dict` of every checkpoint, and the raw
    weights are `current_model_state` there: in `step_N.ckpt` by Lightning's hook, in `best.ckpt` by
    :class:`~nvae.training.checkpointing.Checkpoints`.

    Args:
        decay: of the average, a step.
        device: where the average lives; None: beside the model.
    """

    def __init__(self, decay: float, device: str | None = None) -> None:
        super().__init__(device=device)
        self.decay, self.device = decay, device
        self._guard: BadSteps | None = None
        self._pairs: list[tuple[Tensor, Place]] = []
        self._groups: list[_Averaged] = []
        self._thread: ThreadPoolExecutor | None = None
        self._update: Future[None] | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Make the average; its counter stays on the host, which looks at it at every update."""
        if self._device is None:
            # where the model is going to be: the strategy moves it only after this hook
            self._device = trainer.strategy.root_device
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            assert self._average_model is not None
            self._average_model.n_averaged = torch.zeros((), dtype=torch.long)
            self._latest_update_step = trainer.global_step  # it may have served another run

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The model is on its device: remember its tensors."""
        length = getattr(pl_module, "length", None)
        if length is not None and trainer.is_global_zero:
            self._warn_of_short_run(length.total_steps)
        self._settle()
        assert self._average_model is not None
        self._pairs = []
        own = zip(_places(self._average_model.module), _places(pl_module), strict=True)
        for (kept, name), (theirs, other) in own:
            average, weight = kept[name], theirs[other]
            assert average is not None
            assert weight is not None
            average.data = average.data.to(weight.dtype)  # a Trainer of half precision came later
            self._pairs.append((average, (theirs, other)))
        self._guard = guard_of(trainer)
        self._group()
        apart = any(group.is_apart for group in self._groups)
        self._thread = ThreadPoolExecutor(1, "moving-average") if apart else None
        if self._average_model.n_averaged:
            self._hand_over(trainer.optimizers)

    def _group(self) -> None:
        """By type."""
        kinds: dict[torch.dtype, tuple[list[Tensor], list[Place]]] = defaultdict(lambda: ([], []))
        for average, place in self._pairs:
            same, places = kinds[average.dtype]
            same.append(average)
            places.append(place)
        guarded = self._guard is not None
        self._groups = [_Averaged(*lists, self.decay, guarded) for lists in kinds.values()]

    def _hand_over(self, optimizers: Iterable[Optimizer]) -> None:
        """Leave what Adamax's kernel trains to it, if the averages are on its device.

        Not before the first update, which is a copy of all there is.
        """
        for optimizer in optimizers:
            if not (isinstance(optimizer, Adamax) and optimizer.moves_averages):
                continue
            trained = {p for group in optimizer.param_groups for p in group["params"]}
            theirs: dict[Tensor, Tensor] = {}
            rest = []
            for average, (kept, name) in self._pairs:
                weight = kept[name]
                if weight is not None and weight in trained and _is_like(average, weight):
                    theirs[weight] = average
                else:
                    rest.append((average, (kept, name)))
            if theirs.keys() == trained:
                share = torch.tensor(1 - self.decay, dtype=torch.float64, device=average.device)
                optimizer.moving = WeightAverages(theirs, share)
                self._pairs = rest
                self._group()

    def _warn_of_short_run(self, steps: int) -> None:
        left = self.decay**steps
        if left > MOST_LEFT:
            _LOG.warning(
                "callbacks.ema.decay=%g averages over some %d steps, of a run of %d: at its end %d "
                "%% of the average will be the first step's weights; set callbacks.ema.decay=%.4g, "
                "or null to validate the weights themselves",
                self.decay, round(1 / (1 - self.decay)), steps, round(100 * left),
                max(0, 1 - 10 / steps),
            )  # fmt: skip

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any,
        batch_idx: int,
    ) -> None:  # fmt: skip
        """After an optimizer step: update. The first average is the weights themselves."""
        if trainer.global_step <= self._latest_update_step:
            return
        assert self._average_model is not None
        first = not self._average_model.n_averaged
        self._settle()
        left_out = None if self._guard is None else self._guard.left_out
        for group in self._groups:
            group.start(left_out)
        if self._thread is not None:
            self._update = self._thread.submit(self._move, first)
        else:
            self._move(first)
        self._average_model.n_averaged += 1
        if first:
            self._hand_over(trainer.optimizers)
        self._latest_update_step = trainer.global_step

    def _move(self, first: bool) -> None:
        for group in self._groups:
            group.update(first)

    def _settle(self) -> None:
        """Wait for the update that a thread may be at."""
        update, self._update = self._update, None
        if update is not None:
            update.result()

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the average in; through ``.data``, which derived weights do not see.

        Not where a Trainer validates by itself: the model ended its training with the average, or
        is another one by now.
        """
        if trainer.state.fn != "fit":
            return
        self._settle()
        super().on_validation_epoch_start(trainer, pl_module)
        forget(pl_module)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the raw weights back."""
        if trainer.state.fn != "fit":
            return
        super().on_validation_epoch_end(trainer, pl_module)
        forget(pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The model ends with the average."""
        self._settle()
        super().on_train_end(trainer, pl_module)
        forget(pl_module)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Go on from both sets of weights. To be evaluated, a model has the average, as saved."""
        if trainer.state.fn == "fit":
            super().on_load_checkpoint(trainer, pl_module, checkpoint)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Average and raw weights are those of the same step."""
        self._settle()
        super().on_save_checkpoint(trainer, pl_module, checkpoint)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """End the thread."""
        self._settle()
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None

    def averaged_state(self) -> dict[str, Tensor]:
        """The average, under the names that the module's own ``state_dict`` uses.

        Not inside a validation, where the module holds the average and this the raw weights.
        """
        self._settle()
        assert self._average_model is not None
        module: nn.Module = self._average_model.module
        return dict(module.state_dict())


def _apart(a: Tensor, b: Tensor) -> bool:
    return a.device != b.device


def _is_like(a: Tensor, b: Tensor) -> bool:
    return not _apart(a, b) and a.stride() == b.stride()


def _places(module: nn.Module) -> list[Place]:
    """Of every parameter and buffer, each once."""
    found: dict[int, Place] = {}
    for child in module.modules():
        for kept in (child._parameters, child._buffers):
            for name, tensor in kept.items():
                if tensor is not None:
                    found.setdefault(id(tensor), (kept, name))  # type: ignore[arg-type]
    return list(found.values())


def moving_average(decay: float | None = None, device: str | None = None) -> MovingAverage | None:
    """The average that a run keeps, or none.

    Args:
        decay: a step, in [0, 1); None: no average.
        device: None: beside the model; ``cpu`` saves GPU memory.

    Raises:
        ValueError: an impossible decay or device.
    """
    if device not in (None, "cpu"):
        raise ValueError(f"callbacks.ema.device={device} is unknown; allowed: cpu, null")
    if decay is None:
        return None
    if isinstance(decay, bool) or not isinstance(decay, int | float):
        raise ValueError(f"callbacks.ema.decay={decay!r} is not a number or null")
    if not 0 <= decay < 1:
        raise ValueError(f"callbacks.ema.decay is {decay}; allowed: 0 up to, not with, 1, or null")
    return MovingAverage(decay, device)
